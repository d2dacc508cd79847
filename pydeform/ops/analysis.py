"""Where a deformable convolution samples, and how far apart."""

from __future__ import annotations

from typing import Any


def sampling_locations(
    offset: Any, kernel_size: Any, stride: Any = 1, padding: Any = 0, dilation: Any = 1
) -> Any:
    raise NotImplementedError


def effective_dilation(offset: Any, kernel_size: Any, dilation: Any = 1) -> Any:
    raise NotImplementedError
