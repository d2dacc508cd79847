"""Foreign CUDA arrays as CuPy arrays, and work that is safe with their memory.

Launches are asynchronous. Memory that is given back while a kernel still reads it is safe only where whoever gets it
next comes later on the same stream. So arrays of PyTorch, whose allocator thinks in streams, are computed with on its
current stream; arrays of libraries that do not tell their streams are held until the device is done with them.

What we allocate meanwhile is PyTorch's too: it keeps the memory of what it captures for that graph. CuPy's pool has
none for a new stream, may not ask the driver for it then, and hands out again what every replay writes to.
"""

from __future__ import annotations

import atexit
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import cupy


class ForeignStream:
    """A stream of another library in CUDA's stream protocol, which not every library has."""

    def __init__(self, pointer: int):
        self.pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


def from_dlpack(array: Any, stream: Any = None) -> cupy.ndarray:
    """The same memory. The exchange makes `stream`, or else CuPy's current one, wait for the work that writes it.

    On the stream that this work is on nothing is waited for, so that it can be captured in a graph.
    """
    with cupy.cuda.Device(array.__dlpack_device__()[1]):
        if stream is None:
            return cupy.from_dlpack(array)
        with cupy.cuda.Stream.from_external(ForeignStream(stream.pointer)):
            return cupy.from_dlpack(array)


@contextmanager
def borrowing(stream: Any, alone: bool, lent: list[Any]) -> Iterator[None]:
    """Computing on that `_interop.Stream`, or on CuPy's current one, with arrays lent by others.

    `alone`: no array is ordered by CuPy's current stream.
    """
    with on_stream(stream.device, stream.pointer, alone, stream[2:]) if stream else nullcontext():
        yield
        if lent:
            _held.hold(lent)


@contextmanager
def on_stream(
    device: int, pointer: int, alone: bool = False, functions: tuple[Any, Any] | None = None
) -> Iterator[None]:
    """CuPy allocates and launches on this stream, by `functions` if given: to allocate and to free, as in `Stream`.

    Unless `alone`, arrays on CuPy's former current stream are in use: they may be in the making, and when they are
    freed that stream hands out their memory. So each stream waits for the other, and memory is CuPy's.
    """
    with cupy.cuda.Device(device):
        before = cupy.cuda.get_current_stream()
        with cupy.cuda.Stream.from_external(ForeignStream(pointer)) as stream:
            if alone or before.ptr == pointer:
                with _allocating(functions):
                    yield
                return
            stream.wait_event(_mark(before))
            yield
            before.wait_event(_mark(stream))


def _allocating(functions: tuple[Any, Any] | None) -> AbstractContextManager[None]:
    if functions is None:
        return nullcontext()
    return cupy.cuda.using_allocator(cupy.cuda.PythonFunctionAllocator(*functions).malloc)


def _mark(stream: Any) -> Any:
    """An event behind all that is queued on the stream."""
    return stream.record(cupy.cuda.Event(disable_timing=True))


class Held:
    """Arrays that others lent us, until the device has passed the event behind them. Looked through at each call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arrays: deque[tuple[Any, list[Any]]] = deque()

    def hold(self, arrays: list[Any]) -> None:
        with arrays[0].device:
            stream = cupy.cuda.get_current_stream()
            if stream.is_capturing():
                # Nothing reads them yet: whoever captures keeps what the graph reads. Nobody could ask an event that is
                # recorded now, and to ask any other may end the capture.
                return
            event = _mark(stream)
        with self._lock:
            self._arrays.append((event, arrays))
            while self._arrays and self._arrays[0][0].done:
                self._arrays.popleft()

    def release(self) -> None:
        """While their libraries still run."""
        with self._lock:
            for event, _ in self._arrays:
                event.synchronize()
            self._arrays.clear()


_held = Held()
atexit.register(_held.release)
