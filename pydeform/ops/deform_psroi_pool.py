"""Position-sensitive RoI pooling whose bins are moved by offsets (the first Deformable ConvNets paper's operator)."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydeform import _checks, _interop, _roi_geometry
from pydeform._types import AnyArray, Array, Int, Needs, Number
from pydeform.ops import _roi


class DeformPsroiPoolGrads(NamedTuple):
    """What `deform_psroi_pool_backward` returns; `boxes` has no gradient and is None.

    Examples
    --------
    >>> from pydeform import DeformPsroiPoolGrads
    >>> DeformPsroiPoolGrads._fields
    ('input', 'boxes', 'trans', 'mask')
    """

    input: Any
    boxes: Any
    trans: Any
    mask: Any


def deform_psroi_pool(
    input: Array,
    boxes: AnyArray,
    trans: AnyArray | None = None,
    *,
    output_dim: Int,
    pooled_size: Int,
    group_size: Int = 1,
    part_size: Int | None = None,
    sample_per_part: Int = 1,
    trans_std: Number = 0.0,
    spatial_scale: Number = 1.0,
    mask: AnyArray | None = None,
) -> Array:
    """Mean of points in each bin of each box, every bin moved by an offset and reading channels of its own.

        output[r, c, py, px] = mask[r, 0, py, px] * mean over iy, ix of input[b, k](y, x)
        y = y1 + (py + iy / sample_per_part) * bin_h + trans_std * (y2 - y1) * trans[r, 2*class + 1, ty, tx]
        x = x1 + (px + ix / sample_per_part) * bin_w + trans_std * (x2 - x1) * trans[r, 2*class, ty, tx]
        k = (c*group_size + gy)*group_size + gx        gy = py*group_size // pooled_size, gx likewise
        bin_h = (y2 - y1) / pooled_size                ty = py*part_size // pooled_size, tx likewise

    where r is a box, [b, x1, y1, x2, y2] = boxes[r]: round(x1)*scale - 1/2 to (round(x2) + 1)*scale - 1/2, halves
    rounded away from zero, at least 0.1 long. class = c // (output_dim // classes). input(y, x) is bilinear between
    pixel centres, which lie at integers. With group_size=1 it is the paper's deformable RoI pooling.

    Parameters
    ----------
    input : array (N, output_dim*group_size**2, H, W), float64, float32, float16 or bfloat16, as every other array
    boxes : array (R, 5), rows [batch index, x1, y1, x2, y2], which times spatial_scale are pixels of `input`.
        Beside float16 or bfloat16 they may be float32, and must be for more images than these count, 2048 or 256
    trans : array (R, 2*classes, part_size, part_size): channel 2*class moves x, 2*class + 1 y, in units of trans_std
        times the box; output_dim is a multiple of classes. None: no offsets (the `no_trans` of other systems).
        Beside float16 or bfloat16 it may be float32
    output_dim : channels of the result
    pooled_size, group_size : bins on each axis; groups of channels on each axis
    part_size : offsets on each axis; None: pooled_size
    sample_per_part : points of a bin on each axis
    trans_std : the size of an offset of 1, as a part of the box
    spatial_scale : what turns the boxes' coordinates into those of `input`, say 1/16
    mask : array (R, 1, pooled_size, pooled_size), optional; used as given, without a sigmoid

    Returns
    -------
    array (R, output_dim, pooled_size, pooled_size)
        Of the kind, device and dtype of `input`.

    Raises
    ------
    ValueError
        A shape, option or, on the CPU, batch index does not fit.
    TypeError
        The kind, dtype or device of an array does not fit.

    Notes
    -----
    A point beyond [-1/2, H - 1/2] x [-1/2, W - 1/2] is left out of the mean; one before the first or past the last
    pixel reads that pixel. A bin without points gives 0. A NaN in a box or in trans gives NaN, an infinite coordinate
    is outside; on CUDA a batch index outside the batch gives NaN. The same bits on every run and, on the CPU, for any
    number of threads.

    Memory beyond the result: at most 128 numbers for each of its own, and some MB for each thread, whatever the size of
    the image; on CUDA an input that is not contiguous is copied.

    References
    ----------
    arXiv:1703.06211 eq. 5 and 6, arXiv:1811.11168 eq. 2. As mxnet.contrib.DeformablePSROIPooling.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import deform_psroi_pool
    >>> image, boxes = np.arange(64.0).reshape(1, 1, 8, 8), np.array([[0, 0, 0, 3, 3.0]])
    >>> deform_psroi_pool(image, boxes, output_dim=1, pooled_size=2, sample_per_part=2)[0, 0].tolist()
    [[2.25, 4.0], [16.25, 18.0]]
    """
    op = "deform_psroi_pool"
    arrays, back = _interop.to_native(op, {"input": input, "boxes": boxes, "trans": trans, "mask": mask})
    sizes = (output_dim, pooled_size, group_size, part_size, sample_per_part)
    return _roi.forward(op, arrays, back, _geometry_of(op, arrays, *sizes, trans_std, spatial_scale))


def deform_psroi_pool_backward(
    grad_output: AnyArray,
    input: AnyArray,
    boxes: AnyArray,
    trans: AnyArray | None = None,
    *,
    output_dim: Int,
    pooled_size: Int,
    group_size: Int = 1,
    part_size: Int | None = None,
    sample_per_part: Int = 1,
    trans_std: Number = 0.0,
    spatial_scale: Number = 1.0,
    mask: AnyArray | None = None,
    needs: Needs = None,
    deterministic: bool = False,
) -> DeformPsroiPoolGrads:
    """Gradients of `deform_psroi_pool`, computed from its arguments alone: d sum(grad_output * output) / d argument.

    Parameters
    ----------
    grad_output : array (R, output_dim, pooled_size, pooled_size), the gradient of the forward's result
    input, boxes, trans, mask : exactly the forward's
    output_dim, pooled_size, group_size, part_size, sample_per_part, trans_std, spatial_scale : exactly the forward's
    needs : names of the gradients to compute, say ("input", "trans"); None computes all
    deterministic : accepted as by the other backwards; this one has the same bits on every run, always

    Returns
    -------
    DeformPsroiPoolGrads
        Of the kind, device and dtype of `grad_output`; that of trans has the dtype of `trans`.

    Raises
    ------
    ValueError
        A shape, option or name in `needs` does not fit.
    TypeError
        The kind, dtype or device of an array does not fit.

    Notes
    -----
    How many points a mean is over counts as constant. On the axis on which a point lies exactly on a row or column of
    pixels, or beyond the first or last, its derivative is 0, as in MXNet: the interpolation there is between a pixel
    and itself. A NaN coordinate gives NaN in its own gradients, nothing to the input's.

    Memory beyond the gradients: at most 128 numbers for each of grad_output, and some MB for each thread, whatever the
    size of the image; in half precision that of input once in float32; on CUDA an input that is not contiguous is
    copied.

    References
    ----------
    arXiv:1703.06211 appendix B; arXiv:1811.11168.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import deform_psroi_pool_backward
    >>> image, boxes, trans = np.ones((1, 8, 8, 8)), np.array([[0, 2, 2, 6, 6.0]]), np.zeros((1, 2, 3, 3))
    >>> options = {"output_dim": 8, "pooled_size": 3, "sample_per_part": 4, "trans_std": 0.1}
    >>> grads = deform_psroi_pool_backward(np.ones((1, 8, 3, 3)), image, boxes, trans, **options)
    >>> grads.input.shape, grads.trans.shape, grads.mask
    ((1, 8, 8, 8), (1, 2, 3, 3), None)
    """
    op = "deform_psroi_pool_backward"
    arrays, back = _interop.to_native(
        op, {"grad_output": grad_output, "input": input, "boxes": boxes, "trans": trans, "mask": mask}
    )
    sizes = (output_dim, pooled_size, group_size, part_size, sample_per_part)
    g = _geometry_of(op, arrays, *sizes, trans_std, spatial_scale)
    return DeformPsroiPoolGrads(**_roi.backward(op, arrays, back, g, needs, deterministic))


def _geometry_of(
    op: str,
    arrays: dict[str, Any],
    output_dim: Int,
    pooled_size: Int,
    group_size: Int,
    part_size: Int | None,
    sample_per_part: Int,
    trans_std: Number,
    spatial_scale: Number,
) -> _roi_geometry.RoiGeometry:
    _roi.check_arrays(op, arrays)
    pooled = (_roi.integer(op, "pooled_size", pooled_size),) * 2
    return _roi_geometry.roi_geometry(
        op,
        arrays["input"],
        arrays["boxes"],
        _roi_geometry.DEFORM_PSROI_POOL,
        pooled,
        spatial_scale,
        samples=_roi.integer(op, "sample_per_part", sample_per_part),
        group=(_roi.integer(op, "group_size", group_size),) * 2,
        output_dim=_roi.integer(op, "output_dim", output_dim),
        offset_name="trans",
        offset=arrays["trans"],
        part=pooled if part_size is None else (_roi.integer(op, "part_size", part_size),) * 2,
        offset_scale=_checks.number(op, "trans_std", trans_std, dtype=arrays["input"].dtype),
        classes=None,
        mask=arrays["mask"],
    )
