"""The emulated device's memory and the arrays in it, with the interface of cupy.ndarray."""

from __future__ import annotations

import bisect
import ctypes
import functools
import operator
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tests.cuda_emulation import build, dlpack, streams

GUARD, GUARD_BYTE = 2048, 0xA5  # as in runtime.h
ALIGNMENT = 512  # of CuPy's memory pool
# Modules of the package that run beside the operators and may wait for the device.
# `_arrays` moves layers to the CPU, and losses return a Python float.
MAY_SYNCHRONISE = ("_selfcheck", "testing", "cli", "bench", "demo", "viz", "_arrays", "losses")


def refuse_synchronisation(what: str) -> None:
    """An operator can be captured in a graph: nothing in it may wait for the device."""
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__", "").startswith("tests.cuda_emulation"):
        assert frame.f_back is not None
        frame = frame.f_back
    package, _, rest = frame.f_globals.get("__name__", "").partition(".")
    if package == "pydeform" and rest.partition(".")[0] not in MAY_SYNCHRONISE:
        place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        raise RuntimeError(f"{what} waits for the device, inside an operator: {place}")


@functools.cache
def _runtime() -> Any:
    library = build.load(build.runtime())
    library.emulation_new_cells.restype, library.emulation_new_cells.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    library.emulation_free_cells.argtypes = (ctypes.c_void_p,)
    library.emulation_mark_initialised.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
    return library


def _bounds(host: np.ndarray) -> tuple[int, int]:
    """From which address to which the array's elements lie."""
    low = high = host.ctypes.data
    for size, stride in zip(host.shape, host.strides, strict=True):
        low += min(0, (size - 1) * stride)
        high += max(0, (size - 1) * stride)
    return (low, high + host.itemsize) if host.size else (low, low)


class Memory:
    """One allocation: guards on both sides, and for the check build which bytes were written."""

    def __init__(self, nbytes: int):
        self._raw = np.empty(nbytes + 2 * GUARD + ALIGNMENT, np.uint8)
        start = -(self._raw.ctypes.data + GUARD) % ALIGNMENT + GUARD
        self.bytes = self._raw[start : start + nbytes]
        self._raw[start - GUARD : start] = GUARD_BYTE
        self._raw[start + nbytes : start + nbytes + GUARD] = GUARD_BYTE
        self.bytes[...] = 0xFF  # NaN: whatever nobody writes shows up in a result
        self.pointer, self.nbytes = self._raw.ctypes.data + start, nbytes
        self.guarded, self.freed, self.borrowed = True, False, False
        self._written: list[tuple[int, int]] = []
        self._cells: int | None = None
        self._give_back: Callable[[], None] | None = None

    @property
    def ptr(self) -> int:
        return self.pointer if self.nbytes else 0

    @classmethod
    def of_allocator(cls, pointer: int, nbytes: int, give_back: Callable[[], None]) -> Memory:
        """What a function of another library allocated."""
        self = cls.foreign(np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(pointer)))
        self.bytes[...] = 0xFF
        self.borrowed, self._written, self._give_back = False, [], give_back
        return self

    @classmethod
    def foreign(cls, host: np.ndarray) -> Memory:
        """Memory of another library, that has no guards and counts as written."""
        self = cls.__new__(cls)
        low, high = _bounds(host)
        self._raw = self.bytes = host
        self.pointer, self.nbytes = low, high - low
        self.guarded, self.freed, self.borrowed = False, False, True
        self._written, self._cells, self._give_back = [(0, self.nbytes)], None, None
        return self

    def mark_written(self, pointer: int, nbytes: int) -> None:
        if self._cells is None:
            if nbytes >= self.nbytes:  # all of it, however often
                self._written = [(0, self.nbytes)]
            else:
                self._written.append((pointer - self.pointer, nbytes))
        else:
            _runtime().emulation_mark_initialised(self._cells, pointer - self.pointer, nbytes)

    def cells(self) -> int:
        """What the checker keeps for each two bytes, from the first checked launch on."""
        if self._cells is None:
            self._cells = _runtime().emulation_new_cells(self.nbytes)
            self._release = _runtime().emulation_free_cells
            for offset, nbytes in self._written:
                self.mark_written(self.pointer + offset, nbytes)
            self._written = []
        return self._cells

    def free(self) -> None:
        self.bytes[...] = 0xFF if self.guarded else self.bytes
        self.freed = True

    def __del__(self) -> None:
        if getattr(self, "_cells", None) is not None:
            self._release(self._cells)
        if getattr(self, "_give_back", None) is not None:
            self._give_back()


class MemoryPointer(NamedTuple):
    ptr: int
    mem: Memory
    device: streams.Device


class PythonFunctionAllocator:
    """CuPy's allocator by functions of another library: (bytes, device) -> address, and (address, device)."""

    def __init__(self, malloc_func: Callable[[int, int], int], free_func: Callable[[int, int], None]):
        self._malloc, self._free = malloc_func, free_func

    def malloc(self, size: int) -> MemoryPointer:
        device = streams.Device()
        if size == 0:
            return MemoryPointer(0, Memory(0), device)
        pointer = self._malloc(size, device.id)
        memory = Memory.of_allocator(pointer, size, functools.partial(self._free, pointer, device.id))
        return MemoryPointer(pointer, memory, device)


# Sizes of what CuPy's pool has, in order, for who allocates on a stream of a device what was given back there.
_pool: dict[tuple[int, int], list[int]] = {}


def _allocate(nbytes: int) -> Memory:
    """From the allocator in use, or else a pool as CuPy's, which asks the driver for what its arenas do not hold."""
    allocator = streams.get_allocator()
    if allocator is not None:
        memory: Memory = allocator(nbytes).mem
        return memory
    if nbytes == 0:
        return Memory(0)
    size = -(-nbytes // ALIGNMENT) * ALIGNMENT
    arena = _pool.setdefault((streams.Device().id, streams.get_current_stream().ptr), [])
    place = bisect.bisect_left(arena, size)
    if place < len(arena):
        size = arena.pop(place)
    else:
        streams.refuse_while_capturing("cudaMalloc")
    memory = Memory(nbytes)
    memory._give_back = functools.partial(bisect.insort, arena, size)
    return memory


class ndarray:
    """An array in emulated device memory. The NumPy array over the same bytes is for this folder only."""

    __slots__ = ("__weakref__", "_host", "_memory", "device")
    __array_priority__ = 100
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, shape: Any, dtype: Any = float, memory: Memory | None = None, host: np.ndarray | None = None):
        if host is None:
            dtype = np.dtype(dtype)
            shape = (shape,) if isinstance(shape, int | np.integer) else tuple(shape)
            size = int(np.prod(shape, dtype=np.int64))
            memory = _allocate(size * dtype.itemsize)
            host = np.ndarray(shape, dtype, memory.bytes)
        assert memory is not None
        self._host, self._memory, self.device = host, memory, streams.Device()

    # ---- on the host's side of things
    def _alive(self) -> np.ndarray:
        if self._memory.freed:
            raise RuntimeError("the array is used after its memory was freed")
        return self._host

    def _written(self) -> None:
        low, high = _bounds(self._host)
        if self._host.size:
            self._memory.mark_written(low, high - low)

    def _view(self, host: np.ndarray) -> ndarray:
        return ndarray((), memory=self._memory, host=host)

    shape = property(lambda self: self._host.shape)
    dtype = property(lambda self: self._host.dtype)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    nbytes = property(lambda self: self._host.nbytes)
    itemsize = property(lambda self: self._host.itemsize)
    strides = property(lambda self: self._host.strides)
    flags = property(lambda self: self._host.flags)
    T = property(lambda self: self._view(self._host.T))

    @property
    def data(self) -> MemoryPointer:
        return MemoryPointer(self._host.ctypes.data if self.size else 0, self._memory, self.device)

    def __len__(self) -> int:
        return len(self._host)

    def __repr__(self) -> str:
        return repr(self._host)

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct one.")

    def get(self) -> np.ndarray:
        refuse_synchronisation("ndarray.get")
        return self._alive().copy()

    def item(self) -> Any:
        refuse_synchronisation("ndarray.item")
        return self._alive().item()

    def tolist(self) -> Any:
        refuse_synchronisation("ndarray.tolist")
        return self._alive().tolist()

    def __bool__(self) -> bool:
        refuse_synchronisation("bool(ndarray)")
        return bool(self._alive())

    def __float__(self) -> float:
        refuse_synchronisation("float(ndarray)")
        return float(self._alive())

    def __int__(self) -> int:
        refuse_synchronisation("int(ndarray)")
        return int(self._alive())

    def __index__(self) -> int:
        refuse_synchronisation("index(ndarray)")
        return operator.index(self._alive())

    # ---- what the device does
    def _place(self, index: Any) -> np.ndarray | None:
        """The host's view of the elements that a basic index names, or None for arrays of indices."""
        parts = index if isinstance(index, tuple) else (index,)
        if any(isinstance(part, ndarray | np.ndarray | list) for part in parts):
            return None
        # With an ellipsis NumPy returns a view of a single element too, not its value.
        found: np.ndarray = self._alive()[parts if Ellipsis in parts else (*parts, ...)]
        return found

    def __getitem__(self, index: Any) -> ndarray:
        place = self._place(index)
        return _new(self._host[_host_index(index)]) if place is None else self._view(place)

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(value, np.ndarray) and value.ndim:
            raise TypeError(f"Unsupported type {type(value)}")
        self._alive()[_host_index(index)] = value._alive() if isinstance(value, ndarray) else value
        place = self._place(index)
        (self if place is None else self._view(place))._written()

    def fill(self, value: Any) -> None:
        self[...] = value

    def copy(self, order: str = "C") -> ndarray:
        return _new(self._alive(), order)

    def astype(self, dtype: Any, order: Any = "K", copy: bool = True) -> ndarray:
        host = self._alive().astype(dtype, order=order, copy=copy)
        return self if host is self._host else _new(host)

    def reshape(self, *shape: Any, order: Any = "C") -> ndarray:
        reshaped = self._alive().reshape(*shape, order=order)
        return self._view(reshaped) if np.may_share_memory(reshaped, self._host) else _new(reshaped)

    def ravel(self) -> ndarray:
        return self.reshape(-1)

    def view(self, dtype: Any = None) -> ndarray:
        return self._view(self._alive().view() if dtype is None else self._alive().view(dtype))

    def transpose(self, *axes: Any) -> ndarray:
        return self._view(self._alive().transpose(*axes))

    def squeeze(self, axis: Any = None) -> ndarray:
        return self._view(self._alive().squeeze(axis))

    def sum(self, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False) -> ndarray:
        result = _new(np.asarray(self._alive().sum(axis, dtype, keepdims=keepdims)))
        if out is None:
            return result
        out[...] = result
        return out  # type: ignore[no-any-return]

    def mean(self, axis: Any = None, dtype: Any = None, out: None = None, keepdims: bool = False) -> ndarray:
        return _new(np.asarray(self._alive().mean(axis, dtype, keepdims=keepdims)))

    def max(self, axis: Any = None, out: None = None, keepdims: bool = False) -> ndarray:
        return _new(np.asarray(self._alive().max(axis, keepdims=keepdims)))

    def min(self, axis: Any = None, out: None = None, keepdims: bool = False) -> ndarray:
        return _new(np.asarray(self._alive().min(axis, keepdims=keepdims)))

    def set(self, host: np.ndarray) -> None:
        if host.shape != self.shape or host.dtype != self.dtype:
            raise ValueError(f"set: an array {host.shape} of {host.dtype} into one {self.shape} of {self.dtype}")
        self._alive()[...] = host
        self._written()

    def __dlpack__(
        self, *, stream: Any = None, max_version: Any = None, dl_device: Any = None, copy: Any = None
    ) -> Any:
        return dlpack.to_capsule(dlpack.owned(self._alive(), self), self.device.id, max_version)

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self.device.id


ndarray.__module__ = "cupy"


def _new(host: Any, order: str = "K") -> ndarray:
    """A device array with the values of a host's."""
    host = np.asarray(host)
    result = empty_like(host, order=order)
    result._host[...] = host
    result._written()
    return result


def _host_index(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(_host_index(part) for part in index)
    return index._alive() if isinstance(index, ndarray) else index


def _add_operators() -> None:
    def binary(function: Callable[..., Any], swapped: bool) -> Callable[[ndarray, Any], Any]:
        def method(self: ndarray, other: Any) -> Any:
            if isinstance(other, np.ndarray) and other.ndim:
                raise TypeError(f"Unsupported type {type(other)}")
            a, b = self._alive(), other._alive() if isinstance(other, ndarray) else other
            return _new(function(b, a) if swapped else function(a, b))

        return method

    def inplace(function: Callable[..., Any]) -> Callable[[ndarray, Any], ndarray]:
        def method(self: ndarray, other: Any) -> ndarray:
            self[...] = _new(function(self._alive(), other._alive() if isinstance(other, ndarray) else other))
            return self

        return method

    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"):
        function = getattr(operator, name if name not in ("and", "or") else name + "_")
        setattr(ndarray, f"__{name}__", binary(function, False))
        setattr(ndarray, f"__r{name}__", binary(function, True))
        setattr(ndarray, f"__i{name}__", inplace(function))
    for name in ("eq", "ne", "lt", "le", "gt", "ge", "matmul"):
        setattr(ndarray, f"__{name}__", binary(getattr(operator, name), False))
    for name in ("neg", "abs", "invert"):
        unary = getattr(operator, name)
        setattr(ndarray, f"__{name}__", lambda self, unary=unary: _new(unary(self._alive())))


_add_operators()


# ---- cupy's functions
def empty(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    if order != "C":
        raise NotImplementedError("the emulation allocates in C order only")
    return ndarray(shape, dtype)


def full(shape: Any, value: Any, dtype: Any = None) -> ndarray:
    result = empty(shape, np.asarray(value).dtype if dtype is None else dtype)
    result.fill(value)
    return result


def zeros(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    result = empty(shape, dtype, order)
    result._memory.bytes[...] = 0
    result._memory.mark_written(result._memory.pointer, result._memory.nbytes)
    return result


def ones(shape: Any, dtype: Any = float) -> ndarray:
    return full(shape, 1, dtype)


def empty_like(a: Any, dtype: Any = None, order: str = "K") -> ndarray:
    like = a._host if isinstance(a, ndarray) else a
    template = np.empty_like(like, dtype, order)  # type: ignore[call-overload]
    memory = _allocate(template.nbytes)
    host = np.ndarray(template.shape, template.dtype, memory.bytes, strides=template.strides)
    return ndarray((), memory=memory, host=host)


def zeros_like(a: ndarray, dtype: Any = None, order: str = "K") -> ndarray:
    result = empty_like(a, dtype, order)
    result.fill(0)
    return result


def asarray(a: Any, dtype: Any = None, order: Any = None) -> ndarray:
    if isinstance(a, ndarray):
        return a if dtype is None or a.dtype == dtype else a.astype(dtype)
    return _new(np.asarray(a, dtype), order or "K")


def array(a: Any, dtype: Any = None, copy: bool = True, order: str = "K") -> ndarray:
    if isinstance(a, ndarray) and copy:
        return _new(a._alive().astype(a.dtype if dtype is None else dtype, copy=False), order)
    return asarray(a, dtype)


def asnumpy(a: Any) -> np.ndarray:
    return a.get() if isinstance(a, ndarray) else np.asarray(a)


def ascontiguousarray(a: Any, dtype: Any = None) -> ndarray:
    a = asarray(a, dtype)
    return a if a.flags.c_contiguous else _new(a._alive(), "C")


def cumsum(a: ndarray, axis: Any = None, dtype: Any = None, out: ndarray | None = None) -> ndarray:
    sums = np.cumsum(a._alive(), axis, dtype)
    if out is None:
        return _new(sums)
    if out.shape != sums.shape:
        raise ValueError(f"cumsum: out has shape {out.shape}, the sums have {sums.shape}")
    out[...] = _new(sums)
    return out


def arange(*bounds: Any, dtype: Any = None) -> ndarray:
    return _new(np.arange(*bounds, dtype=dtype))


def concatenate(parts: Any, axis: int = 0) -> ndarray:
    return _new(np.concatenate([part._alive() for part in parts], axis))


def where(condition: ndarray, a: Any, b: Any) -> ndarray:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        raise TypeError(f"Unsupported type {np.ndarray}")
    parts = [part._alive() if isinstance(part, ndarray) else part for part in (a, b)]
    if any(getattr(part, "dtype", np.dtype(float)).name == "bfloat16" for part in parts):
        raise TypeError("Wrong type (bfloat16) of arguments for cupy_where")  # CuPy 14 has no such loop
    return _new(np.where(condition._alive(), *parts))


def _elementwise(name: str) -> Callable[..., ndarray]:
    def function(*operands: Any) -> ndarray:
        if any(isinstance(operand, np.ndarray) for operand in operands):
            raise TypeError(f"Unsupported type {np.ndarray}")
        return _new(getattr(np, name)(*[o._alive() if isinstance(o, ndarray) else o for o in operands]))

    function.__name__ = name
    return function


exp, log, maximum, minimum, sign, sqrt, square, tanh = map(
    _elementwise, ("exp", "log", "maximum", "minimum", "sign", "sqrt", "square", "tanh")
)


def may_share_memory(a: ndarray, b: ndarray) -> bool:
    return np.may_share_memory(a._host, b._host)


def shares_memory(a: ndarray, b: ndarray) -> bool:
    return np.shares_memory(a._host, b._host)


def from_dlpack(producer: Any) -> ndarray:
    """As CuPy's: on the producer's device, ordered after its work by the current stream, without a copy."""
    kind, number = producer.__dlpack_device__()
    if kind == dlpack.CPU:
        raise TypeError(
            "CPU arrays cannot be directly imported to CuPy. Use `cupy.array(numpy.from_dlpack(input))` instead."
        )
    if kind not in (dlpack.CUDA, dlpack.CUDA_MANAGED):
        raise TypeError(f"Unsupported array type: {kind}")
    with streams.Device(number):
        stream = streams.get_current_stream().ptr
        host = dlpack.to_host(producer, stream or 1)  # 1 is the protocol's name for the default stream
        memory = producer._memory if isinstance(producer, ndarray) else Memory.foreign(host)
        return ndarray((), memory=memory, host=host)
