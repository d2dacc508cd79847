"""Arrays choose the backend: NumPy arrays the CPU, CuPy arrays CUDA. The only place that imports one."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any

import numpy as np


def backend_for(op: str, module: str, arrays: dict[str, Any]) -> ModuleType:
    """The twin of operator `op` in the file `module` of the backend that all `arrays` belong to."""
    kinds = {name: type(a).__module__.partition(".")[0] for name, a in arrays.items() if a is not None}
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{name} is {kind}" for name, kind in kinds.items())
        raise TypeError(f"{op}: all arrays must be on one device, got {listed}")
    package = "cpu" if all(isinstance(a, np.ndarray) for a in arrays.values() if a is not None) else "cuda"
    if importlib.util.find_spec(f"pydeform.{package}.{module}") is None:
        raise NotImplementedError(f"{op}: not available on {package} yet")
    return importlib.import_module(f"pydeform.{package}.{module}")
