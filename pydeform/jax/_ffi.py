"""XLA's foreign function interface without a compiler: Python computes in the memory of XLA's buffers.

The structures are those of xla/ffi/api/c_api.h, version 0.1, which comes with jaxlib (`jax.ffi.include_dir()`).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np

Compute = Callable[[str, list[Any], list[Any]], None]  # text, inputs (read-only), results to be filled

VERSION = (0, 1)
METADATA = 1  # XLA_FFI_Extension_Metadata
EXECUTE = 3  # XLA_FFI_ExecutionStage_EXECUTE
INVALID_ARGUMENT, UNIMPLEMENTED, INTERNAL = 3, 12, 13  # XLA_FFI_Error_Code
DTYPES = {
    10: np.dtype(np.float16),
    11: np.dtype(np.float32),
    12: np.dtype(np.float64),
    16: np.dtype(ml_dtypes.bfloat16),
}


class _Struct(ctypes.Structure):
    """What all structures begin with."""

    _fields_ = (("struct_size", ctypes.c_size_t), ("extension", ctypes.c_void_p))


class _Extension(ctypes.Structure):
    _fields_ = (("struct_size", ctypes.c_size_t), ("type", ctypes.c_int), ("next", ctypes.c_void_p))


class _Version(_Struct):
    _fields_ = (("major", ctypes.c_int), ("minor", ctypes.c_int))


class _Metadata(ctypes.Structure):
    _fields_ = (("struct_size", ctypes.c_size_t), ("version", _Version), ("traits", ctypes.c_uint32))


class _MetadataExtension(ctypes.Structure):
    _fields_ = (("base", _Extension), ("metadata", ctypes.POINTER(_Metadata)))


class _Buffer(_Struct):
    _fields_ = (
        ("dtype", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("dims", ctypes.POINTER(ctypes.c_int64)),
    )


class _Buffers(_Struct):
    """XLA_FFI_Args and XLA_FFI_Rets."""

    _fields_ = (
        ("size", ctypes.c_int64),
        ("types", ctypes.c_void_p),
        ("items", ctypes.POINTER(ctypes.POINTER(_Buffer))),
    )


class _Span(ctypes.Structure):
    _fields_ = (("begin", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _Attributes(_Struct):
    """Ours has one, a text."""

    _fields_ = (
        ("size", ctypes.c_int64),
        ("types", ctypes.c_void_p),
        ("names", ctypes.c_void_p),
        ("items", ctypes.POINTER(ctypes.POINTER(_Span))),
    )


class _ErrorArguments(_Struct):
    _fields_ = (("message", ctypes.c_char_p), ("code", ctypes.c_int))


class _Api(_Struct):
    """Its first function only."""

    _fields_ = (
        ("version", _Version),
        ("internal", ctypes.c_void_p),
        ("create_error", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_ErrorArguments))),
    )


class _CallFrame(_Struct):
    _fields_ = (
        ("api", ctypes.POINTER(_Api)),
        ("context", ctypes.c_void_p),
        ("stage", ctypes.c_int),
        ("inputs", _Buffers),
        ("results", _Buffers),
        ("attributes", _Attributes),
    )


_Handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_CallFrame))


def handler(compute: Compute) -> Any:
    """A C function for `jax.ffi.pycapsule`; it must be kept as long as the process lives.

    XLA calls it in threads of its own, without the interpreter's lock; ctypes takes that for as long as Python runs.
    """

    def handle(pointer: Any) -> int | None:
        frame = pointer.contents
        if frame.extension:
            return _describe(frame.extension)
        try:
            with _counted():
                span = frame.attributes.items[0].contents
                text = ctypes.string_at(span.begin, span.size).decode()
                compute(text, _arrays(frame.inputs, writeable=False), _arrays(frame.results, writeable=True))
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


def _describe(address: int) -> None:
    """Answers XLA's question, when it registers a handler, for which version it was written."""
    extension = _MetadataExtension.from_address(address)
    if extension.base.type == METADATA:
        version = extension.metadata.contents.version
        version.major, version.minor = VERSION
        extension.metadata.contents.traits = 0


def _arrays(buffers: _Buffers, writeable: bool) -> list[Any]:
    """The buffers' memory itself."""
    found = []
    for k in range(buffers.size):
        buffer = buffers.items[k].contents
        dtype, shape = DTYPES[buffer.dtype], tuple(buffer.dims[: buffer.rank])
        nbytes = dtype.itemsize
        for size in shape:
            nbytes *= size
        memory = (ctypes.c_char * nbytes).from_address(buffer.data) if nbytes else bytearray()
        array: Any = np.ndarray(shape, dtype, memory)
        array.flags.writeable = writeable
        found.append(array)
    return found


def _error(frame: _CallFrame, error: BaseException) -> int:
    code = INVALID_ARGUMENT if isinstance(error, TypeError | ValueError) else INTERNAL
    if isinstance(error, NotImplementedError):
        code = UNIMPLEMENTED
    message = f"{type(error).__name__}: {error}".encode()
    arguments = _ErrorArguments(ctypes.sizeof(_ErrorArguments), None, message, code)
    return int(frame.api.contents.create_error(arguments))
