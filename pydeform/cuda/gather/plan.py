"""How a gather goes on a device: bytes of a load, lanes of an item, the table of samples. Nothing here needs one."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from pydeform import _checks
from pydeform._gather_geometry import Gather, GatherGeometry, SampleTable
from pydeform.cuda.core import sizes
from pydeform.cuda.core.numbers import ceil_div, round_up

THREADS = 256
WARPS_SHARED = 24  # of a multiprocessor: with fewer, lanes that share an item take some of its samples each
MOST_COLUMNS = 2**27 - 1  # of a map: a point holds them together with four bits
DEFAULT_SHARED = 48 << 10  # bytes of shared memory that a block has without asking
WORDS = 896  # of `struct TableWords`


class Team(NamedTuple):
    """`struct Team` of gather/points.cuh."""

    lanes: int  # on channels
    team: int


class Chunk(NamedTuple):
    """`struct Chunk` of gather/cells.cuh."""

    first: int
    queries: int
    cells: int


@functools.lru_cache(maxsize=256)
def check_size(op: str, gathering: Gather) -> None:
    """Pixels and samples of one image are counted in an int, those of all images in whatever they need."""
    g = gathering.numbers
    sizes.check_fields(op, g)
    limits = {
        "pixels of an image, with a row and a column more of each map": (cells_of(gathering.samples), sizes.MOST_CELLS),
        "queries in all images": (g.batch * g.queries, _checks.MOST),
        "numbers in an image's locations": (g.number_steps[0], _checks.MOST),
        "weights in an image": (g.weight_steps[0], _checks.MOST),
        "columns in a map": (int(gathering.samples.size[1].max()), MOST_COLUMNS),
    }
    for what, (count, most) in limits.items():
        if count > most:
            raise ValueError(f"{op}: there must be at most {most} {what} on CUDA, got {count}")


def bytes_of_load(g: GatherGeometry, *arrays: Any) -> int:
    """As many as divide a group's channels, and where each array begins."""
    multiple = math.gcd(16, g.channels * arrays[0].dtype.itemsize, *(int(array.data.ptr) for array in arrays))
    return max(multiple, int(arrays[0].dtype.itemsize))


def team_of(g: GatherGeometry, per_load: int, owners: int, samples: int, processors: int) -> Team:
    """Lanes for the channels of a group, and more for its samples where the owners of an image are few for the device.

    How many images there are does not matter, so that an image's sums have one order in every batch.
    """
    lanes = min(32, 1 << (ceil_div(g.channels, per_load) - 1).bit_length())
    team = lanes
    while team < min(32, samples) and owners * team < 32 * WARPS_SHARED * processors:
        team *= 2
    return Team(lanes, team)


@functools.lru_cache(maxsize=256)
def places_of(table: SampleTable, shared: bool) -> int:
    """Places of a query that several samples, or several groups (`shared`), have; equally many follow one another."""
    samples, places = len(table.number), len(np.unique(table.number))
    if places == samples and not shared:
        return 0
    assert np.array_equal(table.number, np.repeat(table.number[:: samples // places], samples // places))
    return places


class Rows(NamedTuple):
    """How a block of `fused_gradients` takes rows, each a query and group."""

    threads: int
    team: Team
    queries: int
    shared: int  # bytes of shared memory


def rows_of(g: GatherGeometry, team: Team, of_sample: int, sums: int) -> Rows:
    """`of_sample`: bytes that stay of each sample of a row; `sums`: of each number of a query's reference points.

    Fewer rows at a time where they have many samples; still fewer, some groups of a query, where a query's do not fit.
    """

    def shared(threads: int, team: Team, queries: int) -> int:
        return threads // team.team * g.samples * of_sample + queries * g.reference_levels * g.reference_numbers * sums

    threads = THREADS
    while shared(threads, team, 1) > DEFAULT_SHARED and threads > 32:
        threads //= 2
    while shared(threads, team, 1) > DEFAULT_SHARED and team.team < 32:
        team = Team(team.lanes, 2 * team.team)
    queries = max(1, threads // team.team // g.groups)
    if queries == 1:  # no more rows than a query has
        threads = min(threads, round_up(g.groups * team.team, 32))
    while queries > 1 and shared(threads, team, queries) > DEFAULT_SHARED:
        queries -= 1
    return Rows(threads, team, queries, shared(threads, team, queries))


# The table ------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def maps_of(table: SampleTable) -> tuple[np.ndarray, ...]:
    """The level, size, first pixel and first cell of each map, in the order of their pixels."""
    level, which = np.unique(table.level, return_index=True)
    size = table.size[:, which]
    cells = np.cumsum((size + 1).prod(axis=0))
    return level, size, table.first_pixel[which], np.concatenate([[0], cells])


def cells_of(table: SampleTable) -> int:
    """Between the pixels of an image's maps, and around them."""
    return int(maps_of(table)[3][-1])


def row_type(dtype: Any) -> np.dtype:
    """`struct SampleRow` of gather/points.cuh for coordinates of that type."""
    integers = [("level", np.int32), ("size", np.int32, 2), *((name, np.int32) for name in INTEGERS), ("_", np.int32)]
    return np.dtype(integers + [(name, dtype, 2) for name in FLOATS], align=True)


INTEGERS = "first_pixel", "first_cell", "number", "weight"
FLOATS = "shift", "scale", "divisor"


@functools.lru_cache(maxsize=256)
def words_of(table: SampleTable, dtype: Any) -> tuple[tuple[Any, ...], int]:
    """The rows of the samples, then those of the maps, as pieces for `fill_table`; and how many words they are."""
    level, size, first_pixel, first_cell = maps_of(table)
    samples, which = len(table.level), np.searchsorted(level, table.level)
    rows = np.zeros(samples + len(level), row_type(dtype))
    own, maps = rows[:samples], rows[samples:]
    for name in ("level", "first_pixel", "number", "weight"):
        own[name] = getattr(table, name)
    own["first_cell"] = first_cell[which]
    for name in ("size", *FLOATS):
        own[name] = getattr(table, name).T
    maps["size"], maps["first_pixel"], maps["first_cell"] = size.T, first_pixel, first_cell[:-1]
    words = rows.view(np.uint32)
    pieces = []
    for first in range(0, len(words), WORDS):
        piece = np.zeros(1, [("w", np.uint32, WORDS)])
        piece["w"][0, : len(words) - first] = words[first : first + WORDS]
        piece.flags.writeable = False
        pieces.append(piece)
    return tuple(pieces), len(words)
