"""Multi-scale deformable attention (Deformable-DETR and what came after it)."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydeform import _gather_geometry, _interop
from pydeform._types import AnyArray, Array, Method, Needs, Points, SpatialShapes
from pydeform.ops import _call, _gather

NAMES = "sampling_locations", "attention_weights"


class MsDeformAttnGrads(NamedTuple):
    """What `ms_deform_attn_backward` returns; with method "discrete" `sampling_locations` has no gradient and is None.

    Examples
    --------
    >>> from pydeform import MsDeformAttnGrads
    >>> MsDeformAttnGrads._fields
    ('value', 'sampling_locations', 'attention_weights')
    """

    value: Any
    sampling_locations: Any
    attention_weights: Any


def ms_deform_attn(
    value: Array,
    spatial_shapes: SpatialShapes,
    sampling_locations: AnyArray,
    attention_weights: AnyArray,
    *,
    points: Points = None,
    method: Method = "bilinear",
) -> Array:
    """Sum weighted samples of maps of several sizes, for each query and head.

        output[b, q, m*D + d] = sum over l, p of attention_weights[b, q, m, l, p] * value_l[b, m, d](y, x)
        x = sampling_locations[b, q, m, l, p, 0] * w_l - 1/2        y = sampling_locations[b, q, m, l, p, 1] * h_l - 1/2

    where value_l is level l, of h_l rows and w_l columns, and value_l(y, x) is bilinear between pixel centres, which
    lie at integers, with zeros outside. Locations of 0 and 1 are the outer edges of the first and last pixel.

    Parameters
    ----------
    value : array (N, S, heads, channels), float64, float32, float16 or bfloat16, as every other array. Levels follow
        one another along the second axis, each row by row
    spatial_shapes : (L, 2), rows (h, w): a nested tuple, or an array; S is the sum of h*w. One on a GPU has to be
        copied from there, for which the call waits
    sampling_locations : array (N, Lq, heads, L, P, 2) of (x, y) from 0 to 1 within a level; beyond, samples fade to
        zero. With `points`: (N, Lq, heads, sum(points), 2). Beside float16 or bfloat16 it may be float32
    attention_weights : array (N, Lq, heads, L, P), or (N, Lq, heads, sum(points)); used as given, without a softmax
    points : points of each level, where they differ, say (3, 6, 3); all points of a head then follow one another
    method : "bilinear", or "discrete" (RT-DETRv2's): the pixel trunc(location * size + 1/2), or the nearest of the
        level

    Returns
    -------
    array (N, Lq, heads*channels)
        Of the kind, device and dtype of `value`.

    Raises
    ------
    ValueError
        A shape or option does not fit.
    TypeError
        The kind, dtype or device of an array does not fit.

    Notes
    -----
    NaN in a location gives NaN. An infinite one is outside and gives 0; "discrete" reads the nearest pixel. The same
    bits on every run and, on the CPU, for any number of threads.

    Memory beyond the result: some 100 kB for each thread, whatever the size of the maps; on the CPU arrays of half
    types, and everywhere those that are not contiguous, are copied.

    References
    ----------
    arXiv:2010.04159 eq. 3; arXiv:2407.17140 for "discrete". Deformable-DETR's and transformers' operator.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import ms_deform_attn
    >>> value = np.arange(20.0).reshape(1, 20, 1, 1)  # levels of 4x4 and 2x2
    >>> locations, weights = np.full((1, 1, 1, 2, 1, 2), 0.5), np.full((1, 1, 1, 2, 1), 0.5)
    >>> ms_deform_attn(value, ((4, 4), (2, 2)), locations, weights).tolist()
    [[[12.5]]]
    """
    op = "ms_deform_attn"
    arrays = {"value": value, NAMES[0]: sampling_locations, NAMES[1]: attention_weights}
    arrays, back = _interop.to_native(op, arrays)
    g = _geometry_of(op, arrays, spatial_shapes, points, method)
    return _gather.forward(op, arrays, back, g, _gather.shape_of(g))


def ms_deform_attn_backward(
    grad_output: AnyArray,
    value: AnyArray,
    spatial_shapes: SpatialShapes,
    sampling_locations: AnyArray,
    attention_weights: AnyArray,
    *,
    points: Points = None,
    method: Method = "bilinear",
    needs: Needs = None,
    deterministic: bool = False,
) -> MsDeformAttnGrads:
    """Gradients of `ms_deform_attn`, computed from its arguments alone: d sum(grad_output * output) / d argument.

    Parameters
    ----------
    grad_output : array (N, Lq, heads*channels), the gradient of the forward's result
    value, spatial_shapes, sampling_locations, attention_weights, points, method : exactly the forward's
    needs : names of the gradients to compute; None computes all
    deterministic : the same bits on every run, on CUDA too; the CPU always has them

    Returns
    -------
    MsDeformAttnGrads
        Of the kind, device and dtype of `grad_output`; that of sampling_locations has the dtype of
        `sampling_locations`.

    Raises
    ------
    ValueError
        A shape, option or name in `needs` does not fit.
    TypeError
        The kind, dtype or device of an array does not fit.

    Notes
    -----
    At a kink, where a sample lies on a row or column of pixels, the gradient of its location is the derivative from the
    right; one pixel before the first, where the forward starts to see the map, it is 0, as in the authors' kernels. NaN
    in a location gives NaN there and in the weight's gradient.

    Memory beyond the gradients: some 100 kB for each thread, whatever the size of the maps, and the copies of the
    forward; on CUDA, if deterministic, some numbers for each sample.

    References
    ----------
    Derived in docs/math/gather.md.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import ms_deform_attn_backward
    >>> value, locations, weights = np.ones((1, 20, 2, 8)), np.full((1, 5, 2, 2, 3, 2), 0.3), np.ones((1, 5, 2, 2, 3))
    >>> grads = ms_deform_attn_backward(np.ones((1, 5, 16)), value, ((4, 4), (2, 2)), locations, weights)
    >>> grads.value.shape, grads.sampling_locations.shape, float(grads.attention_weights.min())
    ((1, 20, 2, 8), (1, 5, 2, 2, 3, 2), 8.0)
    """
    op = "ms_deform_attn_backward"
    arrays = {
        "grad_output": grad_output,
        "value": value,
        NAMES[0]: sampling_locations,
        NAMES[1]: attention_weights,
    }
    arrays, back = _interop.to_native(op, arrays)
    g = _geometry_of(op, arrays, spatial_shapes, points, method)
    formula = "(N, Lq, heads*channels)"
    return MsDeformAttnGrads(
        **_gather.backward(op, arrays, back, g, formula, _gather.shape_of(g), needs, deterministic)
    )


def _geometry_of(
    op: str, arrays: dict[str, Any], spatial_shapes: Any, points: Any, method: str
) -> _gather_geometry.Gather:
    _call.check_arrays(op, arrays, "value", *NAMES)
    return _gather_geometry.attention_geometry(op, arrays, spatial_shapes, NAMES, points, method)
