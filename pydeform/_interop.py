"""Arrays of other frameworks in and out, without a copy. A framework is recognised when it is already imported."""

from __future__ import annotations

import ctypes
import functools
import importlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from pydeform import _background

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13  # DLPack device types
UNSIGNED, BFLOAT = 1, 4  # DLPack type codes
UNREADABLE = (BufferError, RuntimeError, TypeError, ValueError)  # what libraries raise for memory they do not share


class Back:
    """Takes a result of ours to the caller's kind. As a context, once: computes where the caller's memory is safe."""

    __slots__ = ("_context", "_convert")

    def __init__(self, convert: Callable[[Any], Any] | None, context: AbstractContextManager[None] | None = None):
        self._convert, self._context = convert, context

    def __call__(self, array: Any) -> Any:
        return array if self._convert is None else self._convert(array)

    def __enter__(self) -> None:
        if self._context is not None:
            self._context.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._context is not None:
            self._context.__exit__(*error)


UNCHANGED = Back(None)


class Stream(NamedTuple):
    """Of a library that reuses CUDA memory in the stream's order, and memory that it then reuses so."""

    device: int
    pointer: int
    allocate: Callable[[int, int], int]  # bytes, device -> address
    free: Callable[[int, int], None]  # address, device


class Taken(NamedTuple):
    """A caller's array as NumPy or CuPy sees it."""

    array: Any
    convert: Callable[[Any], Any] | None = None  # takes a result to the kind of the caller's array
    stream: Stream | None = None  # in whose order its library reuses CUDA memory
    lent: bool = False  # CUDA memory that its library may reuse as soon as we let go of it


def to_native(op: str, arrays: dict[str, Any]) -> tuple[dict[str, Any], Back]:
    """NumPy or CuPy arrays in place of the caller's (None stays), and the way back to the kind of the first array."""
    for array in arrays.values():
        if array is not None and type(array) is not np.ndarray:
            break
    else:
        return arrays, UNCHANGED  # the usual case pays for this loop and nothing else
    native: dict[str, Any] = dict.fromkeys(arrays)
    present: list[Taken] = []
    for name, array in arrays.items():
        if array is not None:
            present.append(_take(f"{op}: {name} must be", array, not present))
            native[name] = present[-1].array
    return native, Back(present[0].convert, _context(present))


def _context(present: list[Taken]) -> AbstractContextManager[None] | None:
    """Where CUDA memory of other libraries can be computed with."""
    stream = next((t.stream for t in present if t.stream), None)
    lent = [t.array for t in present if t.lent]
    if stream is None and not lent:
        return None
    return _cuda("").borrowing(stream, alone=all(t.stream for t in present), lent=lent)


def _take(must_be: str, array: Any, is_first: bool) -> Taken:
    """`is_first`: results are of its kind."""
    if isinstance(array, np.ndarray):
        if isinstance(array, np.ma.MaskedArray | np.matrix):  # their operators mean something else than an array's
            raise TypeError(f"{must_be} a plain array, got {_type_name(array)}")
        return Taken(array.view(np.ndarray))
    if isinstance(array, _loaded("torch", "Tensor")):
        return _take_torch(must_be, array)
    if isinstance(array, _loaded("cupy", "ndarray")):
        return Taken(array)
    if isinstance(array, _loaded("jax", "Array")):
        return _take_jax(must_be, array)
    return _take_dlpack(must_be, array, is_first)


def _loaded(module: str, name: str) -> type | tuple[()]:
    return getattr(sys.modules.get(module), name, ())


def _take_torch(must_be: str, tensor: Any) -> Taken:
    torch = sys.modules["torch"]
    if tensor.is_cpu and type(tensor) is torch.Tensor and tensor.dtype in (torch.float32, torch.float64):
        try:  # the usual case is a quick one
            native = tensor.numpy()
            if native.size == 0 or tensor.data_ptr():
                return Taken(native, _torch_from_numpy)
        except UNREADABLE:
            pass  # below is why, or what to do
    if tensor.requires_grad and torch.is_grad_enabled():
        raise TypeError(
            f"{must_be} without requires_grad, got a tensor that autograd records: "
            "pass tensor.detach(); gradients come from the operator's own _backward"
        )
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        raise TypeError(f"{must_be} a dense tensor, got layout {tensor.layout} and dtype {tensor.dtype}")
    if not (tensor.is_cpu or tensor.is_cuda):
        raise TypeError(f"{must_be} on the CPU or a CUDA device, got device {tensor.device}")
    cuda = _cuda(must_be) if tensor.is_cuda else None
    is_bfloat16 = tensor.dtype is torch.bfloat16
    try:
        plain = tensor.detach() if tensor.requires_grad else tensor
        if plain.is_neg() or plain.is_conj():  # NumPy would ignore the bits that stand for them
            plain = plain.resolve_conj().resolve_neg()
        if is_bfloat16:
            plain = plain.view(torch.int16)
        memory = TorchMemory(tensor.device) if cuda else None
        native = cuda.from_dlpack(plain, memory.stream) if cuda and memory else plain.numpy()
    except UNREADABLE as error:  # fake tensors, tensors under vmap; float8 and other foreign dtypes
        raise TypeError(
            f"{must_be} a tensor whose memory NumPy can read, got {_type_name(tensor)} of dtype {tensor.dtype} "
            f"(torch.func and torch.compile cannot trace the call): {error}"
        ) from None
    if is_bfloat16:
        native = native.view(_bfloat16())
    if native.size and not tensor.data_ptr():  # NumPy makes numbers up for it
        raise ValueError(f"{must_be} a tensor with memory, got one whose storage was freed")
    return Taken(native, memory.tensor, memory.stream) if memory else Taken(native, _torch_from_numpy)


def _torch_from_numpy(result: Any) -> Any:
    return _to_torch(sys.modules["torch"].from_numpy, result)


def _to_torch(to_tensor: Callable[[Any], Any], result: Any) -> Any:
    is_float = result.dtype.kind == "f"
    return to_tensor(result) if is_float else to_tensor(result.view(np.int16)).view(sys.modules["torch"].bfloat16)


class TorchMemory:
    """A call's memory, on torch's current stream of a device: torch's own tensors.

    A result is one of them, and not their memory through DLPack. Of foreign memory torch does not know which other
    streams use it (record_stream would do nothing), and graphs of torch.compile refuse it.
    """

    def __init__(self, device: Any) -> None:
        self._torch = sys.modules["torch"]
        self._at_the_end = sys.is_finalizing  # of the program, when parts of modules are gone already
        self._blocks: dict[int, Any] = {}  # by address
        stream = self._torch.cuda.current_stream(device)
        self.stream = Stream(stream.device_index, stream.cuda_stream, self._allocate, self._free)

    def _allocate(self, nbytes: int, device: int) -> int:
        torch = self._torch
        block = torch.empty(nbytes, dtype=torch.uint8, device=torch.device("cuda", device))
        try:
            address = int(block.data_ptr())
        except RuntimeError:  # inside of torch.func.grad, which wraps what is made there
            return int(torch.cuda.caching_allocator_alloc(nbytes, device, self.stream.pointer))
        self._blocks[address] = block
        return address

    def _free(self, address: int, _: int) -> None:
        if self._blocks.pop(address, None) is None and not self._at_the_end():
            self._torch.cuda.caching_allocator_delete(address)

    def tensor(self, result: Any) -> Any:
        """A CuPy array in this memory, or in CuPy's, without a copy."""
        torch, data = self._torch, result.data
        block = self._blocks.get(data.mem.ptr)
        if block is None:
            return _to_torch(torch.from_dlpack, result)
        size = result.dtype.itemsize
        place = (data.ptr - data.mem.ptr) // size, result.shape, tuple(step // size for step in result.strides)
        # No view of the block, which autograd would follow.
        empty = torch.empty(0, dtype=getattr(torch, result.dtype.name), device=block.device)
        return empty.set_(block.untyped_storage(), *place)


def _take_jax(must_be: str, array: Any) -> Taken:
    jax = sys.modules["jax"]
    if isinstance(array, jax.core.Tracer):
        raise TypeError(
            f"{must_be} a concrete array, got a JAX tracer: "
            "call the operator of this name in pydeform.jax, or this one outside of jit, grad and vmap"
        )
    devices = array.devices()
    if len(devices) > 1:
        raise TypeError(f"{must_be} on one device, got a JAX array sharded over {len(devices)} devices")
    (device,) = devices
    if device.platform != "cpu":
        return _take_dlpack(must_be, array, False)._replace(convert=_keeping_float64(jax.dlpack.from_dlpack))
    # No copy where the result is 64-byte aligned.
    export = _keeping_float64(lambda result: jax.device_put(result, device, may_alias=True))
    return Taken(np.asarray(array), export)  # the same memory, read-only; bfloat16 too, unlike through DLPack


def _keeping_float64(to_jax: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A float64 array can outlive the context that enabled x64; JAX would then make the result float32 in silence."""
    jax = sys.modules["jax"]

    def export(result: Any) -> Any:
        if result.dtype != np.float64:
            return to_jax(result)
        with (jax if hasattr(jax, "enable_x64") else jax.experimental).enable_x64(True):
            return to_jax(result)

    return export


def _take_dlpack(must_be: str, array: Any, is_first: bool) -> Taken:
    library = sys.modules.get(type(array).__module__.partition(".")[0])
    if not (hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__")):
        to_dlpack = _capsule_function(library, "to_dlpack")
        if to_dlpack is None:
            raise TypeError(f"{must_be} an array (NumPy, CuPy, or one with __dlpack__), got {_type_name(array)}")
        try:
            array = Capsule(to_dlpack(array))
        except Exception as error:  # each library has its own
            raise TypeError(f"{must_be} an array with memory to share, got {_type_name(array)}: {error}") from error
    device = int(array.__dlpack_device__()[0])
    if device in (CUDA, CUDA_MANAGED):
        native = _cuda(must_be).from_dlpack(array)
    elif device in (CPU, CUDA_HOST):
        native = _from_dlpack_cpu(must_be, array)
    else:
        raise TypeError(f"{must_be} on the CPU or a CUDA device, got DLPack device type {device}")
    convert = _exporter(must_be, array, library) if is_first else None
    return Taken(native, convert, lent=device in (CUDA, CUDA_MANAGED))


def _from_dlpack_cpu(must_be: str, array: Any) -> Any:
    try:
        return np.from_dlpack(array)
    except UNREADABLE as error:
        reason = error
    with suppress(*UNREADABLE):  # NumPy reads no bfloat16: hand it over as uint16
        capsule = Capsule(array.__dlpack__())
        if capsule.type_code == BFLOAT:
            capsule.type_code = UNSIGNED
            return np.from_dlpack(capsule).view(_bfloat16())
    raise TypeError(f"{must_be} an array that NumPy can read, got {_type_name(array)}: {reason}") from None


def _exporter(must_be: str, array: Any, library: ModuleType | None) -> Callable[[Any], Any]:
    """From the array's standard namespace, or from its library: `from_dlpack`, or an older one that takes capsules."""
    namespace = array.__array_namespace__() if hasattr(array, "__array_namespace__") else library
    from_dlpack = getattr(namespace, "from_dlpack", None)
    takes_capsule = from_dlpack is None
    if takes_capsule:
        from_dlpack = _capsule_function(library, "from_dlpack")
    if from_dlpack is None:
        raise TypeError(f"{must_be} of a library with a function from_dlpack, got {_type_name(array)}")

    def export(result: Any) -> Any:
        # CuPy exports bfloat16 itself, NumPy does not. An array hears the consumer's stream, a capsule does not.
        plain = result.dtype.kind == "f" or not isinstance(result, np.ndarray)
        if plain:
            return from_dlpack(result.__dlpack__() if takes_capsule else result)
        capsule = Capsule(result.view(np.uint16).__dlpack__())
        capsule.type_code = BFLOAT
        return from_dlpack(capsule.capsule if takes_capsule else capsule)

    return export


def _capsule_function(library: ModuleType | None, name: str) -> Callable[[Any], Any] | None:
    """`to_dlpack` or `from_dlpack` where libraries keep it that have them on capsules (TensorFlow, Paddle)."""
    for path in ("dlpack", "utils.dlpack", "experimental.dlpack"):
        place: Any = library
        for step in (*path.split("."), name):
            place = getattr(place, step, None)
        if place is not None:
            return place
    return None


class Capsule:
    """A DLPack capsule, exchangeable like an array, whose header can be read and whose type code can be set."""

    def __init__(self, capsule: Any):
        self.capsule = capsule
        address = ctypes.pythonapi.PyCapsule_GetPointer
        address.restype, address.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        managed = address(capsule, b"dltensor")
        # DLManagedTensor starts with: void *data; int32 device_type, device_id, ndim; uint8 type_code, bits
        self._device = (ctypes.c_int32 * 2).from_address(managed + 8)
        self._code = ctypes.c_uint8.from_address(managed + 20)

    def __dlpack__(self, **_: Any) -> Any:
        return self.capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device[0], self._device[1]

    @property
    def type_code(self) -> int:
        return self._code.value

    @type_code.setter
    def type_code(self, code: int) -> None:
        self._code.value = code


def _cuda(must_be: str) -> ModuleType:
    try:
        return _import_cuda()
    except ImportError as error:
        raise TypeError(f"{must_be} on the CPU while CuPy cannot be imported ({error}), got a CUDA array") from error


@functools.cache
def _import_cuda() -> ModuleType:
    return _background.complete(lambda: importlib.import_module("pydeform.cuda.core.dlpack"))


def _bfloat16() -> Any:
    import ml_dtypes  # not needed by who never sees one

    return ml_dtypes.bfloat16


def _type_name(array: Any) -> str:
    kind = type(array)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
