"""Offsets that move bins (docs/math/roi.md, eq. 2), and their gradients with that of the mask (eq. 8 and 9)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pydeform.cpu.core.jit import inline_always
from pydeform.cpu.roi.bins import BROKEN, SOUND, state_of, worse
from pydeform.cpu.roi.plan import bins_of


@inline_always
def move_bin(slot: int, box: Any, r: int, cls: int, at: Any, offset: Any, bins: Any, lists: Any, g: Any) -> None:
    """Where its offset puts a bin, that of box r in row and column of cursor `at`, into slot `slot` of each axis."""
    real = offset.dtype.type
    part = bins[at.y].part + bins[g.pooled_h + at.x].part
    offset_y, offset_x = offset[r, cls, 1, part], offset[r, cls, 0, part]
    scale = real(g.offset_scale)
    move_y, move_x = offset_y * scale * box.size_y, offset_x * scale * box.size_x  # eq. 2
    state = box.state
    if state != BROKEN:
        state = worse(state, state_of(offset_y, offset_x, move_y, move_x))
    lists.moved[slot] = state
    sound = state == SOUND
    slot_x = lists.of_axis + slot
    bin_h, bin_w = box.size_y / real(g.pooled_h), box.size_x / real(g.pooled_w)
    lists.starts[slot] = box.begin_y + real(at.y) * bin_h + move_y if sound else real(0)
    lists.starts[slot_x] = box.begin_x + real(at.x) * bin_w + move_x if sound else real(0)
    lists.sizes[slot] = bin_h if sound else real(0)
    lists.sizes[slot_x] = bin_w if sound else real(0)


@inline_always
def write_moves(
    bin_: Any, cls: int, sums: Any, scale: Any, mask: Any, grads: Any, extents: Any, g: Any, p: Any
) -> None:
    """One bin's parts of eq. 8 and 9. `sums`: of values, and of slopes along y and x, times the output's gradient."""
    real = extents.dtype.type
    value, along_y, along_x = sums
    r, i = bin_.r, bin_.i
    if bin_.listed == 0 and bin_.state != BROKEN:
        grads.mask[r, cls, i] = 0
        if p.has_offset:
            grads.moves[r, cls, 0, i] = grads.moves[r, cls, 1, i] = 0
        return
    grads.mask[r, cls, i] = value * scale
    if p.has_offset:
        if p.has_mask:
            scale *= mask[r, i]
        scale *= real(g.offset_scale)
        # Of a broken bin `scale` is NaN, and so are both axes, as in eq. 9; its sizes do not matter.
        size_y = extents[r, 1] if bin_.state == SOUND else real(1)
        size_x = extents[r, 3] if bin_.state == SOUND else real(1)
        grads.moves[r, cls, 0, i] = along_x * scale * size_x
        grads.moves[r, cls, 1, i] = along_y * scale * size_y


def sum_by_part(moves: Any, g: Any) -> Any:
    """One offset cell may move several bins: sum their gradients, in the bins' order."""
    if (g.part_h, g.part_w) == (g.pooled_h, g.pooled_w) or not moves.size:
        return moves
    parts = g.part_h * g.part_w
    grad_offset = np.zeros((math.prod(moves.shape[:3]), parts), moves.dtype)
    table = bins_of(g)["part"]
    part_of_bin = np.add.outer(table[: g.pooled_h], table[g.pooled_h :]).reshape(-1)
    place = parts * np.arange(len(grad_offset))[:, None] + part_of_bin
    np.add.at(grad_offset.reshape(-1), place.reshape(-1), moves.reshape(-1))
    return grad_offset
