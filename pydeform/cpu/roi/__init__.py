"""RoI pooling on NumPy arrays, every operator by the same kernels, which differ by the rules in their geometry.

What a bin reads is listed once for all of its channels, as rows times columns in which neighbouring points share
pixels; the input is copied to channels-last, unless few boxes or classes of few channels make that a waste. Backward
gives every gradient one owner, so that results are always deterministic. Kernels cite docs/math/roi.md.

Which problem takes which way, and why:

- means of classes of at least four channels (`mean`): a slice or block of the channels is copied to channels-last, and
  each bin of each box sums runs of whole vectors of them
- means of classes of fewer (`plan.has_few_channels`, `planes`): each channel in its plane, through all boxes of an
  image, since a pixel would fill a small part of a vector
- the largest pixel or point of a bin (`largest`): as `mean`, but candidates are compared, not summed
- the gradient of boxes (`edges`): box by box, as `mean` or `largest` find what a bin reads, whatever the channels
- few boxes on a large image (`plan.prefers_planes`): each of these ways, but pixels are gathered from the image as it
  lies, since the copy would be most of the work

What they share: `plan` decides, `records` names what there is, `boxes` and `bins` say where a box and each of its bins
lie and what they read on an axis (`surface`: where that is all there is), `rotated` what bins of turned boxes read,
`offsets` moves bins, `lists` lists what some bins read, `copies` turns channels.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from pydeform.cpu.core.memory import compute_dtype, contiguous, empty, to_result
from pydeform.cpu.roi import edges, largest, mean, planes
from pydeform.cpu.roi.offsets import sum_by_part
from pydeform.cpu.roi.plan import (
    gathers_pixels,
    given_arrays,
    has_few_channels,
    prefers_planes,
    size_of_lists,
)
from pydeform.cpu.roi.records import Gradients, Kind


def _way(g: Any) -> ModuleType:
    return largest if g.is_max else planes if has_few_channels(g) else mean


def forward(arrays: Any, g: Any) -> Any:
    input, boxes, offset, mask = arrays
    dtype = compute_dtype(input.dtype)
    output = empty((g.boxes, g.out_channels, g.pooled_h * g.pooled_w), dtype)
    if g.boxes:
        gathers = gathers_pixels(input, g, dtype)
        given = given_arrays(input, boxes, offset, mask, g, dtype, gathers)
        slots, listed = size_of_lists(g, given.boxes)
        _way(g).forward(given, output, Kind(g, dtype, slots, listed, gathers, offset is not None, mask is not None))
    return to_result(output, input.dtype, (g.boxes, g.out_channels, g.pooled_h, g.pooled_w))


def backward(grad_output: Any, arrays: Any, g: Any, needs: Any, **_options: bool) -> dict[str, Any]:
    input, boxes, offset, mask = arrays
    dtype = compute_dtype(input.dtype)
    bins = g.pooled_h * g.pooled_w
    need_input, need_dots = "input" in needs, "offset" in needs or "mask" in needs
    has_offset, has_mask = offset is not None, mask is not None
    gathers = gathers_pixels(input, g, dtype)
    # Zeros that are never touched cost nothing; with channels last every pixel is written.
    make = np.zeros if has_few_channels(g) or gathers or g.boxes == 0 else empty
    with_dots = g.boxes if need_dots else 0
    grads = Gradients(
        contiguous(grad_output, dtype, (g.boxes, g.out_channels, bins)),
        make((g.batch, g.in_channels, g.in_h * g.in_w) if need_input else (0, 1, 1), dtype),
        empty((with_dots if has_offset else 0, g.classes, 2, bins), dtype),
        empty((with_dots, g.classes, bins), dtype),
    )
    if g.boxes and (need_input or need_dots):
        # Where only the input's gradient is wanted, a mean needs none of the input's numbers.
        given = given_arrays(input, boxes, offset, mask, g, dtype, gathers, need_dots or bool(g.is_max))
        slots, listed = size_of_lists(g, given.boxes)
        kind = Kind(g, dtype, slots, listed, gathers, has_offset, has_mask, need_input, need_dots)
        _way(g).backward(given, grads, kind)
    grad_boxes = np.zeros((g.boxes, 5) if "boxes" in needs else (0, 5), dtype)
    if len(grad_boxes):
        gathers = prefers_planes(g, dtype)
        given = given_arrays(input, boxes, offset, mask, g, dtype, gathers)
        slots, listed = size_of_lists(g, given.boxes)
        kind = Kind(g, dtype, slots, listed, gathers, has_offset, has_mask)
        edges.backward(given, edges.BoxGradients(grads.output, grad_boxes), kind)
    taken = {
        "input": (grads.input, (g.batch, g.in_channels, g.in_h, g.in_w)),
        "offset": (sum_by_part(grads.moves, g), (g.boxes, 2 * g.classes, g.part_h, g.part_w)),
        "mask": (grads.mask.sum(axis=1), (g.boxes, 1, g.pooled_h, g.pooled_w)),
        "boxes": (grad_boxes, (g.boxes, 5)),
    }
    return {
        name: to_result(grad, getattr(arrays, name).dtype, shape) if name in needs else None
        for name, (grad, shape) in taken.items()
    }
