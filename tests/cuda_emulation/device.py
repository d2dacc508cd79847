"""A stand-in for CuPy on the emulated device: `install()` makes `import cupy` find it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np

from tests.cuda_emulation import arrays, build, launch, programs, streams, traffic
from tests.cuda_emulation.launch import Counter, EmulationError, RawModule
from tests.cuda_emulation.streams import configuration

__all__ = ["Counter", "EmulationError", "RawModule", "cupy", "free", "install", "settings", "uninstall"]


class Run:
    """What `settings(profile=True)` counted."""

    def __init__(self) -> None:
        self._counters: dict[tuple[str, str, str], Counter] = {}
        self._kernels: dict[str, traffic.Traffic] = {}

    def counters(self) -> dict[tuple[str, str, str], Counter]:
        """By (file:line, "read" | "write" | "atomic", "global" | "shared"); available inside and after the context."""
        for key, new in launch.take_counters().items():
            old = self._counters.get(key)
            self._counters[key] = Counter(*map(sum, zip(new, old, strict=True))) if old else new
        return self._counters

    def kernels(self) -> dict[str, traffic.Traffic]:
        """By the kernel's name, likewise."""
        for name, new in traffic.take().items():
            self._kernels[name] = traffic.added(new, self._kernels[name]) if name in self._kernels else new
        return self._kernels


@contextmanager
def settings(**chosen: Any) -> Iterator[Run]:
    """check, schedule (0 ascending, 1 descending, n random), profile, capability, processors, devices."""
    unknown = set(chosen) - {name for name in vars(streams.Configuration) if not name.startswith("_")}
    if unknown:
        raise TypeError(f"no such setting: {', '.join(sorted(unknown))}")
    before = dict(vars(configuration))
    vars(configuration).update(chosen)
    run = Run()
    try:
        yield run
    finally:
        if configuration.profile:
            run.counters()
            run.kernels()
        vars(configuration).clear()
        vars(configuration).update(before)


def free(array: arrays.ndarray) -> None:
    """Gives the array's memory back, as when the last owner of foreign memory lets go: further use is an error."""
    array._memory.free()


def _is_available() -> bool:
    return True


def _device_properties(device: int) -> dict[str, Any]:
    with streams.Device(device) as entered:
        shared = entered.attributes["MaxSharedMemoryPerBlockOptin"]
        return {
            "name": b"emulated device",
            "major": int(entered.compute_capability[:-1]),
            "minor": int(entered.compute_capability[-1]),
            "multiProcessorCount": configuration.processors,
            "sharedMemPerBlock": 48 * 1024,
            "sharedMemPerBlockOptin": shared,
            "totalGlobalMem": 8 << 30,
            "warpSize": 32,
        }


def _runtime_module() -> ModuleType:
    module = ModuleType("cupy.cuda.runtime")
    module.getDeviceCount = lambda: configuration.devices  # type: ignore[attr-defined]
    module.getDevice = lambda: streams.Device().id  # type: ignore[attr-defined]
    module.setDevice = lambda device: streams.Device(device).use()  # type: ignore[attr-defined]
    module.getDeviceProperties = _device_properties  # type: ignore[attr-defined]
    module.runtimeGetVersion = lambda: 13000  # type: ignore[attr-defined]
    module.driverGetVersion = lambda: 13000  # type: ignore[attr-defined]
    module.deviceSynchronize = lambda: arrays.refuse_synchronisation("deviceSynchronize")  # type: ignore[attr-defined]
    return module


def _modules() -> dict[str, ModuleType]:
    top, cuda, compiler = ModuleType("cupy"), ModuleType("cupy.cuda"), ModuleType("cupy.cuda.compiler")
    compiler.CompileException = build.CompileException  # type: ignore[attr-defined]
    names = ("Device", "Event", "ExternalStream", "Stream", "get_current_stream", "get_elapsed_time", "using_allocator")
    vars(cuda).update({name: getattr(streams, name) for name in names})
    vars(cuda).update({name: getattr(arrays, name) for name in ("MemoryPointer", "PythonFunctionAllocator")})
    vars(cuda).update(runtime=_runtime_module(), compiler=compiler, nvrtc=programs, is_available=_is_available)
    functions = (
        *("array", "asarray", "ascontiguousarray", "asnumpy", "cumsum", "empty", "empty_like", "from_dlpack", "full"),
        *(
            "may_share_memory",
            "ndarray",
            "ones",
            "shares_memory",
            "zeros",
            "zeros_like",
            "arange",
            "concatenate",
            "exp",
        ),
        *("log", "maximum", "minimum", "sign", "sqrt", "square", "tanh", "where"),
    )
    vars(top).update({name: getattr(arrays, name) for name in functions})
    dtypes = ["bool_", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64))]
    dtypes += ["float16", "float32", "float64"]
    vars(top).update({name: getattr(np, name) for name in (*dtypes, "dtype", "newaxis", "inf", "nan", "pi")})
    vars(top).update(cuda=cuda, RawModule=RawModule, is_available=_is_available, __version__="14.2.0", __path__=[])
    vars(cuda).update(__path__=[])
    modules = {module.__name__: module for module in (top, cuda, cuda.runtime, compiler)}
    for name, module in modules.items():
        module.__spec__ = ModuleSpec(name, None, is_package=hasattr(module, "__path__"))
    return modules


stand_ins = _modules()
cupy = stand_ins["cupy"]


def install() -> None:
    """From now on `import cupy` gives the stand-in. Not beside the real one: its arrays are another class."""
    present = sys.modules.get("cupy")
    if present is not None and present is not cupy:
        raise RuntimeError("the real CuPy is imported already")
    sys.modules.update(stand_ins)
    os.environ["CUPY_CACHE_DIR"] = str(build.cache_folder())  # for machine code on disk


def uninstall() -> None:
    for name, module in stand_ins.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]
