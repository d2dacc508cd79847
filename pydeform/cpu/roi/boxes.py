"""Where the boxes of a call lie (docs/math/roi.md, eq. 1), and in what order they are gone through."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pydeform.cpu.core.jit import inline, inline_always
from pydeform.cpu.core.parallel import claim, finish, wait_for
from pydeform.cpu.roi.bins import extent, worse
from pydeform.cpu.roi.rotated import turn_box

BOXES_AT_ONCE = 256  # of a unit of `find_boxes`


class Box(NamedTuple):
    begin_y: Any
    size_y: Any
    begin_x: Any
    size_x: Any
    state: int


def by_image(boxes: Any, batch: int) -> tuple[Any, Any]:
    """The boxes' numbers, image by image and in order, and where each image begins among them."""
    index = boxes[:, 0].astype(np.int64)
    order = np.argsort(index, kind="stable")
    return order, np.searchsorted(index[order], np.arange(batch + 1))


@inline
def find_boxes(counters: Any, phase: int, boxes: Any, scratch: Any, g: Any) -> None:
    """A phase: begin and size of every box along y, then along x, and its state; if boxes are turned, how."""
    extents, states = scratch.extents, scratch.states
    units = -(-g.boxes // BOXES_AT_ONCE)
    unit = claim(counters, phase)
    while unit < units:
        for r in range(unit * BOXES_AT_ONCE, min((unit + 1) * BOXES_AT_ONCE, g.boxes)):
            if scratch.turns is not None:
                states[r] = turn_box(boxes, r, extents, scratch.turns, g)
            else:
                extents[r, 0], extents[r, 1], state_y = extent(boxes, r, 2, g)
                extents[r, 2], extents[r, 3], state_x = extent(boxes, r, 1, g)
                states[r] = worse(state_y, state_x)
        finish(counters, phase)
        unit = claim(counters, phase)
    wait_for(counters, phase, units)


@inline_always
def found_box(extents: Any, states: Any, r: int) -> Box:
    """Box r as `find_boxes` has found it; extents and states are pointers."""
    k = 4 * r
    return Box(extents[k], extents[k + 1], extents[k + 2], extents[k + 3], states[r])
