"""XLA's foreign function interface without a compiler: Python computes in the memory of XLA's buffers.

The structures are those of xla/ffi/api/c_api.h, version 0.1, which comes with jaxlib (`jax.ffi.include_dir()`).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np

Compute = Callable[[str, list[Any], list[Any]], None]  # text, inputs (read-only), results to be filled

VERSION = (0, 1)
METADATA = 1  # XLA_FFI_Extension_Metadata
INVALID_ARGUMENT, UNIMPLEMENTED, INTERNAL = 3, 12, 13  # XLA_FFI_Error_Code
READ, WRITE = 0x100, 0x200  # PyBUF_READ, PyBUF_WRITE
DTYPES = {
    10: np.dtype(np.float16),
    11: np.dtype(np.float32),
    12: np.dtype(np.float64),
    16: np.dtype(ml_dtypes.bfloat16),
}


def _struct(**fields: Any) -> Any:
    return type("Struct", (ctypes.Structure,), {"_fields_": list(fields.items())})


_pointer_to: Any = ctypes.POINTER
_pointer, _integer, _count = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_HEAD = {"struct_size": ctypes.c_size_t, "extension": _pointer}  # of nearly all structures

_Version = _struct(**_HEAD, major=_integer, minor=_integer)
_Metadata = _struct(struct_size=ctypes.c_size_t, version=_Version, traits=ctypes.c_uint32)
_Extension = _struct(
    struct_size=ctypes.c_size_t, type=_integer, next=_pointer, metadata=_pointer_to(_Metadata)
)  # one that asks for metadata

_Buffer = _struct(**_HEAD, dtype=_integer, data=_pointer, rank=_count, dims=_pointer_to(_count))
_Buffers = _struct(**_HEAD, size=_count, types=_pointer, items=_pointer_to(_pointer_to(_Buffer)))
_Text = _struct(begin=_pointer, size=ctypes.c_size_t)
_Texts = _struct(**_HEAD, size=_count, types=_pointer, names=_pointer, items=_pointer_to(_pointer_to(_Text)))

_ErrorArguments = _struct(**_HEAD, message=ctypes.c_char_p, code=_integer)
_CreateError = ctypes.CFUNCTYPE(_pointer, _pointer_to(_ErrorArguments))
_Api = _struct(**_HEAD, version=_Version, internal=_pointer, create_error=_CreateError)  # and more functions
_CallFrame = _struct(
    **_HEAD,
    api=_pointer_to(_Api),
    context=_pointer,
    stage=_integer,
    inputs=_Buffers,
    results=_Buffers,
    attributes=_Texts,  # one, as `jax.ffi.ffi_call` was given one
)

_memory = ctypes.pythonapi.PyMemoryView_FromMemory
_memory.restype, _memory.argtypes = ctypes.py_object, (_pointer, ctypes.c_ssize_t, _integer)
_Handler = ctypes.CFUNCTYPE(_pointer, _pointer_to(_CallFrame))


def handler(compute: Compute) -> Any:
    """A C function for `jax.ffi.pycapsule`; it must be kept as long as the process lives.

    XLA calls it in threads of its own, without the interpreter's lock; ctypes takes that for as long as Python runs.
    """

    def handle(pointer: Any) -> int | None:
        frame = pointer.contents
        if frame.extension:
            _describe(_Extension.from_address(frame.extension))
            return None
        try:
            with _counted():
                span = frame.attributes.items[0].contents
                text = ctypes.string_at(span.begin, span.size).decode()
                compute(text, _arrays(frame.inputs, READ), _arrays(frame.results, WRITE))
        except BaseException as error:  # whatever it is: no exception can pass through XLA
            return _error(frame, error)
        return None

    return _Handler(handle)


_ended = threading.Condition()
_running = 0  # calls that have begun and not ended


@contextlib.contextmanager
def _counted() -> Iterator[None]:
    global _running
    end_in_order()
    with _ended:
        _running += 1
    try:
        yield
    finally:
        with _ended:
            _running -= 1
            _ended.notify_all()


@functools.cache
def end_in_order() -> None:
    """Python is to end after XLA's programs: a thread of theirs would never get the interpreter's lock again, and XLA
    waits for its threads."""
    atexit.register(_wait_for_programs)


def _wait_for_programs() -> None:
    for array in jax.live_arrays("cpu"):
        with contextlib.suppress(Exception):  # its program failed, or it was given away
            array.block_until_ready()
    for device in jax.local_devices(backend="cpu"):  # a device computes in order: also what nobody waits for is done
        jax.block_until_ready(jax.device_put(np.zeros(1), device) + 1)
    with _ended:
        _ended.wait_for(lambda: not _running)


def _describe(extension: Any) -> None:
    """Answers XLA's question, when it registers a handler, for which version it was written."""
    if extension.type == METADATA:
        metadata = extension.metadata.contents
        metadata.version.major, metadata.version.minor = VERSION
        metadata.traits = 0


def _arrays(buffers: Any, access: int) -> list[Any]:
    """The buffers' memory itself."""
    found: list[Any] = []
    for k in range(buffers.size):
        buffer = buffers.items[k].contents
        dtype, shape = DTYPES[buffer.dtype], tuple(buffer.dims[: buffer.rank])
        nbytes = math.prod(shape) * dtype.itemsize
        memory = _memory(buffer.data, nbytes, access) if nbytes else bytearray()
        found.append(np.ndarray(shape, dtype, memory))
    return found


def _error(frame: Any, error: BaseException) -> int:
    code = INVALID_ARGUMENT if isinstance(error, TypeError | ValueError) else INTERNAL
    if isinstance(error, NotImplementedError):
        code = UNIMPLEMENTED
    message = f"{type(error).__name__}: {error}".encode()
    arguments = _ErrorArguments(ctypes.sizeof(_ErrorArguments), None, message, code)
    return int(frame.api.contents.create_error(arguments))
