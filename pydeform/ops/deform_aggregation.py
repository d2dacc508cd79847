"""Deformable aggregation over cameras and scales (Sparse4D)."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydeform import _gather_geometry, _interop
from pydeform._types import AnyArray, Array, Needs, SpatialShapes
from pydeform.ops import _call, _gather


class DeformAggregationGrads(NamedTuple):
    """What `deform_aggregation_backward` returns.

    Examples
    --------
    >>> from pydeform import DeformAggregationGrads
    >>> DeformAggregationGrads._fields
    ('features', 'sampling_locations', 'weights')
    """

    features: Any
    sampling_locations: Any
    weights: Any


def deform_aggregation(
    features: Array, spatial_shapes: SpatialShapes, sampling_locations: AnyArray, weights: AnyArray
) -> Array:
    """Sum weighted samples of the maps of all cameras and scales, for each anchor.

        output[b, a, c] = sum over p, v, s of weights[b, a, p, v, s, group of c] * map_vs[b, c](y, x)
        (x, y) = sampling_locations[b, a, p, v] * (w_vs, h_vs) - 1/2

    where map_vs is that of camera v and scale s, of h_vs rows and w_vs columns, and map(y, x) is bilinear between pixel
    centres, which lie at integers, with zeros outside. A point counts in the cameras that see it: 0 < x, y < 1 in its
    location. Channels are in equal, consecutive groups.

    Parameters
    ----------
    features : array (B, S, C), float64, float32, float16 or bfloat16, as every other array. Maps follow one another
        along the second axis, scale by scale of each camera, each row by row
    spatial_shapes : (cameras, scales, 2), rows (h, w): a nested tuple, or an array; S is the sum of h*w. Sizes may
        differ from camera to camera
    sampling_locations : array (B, anchors, points, cameras, 2) of (x, y) from 0 to 1, the same for all scales. Beside
        float16 or bfloat16 it may be float32
    weights : array (B, anchors, points, cameras, scales, groups); groups divide C

    Returns
    -------
    array (B, anchors, C)
        Of the kind, device and dtype of `features`.

    Raises
    ------
    ValueError
        A shape does not fit.
    TypeError
        The kind, dtype or device of an array does not fit.

    Notes
    -----
    NaN in a location gives NaN; an infinite one is not seen. Sums are in one order, so bits are the same on every run
    and, on the CPU, for any number of threads.

    Memory beyond the result: as `ms_deform_attn`, whatever the size of the maps. What is not seen has no part in any
    gradient, whatever its weight.

    References
    ----------
    arXiv:2311.11722 section 3.3; Sparse4D's deformable_aggregation_function.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import deform_aggregation
    >>> features = np.arange(16.0).reshape(1, 16, 1)
    >>> locations, weights = np.full((1, 1, 2, 1, 2), 0.5), np.ones((1, 1, 2, 1, 1, 1))
    >>> deform_aggregation(features, (((4, 4),),), locations, weights).tolist()
    [[[15.0]]]
    """
    op = "deform_aggregation"
    arrays = {"features": features, "sampling_locations": sampling_locations, "weights": weights}
    arrays, back = _interop.to_native(op, arrays)
    g = _geometry_of(op, arrays, spatial_shapes)
    return _gather.forward(op, arrays, back, g, _gather.shape_of(g))


def deform_aggregation_backward(
    grad_output: AnyArray,
    features: AnyArray,
    spatial_shapes: SpatialShapes,
    sampling_locations: AnyArray,
    weights: AnyArray,
    *,
    needs: Needs = None,
    deterministic: bool = False,
) -> DeformAggregationGrads:
    """Gradients of `deform_aggregation`, computed from its arguments alone: d sum(grad_output * output) / d argument.

    Parameters
    ----------
    grad_output : array (B, anchors, C), the gradient of the forward's result
    features, spatial_shapes, sampling_locations, weights : exactly the forward's
    needs, deterministic : as in `ms_deform_attn_backward`

    Returns
    -------
    DeformAggregationGrads
        Of the kind, device and dtype of `grad_output`; that of sampling_locations has the dtype of
        `sampling_locations`.

    Raises
    ------
    ValueError
        A shape or name in `needs` does not fit.
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
    >>> from pydeform import deform_aggregation_backward
    >>> locations, weights = np.full((1, 5, 2, 1, 2), 0.3), np.ones((1, 5, 2, 1, 1, 4))
    >>> grads = deform_aggregation_backward(np.ones((1, 5, 8)), np.ones((1, 16, 8)), (((4, 4),),), locations, weights)
    >>> grads.features.shape, float(grads.weights.max())
    ((1, 16, 8), 2.0)
    """
    op = "deform_aggregation_backward"
    arrays = {
        "grad_output": grad_output,
        "features": features,
        "sampling_locations": sampling_locations,
        "weights": weights,
    }
    arrays, back = _interop.to_native(op, arrays)
    g = _geometry_of(op, arrays, spatial_shapes)
    return DeformAggregationGrads(
        **_gather.backward(op, arrays, back, g, "(B, anchors, C)", _gather.shape_of(g), needs, deterministic)
    )


def _geometry_of(op: str, arrays: dict[str, Any], spatial_shapes: Any) -> _gather_geometry.Gather:
    _call.check_arrays(op, arrays, "features", "sampling_locations", "weights")
    return _gather_geometry.aggregation_geometry(op, arrays, spatial_shapes)
