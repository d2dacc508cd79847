"""RoI pooling on CuPy arrays, every operator by the same kernels, which differ by the rules in their geometry.

Backward gives every gradient one owner, without atomics, so that results are always deterministic and `deterministic`
changes nothing. Nothing waits for the device. Kernels cite docs/math/roi.md.

Which problem takes which way, and why:

- means (`pool_bins`, `bin_gradients`): a warp lists the rows and columns that a bin reads, once for all channels, of
  which a channels-last copy of the input gives 16 bytes at a time
- means of classes of few channels, or of few boxes on a large input (`plan.is_direct`; `pool_direct`,
  `bin_gradients_direct`): a thread for each result on the input as it lies, since chunks would be mostly empty, or the
  copy most of the work
- the largest pixel or point of a bin (`launches.find_largest`): likewise a thread for each result; backward finds the
  winners again
- means in turned boxes (`rotated`): likewise by warps or by threads, but points are listed, one by one
- the input's gradient (`gradients.input_gradient`), of all of these: a block owns a tile of pixels and looks for the
  boxes that reach it
- the gradient of boxes (`gradients.box_gradient`): the means and maxima above once more, for the four edges of each
  bin, then summed by box
- more images than a copy may have bytes for (`launches.copies_of`): some of them at a time

`plan` decides and needs no device; `core` has what is not about boxes: sources, launches, copies.
"""

from __future__ import annotations

from typing import Any

import cupy

from pydeform.cuda.core.copies import contiguous, to_channels_last
from pydeform.cuda.core.launch import geometry
from pydeform.cuda.core.numbers import own_types
from pydeform.cuda.roi.gradients import bin_gradients, box_gradient, input_gradient
from pydeform.cuda.roi.launches import code_of, find_largest, launch_threads, pool_by_warps
from pydeform.cuda.roi.plan import check_size, is_direct, pitch_of
from pydeform.cuda.roi.rotated import pool_turned


def forward(arrays: Any, g: Any) -> Any:
    check_size(g)
    with arrays.input.device:
        input, boxes, offset, mask = contiguous(*arrays)
        output = cupy.empty((g.boxes, g.out_channels, g.pooled_h, g.pooled_w), input.dtype)
        if g.turn:
            pool_turned(input, boxes, g, output)
        elif g.is_max:
            find_largest(input, boxes, offset, mask, g, output, None)
        elif is_direct(g):
            arguments = (input, boxes, offset, mask, output, geometry(g))
            suffix = own_types(input, boxes, offset)
            launch_threads("pool_direct", input, g, output.size, arguments, offset, suffix=suffix)
        else:
            pool_by_warps(input, boxes, offset, mask, g, output)
        return output


def backward(grad_output: Any, arrays: Any, g: Any, needs: Any, **_options: bool) -> dict[str, Any]:
    check_size(g)
    with arrays.input.device:
        grad_output, input, boxes, offset, mask = contiguous(grad_output, *arrays)
        grad_input, grad_boxes, grad_offset, grad_mask = (
            cupy.empty(array.shape, array.dtype) if name in needs and array is not None else None
            for name, array in (("input", input), ("boxes", boxes), ("offset", offset), ("mask", mask))
        )
        pitch = g.out_channels // g.classes if is_direct(g) else pitch_of(g, input)
        # (R, bins, classes, pitch), and one row of zeros that nothing reads
        grads = to_channels_last(code_of(g), grad_output, g.out_channels // g.classes, pitch)
        if grad_input is not None:
            input_gradient(grads, input, boxes, offset, mask, g, pitch, grad_input)
        if grad_offset is not None or grad_mask is not None:
            bin_gradients(grads, input, boxes, offset, mask, g, pitch, grad_offset, grad_mask)
        if grad_boxes is not None:
            box_gradient(grads, input, boxes, g, pitch, grad_boxes)
        return {"input": grad_input, "boxes": grad_boxes, "offset": grad_offset, "mask": grad_mask}
