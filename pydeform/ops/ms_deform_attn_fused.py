"""Multi-scale deformable attention from what a network predicts: raw offsets and logits."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydeform import _checks, _gather_geometry, _interop
from pydeform._types import AnyArray, Array, Method, Needs, Number, Points, SpatialShapes
from pydeform.ops import _call, _gather

NAMES = "sampling_offsets", "attention_logits"


class MsDeformAttnFusedGrads(NamedTuple):
    """What `ms_deform_attn_fused_backward` returns; with method "discrete" `reference_points` and `sampling_offsets`
    have no gradient and are None.

    Examples
    --------
    >>> from pydeform import MsDeformAttnFusedGrads
    >>> MsDeformAttnFusedGrads._fields
    ('value', 'reference_points', 'sampling_offsets', 'attention_logits')
    """

    value: Any
    reference_points: Any
    sampling_offsets: Any
    attention_logits: Any


def ms_deform_attn_fused(
    value: Array,
    spatial_shapes: SpatialShapes,
    reference_points: AnyArray,
    sampling_offsets: AnyArray,
    attention_logits: AnyArray,
    *,
    points: Points = None,
    method: Method = "bilinear",
    offset_scale: Number = 0.5,
) -> Array:
    """`ms_deform_attn` with locations and weights made on the way, so that they are never stored.

        attention_weights[b, q, m] = softmax over all points of all levels of attention_logits[b, q, m]
        sampling_locations[b, q, m, l, p] = reference + offset / (w_l, h_l)                     of a point (x, y)
                                          = (cx, cy) + offset / P_l * offset_scale * (w, h)     of a box (cx, cy, w, h)

    where reference = reference_points[b, q, l], offset = sampling_offsets[b, q, m, l, p], and P_l are the points of a
    level.

    Parameters
    ----------
    value, spatial_shapes, points, method : as in `ms_deform_attn`
    reference_points : array (N, Lq, 1 or L, 2 or 4), from 0 to 1: points (x, y), or boxes (cx, cy, w, h); one for all
        levels, or one for each
    sampling_offsets : array (N, Lq, heads, L, P, 2) of (x, y): in pixels of the level beside points, in parts of the
        box beside boxes. With `points`: (N, Lq, heads, sum(points), 2). Beside float16 or bfloat16 data
        reference_points and sampling_offsets may be float32
    attention_logits : array (N, Lq, heads, L, P), or (N, Lq, heads, sum(points))
    offset_scale : of offsets beside boxes; Deformable-DETR, RT-DETR, D-FINE and RF-DETR have 0.5

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
    As `ms_deform_attn`.

    Memory beyond the result: as there, whatever the size of the maps. A logit that is NaN, or infinite and positive,
    makes its query and head NaN.

    References
    ----------
    arXiv:2010.04159 section 4.1 and appendix A.3.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import ms_deform_attn_fused
    >>> value, reference = np.arange(16.0).reshape(1, 16, 1, 1), np.full((1, 1, 1, 2), 0.5)
    >>> offsets, logits = np.zeros((1, 1, 1, 1, 2, 2)), np.zeros((1, 1, 1, 1, 2))
    >>> offsets[..., 1, :] = 1, 0  # a pixel to the right
    >>> ms_deform_attn_fused(value, ((4, 4),), reference, offsets, logits).tolist()
    [[[8.0]]]
    """
    op = "ms_deform_attn_fused"
    arrays = {
        "value": value,
        "reference_points": reference_points,
        NAMES[0]: sampling_offsets,
        NAMES[1]: attention_logits,
    }
    arrays, back = _interop.to_native(op, arrays)
    g = _geometry_of(op, arrays, spatial_shapes, points, method, offset_scale)
    return _gather.forward(op, arrays, back, g, _gather.shape_of(g))


def ms_deform_attn_fused_backward(
    grad_output: AnyArray,
    value: AnyArray,
    spatial_shapes: SpatialShapes,
    reference_points: AnyArray,
    sampling_offsets: AnyArray,
    attention_logits: AnyArray,
    *,
    points: Points = None,
    method: Method = "bilinear",
    offset_scale: Number = 0.5,
    needs: Needs = None,
    deterministic: bool = False,
) -> MsDeformAttnFusedGrads:
    """Gradients of `ms_deform_attn_fused`, computed from its arguments alone: d sum(grad_output * output) / d argument.

    Parameters
    ----------
    grad_output : array (N, Lq, heads*channels), the gradient of the forward's result
    value, spatial_shapes, reference_points, sampling_offsets, attention_logits, points, method, offset_scale : exactly
        the forward's
    needs, deterministic : as in `ms_deform_attn_backward`

    Returns
    -------
    MsDeformAttnFusedGrads
        Of the kind, device and dtype of `grad_output`; those of reference_points and sampling_offsets have the dtypes
        of these.

    Raises
    ------
    ValueError
        A shape, option or name in `needs` does not fit.
    TypeError
        The kind, dtype or device of an array does not fit.

    Notes
    -----
    Kinks and NaN as in `ms_deform_attn_backward`.

    Memory beyond the gradients: as there, whatever the size of the maps.

    References
    ----------
    Derived in docs/math/gather.md.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import ms_deform_attn_fused_backward
    >>> value, reference = np.ones((1, 16, 2, 4)), np.full((1, 3, 1, 4), 0.5)
    >>> offsets, logits = np.zeros((1, 3, 2, 1, 5, 2)), np.zeros((1, 3, 2, 1, 5))
    >>> grads = ms_deform_attn_fused_backward(np.ones((1, 3, 8)), value, ((4, 4),), reference, offsets, logits)
    >>> grads.reference_points.shape, float(abs(grads.attention_logits).max())
    ((1, 3, 1, 4), 0.0)
    """
    op = "ms_deform_attn_fused_backward"
    arrays = {
        "grad_output": grad_output,
        "value": value,
        "reference_points": reference_points,
        NAMES[0]: sampling_offsets,
        NAMES[1]: attention_logits,
    }
    arrays, back = _interop.to_native(op, arrays)
    g = _geometry_of(op, arrays, spatial_shapes, points, method, offset_scale)
    formula = "(N, Lq, heads*channels)"
    return MsDeformAttnFusedGrads(
        **_gather.backward(op, arrays, back, g, formula, _gather.shape_of(g), needs, deterministic)
    )


def _geometry_of(
    op: str, arrays: dict[str, Any], spatial_shapes: Any, points: Any, method: str, offset_scale: Any
) -> _gather_geometry.Gather:
    _call.check_arrays(op, arrays, "value", "reference_points", *NAMES)
    scale = _checks.number(op, "offset_scale", offset_scale, dtype=arrays["value"].dtype)
    return _gather_geometry.attention_geometry(op, arrays, spatial_shapes, NAMES, points, method, scale)
