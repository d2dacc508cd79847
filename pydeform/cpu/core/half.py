"""float16 to float32 and back, in integer arithmetic that compiles to vector instructions on every processor.

NumPy gives the same bits, but takes up to 200 times as long where values are subnormal, as small gradients are: each
of them raises a flag of the processor.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pydeform.cpu.core.jit import Kernel

U4, F4 = np.uint32, np.float32
SIGN, MANTISSA, INFINITE = U4(0x8000), U4(0x3FF), U4(0x7C00)  # of float16
INFINITE_32, MAGNITUDE_32 = U4(0x7F800000), U4(0x7FFFFFFF)
SHIFT, SIGN_SHIFT, ONE = U4(13), U4(16), U4(1)  # bits from float16's mantissa to float32's, from sign to sign
REBIAS = U4((127 - 15) << 23)
LEAST_NORMAL, LEAST = F4(2.0**-14), F4(2.0**-24)
HALF, PER_LEAST = F4(0.5), F4(2.0**24)


def widen(half: Any, wide: Any) -> None:
    """wide[...] = half; float16 and float32, both contiguous and flat."""
    _run(_widen, half.view(np.uint16), wide.view(np.uint32))


def round_to_half(wide: Any, half: Any) -> None:
    """half[...] = wide, rounded to nearest, ties to even; float32 and float16, both contiguous and flat."""
    _run(_round, wide.view(np.uint32), wide, half.view(np.uint16))


def _run(kernel: Kernel, *arguments: Any) -> None:
    """In the calling thread alone: memory is the limit, not arithmetic."""
    if call := kernel.prepare("", arguments):
        call(*arguments)


@Kernel
def _widen(half: Any, bits: Any) -> None:
    for i in range(half.size):
        h = U4(half[i])
        mantissa = h & MANTISSA
        exponent = U4(h >> U4(10)) & U4(31)
        rest = U4(U4(h & U4(0x7FFF)) << SHIFT)
        normal = U4(rest + REBIAS) if exponent < U4(31) else U4(rest | INFINITE_32)
        sign = U4(U4(h & SIGN) << SIGN_SHIFT)
        subnormal = F4(F4(np.int32(mantissa)) * LEAST).view(np.uint32)
        bits[i] = U4(sign | (normal if exponent > U4(0) else subnormal))


@Kernel
def _round(bits: Any, wide: Any, half: Any) -> None:
    for i in range(wide.size):
        x = bits[i]
        magnitude = U4(x & MAGNITUDE_32)
        size = abs(wide[i])
        # Between 1/2 and 1 a float32 is a multiple of 2**-24, as subnormals of float16 are: adding 1/2 rounds to one.
        subnormal = U4(np.int32(((min(size, LEAST_NORMAL) + HALF) - HALF) * PER_LEAST))
        odd = U4(U4(magnitude >> SHIFT) & ONE)
        normal = U4(U4(U4(magnitude - REBIAS) + U4(U4(0xFFF) + odd)) >> SHIFT)
        finite = min(normal, INFINITE) if size >= LEAST_NORMAL else subnormal
        # The upper bits of a NaN, as in NumPy; without any it would be infinite.
        nan = U4(INFINITE | max(U4(U4(magnitude >> SHIFT) & MANTISSA), ONE))
        result = finite if magnitude <= INFINITE_32 else nan
        half[i] = np.uint16(result | U4(U4(x >> SIGN_SHIFT) & SIGN))
