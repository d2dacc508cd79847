"""Where a deformable convolution samples, and how far apart; its offsets in the layouts of other systems."""

from __future__ import annotations

from typing import Any, TypeVar, overload

import numpy as np  # on CuPy arrays its functions call CuPy's

from pydeform import _arrays, _checks, _geometry, _interop
from pydeform._types import Array, Padding, Size

DType = TypeVar("DType", bound="np.dtype[Any]")
OFFSET_SHAPE = "(N, 2*offset_groups*kernel_h*kernel_w, out_h, out_w)"

# Axes from the slowest to the fastest: n image, g offset group, y and x of the tap, a which coordinate, H and W of the
# output; and whether x is the first of the coordinates.
LAYOUTS = dict.fromkeys(("torchvision", "mxnet", "mmcv", "onnx", "paddle"), ("ngyxaHW", False)) | {
    "chainer": ("ngayxHW", True),
    "dcnv3": ("nHWgxya", True),
    "blocked_yx": ("ngayxHW", False),
}


# An array's type may name its axes, of which the result has others.
@overload
def sampling_locations(
    offset: np.ndarray[Any, DType], kernel_size: Size, stride: Size = 1, padding: Padding = 0, dilation: Size = 1
) -> np.ndarray[Any, DType]: ...
@overload
def sampling_locations(
    offset: Array, kernel_size: Size, stride: Size = 1, padding: Padding = 0, dilation: Size = 1
) -> Array: ...
def sampling_locations(
    offset: Any, kernel_size: Size, stride: Size = 1, padding: Padding = 0, dilation: Size = 1
) -> Any:
    """Where `deform_conv2d` samples its input, in pixels.

        location[b, og, k, oy, ox] = (oy*stride_h - pad_h + ky*dilation_h + dy,
                                      ox*stride_w - pad_w + kx*dilation_w + dx)

    with k = ky*kernel_w + kx and (dy, dx) = offset[b, 2*(og*K + k)], offset[b, 2*(og*K + k) + 1], K taps in all.

    Parameters
    ----------
    offset : array (N, 2*offset_groups*K, out_h, out_w), in input pixels, as given to `deform_conv2d`
    kernel_size : int or (height, width)
    stride, dilation : int or one per axis
    padding : int, one per axis, a (before, after) pair per axis, or "same". Only what lies before the image counts.
        "same" is dilation*(kernel - 1)//2 before; with a stride above 1 it depends on the size of the input, which
        is not an argument here: give numbers then.

    Returns
    -------
    array (N, offset_groups, K, out_h, out_w, 2)
        (y, x) with pixel centres at integers, of the kind and dtype of `offset`. Locations may lie outside the image.

    Raises
    ------
    ValueError
        A shape or option does not fit; "same" with a stride.
    TypeError
        The kind or dtype of an array does not fit.

    Notes
    -----
    float16 and bfloat16 are computed in float32 and rounded at the end. NaN and infinities stay as they are.
    The same bits on every run.

    References
    ----------
    arXiv:1703.06211 eq. 2.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import sampling_locations
    >>> locations = sampling_locations(np.zeros((1, 18, 4, 4)), 3, padding=1)
    >>> locations.shape, locations[0, 0, 0, 2, 3].tolist()
    ((1, 1, 9, 4, 4, 2), [1.0, 2.0])
    """
    op = "sampling_locations"
    arrays, back = _interop.to_native(op, {"offset": offset})
    kernel = _checks.per_axis(op, "kernel_size", kernel_size, 2, 1)
    strides = _checks.per_axis(op, "stride", stride, 2, 1)
    dilations = _checks.per_axis(op, "dilation", dilation, 2, 1)
    if isinstance(padding, str) and max(strides) > 1:
        raise ValueError(
            f"{op}: padding must be given in numbers where stride > 1, since 'same' then depends on the size of the "
            f"input, got {padding!r}"
        )
    # Without a stride "same" is the same for every size of the input.
    before = [pair[0] for pair in _checks.padding_pairs(op, padding, (1, 1), kernel, (1, 1), dilations)]
    taps = _taps(op, arrays["offset"], kernel)
    batch, groups, _, _, _, *out = taps.shape
    ends = [(n - 1) * s + (k - 1) * d for n, s, k, d in zip(out, strides, kernel, dilations, strict=True)]
    _geometry.check_taps(op, before, ends, taps.dtype.itemsize)
    with back:
        locations = np.moveaxis(taps, 4, -1).astype(_arrays.wide_dtype(taps.dtype), order="C", copy=True)
        for axis in (0, 1):
            tap = np.arange(kernel[axis], dtype=np.int64, like=locations) * dilations[axis]
            pixel = np.arange(out[axis], dtype=np.int64, like=locations) * strides[axis] - before[axis]
            grid = (tap[:, None, None, None] + pixel[:, None]).astype(locations.dtype)  # (kernel, 1, out, 1): rows
            locations[..., axis] += grid if axis == 0 else grid.swapaxes(0, 1).swapaxes(2, 3)
        shape = (batch, groups, kernel[0] * kernel[1], *out, 2)
        return back(locations.astype(taps.dtype, copy=False).reshape(shape))


def effective_dilation(offset: Array, kernel_size: Size, dilation: Size = 1) -> Array:
    """How far apart the taps of a deformable convolution stand: the dilation of a plain one that is as wide.

        mean over pairs (k, k') of adjacent taps of |p[k'] - p[k]|,   p[k] = (ky*dilation_h + dy, kx*dilation_w + dx)

    Adjacent are horizontal and vertical neighbours in the kernel: 12 pairs for 3x3.

    Parameters
    ----------
    offset : array (N, 2*offset_groups*kernel_h*kernel_w, out_h, out_w), in input pixels, as given to `deform_conv2d`
    kernel_size : int or (height, width), of at least two taps
    dilation : int or one per axis

    Returns
    -------
    array (N, offset_groups, out_h, out_w)
        In input pixels, of the kind and dtype of `offset`. Zero offsets give `dilation` exactly (where it is equal on
        both axes).

    Raises
    ------
    ValueError
        A shape or option does not fit.
    TypeError
        The kind or dtype of an array does not fit.

    Notes
    -----
    float16 and bfloat16 are computed in float32. NaN or infinite offsets give NaN or infinity at their output pixel
    only. The same bits on every run.

    References
    ----------
    arXiv:1703.06211 section 4.2, "effective dilation".

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import effective_dilation
    >>> effective_dilation(np.zeros((1, 18, 1, 1)), 3, dilation=2).tolist()
    [[[[2.0]]]]
    """
    op = "effective_dilation"
    arrays, back = _interop.to_native(op, {"offset": offset})
    kernel = kernel_h, kernel_w = _checks.per_axis(op, "kernel_size", kernel_size, 2, 1)
    dilation_h, dilation_w = _checks.per_axis(op, "dilation", dilation, 2, 1)
    pairs = kernel_h * (kernel_w - 1) + (kernel_h - 1) * kernel_w
    if pairs == 0:
        raise ValueError(f"{op}: kernel_size must have at least two taps, got {kernel_size!r}")
    taps = _taps(op, arrays["offset"], kernel)
    with back, np.errstate(invalid="ignore", over="ignore"):  # inf - inf is NaN, as the docstring says
        points = taps.astype(_arrays.wide_dtype(taps.dtype), copy=False)
        rows = points[:, :, 1:] - points[:, :, :-1]
        columns = points[:, :, :, 1:] - points[:, :, :, :-1]
        total = np.hypot(rows[:, :, :, :, 0] + dilation_h, rows[:, :, :, :, 1]).sum(axis=(2, 3))
        total += np.hypot(columns[:, :, :, :, 0], columns[:, :, :, :, 1] + dilation_w).sum(axis=(2, 3))
        return back((total / pairs).astype(taps.dtype, copy=False))


def convert_offset(offset: Array, kernel_size: Size, source: str, target: str) -> Array:
    """The offsets of one system in the layout of another. Nothing is computed: numbers change their places.

    With K = kernel_h*kernel_w taps, number k = ky*kernel_w + kx, in offset group og:

        "torchvision"   (N, 2*offset_groups*K, out_h, out_w), dy in channel 2*(og*K + k), dx in the next. Other names of
                        it are "mxnet", "mmcv", "onnx" and "paddle"
        "chainer"       the same shape, dx in channel og*2*K + k, dy in og*2*K + K + k
        "blocked_yx"    the same shape, dy in channel og*2*K + k, dx in og*2*K + K + k (pytorch-deform-conv-v2)
        "dcnv3"         (N, out_h, out_w, offset_groups*K*2), dx in channel 2*(og*K + kx*kernel_h + ky), dy in the next

    Chainer and blocked_yx know one group; of several, each has its channels together, as it would have them alone.

    Parameters
    ----------
    offset : array of the shape that `source` has
    kernel_size : int or (height, width)
    source, target : one of the names above

    Returns
    -------
    array of the shape that `target` has
        Of the kind and dtype of `offset`, never the same memory.

    Raises
    ------
    ValueError
        A shape or option does not fit.
    TypeError
        The kind or dtype of an array does not fit.

    Notes
    -----
    What offsets mean is the same for all, pixels of the input, where DCNv3's offset_scale is 1. DCNv4 packs its
    offsets, which are as DCNv3's, with masks. The same bits on every run.

    References
    ----------
    The code of these systems.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import convert_offset
    >>> offset = np.arange(4.0).reshape(1, 4, 1, 1)  # dy, dx of the upper tap, dy, dx of the lower one
    >>> convert_offset(offset, (2, 1), "torchvision", "chainer").ravel().tolist()
    [1.0, 3.0, 0.0, 2.0]
    """
    op = "convert_offset"
    arrays, back = _interop.to_native(op, {"offset": offset})
    kernel = _checks.per_axis(op, "kernel_size", kernel_size, 2, 1)
    for name, layout in (("source", source), ("target", target)):
        _checks.check_choice(op, name, layout, tuple(LAYOUTS))
    (axes, x_first), (wanted, x_first_wanted) = LAYOUTS[source], LAYOUTS[target]
    # Channels are the axes that are not n, H and W.
    last = axes.endswith("a")
    formula = "(N, out_h, out_w, 2*offset_groups*kernel_h*kernel_w)" if last else OFFSET_SHAPE
    batch, channels, out, groups = _parts(op, arrays["offset"], kernel, formula, 3 if last else 1)
    sizes = {"n": batch, "g": groups, "y": kernel[0], "x": kernel[1], "a": 2, "H": out[0], "W": out[1]}
    with back:
        parts = arrays["offset"].reshape([sizes[axis] for axis in axes])
        if x_first != x_first_wanted:
            parts = np.flip(parts, axes.index("a"))
        moved = parts.transpose([axes.index(axis) for axis in wanted]).copy(order="C")
        shape = (batch, *out, channels) if wanted.endswith("a") else (batch, channels, *out)
        return back(moved.reshape(shape))


def _taps(op: str, offset: Any, kernel: tuple[int, ...]) -> Any:
    """Check `offset` and take its channel axis apart: (N, offset_groups, kernel_h, kernel_w, 2, out_h, out_w)."""
    batch, _, out, groups = _parts(op, offset, kernel, OFFSET_SHAPE, 1)
    return offset.reshape(batch, groups, *kernel, 2, *out)


def _parts(
    op: str, offset: Any, kernel: tuple[int, ...], formula: str, axis: int
) -> tuple[int, int, tuple[int, int], int]:
    """Check `offset`, whose channels are `axis`: batch, channels, size of the output, offset groups."""
    if offset is None:
        raise TypeError(f"{op}: offset must be an array, got None")
    _checks.check_dtypes(op, {"offset": offset})
    _checks.check_ndim(op, "offset", offset.shape, formula, 4)
    batch, *out = offset.shape[:axis] + offset.shape[axis + 1 :]
    channels, taps = offset.shape[axis], kernel[0] * kernel[1]
    groups = max(channels // (2 * taps), 1)
    expected = [batch, *out]
    expected.insert(axis, 2 * groups * taps)
    _checks.check_shape(op, "offset", offset.shape, formula, expected)
    return batch, channels, (out[0], out[1]), groups
