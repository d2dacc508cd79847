"""RoI pooling whose bins are moved by offsets (mmcv's deformable RoI pooling; modulated when `mask` is given)."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydeform import _checks, _interop, _roi_geometry
from pydeform._types import AnyArray, Array, Int, Needs, Number, Size
from pydeform.ops import _roi


class DeformRoiPoolGrads(NamedTuple):
    """What `deform_roi_pool_backward` returns; `boxes` has no gradient and is None.

    Examples
    --------
    >>> from pydeform import DeformRoiPoolGrads
    >>> DeformRoiPoolGrads._fields
    ('input', 'boxes', 'offset', 'mask')
    """

    input: Any
    boxes: Any
    offset: Any
    mask: Any


def deform_roi_pool(
    input: Array,
    boxes: AnyArray,
    offset: AnyArray | None = None,
    output_size: Size = 7,
    spatial_scale: Number = 1.0,
    sampling_ratio: Int = 0,
    gamma: Number = 0.1,
    mask: AnyArray | None = None,
) -> Array:
    """Mean of points in each bin of each box, every bin moved by an offset.

        output[r, c, py, px] = mask[r, 0, py, px] * mean over iy, ix of input[b, c](y, x)
        y = y1 + (py + (iy + 1/2) / n) * bin_h + gamma * (y2 - y1) * offset[r, 1, py, px]
        x = x1 + (px + (ix + 1/2) / n) * bin_w + gamma * (x2 - x1) * offset[r, 0, py, px]

    where r is a box, [b, x1, y1, x2, y2] = boxes[r], its coordinates times spatial_scale minus 1/2, and
    bin_h = (y2 - y1) / output_h, bin_w likewise. There are n = sampling_ratio points on each axis, or ceil(bin_h) and
    ceil(bin_w) if that is 0; input(y, x) is bilinear between pixel centres, which lie at integers. Without offset it is
    roi_align(..., aligned=True).

    Parameters
    ----------
    input : array (N, C, H, W), float64, float32, float16 or bfloat16, as every other array
    boxes : array (R, 5), rows [batch index, x1, y1, x2, y2], which times spatial_scale are pixels of `input`.
        Beside float16 or bfloat16 they may be float32, and must be for more images than these count, 2048 or 256
    offset : array (R, 2, output_h, output_w), optional: channel 0 moves x, channel 1 y, in units of gamma times the
        box. Beside float16 or bfloat16 it may be float32
    output_size : int, or (output_h, output_w)
    spatial_scale : what turns the boxes' coordinates into those of `input`, say 1/16
    sampling_ratio : points of a bin on each axis; 0 and -1: adaptive
    gamma : the size of an offset of 1, as a part of the box
    mask : array (R, 1, output_h, output_w), optional; used as given, without a sigmoid

    Returns
    -------
    array (R, C, output_h, output_w)
        Of the kind, device and dtype of `input`.

    Raises
    ------
    ValueError
        A shape, option or, on the CPU, batch index does not fit.
    TypeError
        The kind, dtype or device of an array does not fit.

    Notes
    -----
    A point beyond [-1, H] x [-1, W] reads 0 and counts; between there and the pixels it reads the nearest. A bin
    without points gives 0. A NaN in a box or offset gives NaN, an infinite coordinate is outside; on CUDA a batch index
    outside the batch gives NaN. The same bits on every run and, on the CPU, for any number of threads.

    Memory beyond the result: at most 128 numbers for each of its own, and some MB for each thread, whatever the size of
    the image; on CUDA an input that is not contiguous is copied.

    References
    ----------
    arXiv:1703.06211 eq. 5, arXiv:1811.11168 eq. 2. As mmcv.ops.deform_roi_pool and its modulated layer.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import deform_roi_pool
    >>> image, boxes = np.arange(64.0).reshape(1, 1, 8, 8), np.array([[0, 2, 2, 6, 6.0]])
    >>> offset = np.zeros((1, 2, 2, 2))
    >>> offset[0, 0] = 2.5  # a quarter of the box to the right: one pixel
    >>> (deform_roi_pool(image, boxes, offset, 2) - deform_roi_pool(image, boxes, None, 2))[0, 0].tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    op = "deform_roi_pool"
    arrays, back = _interop.to_native(op, {"input": input, "boxes": boxes, "offset": offset, "mask": mask})
    g = _geometry_of(op, arrays, output_size, spatial_scale, sampling_ratio, gamma)
    return _roi.forward(op, arrays, back, g)


def deform_roi_pool_backward(
    grad_output: AnyArray,
    input: AnyArray,
    boxes: AnyArray,
    offset: AnyArray | None = None,
    output_size: Size = 7,
    spatial_scale: Number = 1.0,
    sampling_ratio: Int = 0,
    gamma: Number = 0.1,
    mask: AnyArray | None = None,
    *,
    needs: Needs = None,
    deterministic: bool = False,
) -> DeformRoiPoolGrads:
    """Gradients of `deform_roi_pool`, computed from its arguments alone: d sum(grad_output * output) / d argument.

    Parameters
    ----------
    grad_output : array (R, C, output_h, output_w), the gradient of the forward's result
    input, boxes, offset, output_size, spatial_scale, sampling_ratio, gamma, mask : exactly the forward's
    needs : names of the gradients to compute, say ("input", "offset"); None computes all
    deterministic : accepted as by the other backwards; this one has the same bits on every run, always

    Returns
    -------
    DeformRoiPoolGrads
        Of the kind, device and dtype of `grad_output`; that of offset has the dtype of `offset`.

    Raises
    ------
    ValueError
        A shape, option or name in `needs` does not fit.
    TypeError
        The kind, dtype or device of an array does not fit.

    Notes
    -----
    The offset's gradient is the derivative of the forward: from the right where a point lies on a row or column of
    pixels, 0 from the last one on and up to and on the first, where a point reads the nearest pixel or nothing. mmcv's
    own is not the derivative there. A NaN coordinate gives NaN in its own gradients and nothing to the input's.

    Memory beyond the gradients: at most 128 numbers for each of grad_output, and some MB for each thread, whatever the
    size of the image; in half precision that of input once in float32; on CUDA an input that is not contiguous is
    copied.

    References
    ----------
    arXiv:1703.06211 appendix B; arXiv:1811.11168.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import deform_roi_pool_backward
    >>> image, boxes, offset = np.ones((1, 3, 8, 8)), np.array([[0, 2, 2, 6, 6.0]]), np.zeros((1, 2, 7, 7))
    >>> grads = deform_roi_pool_backward(np.ones((1, 3, 7, 7)), image, boxes, offset, needs=("offset",))
    >>> grads.offset.shape, grads.input
    ((1, 2, 7, 7), None)
    """
    op = "deform_roi_pool_backward"
    arrays, back = _interop.to_native(
        op, {"grad_output": grad_output, "input": input, "boxes": boxes, "offset": offset, "mask": mask}
    )
    g = _geometry_of(op, arrays, output_size, spatial_scale, sampling_ratio, gamma)
    return DeformRoiPoolGrads(**_roi.backward(op, arrays, back, g, needs, deterministic))


def _geometry_of(
    op: str, arrays: dict[str, Any], output_size: Size, spatial_scale: Number, sampling_ratio: Int, gamma: Number
) -> _roi_geometry.RoiGeometry:
    _roi.check_arrays(op, arrays)
    return _roi_geometry.roi_geometry(
        op,
        arrays["input"],
        arrays["boxes"],
        _roi_geometry.DEFORM_ROI_POOL,
        _roi.pair(op, "output_size", output_size),
        spatial_scale,
        samples=_roi.integer(op, "sampling_ratio", sampling_ratio, -1),
        offset=arrays["offset"],
        offset_scale=_checks.number(op, "gamma", gamma, dtype=arrays["input"].dtype),
        mask=arrays["mask"],
    )
