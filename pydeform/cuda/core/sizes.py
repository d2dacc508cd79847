"""Limits that the families share: what fits into a kernel's integers, what a copy may cost, what it needs."""

from __future__ import annotations

from typing import Any

from pydeform import _checks

DIRECT_CHANNELS = 8  # with fewer channels in a group a tile would be mostly zeros: then threads work by themselves
SMALL_COPY = 1 << 18  # values of an image that are copied for however few results
COPIES = 256 << 20  # bytes of channels-last copies at a time, of one image at least
WORKSPACE = 64 << 20  # bytes for partial weight gradients, and for the columns of a deterministic input gradient
MOST_CELLS = 2**31 - 1  # between the pixels of one image, and around them: counted in an int


def check_fields(op: str, g: Any) -> None:
    """The integers of a geometry fit into those of its struct."""
    for name, value in g._asdict().items():
        if isinstance(value, int) and value > _checks.MOST:
            raise ValueError(f"{op}: {name} must be at most {_checks.MOST} on CUDA, got {value}")
