"""Devices, streams and events of the emulated CUDA. Work is done at once, so that waiting for it is nothing."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

# Shared memory that a block may ask for, in KiB, by compute capability.
SHARED_KIB = {"75": 64, "80": 163, "86": 99, "87": 163, "89": 99, "90": 227, "100": 227, "120": 99}


class Configuration:
    """What the tests choose; see `device.settings`."""

    check = False
    schedule = 7
    profile = False
    capability = "90"
    processors = 2
    devices = 1


configuration = Configuration()


class _Current(threading.local):
    def __init__(self) -> None:
        self.devices = [0]
        self.streams: list[Stream] = []
        self.allocator: Callable[[int], Any] | None = None


_current = _Current()


class Device:
    def __init__(self, device: Any = None):
        self.id = _current.devices[-1] if device is None else int(device)
        if not 0 <= self.id < configuration.devices:
            raise RuntimeError("cudaErrorInvalidDevice: invalid device ordinal")

    def __enter__(self) -> Device:
        _current.devices.append(self.id)
        return self

    def __exit__(self, *_: Any) -> None:
        _current.devices.pop()

    def __int__(self) -> int:
        return self.id

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self) -> int:
        return self.id

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"

    def use(self) -> None:
        _current.devices[-1] = self.id

    def synchronize(self) -> None:
        _refuse("Device.synchronize")

    @property
    def compute_capability(self) -> str:
        return configuration.capability

    @property
    def attributes(self) -> dict[str, int]:
        shared = SHARED_KIB[configuration.capability] * 1024
        return {
            "MultiProcessorCount": configuration.processors,
            "MaxSharedMemoryPerBlock": 48 * 1024,
            "MaxSharedMemoryPerBlockOptin": shared,
            "MaxSharedMemoryPerMultiprocessor": shared + 1024,
            "MaxThreadsPerBlock": 1024,
            "MaxThreadsPerMultiProcessor": 2048,
            "WarpSize": 32,
            "L2CacheSize": 50 << 20,
        }


GLOBAL, THREAD_LOCAL, RELAXED = 0, 1, 2  # modes of a capture
_captures: dict[int, Capture] = {}  # under way, by the stream's pointer


class Capture:
    """A stream's launches, which run at once nevertheless, and then the graph of them."""

    def __init__(self, mode: int):
        self.mode = mode
        self._uses: list[tuple[str, int, int, Callable[[], Any]]] = []  # of memory: by whom, where, how to find it

    def use(self, what: str, memory: Any, find: Callable[[], Any]) -> None:
        self._uses.append((what, memory.pointer, memory.nbytes, find))

    def launch(self, stream: Stream | None = None, *, kept: Iterable[tuple[int, int]] = ()) -> None:
        """Runs nothing: what the kernels use must be there still, or in (address, bytes) of what the graph keeps."""
        kept = list(kept)
        for what, pointer, nbytes, find in self._uses:
            if find() is None and not any(p <= pointer and pointer + nbytes <= p + size for p, size in kept):
                raise RuntimeError(f"a graph is replayed on memory that was given back: {what}")


def refuse_while_capturing(what: str) -> None:
    """As the driver does unless the capture is relaxed, wherever it is under way."""
    if any(capture.mode != RELAXED for capture in _captures.values()):
        raise RuntimeError(f"cudaErrorStreamCaptureUnsupported: {what} is not permitted when a stream is capturing")


def capture_of(stream: Stream) -> Capture | None:
    return _captures.get(stream.ptr)


class Event:
    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False):
        self.recorded_on: int | None = None
        self._capture: Capture | None = None

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or get_current_stream()
        self.recorded_on, self._capture = stream.ptr, capture_of(stream)

    def synchronize(self) -> None:
        _refuse("Event.synchronize")

    @property
    def done(self) -> bool:
        if self._capture is not None:
            raise RuntimeError("cudaErrorCapturedEvent: the event was recorded in a stream that was capturing")
        refuse_while_capturing("cudaEventQuery")
        return True


class Stream:
    _pointers = itertools.count(0x1000, 0x10)
    null: Stream

    def __init__(self, null: bool = False, non_blocking: bool = False, ptds: bool = False):
        self.ptr, self.device_id = (0 if null else next(self._pointers)), _current.devices[-1]
        self.waited_for: list[Event] = []

    @classmethod
    def from_external(cls, foreign: Any) -> Stream:
        """A stream of another library, in CUDA's stream protocol."""
        version, pointer = foreign.__cuda_stream__()
        if version != 0:
            raise TypeError(f"__cuda_stream__ must return version 0, got {version}")
        return ExternalStream(pointer)

    def __enter__(self) -> Stream:
        _current.streams.append(self)
        return self

    def __exit__(self, *_: Any) -> None:
        _current.streams.pop()

    def use(self) -> Stream:
        _current.streams[-1:] = [self]
        return self

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Stream) and self.ptr == other.ptr

    def __hash__(self) -> int:
        return hash(self.ptr)

    def record(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        if event.recorded_on is None:
            raise RuntimeError("wait_event: nobody has recorded this event")
        if capture_of(self) is not event._capture:
            raise RuntimeError("cudaErrorStreamCaptureIsolation: the event is not of this capture")
        self.waited_for.append(event)

    def begin_capture(self, mode: int | None = None) -> None:
        if self.ptr in (0, 1):
            raise RuntimeError("cannot capture on the default (legacy) stream")
        if self.ptr in _captures:
            raise RuntimeError("cudaErrorIllegalState: the stream is capturing")
        _captures[self.ptr] = Capture(RELAXED if mode is None else mode)

    def end_capture(self) -> Capture:
        return _captures.pop(self.ptr)

    def is_capturing(self) -> bool:
        return self.ptr in _captures

    def synchronize(self) -> None:
        _refuse("Stream.synchronize")

    done = True


class ExternalStream(Stream):
    def __init__(self, ptr: int, device_id: int = -1):
        self.ptr, self.device_id = ptr, _current.devices[-1] if device_id < 0 else device_id
        self.waited_for = []


Stream.null = Stream(null=True)


def get_current_stream(device_id: int | None = None) -> Stream:
    return _current.streams[-1] if _current.streams else Stream.null


@contextmanager
def using_allocator(allocator: Callable[[int], Any]) -> Iterator[None]:
    before, _current.allocator = _current.allocator, allocator
    try:
        yield
    finally:
        _current.allocator = before


def get_allocator() -> Callable[[int], Any] | None:
    """This thread's own, or None."""
    return _current.allocator


def get_elapsed_time(start: Event, end: Event) -> float:
    return 0.0


def _refuse(what: str) -> None:
    from tests.cuda_emulation.arrays import refuse_synchronisation

    refuse_synchronisation(what)
