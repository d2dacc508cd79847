"""CUDA arrays of other frameworks: on which stream and device we compute, what waits for what, and whose memory it is.

First with stand-ins for CuPy, PyTorch and others, which record what they are asked for; then, where there is a GPU,
with the real ones.
"""

import gc
import importlib.util
import inspect
import itertools
import os
import shutil
import subprocess
import sys
import types
import weakref
from contextlib import contextmanager

import ml_dtypes
import numpy as np
import pytest

import pydeform
from pydeform import _interop
from tests.conftest import needs_emulation
from tests.cuda_emulation import device, dlpack, streams
from tests.cuda_emulation.arrays import Memory

OTHER_STREAM = 0x7000  # of a stand-in for torch; its streams are even on device 0, odd on device 1
CAPTURE_STREAMS = itertools.count(0x8000, 0x10)


def why_no_gpu():
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed"
    import cupy

    return "" if cupy.is_available() else "CuPy finds no device"


NO_GPU = why_no_gpu()
needs_gpu = pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
needs_jax = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax is not installed")


# Stand-ins -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def cupy(monkeypatch):
    """The emulated CuPy, also for what imported another one before."""
    if not NO_GPU:
        pytest.skip("a real device is here")
    for name, module in device.stand_ins.items():
        monkeypatch.setitem(sys.modules, name, module)
    from pydeform.cuda.core import dlpack

    monkeypatch.setattr(dlpack, "cupy", device.cupy)
    monkeypatch.setattr(dlpack, "_held", dlpack.Held())
    monkeypatch.setattr(streams, "_captures", {})
    with device.settings(devices=2):
        yield device.cupy


class Producer:
    """A CUDA array of some library, which remembers each exchange: (stream asked for, device that was current)."""

    memory = _interop.CUDA

    def __init__(self, values, number=0):
        self.host, self.number, self.asked = np.asarray(values), number, []

    def __dlpack__(self, *, stream, max_version=None, copy=None):
        self.asked.append((stream, device.cupy.cuda.Device().id))
        return dlpack.to_capsule(self.host, self.number, max_version)

    def __dlpack_device__(self):
        return self.memory, self.number


class Imported:
    """What a library makes of a result of ours; as a consumer it names its own stream."""

    stream = 0x5000

    def __init__(self, array):
        self.values = dlpack.to_host(array, self.stream)
        self.device = array.__dlpack_device__()[1]


class TorchMemory:
    """Torch's caching allocator. What is taken on a stream while it captures belongs to the graph, also when freed.

    `record_stream` works on what the allocator gave to a tensor, and on nothing else.
    """

    def __init__(self):
        self.blocks, self.graph = {}, []

    def allocate(self, size, number=None, stream=None):
        assert size > 0 and isinstance(stream, int) and number == device_of(stream)
        memory = Memory(size)
        self.blocks[memory.pointer] = memory
        if device.cupy.cuda.ExternalStream(stream).is_capturing():
            self.graph.append(memory)
        return memory.pointer

    def delete(self, mem_ptr):
        self.blocks.pop(mem_ptr).bytes[...] = 0xFF  # NaN: whoever still reads it shall notice


class CUDAGraph:
    captured = memory = None

    def replay(self):
        self.captured.launch(kept=[(block.pointer, block.nbytes) for block in self.memory])


class Storage:
    """Memory of the allocator, given back with the last tensor that has it."""

    def __init__(self, memory, pointer):
        self.bytes = memory.blocks[pointer].bytes
        weakref.finalize(self, memory.delete, pointer)


class Tensor(Producer):
    """As much of torch.Tensor on CUDA as we look at."""

    storage = None

    requires_grad, layout, is_quantized, is_nested = False, "strided", False, False
    is_cpu, is_cuda = False, True

    @property
    def device(self):
        return types.SimpleNamespace(type="cuda", index=self.number)

    @property
    def dtype(self):
        return self.host.dtype.name

    def detach(self):
        return self

    def is_neg(self):
        return False

    is_conj = is_neg

    def data_ptr(self):
        return self.host.ctypes.data

    def untyped_storage(self):
        return self.storage

    def set_(self, storage, offset, shape, strides):
        dtype = self.host.dtype
        typed = storage.bytes[: storage.bytes.nbytes // dtype.itemsize * dtype.itemsize].view(dtype)
        steps = [step * dtype.itemsize for step in strides]
        self.host = np.lib.stride_tricks.as_strided(typed[offset:], shape, steps)
        self.storage = storage
        return self

    def record_stream(self, stream):
        assert self.storage is not None, "torch does nothing for memory that is not its own"

    def view(self, dtype):
        viewed = Tensor(self.host.view(getattr(ml_dtypes, dtype, dtype)), self.number)
        viewed.asked = self.asked
        return viewed


def device_of(stream):
    return stream % 2


@pytest.fixture
def torch(cupy, monkeypatch):
    """A torch with a current stream of its own on every device."""
    module, current, memory = types.ModuleType("torch"), [OTHER_STREAM], TorchMemory()
    module.Tensor, module.strided, module.bfloat16, module.int16 = Tensor, "strided", "bfloat16", "int16"
    module.is_grad_enabled = lambda: True
    module.uint8, module.float32, module.device = "uint8", "float32", lambda kind, index: (kind, index)

    def empty(count, *, dtype, device):
        number = device[1] if isinstance(device, tuple) else device.index
        if count == 0:
            return Tensor(np.empty(0, getattr(ml_dtypes, dtype, dtype)), number)
        assert dtype == "uint8"
        pointer = memory.allocate(count, number, current[-1] + number)
        block = Tensor(memory.blocks[pointer].bytes, number)
        block.storage = Storage(memory, pointer)
        return block

    module.empty = empty
    module.from_dlpack = lambda array: Tensor(dlpack.to_host(array, current[-1]), array.__dlpack_device__()[1])

    @contextmanager
    def graph(cuda_graph, pool=None, stream=None, capture_error_mode="global"):
        """On a stream that nobody has used before, unless one is given."""
        current.append(next(CAPTURE_STREAMS) if stream is None else stream)
        stream = cupy.cuda.ExternalStream(current[-1])
        stream.begin_capture(streams.GLOBAL)
        try:
            yield
        finally:
            cuda_graph.captured, cuda_graph.memory, memory.graph = stream.end_capture(), memory.graph, []
            current.pop()

    module.cuda = types.SimpleNamespace(
        current_stream=lambda place: types.SimpleNamespace(
            cuda_stream=current[-1] + place.index, device_index=place.index
        ),
        caching_allocator_alloc=memory.allocate,
        caching_allocator_delete=memory.delete,
        CUDAGraph=CUDAGraph,
        graph=graph,
    )
    module.memory = memory
    monkeypatch.setitem(sys.modules, "torch", module)
    return module


@pytest.fixture
def library(cupy, monkeypatch):
    module = types.ModuleType("fakelib")
    module.from_dlpack = Imported
    monkeypatch.setattr(Producer, "__module__", "fakelib.core")
    monkeypatch.setitem(sys.modules, "fakelib", module)
    return module


@pytest.fixture
def waits(cupy, monkeypatch):
    """(stream that waits, stream whose event it waits for), in order."""
    seen = []
    wait_event = cupy.cuda.Stream.wait_event

    def remember(stream, event):
        seen.append((stream.ptr, event.recorded_on))
        wait_event(stream, event)

    monkeypatch.setattr(cupy.cuda.Stream, "wait_event", remember)
    return seen


@pytest.fixture
def launches(cupy, monkeypatch):
    """(stream, device) at each call of the kernels' side of conv2d, which returns its input."""
    from pydeform.cuda import conv

    seen = []

    def forward(arrays, *arguments, **options):
        seen.append((cupy.cuda.get_current_stream().ptr, cupy.cuda.Device().id))
        return arrays.input.copy()

    monkeypatch.setattr(conv, "forward", forward)
    return seen


def arrays(kind, number=0, dtype=np.float32, **replaced):
    """input and weight of a convolution that keeps the shape."""
    values = np.arange(8).reshape(1, 2, 2, 2).astype(dtype), np.ones((2, 2, 1, 1)).astype(dtype)
    return {"input": kind(values[0], number), "weight": kind(values[1], number)} | replaced


def test_the_exchange_names_cupys_current_stream(library, cupy):
    producer = Producer(np.arange(6.0))
    native, _ = _interop.to_native("op", {"input": producer})
    assert native["input"].data.ptr == producer.host.ctypes.data
    with cupy.cuda.Stream() as stream:
        _interop.to_native("op", {"input": producer})
    assert producer.asked == [(1, 0), (stream.ptr, 0)]  # 1 is DLPack's name of the default stream


def test_the_exchange_is_on_the_device_of_the_array(library, cupy):
    producer = Producer(np.arange(6.0), 1)
    native, _ = _interop.to_native("op", {"input": producer})
    assert native["input"].device.id == 1 and producer.asked == [(1, 1)]
    assert cupy.cuda.Device().id == 0


@pytest.mark.parametrize("kind", [_interop.CUDA, _interop.CUDA_MANAGED])
def test_arrays_of_a_library_without_streams_of_its_own(library, cupy, launches, waits, monkeypatch, kind):
    monkeypatch.setattr(Producer, "memory", kind)
    with cupy.cuda.Stream() as stream:
        result = pydeform.conv2d(**arrays(Producer))
    assert type(result) is Imported and result.values.ravel().tolist() == list(range(8))
    assert launches == [(stream.ptr, 0)] and waits == []


@pytest.mark.parametrize("place", ["dlpack", "utils.dlpack"])
def test_bfloat16_of_any_library_goes_both_ways(library, launches, place):
    given = arrays(Producer, dtype=ml_dtypes.bfloat16)
    result = pydeform.conv2d(**given)
    assert result.values.dtype == ml_dtypes.bfloat16
    assert np.array_equal(result.values, given["input"].host)


@pytest.mark.parametrize("kind", [_interop.CUDA, _interop.CUDA_MANAGED])
def test_lent_memory_is_held_until_the_device_is_done_with_it(library, cupy, launches, monkeypatch, kind):
    """The library may use it again as soon as we let go, whatever kernels still read it."""
    monkeypatch.setattr(Producer, "memory", kind)
    done = []
    monkeypatch.setattr(cupy.cuda.Event, "done", property(lambda event: bool(done)))
    given = arrays(Producer)
    memory = weakref.ref(given["input"].host)
    pydeform.conv2d(**given)
    del given
    gc.collect()
    assert memory() is not None
    done.append(True)
    pydeform.conv2d(**arrays(Producer))
    gc.collect()
    assert memory() is None


def test_held_memory_is_released_when_the_program_ends(library, cupy, launches, monkeypatch):
    from pydeform.cuda.core import dlpack

    order = []
    monkeypatch.setattr(cupy.cuda.Event, "done", False)
    monkeypatch.setattr(cupy.cuda.Event, "synchronize", lambda event: order.append("waited"))
    given = arrays(Producer)
    memory = weakref.ref(given["input"].host, lambda _: order.append("released"))
    pydeform.conv2d(**given)
    del given
    dlpack._held.release()
    gc.collect()
    assert order == ["waited", "released"] and memory() is None


@pytest.mark.parametrize("number", [0, 1])
def test_torch_tensors_are_computed_with_on_torchs_stream(torch, cupy, launches, waits, number):
    with cupy.cuda.Stream() as mine:
        given = arrays(Tensor, number)
        result = pydeform.conv2d(**given)
        assert cupy.cuda.get_current_stream() is mine
    assert cupy.cuda.Device().id == 0
    assert launches == [(OTHER_STREAM + number, number)]
    assert given["input"].asked == [(OTHER_STREAM + number, number)]  # nothing to wait for: it may be capturing a graph
    assert waits == []
    assert type(result) is Tensor and result.number == number
    assert np.array_equal(result.host, given["input"].host)


def test_memory_for_torchs_stream_is_allocated_on_it(torch, cupy, monkeypatch):
    """CuPy's pool gives memory back to the stream that it was allocated on."""
    from pydeform.cuda import conv

    seen = []
    empty = cupy.empty
    monkeypatch.setattr(
        cupy, "empty", lambda *a, **k: seen.append(cupy.cuda.get_current_stream().ptr) or empty(*a, **k)
    )
    monkeypatch.setattr(conv, "forward", lambda arrays, *_, **__: cupy.empty(arrays.input.shape, arrays.input.dtype))
    pydeform.conv2d(**arrays(Tensor))
    assert seen == [OTHER_STREAM]


def test_memory_for_torchs_stream_is_torchs(torch, cupy, monkeypatch):
    """Until the result is gone; what CuPy allocates elsewhere is its own."""
    from pydeform.cuda import conv

    inside = []

    def forward(arrays, *_, **__):
        temporary, nothing = cupy.empty(8, np.float32), cupy.empty((0, 3), np.float32)
        inside.append((temporary.data.ptr in torch.memory.blocks, nothing.data.ptr, len(torch.memory.blocks)))
        return cupy.ones(arrays.input.shape, arrays.input.dtype)

    monkeypatch.setattr(conv, "forward", forward)
    for number in (0, 1):
        result = pydeform.conv2d(**arrays(Tensor, number))
        assert inside.pop() == (True, 0, 1)
        assert list(torch.memory.blocks) == [result.host.ctypes.data]
        again = pydeform.conv2d(result, arrays(Tensor, number)["weight"])
        assert len(torch.memory.blocks) == 2 and (again.host == 1).all()
        del result, again
        gc.collect()
        assert torch.memory.blocks == {}
        inside.clear()
    mine = cupy.empty(8, np.float32)
    assert mine.data.ptr not in torch.memory.blocks


def test_a_result_is_a_tensor_of_torchs_own_memory(torch, cupy, monkeypatch):
    """So that torch knows who else uses it. Wherever in its memory a result lies."""
    from pydeform.cuda import conv

    for place, dtype in ((slice(None), np.float32), (slice(1, None), np.float32), (slice(None), ml_dtypes.bfloat16)):

        def forward(arrays, *_, place=place, **__):
            x = arrays.input
            found = x.copy() if place.start is None else cupy.concatenate([x, x], 1)[:, 2:]
            return found.transpose(0, 1, 3, 2)

        monkeypatch.setattr(conv, "forward", forward)
        given = arrays(Tensor, dtype=dtype)
        result = pydeform.conv2d(**given)
        result.record_stream("another")
        assert result.dtype == np.dtype(dtype).name
        np.testing.assert_array_equal(result.host, given["input"].host.transpose(0, 1, 3, 2))


def under_torch_func(monkeypatch):
    """Where torch wraps what is made there, and does not say where it is."""

    def data_ptr(self):
        if self.storage is not None:
            raise RuntimeError("Cannot access data pointer of Tensor that doesn't have storage")
        return self.host.ctypes.data

    monkeypatch.setattr(Tensor, "data_ptr", data_ptr)


def test_under_torch_func_memory_is_the_allocators(torch, cupy, monkeypatch):
    from pydeform.cuda import conv

    under_torch_func(monkeypatch)
    monkeypatch.setattr(conv, "forward", lambda arrays, *_, **__: cupy.ones(arrays.input.shape, arrays.input.dtype))
    result = pydeform.conv2d(**arrays(Tensor))
    assert list(torch.memory.blocks) == [result.host.ctypes.data] and (result.host == 1).all()
    del result
    gc.collect()
    assert torch.memory.blocks == {}


def test_a_result_may_outlive_torch(torch, cupy, launches, monkeypatch):
    """At the end of the program, when functions of torch find its modules empty."""
    under_torch_func(monkeypatch)
    monkeypatch.setattr(torch.cuda, "caching_allocator_delete", lambda address: 1 / 0)
    monkeypatch.setattr(sys, "is_finalizing", lambda: True)
    result = pydeform.conv2d(**arrays(Tensor))
    monkeypatch.setattr(sys, "unraisablehook", lambda problem: problems.append(problem))
    problems = []
    del result
    gc.collect()
    assert not problems and torch.memory.blocks


def test_no_memory_of_torch_when_kinds_are_mixed(torch, cupy, monkeypatch):
    """The result is in the order of both streams then, which is not for torch to know; on one stream it is."""
    from pydeform.cuda import conv

    monkeypatch.setattr(conv, "forward", lambda arrays, *_, **__: cupy.ones(arrays.input.shape, arrays.input.dtype))
    mixed = arrays(Tensor, weight=cupy.ones((2, 2, 1, 1), np.float32))
    with cupy.cuda.Stream():
        pydeform.conv2d(**mixed)
        assert torch.memory.blocks == {}
    with cupy.cuda.ExternalStream(OTHER_STREAM):
        result = pydeform.conv2d(**mixed)
    assert list(torch.memory.blocks) == [result.host.ctypes.data]


def test_an_error_leaves_cupys_allocator(torch, cupy, monkeypatch):
    from pydeform.cuda import conv

    monkeypatch.setattr(torch, "empty", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(conv, "forward", lambda arrays, *_, **__: cupy.empty(arrays.input.shape, arrays.input.dtype))
    with pytest.raises(ZeroDivisionError):
        pydeform.conv2d(**arrays(Tensor))
    assert cupy.ones(3).get().tolist() == [1, 1, 1]


def graph_problem():
    rng = np.random.default_rng(6)
    shapes = {"input": (2, 9, 5, 6), "offset": (2, 18, 5, 6), "weight": (4, 9, 3, 3), "mask": (2, 9, 5, 6)}
    return {name: rng.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}


GRAPHS = {
    "deform_conv2d": ({}, {}),
    "deform_conv2d, deterministic": ({}, {"deterministic": True}),
    "conv2d": ({}, {}),
    "roi_align": ({"output_size": 3}, {}),
}


@needs_emulation
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("name", GRAPHS)
def test_torch_graphs_capture_forward_and_backward(torch, cupy, name, warm):
    """As torch.cuda.graph is used, on a stream of its own, for which CuPy's pool has nothing; `warm`: where it has."""
    operator = name.partition(",")[0]
    options, more = GRAPHS[name]
    forward, backward = getattr(pydeform, operator), getattr(pydeform, f"{operator}_backward")
    given = graph_problem()
    if operator == "conv2d":
        given, options = {key: given[key] for key in ("input", "weight")}, {"padding": 1}
    elif operator == "roi_align":
        boxes = np.array([[0, 0.5, 1, 4, 4.5], [1, 1, 0, 3, 3]], np.float32)
        given = {"input": np.tile(given["input"], (1, 2, 1, 1)), "boxes": boxes}
    else:
        options = {"padding": 1}
    theirs = {key: Tensor(array) for key, array in given.items()}

    def both(arrays):
        output = forward(**arrays, **options)
        grads = backward(output, **arrays, **options, **(more if arrays is theirs else {}))
        return {"output": output} | {key: grad for key, grad in grads._asdict().items() if grad is not None}

    want = both(given)
    graph, stream = torch.cuda.CUDAGraph(), None
    if warm:
        with cupy.cuda.Stream() as own:
            both({key: cupy.asarray(array) for key, array in given.items()})
        stream = own.ptr
    with torch.cuda.graph(graph, stream=stream):
        captured = both(theirs)
    graph.replay()
    for key, array in want.items():
        np.testing.assert_allclose(captured[key].host, array, rtol=1e-4, atol=1e-4, err_msg=key)


def test_lent_memory_during_a_capture(library, cupy, launches, monkeypatch):
    """No event is recorded, which nobody could ask later, and none is asked, which would end the capture."""
    from pydeform.cuda.core import dlpack

    with cupy.cuda.Stream() as stream:
        with monkeypatch.context() as patch:
            patch.setattr(cupy.cuda.Event, "done", False)
            pydeform.conv2d(**arrays(Producer))
        assert len(dlpack._held._arrays) == 1
        stream.begin_capture(streams.GLOBAL)
        pydeform.conv2d(**arrays(Producer))
        stream.end_capture()
        assert len(dlpack._held._arrays) == 1
        pydeform.conv2d(**arrays(Producer))
    assert not dlpack._held._arrays


@pytest.mark.parametrize("first", ["torch", "cupy"])
def test_streams_wait_for_each_other_when_kinds_are_mixed(torch, cupy, launches, waits, first):
    """Torch's for what CuPy's may still be making, and CuPy's before it hands out memory that was read on torch's."""
    ours = arrays(lambda values, _: cupy.asarray(values))
    theirs = arrays(Tensor)
    mixed = {"input": (theirs if first == "torch" else ours)["input"]}
    mixed["weight"] = (ours if first == "torch" else theirs)["weight"]
    with cupy.cuda.Stream() as mine:
        result = pydeform.conv2d(**mixed)
    assert launches == [(OTHER_STREAM, 0)]
    assert waits == [(OTHER_STREAM, mine.ptr), (mine.ptr, OTHER_STREAM)]
    assert type(result) is (Tensor if first == "torch" else cupy.ndarray)


def test_one_stream_does_not_wait_for_itself(torch, cupy, launches, waits):
    mixed = arrays(Tensor, weight=cupy.ones((2, 2, 1, 1), np.float32))
    with cupy.cuda.ExternalStream(OTHER_STREAM):
        pydeform.conv2d(**mixed)
    assert waits == []


def test_torch_beside_another_library(torch, library, cupy, launches, waits):
    """The other's exchange was with CuPy's current stream, for which torch's has to wait then."""
    other = arrays(Producer)["weight"]
    with cupy.cuda.Stream() as mine:
        result = pydeform.conv2d(**arrays(Tensor, weight=other))
    assert other.asked == [(mine.ptr, 0)] and launches == [(OTHER_STREAM, 0)]
    assert waits == [(OTHER_STREAM, mine.ptr), (mine.ptr, OTHER_STREAM)]
    assert type(result) is Tensor


def test_torch_bfloat16_goes_both_ways(torch, launches):
    given = arrays(Tensor, dtype=ml_dtypes.bfloat16)
    result = pydeform.conv2d(**given)
    assert result.dtype == "bfloat16" and np.array_equal(result.host, given["input"].host)
    native, _ = _interop.to_native("op", given)
    assert native["input"].data.ptr == given["input"].host.ctypes.data
    assert native["input"].dtype == ml_dtypes.bfloat16


def test_torch_gradients_are_not_lost_in_silence(torch, launches):
    given = arrays(Tensor)
    given["weight"].requires_grad = True
    with pytest.raises(TypeError, match=r"^conv2d: weight must be without requires_grad.*tensor\.detach\(\)"):
        pydeform.conv2d(**given)
    assert launches == []
    torch.is_grad_enabled = lambda: False
    assert type(pydeform.conv2d(**given)) is Tensor


def test_an_error_leaves_cupy_on_its_stream(torch, cupy, monkeypatch):
    from pydeform.cuda import conv

    def broken(*arguments, **options):
        raise MemoryError("no memory")

    monkeypatch.setattr(conv, "forward", broken)
    with cupy.cuda.Stream() as mine:
        with pytest.raises(MemoryError):
            pydeform.conv2d(**arrays(Tensor, 1))
        assert cupy.cuda.get_current_stream() is mine
    assert cupy.cuda.Device().id == 0


def test_arrays_on_cpu_and_gpu_are_refused(torch, launches):
    with pytest.raises(
        TypeError, match=r"^conv2d: all arrays must be on one device, got input is cupy, weight is numpy"
    ):
        pydeform.conv2d(**arrays(Tensor, weight=np.ones((2, 2, 1, 1), np.float32)))


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ for the emulation")
def test_kernels_compute_on_foreign_memory(torch):
    """All the way: the emulated kernels on torch's memory, forward and backward."""
    rng = np.random.default_rng(5)
    x, offset, mask = (rng.normal(size=(1, c, 4, 5)).astype(np.float32) for c in (2, 18, 9))
    weight, grad = rng.normal(size=(3, 2, 3, 3)).astype(np.float32), rng.normal(size=(1, 3, 4, 5)).astype(np.float32)
    options = {"padding": 1}
    want = pydeform.deform_conv2d(x, offset, weight, mask=mask, **options)
    got = pydeform.deform_conv2d(*map(Tensor, (x, offset, weight)), mask=Tensor(mask), **options)
    assert type(got) is Tensor
    np.testing.assert_allclose(got.host, want, rtol=1e-5, atol=1e-5)
    want = pydeform.deform_conv2d_backward(grad, x, offset, weight, mask=mask, **options)
    got = pydeform.deform_conv2d_backward(*map(Tensor, (grad, x, offset, weight)), mask=Tensor(mask), **options)
    assert got.bias is None
    for name in ("input", "offset", "weight", "mask"):
        np.testing.assert_allclose(getattr(got, name).host, getattr(want, name), rtol=1e-4, atol=1e-4, err_msg=name)


@needs_torch
@pytest.mark.parametrize("inference", [False, True])
def test_torch_makes_tensors_of_parts_of_a_block(inference):
    """Which are no views, and whose memory is still the allocator's. On the CPU, as tensors everywhere."""
    import torch

    with torch.inference_mode(inference):
        block = torch.arange(64, dtype=torch.uint8)
        result = types.SimpleNamespace(ptr=block.data_ptr() + 4, mem=types.SimpleNamespace(ptr=block.data_ptr()))
        result = types.SimpleNamespace(data=result, dtype=np.dtype(np.int16), shape=(2, 3), strides=(2, 4))
        memory = object.__new__(_interop.TorchMemory)
        memory._torch, memory._blocks = torch, {block.data_ptr(): block}
        found = memory.tensor(result)
    np.testing.assert_array_equal(found.numpy() & 0xFF, [[4, 8, 12], [6, 10, 14]])
    assert not found._is_view()
    assert found.untyped_storage().data_ptr() == block.data_ptr()


@needs_torch
def test_torchs_allocator_takes_these_arguments():
    import torch

    assert [*inspect.signature(torch.cuda.caching_allocator_alloc).parameters] == ["size", "device", "stream"]
    assert [*inspect.signature(torch.cuda.caching_allocator_delete).parameters] == ["mem_ptr"]


# The real ones -------------------------------------------------------------------------------------------------------
def real_torch_problem(dtype):
    """(arguments on the GPU, the same as float64 NumPy arrays)."""
    import torch

    generator = torch.Generator().manual_seed(3)
    shapes = {"input": (2, 16, 9, 7), "offset": (2, 18, 9, 7), "weight": (24, 16, 3, 3), "mask": (2, 9, 9, 7)}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return {n: t.cuda() for n, t in tensors.items()}, {n: t.double().numpy() for n, t in tensors.items()}


def assert_near(got, want, tolerance, what=""):
    assert np.abs(got - want).max() < tolerance * np.abs(want).max(), what


@needs_gpu
@needs_torch
@pytest.mark.parametrize(
    "name, tolerance", [("float32", 1e-5), ("float16", 5e-3), ("bfloat16", 4e-2), ("float64", 1e-12)]
)
def test_real_torch_tensors(name, tolerance):
    import torch

    theirs, ours = real_torch_problem(getattr(torch, name))
    native, _ = _interop.to_native("op", theirs)
    assert [native[n].data.ptr for n in theirs] == [t.data_ptr() for t in theirs.values()]
    result = pydeform.deform_conv2d(**theirs, padding=1)
    assert type(result) is torch.Tensor and result.is_cuda and result.dtype == getattr(torch, name)
    assert_near(result.double().cpu().numpy(), pydeform.deform_conv2d(**ours, padding=1), tolerance)
    grads = pydeform.deform_conv2d_backward(result, **theirs, padding=1)
    want = pydeform.deform_conv2d_backward(result.double().cpu().numpy(), **ours, padding=1)
    for field in theirs:
        got = getattr(grads, field)
        assert got.is_cuda and got.dtype == getattr(torch, name)
        assert_near(got.double().cpu().numpy(), getattr(want, field), 4 * tolerance, field)


@needs_gpu
@needs_torch
def test_real_torch_streams_are_used(monkeypatch):
    import cupy
    import torch

    from pydeform.cuda import conv

    seen, compute = [], conv.forward
    monkeypatch.setattr(
        conv,
        "forward",
        lambda *a, **k: seen.append(cupy.cuda.get_current_stream().ptr) or compute(*a, **k),
    )
    theirs, _ = real_torch_problem(torch.float32)
    want = pydeform.deform_conv2d(**theirs, padding=1)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # the input is not ready for a while
        late = {name: tensor * 1 for name, tensor in theirs.items()}
        got = pydeform.deform_conv2d(**late, padding=1)
    stream.synchronize()
    assert seen == [0, stream.cuda_stream]
    assert torch.equal(got, want)


@needs_gpu
@needs_torch
def test_real_torch_memory_is_not_reused_under_a_running_kernel():
    import torch

    theirs, _ = real_torch_problem(torch.float32)
    want = pydeform.deform_conv2d(**theirs, padding=1)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = {name: tensor.clone() for name, tensor in theirs.items()}
        place = late["input"].data_ptr()
        torch.cuda._sleep(100_000_000)
        got = pydeform.deform_conv2d(**late, padding=1)
        late.clear()
        overwritten = [torch.full_like(tensor, torch.nan) for tensor in theirs.values()]
    assert place in [tensor.data_ptr() for tensor in overwritten]  # else this proves nothing
    stream.synchronize()
    assert torch.equal(got, want)


@needs_gpu
@needs_torch
@pytest.mark.parametrize("warm", [False, True])
def test_real_torch_graphs_capture_forward_and_backward(warm):
    """`warm`: on a stream for which CuPy's pool has memory."""
    import cupy
    import torch

    theirs, _ = real_torch_problem(torch.float32)

    def both(arrays):
        output = pydeform.deform_conv2d(**arrays, padding=1)
        grads = pydeform.deform_conv2d_backward(output, **arrays, padding=1, deterministic=True)
        return [output, *(grad for grad in grads if grad is not None)]

    both(theirs)  # compiles
    stream = None
    if warm:
        stream = torch.cuda.Stream()
        with cupy.cuda.ExternalStream(stream.cuda_stream):
            both({name: cupy.from_dlpack(tensor) for name, tensor in theirs.items()})
        stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = both(theirs)
    theirs["input"].mul_(2)
    want = both(theirs)
    with cupy.cuda.ExternalStream(0 if stream is None else stream.cuda_stream):
        others = [cupy.ones(1 << size, np.uint8) for size in range(9, 24) for _ in range(4)]
    torch.cuda.synchronize()
    graph.replay()
    torch.cuda.synchronize()
    for got, expected in zip(captured, want, strict=True):
        assert torch.equal(got, expected)
    assert all(bool((other == 1).all()) for other in others)


# JAX takes most of the GPU's memory unless told otherwise before it starts, so another process has it.
JAX_PROGRAM = """
import sys, jax, numpy as np, pydeform
from pydeform import _interop
if jax.default_backend() != "gpu":
    sys.exit(77)
for name, tolerance in (("float32", 1e-5), ("bfloat16", 4e-2), ("float16", 5e-3)):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"input": (2, 16, 9, 7), "offset": (2, 18, 9, 7), "weight": (24, 16, 3, 3), "mask": (2, 9, 9, 7)}
    theirs = {n: jax.random.normal(k, s, name) for k, (n, s) in zip(keys, shapes.items())}
    ours = {n: np.asarray(a).astype(np.float64) for n, a in theirs.items()}
    native, _ = _interop.to_native("op", theirs)
    assert [native[n].data.ptr for n in theirs] == [a.unsafe_buffer_pointer() for a in theirs.values()]
    del native
    result = pydeform.deform_conv2d(**theirs, padding=1)
    assert isinstance(result, jax.Array) and result.dtype == name and result.devices() == theirs["input"].devices()
    want = pydeform.deform_conv2d(**ours, padding=1)
    assert np.abs(np.asarray(result).astype(np.float64) - want).max() < tolerance * np.abs(want).max(), name
    for _ in range(20):  # what we let go of is used again at once
        again = pydeform.deform_conv2d(**{n: a + 0 for n, a in theirs.items()}, padding=1)
        other = [jax.numpy.full(s, np.nan, name) for s in shapes.values()]
        assert np.array_equal(np.asarray(again), np.asarray(result))
with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64(True):
    wide = jax.numpy.ones((1, 2, 3, 3), "float64")
assert pydeform.conv2d(wide, wide).dtype == np.float64
"""


@needs_gpu
@needs_jax
def test_real_jax_arrays():
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run([sys.executable, "-c", JAX_PROGRAM], capture_output=True, text=True, env=environment)
    if done.returncode == 77:
        pytest.skip("this JAX has no GPU")
    assert done.returncode == 0, done.stderr
