"""What a RoI problem consists of: its arrays, its memory, and what is decided before the arrays are known."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydeform.cpu.core.memory import Workspace


class Given(NamedTuple):
    """What a caller gave, in the kernels' shapes; an array that is absent or not read is empty."""

    input: Any
    boxes: Any
    offset: Any
    mask: Any
    planes: Any  # where the input lies, if its pixels are gathered
    order: Any  # the boxes' numbers, image by image,
    starts: Any  # and where each image begins among them


class Gradients(NamedTuple):
    """The output's gradient, which is given, and the gradients that are asked for; others are empty."""

    output: Any
    input: Any
    moves: Any  # (box, class, axis, bin): by the offset of each bin, as if it had its own
    mask: Any  # (box, class, bin): each class's part of the mask's gradient


class Scratch(NamedTuple):
    """A call's own memory, from `tiles` on each thread's; empty where a way does not use it."""

    extents: Any  # of boxes: begin and size along y, then along x,
    states: Any  # and whether they are sound
    image: Any  # copies with channels last: see copies.py
    grad_image: Any
    grads: Any
    turns: Any  # of boxes: see rotated.Turn; None if they are not turned
    tiles: Any  # results of some bins: (bin, channel)
    winners: Any  # which pixel or point of a bin is the largest
    starts: Any  # from here on: see lists.Lists
    index: Any
    weights: Any
    counts: Any
    entries: Any
    places: Any
    products: Any
    ends: Any  # beside the derivatives in `weights`: see edges.py
    own: Any
    offsets: Any
    pixels: Any


class Tables(NamedTuple):
    """How bins and channels are cut up."""

    bins: Any  # see `bins_table`
    blocks: Any  # of a class's channels: first, channels, width in whole vectors, and width of those before
    no_shift: Any  # is added to every output


class Plan(NamedTuple):
    """All that kernels know beside the geometry. None of it changes a bit of any result."""

    gathers: int  # 1: pixels are gathered from the input, and its gradient added up, as they lie; 0: from copies
    per_class: int  # channels of a class
    has_offset: int
    has_mask: int
    need_input: int
    need_dots: int  # for offset and mask
    width: int = 0  # of a class in a copy, blocks rounded up to vectors
    tile_bins: int = 0  # bins whose results are turned to channels first at once
    copies: int = 0  # 1: something reads a copy of the output's gradient
    blocks_of_unit: int = 0  # blocks of the input's gradient that one thread adds up together
    parts: int = 0  # an image's boxes are split into so many when there are too few planes to keep all threads busy
    units: int = 0  # into which the planes, or their parts, are divided; some may be empty


class Kind(NamedTuple):
    """What a plan depends on beside the number of threads."""

    g: Any
    dtype: Any
    slots: int  # of each axis in a thread's lists,
    listed: int  # and their entries
    gathers: bool
    has_offset: bool
    has_mask: bool
    need_input: bool = False
    need_dots: bool = False


class Prepared(NamedTuple):
    """All that is decided before the arrays are known."""

    phases: int
    workspace: Workspace
    tables: Tables
    plan: Plan
