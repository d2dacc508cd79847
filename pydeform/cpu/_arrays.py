"""Half types to float32 and back, of NumPy arrays: the twin of cuda/_arrays.py."""

from pydeform.cpu.core.memory import rounded, widened

__all__ = ["rounded", "widened"]
