"""Foreign CUDA arrays as CuPy arrays, and work on the stream of the framework they came from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cupy


def from_dlpack(array: Any) -> cupy.ndarray:
    """The same memory. The exchange itself makes CuPy's current stream wait for the work that writes the array."""
    with cupy.cuda.Device(array.__dlpack_device__()[1]):
        return cupy.from_dlpack(array)


@contextmanager
def on_stream(device: int, pointer: int) -> Iterator[None]:
    """CuPy allocates and launches on the framework's stream, so no allocator hands out memory still in use there."""
    with cupy.cuda.Device(device):
        before = cupy.cuda.get_current_stream()
        with cupy.cuda.ExternalStream(pointer, device) as stream:
            if before.ptr != pointer:
                stream.wait_event(before.record())  # arrays of CuPy's own may still be in the making
            yield
