"""What bounds each kernel that a profiled run launched: passes over L1's data path, tensor cores, bytes of L2."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from tests.cuda_emulation import build

PASS = 128  # bytes that the data path moves in a cycle
MOST_KERNELS = 1024


class Traffic(NamedTuple):
    """Of all launches of one kernel, on all multiprocessors together. How L1 is modelled, counters.cpp says."""

    launches: int
    shared_passes: int  # with conflicts; copies to shared memory among them
    global_passes: int  # of loads, stores and adds
    operand_bytes: int  # that wgmma reads from shared memory
    multiply_adds: int  # of tensor cores on 16-bit types
    tf32_multiply_adds: int
    l2_bytes: int

    @property
    def data_path_cycles(self) -> int:
        """Of one multiprocessor, if one path serves L1, shared memory and the operands of wgmma."""
        return self.shared_passes + self.global_passes + self.operand_bytes // PASS


class _KernelCounts(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), *((name, ctypes.c_int64) for name in Traffic._fields))


def take() -> dict[str, Traffic]:
    """By the kernel's name, since the last call."""
    counts = (_KernelCounts * MOST_KERNELS)()
    found = build.load(build.runtime()).emulation_take_totals(counts, MOST_KERNELS)
    return {one.name.decode(): Traffic(*(getattr(one, name) for name in Traffic._fields)) for one in counts[:found]}


def added(a: Traffic, b: Traffic) -> Traffic:
    return Traffic(*map(sum, zip(a, b, strict=True)))
