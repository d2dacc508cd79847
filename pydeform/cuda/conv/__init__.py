"""Convolutions over one to three axes on CuPy arrays: samples go through shared memory into tensor cores, no column
buffer exists.

A plain convolution is a deformable one whose taps do not move: its offset is None, and nothing of it needs atomics. An
active one has an offset of one axis, (axes*offset_groups*K,), which is that of all images and pixels. Kernels cite
docs/math/deform_conv2d.md.

Which problem takes which way, and why:

- most (`forward_tiles`, `backward_tiles`): the image is copied once to channels-last, so that a corner is one run of
  16-byte loads, and tiles of samples are multiplied in shared memory
- few channels in a group, or few samples of a large image (`plan.is_direct`, `direct`): single threads on the arrays as
  they lie, since a tile would be mostly zeros, or the copy most of the work
- no offset: one pixel is copied for each tap, not blended; backward, every input pixel knows who read it, so its
  gradient is a forward of the output's (`plan.swapped`)
- the input's gradient where something moves: added by atomics, the fastest; for who asks for the same bits on each run,
  samples are sorted by pixel and gathered (`gather`)
- one offset of all pixels, active convolution: blocks sum its gradient over their pixels (`direct.OffsetSums`)
- few tiles for the device: the sum of each is cut into slices (`plan.slices`), added up afterwards in their order
- types: `plan.forward_product`, `data_product` and `weight_product` say by which instructions a device multiplies, and
  how wide its tiles are

`plan` decides and needs no device; `core` has what is not about convolutions: sources, launches, copies.
"""

from __future__ import annotations

from typing import Any

from pydeform._geometry import ConvArrays
from pydeform.cuda.conv import plan
from pydeform.cuda.core.source import Code

# What needs CuPy is imported where it is called: `plan` is asked where there is none.


def forward(arrays: Any, g: Any, *, allow_tf32: bool = False) -> Any:
    import cupy

    from pydeform.cuda.conv import direct, forward_tiles
    from pydeform.cuda.core.copies import contiguous

    offset = arrays.offset
    plan.check_size(_operator(offset, g), g)
    code, reads = _code(offset, g), plan.PLAIN if offset is None else plan.DEFORMED
    with arrays.input.device:
        given = ConvArrays(*contiguous(*arrays))
        output = cupy.empty((g.batch, g.out_channels, *g.out_size), given.input.dtype)
        if g.batch and plan.is_direct(g):
            direct.forward(code, given, g, output)
        elif g.batch:
            forward_tiles.forward(code, reads, given, g, output, allow_tf32=allow_tf32)
        return output


def backward(
    grad_output: Any, arrays: Any, g: Any, needs: Any, *, deterministic: bool = False, allow_tf32: bool = False
) -> dict[str, Any]:
    import cupy

    from pydeform.cuda.conv import backward_tiles, direct
    from pydeform.cuda.core.copies import contiguous

    plan.check_size(f"{_operator(arrays.offset, g)}_backward", g)
    code = _code(arrays.offset, g)
    with arrays.input.device:
        grad_output, *rest = contiguous(grad_output, *arrays)
        given, make = ConvArrays(*rest), cupy.empty_like if g.batch else cupy.zeros_like
        grads = {
            name: make(array) if name in needs and array is not None else None
            for name, array in given._asdict().items()
        }
        if g.batch and plan.is_direct(g):
            direct.backward(code, grad_output, given, g, grads, deterministic=deterministic)
        elif g.batch:
            options = {"deterministic": deterministic, "allow_tf32": allow_tf32}
            backward_tiles.backward(code, grad_output, given, g, grads, **options)
        return grads


def _code(offset: Any, g: Any) -> Code:
    return Code("conv", len(g.in_size), _is_active(offset))


def _operator(offset: Any, g: Any) -> str:
    """Whose errors these are."""
    kind = "conv" if offset is None else "active_conv" if _is_active(offset) else "deform_conv"
    return f"{kind}{len(g.in_size)}d"


def _is_active(offset: Any) -> bool:
    return offset is not None and offset.ndim == 1
