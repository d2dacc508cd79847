"""Position-sensitive RoI pooling over whole pixels (R-FCN)."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydeform import _checks, _interop, _roi_geometry
from pydeform._types import AnyArray, Array, Convention, Needs, Number, Size
from pydeform.ops import _roi

CONVENTIONS = tuple(_roi_geometry.PS_ROI_POOL)


class PsRoiPoolGrads(NamedTuple):
    """What `ps_roi_pool_backward` returns; `boxes` has no gradient and is None.

    Examples
    --------
    >>> from pydeform import PsRoiPoolGrads
    >>> PsRoiPoolGrads._fields
    ('input', 'boxes')
    """

    input: Any
    boxes: Any


def ps_roi_pool(
    input: Array,
    boxes: AnyArray,
    output_size: Size,
    spatial_scale: Number = 1.0,
    *,
    convention: Convention = "torchvision",
) -> Array:
    """Mean of the pixels of each bin, where each bin reads channels of its own.

        output[r, c, py, px] = mean over y in rows(py), x in columns(px) of input[b, k, y, x]
        k = (c*output_h + py)*output_w + px
        rows(py) = floor(y1 + py*bin_h) ... ceil(y1 + (py + 1)*bin_h) - 1, within the image        columns(px) likewise
        bin_h = (y2 - y1) / output_h

    where r is a box and [b, x1, y1, x2, y2] = boxes[r].

    Parameters
    ----------
    input : array (N, C*output_h*output_w, H, W), float64, float32, float16 or bfloat16, as every other array
    boxes : array (R, 5), rows [batch index, x1, y1, x2, y2], which times spatial_scale are pixels of `input`.
        Beside float16 or bfloat16 they may be float32, and must be for more images than these count, 2048 or 256
    output_size : int, or (output_h, output_w)
    spatial_scale : what turns the boxes' coordinates into those of `input`, say 1/16
    convention : how coordinates become those of `input`, halves rounded away from zero
        "torchvision": round(x1*scale) to round(x2*scale), at least 1 long; the last row and column are never read
        "rfcn": round(x1)*scale to (round(x2) + 1)*scale, at least 0.1 long (R-FCN's code, MXNet, Paddle, OpenVINO)

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
    A bin without pixels gives 0. A NaN in a box gives NaN, an infinite coordinate a box outside; on CUDA a batch index
    outside the batch gives NaN. The same bits on every run and, on the CPU, for any number of threads.

    Memory beyond the result: at most 128 numbers for each of its own, and some MB for each thread, whatever the size of
    the image; on CUDA an input that is not contiguous is copied.

    References
    ----------
    arXiv:1605.06409 eq. 1. As torchvision.ops.ps_roi_pool and mxnet.contrib.PSROIPooling.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import ps_roi_pool
    >>> image = np.ones((1, 4, 8, 8)) * np.arange(4.0).reshape(1, 4, 1, 1)
    >>> ps_roi_pool(image, np.array([[0, 0, 0, 4, 4.0]]), 2)[0, 0].tolist()
    [[0.0, 1.0], [2.0, 3.0]]
    """
    op = "ps_roi_pool"
    arrays, back = _interop.to_native(op, {"input": input, "boxes": boxes})
    return _roi.forward(op, arrays, back, _geometry_of(op, arrays, output_size, spatial_scale, convention))


def ps_roi_pool_backward(
    grad_output: AnyArray,
    input: AnyArray,
    boxes: AnyArray,
    output_size: Size,
    spatial_scale: Number = 1.0,
    *,
    convention: Convention = "torchvision",
    needs: Needs = None,
    deterministic: bool = False,
) -> PsRoiPoolGrads:
    """Gradient of `ps_roi_pool`, computed from its arguments alone: d sum(grad_output * output) / d input.

    Parameters
    ----------
    grad_output : array (R, C, output_h, output_w), the gradient of the forward's result
    input, boxes, output_size, spatial_scale, convention : exactly the forward's
    needs : names of the gradients to compute; None computes all
    deterministic : accepted as by the other backwards; this one has the same bits on every run, always

    Returns
    -------
    PsRoiPoolGrads
        Of the kind, device and dtype of `grad_output`.

    Raises
    ------
    ValueError
        A shape, option or name in `needs` does not fit.
    TypeError
        The kind, dtype or device of an array does not fit.

    Notes
    -----
    The transpose of the forward, exactly. torchvision's own backward is not where a box touches the last row or column:
    it reads those, which its forward does not.

    Memory beyond the gradients: at most 128 numbers for each of grad_output, and some MB for each thread, whatever the
    size of the image; in half precision that of input once in float32; on CUDA an input that is not contiguous is
    copied.

    References
    ----------
    arXiv:1605.06409.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import ps_roi_pool_backward
    >>> grads = ps_roi_pool_backward(np.ones((1, 1, 2, 2)), np.ones((1, 4, 8, 8)), np.array([[0, 0, 0, 4, 4.0]]), 2)
    >>> grads.input.sum(axis=(2, 3)).tolist()
    [[1.0, 1.0, 1.0, 1.0]]
    """
    op = "ps_roi_pool_backward"
    arrays, back = _interop.to_native(op, {"grad_output": grad_output, "input": input, "boxes": boxes})
    g = _geometry_of(op, arrays, output_size, spatial_scale, convention)
    return PsRoiPoolGrads(**_roi.backward(op, arrays, back, g, needs, deterministic))


def _geometry_of(
    op: str, arrays: dict[str, Any], output_size: Size, spatial_scale: Number, convention: str
) -> _roi_geometry.RoiGeometry:
    _roi.check_arrays(op, arrays)
    _checks.check_choice(op, "convention", convention, CONVENTIONS)
    pooled = _roi.pair(op, "output_size", output_size)
    return _roi_geometry.roi_geometry(
        op,
        arrays["input"],
        arrays["boxes"],
        _roi_geometry.PS_ROI_POOL[convention],
        pooled,
        spatial_scale,
        group=pooled,
    )
