"""Compiled kernels and their launches. A kernel is one instance of a template, named by its C++ expression."""

from __future__ import annotations

import functools
import threading
from typing import Any, NamedTuple

import cupy
import numpy as np

from pydeform.cuda.core import sm_90a
from pydeform.cuda.core.source import Code, c_fields, source

OLDEST = 75  # compute capability
DEFAULT_SHARED = 48 << 10  # bytes of dynamic shared memory that a kernel has without asking
_lock = threading.Lock()
# Bytes of dynamic shared memory, of an instance that is compiled, on a device of some capability.
_allowed: dict[tuple[Code, str, int, int], int] = {}


class Device(NamedTuple):
    """What launches depend on."""

    id: int
    capability: int  # 10 * major + minor: 90 for sm_90
    processors: int
    shared: int  # bytes of shared memory that a block can ask for


def device() -> Device:
    """The current one."""
    return _device(int(cupy.cuda.Device().id))


@functools.cache
def _device(number: int) -> Device:
    found = cupy.cuda.Device(number)
    capability = int(found.compute_capability)
    if capability < OLDEST:
        raise RuntimeError(
            f"pydeform needs a CUDA device of compute capability {OLDEST / 10} or newer, got {capability / 10}"
        )
    attributes = found.attributes
    return Device(
        number, capability, int(attributes["MultiProcessorCount"]), int(attributes["MaxSharedMemoryPerBlockOptin"])
    )


def geometry(g: Any) -> Any:
    """A NamedTuple of numbers as a struct that goes to a kernel by value."""
    kind: Any = type(g)
    return _geometry(kind, g)


@functools.lru_cache(maxsize=1024)
def _geometry(kind: Any, g: Any) -> Any:
    numbers = {"int": np.int32, "double": np.float64}
    fields: Any = [
        (name, numbers[field.kind], (len(value),) if field.is_array else ())
        for (name, field), value in zip(c_fields(kind).items(), g, strict=True)
    ]
    struct = np.array([tuple(g)], dtype=np.dtype(fields, align=True))
    struct.flags.writeable = False
    return struct


def kernel(code: Code, expression: str, shared: int = 0) -> Any:
    """The compiled instance on the current device, allowed at least `shared` bytes of dynamic shared memory."""
    on = device()
    own = code, expression, on.id, on.capability
    if shared <= _allowed.get(own, -1):  # nobody waits here while others compile
        return _kernel(code, expression, on)
    with _lock:  # two threads would compile it twice
        function = _kernel(code, expression, on)
        # All plans of an instance have one function, and the driver keeps one limit for it: it must only grow.
        if shared > _allowed.setdefault(own, DEFAULT_SHARED):
            function.max_dynamic_shared_size_bytes = _allowed[own] = shared
        return function


@functools.cache
def _kernel(code: Code, expression: str, _on: Device) -> Any:
    if "Wgmma" in expression:
        return sm_90a.kernel(source(code), expression)
    # CuPy knows best what this NVRTC can compile for this device.
    module = cupy.RawModule(code=source(code), options=("-std=c++17",), name_expressions=(expression,))
    return module.get_function(expression)


def launch(function: Any, grid: tuple[int, ...], block: int, arguments: tuple[Any, ...], shared: int = 0) -> None:
    """On the current stream. A grid without blocks is not launched: CuPy would make it one block."""
    if min(grid) > 0:
        function(grid, (block,), arguments, shared_mem=shared)


class Launch:
    """A launch of which all is decided but the arrays: these come first among the kernel's parameters."""

    def __init__(
        self, code: Code, expression: str, grid: tuple[int, ...], block: int, *numbers: Any, shared: int = 0
    ) -> None:
        self._function = kernel(code, expression, shared)
        self._grid, self._block, self._shared = grid, block, shared
        self._numbers = tuple(geometry(n) if isinstance(n, tuple) else n for n in numbers)

    def __call__(self, *arrays: Any) -> None:
        launch(self._function, self._grid, self._block, (*arrays, *self._numbers), self._shared)
