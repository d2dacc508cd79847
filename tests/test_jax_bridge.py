"""Every operator through JAX: the bits of the NumPy function and of its backward, under JAX's transformations."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import pydeform
from pydeform import _selfcheck
from pydeform._operators import operators
from tests.conftest import assert_same_bits

jax = pytest.importorskip("jax")
import pydeform.jax  # noqa: E402
from pydeform.jax import _ffi  # noqa: E402

ROOT = Path(__file__).parents[1]
TABLE = operators()
SMALL = {"input": np.ones((2, 2, 5, 6), np.float32), "weight": np.ones((3, 2, 3, 3), np.float32)}
BOXES = np.array([[0, 0.3, 0.4, 3.2, 4.1], [1, 1.1, 0.2, 4.3, 3.9], [0, 2.3, 1.4, 5.2, 4.7]], np.float32)


@pytest.fixture
def x64():
    with (jax if hasattr(jax, "enable_x64") else jax.experimental).enable_x64(True):
        yield


def asked(name: str, arrays: Any) -> tuple[str, ...]:
    """All gradients that there are, those on request too."""
    return tuple(key for key in arrays if key not in TABLE[name].fixed)


def numpy_grads(name: str, grad_output: Any, arrays: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Zeros for those that do not exist, as JAX has it."""
    grads = TABLE[name].backward(grad_output, **arrays, **options, needs=asked(name, arrays))._asdict()
    return {key: np.zeros_like(a) if grads[key] is None else grads[key] for key, a in arrays.items()}


def value_and_grads(name: str, options: dict[str, Any]) -> Any:
    def both(arrays: dict[str, Any], grad_output: Any) -> Any:
        output, pull = jax.vjp(lambda given: getattr(pydeform.jax, name)(**given, **options), arrays)
        return output, pull(grad_output)[0]

    return both


def assert_same(got: Any, name: str, arrays: dict[str, Any], grad_output: Any, options: dict[str, Any]) -> None:
    output, grads = got
    assert_same_bits(np.asarray(output), TABLE[name].forward(**arrays, **options), name)
    for key, want in numpy_grads(name, grad_output, arrays, options).items():
        assert_same_bits(np.asarray(grads[key]), want, f"gradient of {key}")


def typed(problem: Any, dtype: str) -> tuple[dict[str, Any], Any]:
    arrays = {key: a.astype(_selfcheck.DTYPES[dtype]) for key, a in problem.arrays.items()}
    return arrays, problem.grad_output.astype(_selfcheck.DTYPES[dtype])


# What there is --------------------------------------------------------------------------------------------------------
def test_the_bridge_is_the_table():
    assert pydeform.jax.__all__ == dir(pydeform.jax) == list(TABLE)
    for name, operator in TABLE.items():
        function = getattr(pydeform.jax, name)
        assert inspect.signature(function) == inspect.signature(operator.forward)
        assert (function.__name__, function.__module__) == (name, "pydeform.jax")
        assert getattr(pydeform.jax, name) is function
    assert not hasattr(pydeform.jax, "sampling_locations")


def test_the_page_runs():
    page = (ROOT / "docs" / "bridges" / "jax.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, {})


# Values and gradients -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", TABLE)
def test_bits_eagerly_and_compiled(name, x64):
    for problem in _selfcheck.problems(name):
        both = value_and_grads(name, problem.options)
        assert_same(jax.jit(both)(problem.arrays, problem.grad_output), name, *problem_of(problem))
    problem = _selfcheck.problem(name)
    assert_same(value_and_grads(name, problem.options)(problem.arrays, problem.grad_output), name, *problem_of(problem))


def problem_of(problem: Any) -> tuple[Any, Any, Any]:
    return problem.arrays, problem.grad_output, problem.options


@pytest.mark.parametrize("name", TABLE)
def test_gradients_are_those_of_differences(name, x64):
    from jax.test_util import check_grads

    problem = _selfcheck.problem(name)
    given = dict(problem.arrays)
    boxes = given.pop("boxes", None)
    if boxes is not None and name not in _selfcheck.WITH_BOXES:
        boxes, index = None, boxes  # these have no gradient of boxes

    def function(arrays, corners=None):
        if "boxes" in problem.arrays:
            whole = index if corners is None else jax.numpy.concatenate([problem.arrays["boxes"][:, :1], corners], 1)
            arrays = {**arrays, "boxes": whole}
        return getattr(pydeform.jax, name)(**arrays, **problem.options)

    arguments = (given,) if boxes is None else (given, boxes[:, 1:])  # a batch index has no neighbours
    check_grads(function, arguments, order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["deform_conv2d", "prroi_pool", "affine_grid"])
def test_dtypes(name, dtype):
    problem = _selfcheck.problem(name)
    arrays, grad_output = typed(problem, dtype)
    got = jax.jit(value_and_grads(name, problem.options))(arrays, grad_output)
    assert_same(got, name, arrays, grad_output, problem.options)


def test_coordinates_may_be_float32_beside_half_types():
    problem = _selfcheck.problem("deform_conv2d")
    arrays, grad_output = typed(problem, "float16")
    arrays["offset"] = problem.arrays["offset"].astype(np.float32)
    output, grads = jax.jit(value_and_grads("deform_conv2d", problem.options))(arrays, grad_output)
    assert (output.dtype, grads["input"].dtype, grads["offset"].dtype) == (np.float16, np.float16, np.float32)
    assert_same((output, grads), "deform_conv2d", arrays, grad_output, problem.options)


def test_weak_types_and_numpy_arrays():
    theta = jax.numpy.full((1, 2, 3), 0.25)
    assert theta.weak_type
    grid = pydeform.jax.affine_grid(theta, (1, 1, 4, 4))
    assert not grid.weak_type
    assert_same_bits(np.asarray(grid), pydeform.affine_grid(np.full((1, 2, 3), 0.25, np.float32), (1, 1, 4, 4)))
    assert jax.grad(lambda t: pydeform.jax.affine_grid(t, (1, 1, 4, 4)).sum())(theta).shape == theta.shape
    strided = np.arange(60, dtype=np.float32).reshape(5, 6, 2).T[:, None]
    output = pydeform.jax.conv2d(strided[:, :, ::-1], np.ones((1, 1, 3, 3), np.float32))
    assert_same_bits(np.asarray(output), pydeform.conv2d(strided[:, :, ::-1], np.ones((1, 1, 3, 3), np.float32)))


@pytest.mark.parametrize("kind", ["no images", "no boxes", "NaN", "infinite"])
def test_edges(kind):
    pixels = np.arange(120, dtype=np.float32).reshape(2, 2, 5, 6)
    arrays = {"input": pixels, "boxes": BOXES.copy()}
    if kind == "no images":
        name, options = "conv2d", {}
        arrays = {"input": pixels[:0], "weight": SMALL["weight"]}
    else:
        name, options = "roi_align", {"output_size": (1, 2)}
        arrays["boxes"] = BOXES[:0] if kind == "no boxes" else BOXES.copy()
        arrays["boxes"][1:2, 2] = np.nan if kind == "NaN" else np.inf
    output = TABLE[name].forward(**arrays, **options)
    got = jax.jit(value_and_grads(name, options))(arrays, np.ones_like(output))
    assert_same(got, name, arrays, np.ones_like(output), options)
    assert np.isnan(output).any() == (kind == "NaN")


# Which gradients ------------------------------------------------------------------------------------------------------
@pytest.fixture
def computed(monkeypatch):
    """What the operators are asked for."""
    calls = []
    compute = pydeform.jax._compute
    monkeypatch.setattr(pydeform.jax, "_compute", lambda call, *rest: calls.append(call) or compute(call, *rest))
    return calls


def test_only_what_is_differentiated_is_computed(computed):
    def loss(weight, input):
        return pydeform.jax.conv2d(input, weight).sum()

    jax.block_until_ready(jax.jit(jax.value_and_grad(loss))(SMALL["weight"], SMALL["input"]))
    assert [call.needs for call in computed] == [None, ("weight",)]
    computed.clear()
    jax.block_until_ready(jax.jit(jax.grad(loss, 1))(SMALL["weight"], SMALL["input"]))
    assert [call.needs for call in computed] == [("input",)]  # nor is an output that nobody reads


@pytest.mark.parametrize("name", ["roi_align", "roi_pool"])
def test_boxes(name, computed):
    """roi_align has their gradient where it is asked for, roi_pool never: zeros then."""

    def loss(input, boxes):
        return (getattr(pydeform.jax, name)(input, boxes, 2) ** 2).sum()

    image = np.arange(120, dtype=np.float32).reshape(2, 2, 5, 6) ** 2
    jax.block_until_ready(jax.grad(loss)(image, BOXES))
    assert computed[-1].needs == ("input",)
    grads = jax.grad(loss, (0, 1))(image, BOXES)
    assert grads[1].shape == BOXES.shape and bool((grads[1] != 0).any()) == (name == "roi_align")
    assert computed[-1].needs == (("input", "boxes") if name == "roi_align" else ("input",))


def test_an_unused_output_has_zero_gradients(computed):
    def loss(input):
        return input.sum(), pydeform.jax.conv2d(input, SMALL["weight"])

    grad = jax.grad(loss, has_aux=True)(SMALL["input"])[0]
    np.testing.assert_array_equal(grad, np.ones_like(SMALL["input"]))
    assert [call.needs for call in computed] == [None]


# Transformations ------------------------------------------------------------------------------------------------------
def several(problem: Any, count: int) -> dict[str, Any]:
    """Problems that differ, one behind the other; boxes have their image in common."""
    rng = np.random.default_rng(4)
    scales = rng.integers(1, 4, count) / 4
    return {
        key: np.stack([a * s if key != "boxes" else np.roll(a, k, 0) for k, s in enumerate(scales)])
        for key, a in problem.arrays.items()
    }


@pytest.mark.parametrize("mapped", ["all", "shared", "apart"])
@pytest.mark.parametrize("name", TABLE)
def test_vmap_is_a_loop(name, mapped, x64, computed):
    """Over all arrays, or over those alone that all results need, or over all but these."""
    problem, shared = _selfcheck.problem(name), TABLE[name].shared
    stacked = several(problem, 3)
    over = {key for key in stacked if mapped == "all" or (key in shared) == (mapped == "shared")}
    if not over:
        assert mapped == "shared"
        return
    given = {key: stacked[key] if key in over else a for key, a in problem.arrays.items()}
    axes = {key: 0 if key in over else None for key in given}
    both = jax.vmap(value_and_grads(name, problem.options), (axes, None))
    output, grads = jax.block_until_ready(both(given, problem.grad_output))
    if mapped == "apart" and name != "affine_grid":  # whose size says how many
        assert len(computed) == 1 + (1 if not shared & set(given) else 3)
    for k in range(3):
        arrays = {key: a[k] if key in over else a for key, a in given.items()}
        assert_same((output[k], {n: g[k] for n, g in grads.items()}), name, arrays, *problem_of(problem)[1:])


def test_vmap_within_vmap_and_along_other_axes():
    rng = np.random.default_rng(5)
    input, weight = rng.normal(size=(1, 2, 5, 6, 4)).astype("f"), rng.normal(size=(3, 3, 2, 3, 3)).astype("f")
    output = jax.vmap(jax.vmap(pydeform.jax.conv2d, (None, 0), 1), (4, None))(input, weight)
    assert output.shape == (4, 1, 3, 3, 3, 4)
    for i in range(4):
        for k in range(3):
            assert_same_bits(np.asarray(output[i, :, k]), pydeform.conv2d(input[..., i], weight[k]))


def test_checkpoint_and_scan():
    """Three layers with one weight, whose gradient is a sum over them."""
    rng = np.random.default_rng(6)
    image, offset = rng.normal(size=(1, 2, 5, 6)).astype("f"), rng.normal(size=(3, 1, 18, 5, 6)).astype("f")
    weight = rng.normal(size=(2, 2, 3, 3)).astype("f")

    def layer(hidden, moves, weight):
        return pydeform.jax.deform_conv2d(hidden, moves, weight, padding=1)

    def rolled(weight, offset):
        step = jax.checkpoint(lambda hidden, moves: (layer(hidden, moves, weight), None))
        return jax.lax.scan(step, image, offset)[0].sum()

    hidden = [image]
    for moves in offset:
        hidden.append(pydeform.deform_conv2d(hidden[-1], moves, weight, padding=1))
    pulled, of_weight, of_offset = np.ones_like(image), np.zeros_like(weight), []
    for given, moves in zip(hidden[-2::-1], offset[::-1], strict=True):
        grads = pydeform.deform_conv2d_backward(pulled, given, moves, weight, padding=1)
        pulled, of_weight = grads.input, of_weight + grads.weight
        of_offset.insert(0, grads.offset)
    got = jax.jit(jax.grad(rolled, (0, 1)))(weight, offset)
    assert_same_bits(np.asarray(got[0]), of_weight)
    assert_same_bits(np.asarray(got[1]), np.stack(of_offset))


def test_several_python_threads():
    problem = _selfcheck.problem("deform_conv2d")
    arrays, grad_output = typed(problem, "float32")
    both = jax.jit(value_and_grads("deform_conv2d", problem.options))
    found: list[Any] = []

    def work(k):
        for _ in range(20):
            found.append((k, jax.block_until_ready(both({**arrays, "input": arrays["input"] * k}, grad_output))))

    threads = [threading.Thread(target=work, args=(k,)) for k in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 60
    for k, got in found:
        assert_same(got, "deform_conv2d", {**arrays, "input": arrays["input"] * k}, grad_output, problem.options)


# JAX decides on the number of CPU devices when it starts, so another process has two. It also runs a program that this
# one has compiled, and ends while one still runs.
PROGRAM = """
import sys
import jax, jax.export, numpy as np, pydeform.jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
shard_map = jax.shard_map if hasattr(jax, "shard_map") else jax.experimental.shard_map.shard_map
exported, expected = np.load(sys.argv[1]).values()
rng = np.random.default_rng(7)
image, weight = rng.normal(size=(4, 2, 5, 6)).astype("f"), rng.normal(size=(3, 2, 3, 3)).astype("f")
offset = rng.normal(size=(4, 18, 3, 4)).astype("f")
mesh = Mesh(np.array(jax.devices()), "d")
assert mesh.size == 2

def part(image, offset, weight):
    return jax.lax.psum((pydeform.jax.deform_conv2d(image, offset, weight) ** 2).sum(), "d")

loss = shard_map(part, mesh=mesh, in_specs=(P("d"), P("d"), P()), out_specs=P())
value, grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(image, offset, weight)
output = pydeform.deform_conv2d(image, offset, weight)
np.testing.assert_allclose(value, (output ** 2).sum(), rtol=1e-5)
want = pydeform.deform_conv2d_backward(2 * output, image, offset, weight)
for got, grad in zip(grads, want):
    np.testing.assert_allclose(got, grad, rtol=1e-4, atol=1e-4)

sharded = [jax.device_put(a, NamedSharding(mesh, P("d"))) for a in (image, offset)]
whole = jax.jit(pydeform.jax.deform_conv2d)(*sharded, weight)
np.testing.assert_array_equal(whole, output)

np.testing.assert_array_equal(jax.export.deserialize(bytearray(exported)).call(SMALL, KERNEL), expected)
jax.jit(pydeform.jax.conv2d)(np.ones((8, 32, 128, 128), "f"), np.ones((32, 32, 3, 3), "f"))
"""


def test_several_devices_and_other_processes(tmp_path):
    from jax import export

    target = export.DisabledSafetyCheck.custom_call("pydeform.conv2d")
    small, kernel = SMALL["input"], SMALL["weight"]
    exported = export.export(jax.jit(pydeform.jax.conv2d), disabled_checks=[target])(small, kernel).serialize()
    expected = pydeform.conv2d(small, kernel)
    np.savez(tmp_path / "program.npz", np.frombuffer(exported, np.uint8), expected)
    program = PROGRAM.replace("SMALL", "np.ones((2, 2, 5, 6), 'f')").replace("KERNEL", "np.ones((3, 2, 3, 3), 'f')")
    flags = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", program, str(tmp_path / "program.npz")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=flags, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not done.stderr.replace("pydeform: compiling", ""), done.stderr


# Errors ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("change", ["shape", "batch", "dtype", "option", "absent"])
def test_errors_are_those_of_numpy_functions_while_jax_traces(change):
    arrays: dict[str, Any] = {**SMALL, "offset": np.zeros((2, 18, 3, 4), np.float32)}
    options: dict[str, Any] = {}
    if change == "option":
        options["boundary"] = "none"
    else:
        arrays["offset"] = {
            "shape": np.zeros((2, 17, 3, 4), np.float32),
            "batch": np.zeros((3, 18, 3, 4), np.float32),
            "dtype": np.zeros((2, 18, 3, 4), np.int32),
            "absent": None,
        }[change]
    with pytest.raises((TypeError, ValueError)) as expected:
        pydeform.deform_conv2d(**arrays, **options)
    assert str(expected.value).startswith("deform_conv2d: ")
    for transform in (lambda f: f, jax.jit, lambda f: lambda **given: jax.eval_shape(f, **given)):
        with pytest.raises(type(expected.value)) as caught:
            transform(lambda **given: pydeform.jax.deform_conv2d(**given, **options))(**arrays)
        assert str(caught.value).splitlines()[0] == str(expected.value)


def test_a_size_that_is_not_the_arrays():
    with pytest.raises(ValueError, match=r"affine_grid: theta must have shape .* = \(0, 2, 3\), got \(2, 2, 3\)"):
        pydeform.jax.affine_grid(np.ones((2, 2, 3), np.float32), (0, 3, 4, 5))


def test_what_is_no_array():
    with pytest.raises(TypeError, match=r"conv2d: input must be a JAX or NumPy array, got list"):
        pydeform.jax.conv2d([[1.0]], SMALL["weight"])
    with pytest.raises(TypeError, match="missing a required argument: 'weight'"):
        pydeform.jax.conv2d(SMALL["input"])


def test_options_are_static():
    with pytest.raises(TypeError, match="conv2d: stride must be known when JAX traces the call, got a tracer"):
        jax.jit(pydeform.jax.conv2d)(SMALL["input"], SMALL["weight"], stride=2)
    strided = jax.jit(pydeform.jax.conv2d, static_argnames="stride")(*SMALL.values(), stride=2)
    assert_same_bits(np.asarray(strided), pydeform.conv2d(*SMALL.values(), stride=2))
    problem = _selfcheck.problem("ms_deform_attn")
    arrays, _ = typed(problem, "float32")
    shapes = problem.options["spatial_shapes"]
    want = pydeform.ms_deform_attn(**arrays, **problem.options)
    for given in (np.array(shapes), jax.numpy.array(shapes), [list(shape) for shape in shapes]):
        options = {**problem.options, "spatial_shapes": given}
        got = jax.jit(lambda arrays, options=options: pydeform.jax.ms_deform_attn(**arrays, **options))(arrays)
        assert_same_bits(np.asarray(got), want)
    with pytest.raises(TypeError, match="ms_deform_attn: spatial_shapes must be known when JAX traces"):
        jax.jit(pydeform.jax.ms_deform_attn, static_argnames="points")(**{**arrays, **problem.options})


@pytest.mark.parametrize("transform", ["eager", "jit", "vmap"])
def test_errors_of_values_come_when_the_program_runs(transform):
    """With the NumPy function's message."""
    boxes = BOXES.copy()
    boxes[1, 0] = 2
    with pytest.raises(ValueError) as expected:
        pydeform.roi_pool(SMALL["input"], boxes, 2)
    function = lambda boxes: pydeform.jax.roi_pool(SMALL["input"], boxes, 2)  # noqa: E731
    call = {"eager": function, "jit": jax.jit(function), "vmap": lambda boxes: jax.vmap(function)(boxes[None])}[
        transform
    ]
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError)) as caught:
        jax.block_until_ready(call(boxes))
    assert f"ValueError: {expected.value}" in str(caught.value)
    assert_same_bits(np.asarray(function(BOXES)), pydeform.roi_pool(SMALL["input"], BOXES, 2))  # as if nothing happened


def test_differentiable_once_and_in_reverse():
    def loss(input):
        return (pydeform.jax.conv2d(input, SMALL["weight"]) ** 2).sum()

    for twice in (jax.grad(lambda x: jax.grad(loss)(x).sum()), jax.hessian(loss), jax.jacfwd(jax.grad(loss))):
        with pytest.raises(NotImplementedError, match=r"conv2d: its gradient cannot be differentiated again"):
            twice(SMALL["input"])
    with pytest.raises(TypeError, match=r"jvp.*custom_vjp"):
        jax.jvp(loss, (SMALL["input"],), (SMALL["input"],))


# Devices --------------------------------------------------------------------------------------------------------------
class OnDevice:
    def __init__(self, platform: str):
        self.platform = platform

    def devices(self) -> Any:
        return [SimpleNamespace(platform=self.platform)]


def test_who_computes():
    """Arrays that lie on a GPU now go to CUDA at once, all others to XLA."""
    decide = pydeform.jax._are_on_another_device
    cpu, gpu = OnDevice("cpu"), OnDevice("gpu")
    assert [decide(arrays) for arrays in ((cpu,), (gpu,), (gpu, cpu))] == [False, True, True]
    seen = []
    jax.jit(lambda array: seen.append(decide((array, gpu))) or array)(np.zeros(2, np.float32))
    assert seen == [False]


@pytest.mark.parametrize("name", ["deform_conv2d", "roi_align", "ms_deform_attn"])
def test_arrays_of_a_gpu_are_computed_at_once(name, monkeypatch, computed, x64):
    """As they would be there: through the operators' own way for arrays of JAX, on which XLA has no part."""
    decide = lambda arrays: not any(isinstance(array, jax.core.Tracer) for array in arrays)  # noqa: E731
    monkeypatch.setattr(pydeform.jax, "_are_on_another_device", decide)
    for problem in _selfcheck.problems(name):
        got = value_and_grads(name, problem.options)(problem.arrays, problem.grad_output)
        assert all(isinstance(array, jax.Array) for array in jax.tree.leaves(got))
        assert_same(got, name, *problem_of(problem))
    assert not computed


def test_a_compiled_program_for_a_gpu_is_refused():
    """Registered for this platform here, as it is for GPUs."""
    assert set(pydeform.jax._HANDLERS) == {"cpu", "CUDA", "ROCM"}
    refusing = pydeform.jax._HANDLERS["CUDA"]
    jax.ffi.register_ffi_target("pydeform.refused", jax.ffi.pycapsule(refusing), platform="cpu")
    struct = jax.ShapeDtypeStruct((2,), np.float32)
    text = pydeform.jax._Call("conv2d", ("input",), {}).text()
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"conv2d: compiled programs call it on the CPU only"):
        jax.block_until_ready(jax.ffi.ffi_call("pydeform.refused", struct)(np.zeros(2, np.float32), text=text))


def test_no_exception_passes_through_xla():
    def compute(text: str, inputs: list[Any], results: list[Any]) -> None:
        assert text == "\u00e9"
        inputs[0][...] = 1

    handler = _ffi.handler(compute)
    jax.ffi.register_ffi_target("pydeform.test", jax.ffi.pycapsule(handler), platform="cpu")
    struct = jax.ShapeDtypeStruct((2,), np.float32)
    array = jax.numpy.zeros(2)
    for text, message in (("\u00e9", "ValueError: assignment destination is read-only"), ("e", "AssertionError")):
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            jax.block_until_ready(jax.ffi.ffi_call("pydeform.test", struct)(array, text=text))
    np.testing.assert_array_equal(array, 0)
    _KEPT.append(handler)


_KEPT: list[Any] = []  # XLA has their addresses
