"""Arrays choose the backend: NumPy arrays the CPU, CuPy arrays CUDA. The only place that imports one."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Any

import numpy as np

from pydeform import _background


def backend_for(op: str, module: str, arrays: dict[str, Any]) -> ModuleType:
    """The twin of operator `op` in the file `module` of the backend that all `arrays` belong to."""
    on_cpu = [isinstance(array, np.ndarray) for array in arrays.values() if array is not None]
    if all(on_cpu):
        return twin(op, "cpu", module)
    if any(on_cpu):
        kinds = {n: type(a).__module__.partition(".")[0] for n, a in arrays.items() if a is not None}
        listed = ", ".join(f"{name} is {kind}" for name, kind in kinds.items())
        raise TypeError(f"{op}: all arrays must be on one device, got {listed}")
    devices = {name: int(array.device.id) for name, array in arrays.items() if array is not None}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} is on cuda:{device}" for name, device in devices.items())
        raise TypeError(f"{op}: all arrays must be on one device, got {listed}")
    return twin(op, "cuda", module)


@functools.cache
def twin(op: str, package: str, module: str) -> ModuleType:
    return _background.complete(functools.partial(_import, op, package, module))


def _import(op: str, package: str, module: str) -> ModuleType:
    if importlib.util.find_spec(f"pydeform.{package}.{module}") is None:
        raise NotImplementedError(f"{op}: not available on {package} yet")
    return importlib.import_module(f"pydeform.{package}.{module}")
