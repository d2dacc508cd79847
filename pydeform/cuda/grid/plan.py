"""How sampling goes on a device: which sizes fit, and how many threads share a query. Nothing here needs one."""

from __future__ import annotations

import functools
import math

from pydeform import _checks
from pydeform._grid_geometry import BICUBIC, NEAREST, GridGeometry
from pydeform.cuda.core import sizes
from pydeform.cuda.core.numbers import ceil_div

THREADS = 256
WARPS_SHARED = 32  # of a multiprocessor: with fewer, threads that share a query take some of its channels each
MOST_SLICES = 32  # threads of a block that share a query: as many as leave eight neighbours, a sector of float32
MOST_ROWS = 65535  # of a launch grid
GATHERED_CHANNELS = 4  # of a thread of gather_taps


@functools.lru_cache(maxsize=256)
def check_size(op: str, g: GridGeometry) -> None:
    """Pixels and numbers of one image are counted in an int, those of all images in whatever they need."""
    sizes.check_fields(op, g)
    numbers = g.queries * len(g.in_size)
    if numbers > _checks.MOST:
        raise ValueError(
            f"{op}: there must be at most {_checks.MOST} numbers in an image's grid on CUDA, got {numbers}"
        )


def taps_of(g: GridGeometry) -> int:
    """Pixels that a query reads of a channel."""
    of_axis = 1 if g.mode == NEAREST else 4 if g.mode == BICUBIC else 2
    return int(of_axis ** len(g.in_size))


def rows_of(g: GridGeometry, processors: int) -> int:
    """Threads of a query, each with a part of the channels, where the queries of all images are few for the device."""
    return min(_shares(g.batch * g.queries, g.channels, processors), MOST_ROWS)


def slices_of(g: GridGeometry, processors: int) -> int:
    """The same where the threads add up what they find: a power of two, by the queries of one image.

    How many images there are does not matter, so that an image's sums have one order in every batch.
    """
    return 1 << min(_shares(g.queries, g.channels, processors), MOST_SLICES).bit_length() - 1


def _shares(queries: int, channels: int, processors: int) -> int:
    return max(1, min(channels, ceil_div(32 * WARPS_SHARED * processors, queries)))


def queries_at_once(g: GridGeometry, sums: int) -> int:
    """Whose taps are sorted together, each with its number and weight, and its part of the pixels' bins."""
    taps = taps_of(g)
    of_query = taps * (4 + sums) + ceil_div(8 * math.prod(g.in_size), g.queries)
    return max(1, min(g.batch * g.queries, sizes.WORKSPACE // of_query, _checks.MOST // taps))
