"""Arrays of other frameworks: same memory in, same kind out, and refusals that say what to do."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import types

import ml_dtypes
import numpy as np
import pytest

import pydeform
from pydeform import _interop

HAS = {name: importlib.util.find_spec(name) is not None for name in ("torch", "jax")}
needs_torch = pytest.mark.skipif(not HAS["torch"], reason="torch is not installed")
needs_jax = pytest.mark.skipif(not HAS["jax"], reason="jax is not installed")
DTYPES = ("float64", "float32", "float16", "bfloat16")


def numpy_dtype(name):
    return np.dtype(getattr(ml_dtypes, name, name))


def native(array, op="op"):
    arrays, back = _interop.to_native(op, {"input": array})
    return arrays["input"], back


def address(array):
    return array.__array_interface__["data"][0]


def aligned(values):
    """A copy at a multiple of 64 bytes, as the operators allocate their results."""
    memory = np.empty(values.nbytes + 64, np.uint8)
    start = -address(memory) % 64
    copy = memory[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy


def refused(array, message):
    with pytest.raises(TypeError, match=f"^op: input must be {message}"):
        native(array)


def arguments(dtype="float32"):
    rng = np.random.default_rng(3)
    return {
        "input": rng.normal(size=(2, 4, 6, 5)).astype(numpy_dtype(dtype)),
        "offset": rng.normal(size=(2, 36, 6, 5)).astype(numpy_dtype(dtype)),
        "weight": rng.normal(size=(6, 2, 3, 3)).astype(numpy_dtype(dtype)),
        "bias": rng.normal(size=6).astype(numpy_dtype(dtype)),
        "mask": rng.normal(size=(2, 18, 6, 5)).astype(numpy_dtype(dtype)),
    }


# NumPy ---------------------------------------------------------------------------------------------------------------
def test_numpy_arrays_pass_through():
    arrays = {"input": np.zeros(3)[::-1], "bias": None}
    result, back = _interop.to_native("op", arrays)
    assert result["input"] is arrays["input"] and result["bias"] is None
    assert back(arrays["input"]) is arrays["input"]


def test_a_memory_map_is_read_as_the_array_it_is(tmp_path):
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=(3, 4))
    array, back = native(mapped)
    assert type(array) is np.ndarray and address(array) == address(mapped)
    assert type(back(np.zeros(3))) is np.ndarray


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_arrays_with_other_arithmetic_are_refused():
    refused(np.ma.zeros(3), re.escape("a plain array, got numpy.ma.MaskedArray"))
    refused(np.matrix([[1.0]]), re.escape("a plain array, got numpy.matrix"))


@pytest.mark.parametrize(
    "value, kind",
    [([1.0], "list"), ((1.0,), "tuple"), (1.0, "float"), (np.float32(1), "numpy.float32"), ("x", "str")],
)
def test_what_is_no_array_is_refused(value, kind):
    refused(value, re.escape(f"an array (NumPy, CuPy, or one with __dlpack__), got {kind}") + "$")


def test_the_argument_is_named():
    with pytest.raises(TypeError, match=r"^deform_conv2d: bias must be an array \(.*\), got list$"):
        pydeform.deform_conv2d(**(arguments() | {"bias": [0.0] * 6}), padding=1)


# PyTorch -------------------------------------------------------------------------------------------------------------
@needs_torch
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("cut", [np.s_[:], np.s_[1:, ::2], np.s_[:0]], ids=["whole", "strided", "empty"])
def test_torch_shares_memory_both_ways(name, cut):
    import torch

    tensor = torch.arange(24).reshape(4, 6).to(getattr(torch, name))[cut]
    array, back = native(tensor)
    assert array.dtype == numpy_dtype(name) and array.shape == tuple(tensor.shape)
    assert np.array_equal(array.astype(float), tensor.double().numpy())
    assert tensor.numel() == 0 or address(array) == tensor.data_ptr()
    result = aligned(array + array)
    returned = back(result)
    assert type(returned) is torch.Tensor and returned.dtype == tensor.dtype and returned.device == tensor.device
    assert np.array_equal(returned.double().numpy(), result.astype(float))
    assert tensor.numel() == 0 or returned.data_ptr() == address(result)


@needs_torch
def test_torch_negative_and_conjugate_bits_are_resolved():
    import torch

    imaginary = torch.tensor([1 + 2j, 3 - 4j]).conj().imag
    assert imaginary.is_neg()
    assert native(imaginary)[0].tolist() == [-2, 4]
    assert native(torch._neg_view(torch.ones(2)))[0].tolist() == [-1, -1]
    assert native(torch.tensor([1 + 2j]).conj())[0].tolist() == [1 - 2j]  # refused later, for its dtype


@needs_torch
def test_torch_gradients_are_not_lost_in_silence():
    import torch

    tensor = torch.ones(3, requires_grad=True)
    for recorded in (tensor, tensor * 2, torch.nn.Parameter(torch.ones(2))):
        refused(recorded, r"without requires_grad.*tensor\.detach\(\).*_backward")
    assert address(native(tensor.detach())[0]) == tensor.data_ptr()
    with torch.no_grad():  # the caller said that nothing is to be recorded
        array, back = native(tensor)
    assert address(array) == tensor.data_ptr() and not back(array + 1).requires_grad


@needs_torch
@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch announces the end of quantised tensors
def test_torch_tensors_without_plain_memory_are_refused():
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    refused(torch.eye(3).to_sparse(), "a dense tensor, got layout torch.sparse_coo")
    quantised = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    refused(quantised, "a dense tensor, got layout torch.strided and dtype torch.qint8")
    refused(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a dense tensor")
    refused(torch.ones(2, device="meta"), "on the CPU or a CUDA device, got device meta")
    refused(torch.ones(2).to(torch.float8_e4m3fn), "a tensor whose memory NumPy can read, .* torch.float8_e4m3fn")
    with FakeTensorMode():
        refused(torch.ones(2), r"a tensor whose memory NumPy can read, got .*FakeTensor.*torch\.compile")
    torch.vmap(lambda row: refused(row, r"a tensor whose memory NumPy can read.*torch\.func") or row)(torch.ones(2, 2))


@needs_torch
def test_torch_subclasses_of_other_modules_are_recognised():
    import torch

    class Image(torch.Tensor):
        pass

    tensor = torch.ones(2).as_subclass(Image)
    assert type(tensor).__module__ == __name__
    assert address(native(tensor)[0]) == tensor.data_ptr()


# JAX -----------------------------------------------------------------------------------------------------------------
@needs_jax
@pytest.mark.parametrize("name", DTYPES[1:])
@pytest.mark.parametrize("shape", [(3, 5), (0, 5)])
def test_jax_shares_memory_both_ways(name, shape):
    import jax

    source = jax.numpy.ones(shape, name)
    array, back = native(source)
    assert array.dtype == numpy_dtype(name) and array.shape == shape and not array.flags.writeable
    assert source.size == 0 or address(array) == source.unsafe_buffer_pointer()
    result = aligned(array + array)
    returned = back(result)
    assert isinstance(returned, jax.Array) and returned.dtype == source.dtype
    assert returned.devices() == source.devices() and np.array_equal(np.asarray(returned), result)
    assert source.size == 0 or returned.unsafe_buffer_pointer() == address(result)


@needs_jax
def test_jax_float64_comes_back_as_float64_even_after_x64_was_left():
    import jax

    with (jax if hasattr(jax, "enable_x64") else jax.experimental).enable_x64(True):
        source = jax.numpy.ones(3, "float64")
    array, back = native(source)
    assert array.dtype == np.float64
    assert back(array + 1e-12).dtype == np.float64
    assert np.asarray(back(array + 1e-12)).tolist() == [1 + 1e-12] * 3


@needs_jax
def test_jax_tracers_are_refused():
    import jax

    for transform in (jax.jit, jax.vmap, jax.grad):
        transform(lambda x: refused(x, r"a concrete array, got a JAX tracer.*pydeform\.jax") or x.sum())(
            1.0 if transform is jax.grad else jax.numpy.ones(3)
        )


@needs_jax
def test_jax_sharded_arrays_are_refused():
    """JAX decides on the number of CPU devices when it starts, so another process has two."""

    program = """
import jax, numpy as np
from pydeform import _interop
from jax.sharding import Mesh, NamedSharding, PartitionSpec
x = jax.device_put(np.zeros(4, np.float32), NamedSharding(Mesh(jax.devices(), "d"), PartitionSpec("d")))
try:
    _interop.to_native("op", {"input": x})
except TypeError as error:
    assert str(error) == "op: input must be on one device, got a JAX array sharded over 2 devices", error
else:
    raise AssertionError("accepted")
second = jax.device_put(np.zeros(4, np.float32), jax.devices()[1])
arrays, back = _interop.to_native("op", {"input": second})
assert back(arrays["input"] + 1).devices() == {jax.devices()[1]}
"""

    flags = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", program], check=True, env=flags)


# End to end ----------------------------------------------------------------------------------------------------------
def to_torch(array):
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_jax(array):
    import jax

    return jax.numpy.asarray(array)


FOREIGN = [pytest.param("torch", to_torch, dtype, marks=needs_torch, id=f"torch-{dtype}") for dtype in DTYPES] + [
    pytest.param("jax", to_jax, dtype, marks=needs_jax, id=f"jax-{dtype}") for dtype in DTYPES[1:]
]


def assert_same(library, result, expected):
    if expected is None:
        assert result is None
        return
    assert type(result).__module__.partition(".")[0] in (library, f"{library}lib")
    values = result.view(sys.modules["torch"].int16).numpy() if str(result.dtype) == "torch.bfloat16" else result
    values = np.asarray(values)
    values = values.view(expected.dtype) if values.dtype == np.int16 else values
    assert values.dtype == expected.dtype and values.shape == expected.shape
    assert np.array_equal(values, expected)


@pytest.mark.parametrize("library, convert, dtype", FOREIGN)
def test_convolutions_give_the_numbers_of_numpy(library, convert, dtype):
    ours = arguments(dtype)
    theirs = {name: convert(array) for name, array in ours.items()}
    before = {name: array.copy() for name, array in ours.items()}
    grad_output = pydeform.deform_conv2d(**ours, padding=1)
    assert_same(library, pydeform.deform_conv2d(**theirs, padding=1), grad_output)
    expected = pydeform.deform_conv2d_backward(grad_output, **ours, padding=1)
    grads = pydeform.deform_conv2d_backward(convert(grad_output), **theirs, padding=1)
    assert type(grads) is pydeform.DeformConv2dGrads
    for grad, numbers in zip(grads, expected, strict=True):
        assert_same(library, grad, numbers)

    plain = {name: ours[name] for name in ("input", "weight", "bias")}
    theirs = {name: theirs[name] for name in plain}
    assert_same(library, pydeform.conv2d(**theirs, padding=1, groups=2), pydeform.conv2d(**plain, padding=1, groups=2))
    grads = pydeform.conv2d_backward(convert(grad_output), **theirs, padding=1, groups=2, needs=("weight",))
    expected = pydeform.conv2d_backward(grad_output, **plain, padding=1, groups=2, needs=("weight",))
    for grad, numbers in zip(grads, expected, strict=True):
        assert_same(library, grad, numbers)
    assert all(np.array_equal(ours[name], before[name]) for name in ours)


@pytest.mark.parametrize("library, convert, dtype", FOREIGN)
def test_analysis_gives_the_numbers_of_numpy(library, convert, dtype):
    offset = arguments(dtype)["offset"]
    for function in (pydeform.sampling_locations, pydeform.effective_dilation):
        assert_same(library, function(convert(offset), 3), function(offset, 3))


@pytest.mark.parametrize("library, convert, dtype", FOREIGN)
def test_the_kernels_see_the_callers_memory_and_the_caller_sees_theirs(library, convert, dtype, monkeypatch):
    twin = importlib.import_module("pydeform.cpu.conv")
    compute, seen = twin.forward, {}

    def forward(arrays, g, **options):
        seen["arrays"] = arrays
        seen["result"] = compute(arrays, g, **options)
        return seen["result"]

    monkeypatch.setattr(twin, "forward", forward)
    theirs = {name: convert(array) for name, array in arguments(dtype).items()}
    result = pydeform.deform_conv2d(**theirs, padding=1)
    pointer = (lambda t: t.data_ptr()) if library == "torch" else (lambda a: a.unsafe_buffer_pointer())
    assert [address(array) for array in seen["arrays"]] == [pointer(array) for array in theirs.values()]
    assert pointer(result) == address(seen["result"])


@needs_torch
def test_the_first_array_decides_the_kind():
    ours = arguments()
    mixed = ours | {"weight": to_torch(ours["weight"])}
    expected = pydeform.deform_conv2d(**ours, padding=1)
    assert np.array_equal(pydeform.deform_conv2d(**mixed, padding=1), expected)
    assert type(pydeform.deform_conv2d(**mixed, padding=1)) is np.ndarray
    mixed = ours | {"input": to_torch(ours["input"])}
    assert_same("torch", pydeform.deform_conv2d(**mixed, padding=1), expected)


@needs_torch
def test_dtype_errors_of_foreign_arrays():
    import torch

    message = r"^conv2d: input must have dtype float64, float32, float16, bfloat16, got int64$"
    with pytest.raises(TypeError, match=message):
        pydeform.conv2d(torch.zeros(1, 1, 3, 3, dtype=torch.int64), torch.zeros(1, 1, 3, 3))
    with pytest.raises(TypeError, match=r"^conv2d: weight must have the dtype of input, bfloat16, got float32$"):
        pydeform.conv2d(torch.zeros(1, 1, 3, 3).bfloat16(), torch.zeros(1, 1, 3, 3))


# Libraries that are not here, by the shape of their interface --------------------------------------------------------
class Standard:
    """An array of the array API standard: exports itself, and its library has `from_dlpack`."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Bfloat16(Standard):
    """Exports bfloat16, which NumPy cannot: uint16 under another type code. Knows no versioned capsules."""

    def __dlpack__(self):
        capsule = _interop.Capsule(self.array.view(np.uint16).__dlpack__())
        capsule.type_code = _interop.BFLOAT
        return capsule.capsule


class Handle:
    """An array of a library that exchanges capsules by functions only."""

    def __init__(self, array):
        self.array = array


@pytest.fixture
def library(monkeypatch):
    """A module that owns the classes above, as `tensorflow` owns its tensors."""
    module = types.ModuleType("fakelib")
    for kind in (Standard, Bfloat16, Handle):
        monkeypatch.setattr(kind, "__module__", "fakelib.core")
    monkeypatch.setitem(sys.modules, "fakelib", module)
    return module


def from_dlpack(array):
    return "imported", np.from_dlpack(array)


def from_capsule(capsule):
    assert type(capsule).__name__ == "PyCapsule"
    wrapped = _interop.Capsule(capsule)
    is_bfloat16 = wrapped.type_code == _interop.BFLOAT
    if is_bfloat16:
        wrapped.type_code = _interop.UNSIGNED
    array = np.from_dlpack(wrapped)
    return "capsule", array.view(ml_dtypes.bfloat16) if is_bfloat16 else array


@pytest.mark.parametrize("writeable", [True, False])
def test_standard_arrays(library, writeable):
    library.from_dlpack = from_dlpack
    source = np.arange(6.0).reshape(2, 3)
    source.flags.writeable = writeable
    array, back = native(Standard(source))
    assert address(array) == address(source) and np.array_equal(array, source)
    result = aligned(source * 2)
    how, returned = back(result)
    assert how == "imported" and address(returned) == address(result)


def test_the_namespace_of_the_array_goes_first(library, monkeypatch):
    namespace = types.SimpleNamespace(from_dlpack=from_dlpack)
    monkeypatch.setattr(Standard, "__array_namespace__", lambda self: namespace, raising=False)
    assert native(Standard(np.zeros(3)))[1](np.ones(3))[0] == "imported"


@pytest.mark.parametrize("place", ["dlpack", "utils.dlpack", "experimental.dlpack"])
def test_a_library_with_functions_on_capsules(library, place):
    functions = types.SimpleNamespace(from_dlpack=from_capsule, to_dlpack=lambda handle: handle.array.__dlpack__())
    outer, _, inner = place.rpartition(".")
    setattr(library, outer or inner, types.SimpleNamespace(dlpack=functions) if outer else functions)
    source = np.arange(6, dtype=np.float32)
    for foreign in (Handle(source), Standard(source)):
        array, back = native(foreign)
        assert address(array) == address(source) and array.dtype == np.float32
        result = aligned(source * 2)
        how, returned = back(result)
        assert how == "capsule" and address(returned) == address(result)


def test_bfloat16_of_a_library_goes_both_ways(library):
    source = np.arange(6).astype(ml_dtypes.bfloat16)
    library.dlpack = types.SimpleNamespace(from_dlpack=from_capsule)
    array, back = native(Bfloat16(source))
    assert array.dtype == ml_dtypes.bfloat16 and address(array) == address(source)
    how, returned = back(aligned(source + source))
    assert how == "capsule" and returned.dtype == ml_dtypes.bfloat16
    assert np.array_equal(returned, source + source)
    library.from_dlpack = lambda array: from_capsule(array.__dlpack__())
    assert native(Bfloat16(source))[1](source + source)[1].dtype == ml_dtypes.bfloat16


def test_foreign_arrays_that_cannot_be_read_are_refused(library, monkeypatch):
    library.from_dlpack = from_dlpack
    foreign = Standard(np.zeros(3))
    monkeypatch.setattr(Standard, "__dlpack_device__", lambda self: (8, 0))
    refused(foreign, "on the CPU or a CUDA device, got DLPack device type 8$")
    monkeypatch.setattr(Standard, "__dlpack_device__", lambda self: (1, 0))

    def records_gradients(self, **options):
        raise RuntimeError("records gradients")

    monkeypatch.setattr(Standard, "__dlpack__", records_gradients)
    refused(foreign, r"an array that NumPy can read, got fakelib\.core\.Standard: records gradients$")
    refused(Handle(np.zeros(3)), r"an array \(.*\), got fakelib\.core\.Handle$")
    library.dlpack = types.SimpleNamespace(to_dlpack=lambda handle: handle.missing)
    refused(Handle(np.zeros(3)), r"an array with memory to share, got fakelib\.core\.Handle: .*missing")


def test_a_library_without_a_way_back_is_refused_before_the_work(library):
    refused(Standard(np.zeros(3)), r"of a library with a function from_dlpack, got fakelib\.core\.Standard$")


def test_only_of_the_first_arrays_library_a_way_back_is_needed(library):
    x, w = np.arange(8.0).reshape(1, 2, 2, 2), np.ones((2, 2, 1, 1))
    np.testing.assert_array_equal(pydeform.conv2d(x, Standard(w)), x.sum(1, keepdims=True).repeat(2, 1))


# CUDA, as far as a machine without one goes --------------------------------------------------------------------------
def test_cuda_arrays_without_cupy(library, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # imports as if it were not installed
    monkeypatch.delitem(sys.modules, "pydeform.cuda.core.dlpack", raising=False)
    monkeypatch.setattr(_interop, "_import_cuda", _interop._import_cuda.__wrapped__)  # which keeps what it has
    monkeypatch.setattr(Standard, "__dlpack_device__", lambda self: (_interop.CUDA, 0))
    refused(Standard(np.zeros(3)), r"on the CPU while CuPy cannot be imported \(.*\), got a CUDA array$")


def test_the_callers_stream_is_held_while_computing():
    events = []

    class Stream:
        def __enter__(self):
            events.append("enter")

        def __exit__(self, *error):
            events.append("exit")

    back = _interop.Back(lambda array: events.append("convert"), Stream())
    with back:
        back(None)
    assert events == ["enter", "convert", "exit"]
