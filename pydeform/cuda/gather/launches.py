"""Launches of gather/forward.cuh, and what those of backward share with them."""

from __future__ import annotations

from typing import Any, NamedTuple

import cupy
import numpy as np

from pydeform._gather_geometry import Gather, GatherArrays
from pydeform.cuda.core.launch import device, geometry, kernel, launch
from pydeform.cuda.core.numbers import C_TYPES, ceil_div, compute_dtype, index_type, own_types
from pydeform.cuda.core.source import Code
from pydeform.cuda.gather.plan import THREADS, WORDS, Team, bytes_of_load, team_of, words_of

CODE = Code("gather")


class Given(NamedTuple):
    """A call's arrays, contiguous, and what goes with them to every kernel."""

    arrays: GatherArrays
    gathering: Gather
    table: Any

    @property
    def numbers(self) -> Any:
        return geometry(self.gathering.numbers)

    @property
    def weights(self) -> Any:
        """The array that they are in."""
        return self.arrays.locations if self.arrays.weights is None else self.arrays.weights

    def types(self, *others: Any) -> str:
        """The first template arguments of a kernel: the data's type, and that of places in it and in the others."""
        value, *rest = self.arrays
        index = index_type(value.size, *(array.size for array in (*rest, *others) if array is not None))
        return f"{C_TYPES[value.dtype.name]}, {index}"


def table_of(gathering: Gather, data: Any) -> Any:
    """The samples' rows on the device, as of the current stream."""
    pieces, words = words_of(gathering.samples, compute_dtype(data))
    table = cupy.empty((words,), np.uint32)
    for place, piece in enumerate(pieces):
        part = table[place * WORDS : (place + 1) * WORDS]
        launch(kernel(CODE, "fill_table"), (1,), THREADS, (part, piece, np.int32(part.size)))
    return table


def launch_teams(name: str, given: Given, data: Any, results: Any) -> None:
    """`gather_samples` from the value, or `scatter_samples` from the output's gradient, whichever `data` is."""
    g, itemsize = given.gathering.numbers, data.dtype.itemsize
    if name == "scatter_samples":  # a lane's sums fill what is added at once, 16 bytes of float32, so that lanes adjoin
        wide = min(bytes_of_load(g, data), 8 if itemsize == 8 else 4 * itemsize)
    else:
        wide = bytes_of_load(g, data, results)
    per_load = wide // itemsize
    team = team_of(g, per_load, g.queries * g.groups, g.samples, device().processors)
    items = g.batch * g.queries * g.groups * ceil_div(g.channels, team.lanes * per_load)
    own = own_types(given.arrays.value, given.arrays.locations, given.arrays.reference)
    launch_items(
        f"{name}<{given.types(data, results)}, {wide}{own}>",
        items,
        team,
        (data, given.arrays.locations, given.weights, given.arrays.reference, given.table, results, given.numbers),
    )


def launch_items(expression: str, items: int, team: Team, arguments: tuple[Any, ...], *more: Any) -> None:
    """A team for each item."""
    grid = (ceil_div(items, THREADS // team.team),)
    launch(kernel(CODE, expression), grid, THREADS, (*arguments, geometry(team), *more))


def launch_threads(expression: str, threads: int, arguments: tuple[Any, ...]) -> None:
    launch(kernel(CODE, expression), (ceil_div(threads, THREADS),), THREADS, arguments)
