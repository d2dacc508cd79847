"""Multi-scale deformable attention with the projections around it.

It takes several arrays, `y, backprop = layer(query, reference_points, input, spatial_shapes)`, so a `Sequential` cannot
hold it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pydeform import _arrays, _checks, _gather_geometry
from pydeform.layers import _layer
from pydeform.layers.linear import Linear
from pydeform.ops.ms_deform_attn_fused import ms_deform_attn_fused, ms_deform_attn_fused_backward


class MSDeformAttn(_layer.Layer):
    """Attention of each query to a few points around its reference point, in maps of several sizes.

        sampling_offsets, attention_logits = linear(query), linear(query)
        y = output_proj(ms_deform_attn_fused(value_proj(input), ..., sampling_offsets, attention_logits))

    Offsets and logits start independent of the query: head m looks into the direction 2*pi*m/heads, its point p of each
    level p + 1 pixels away, or (p + 1)/points of the way to the edge of a box, and all points weigh the same. Names,
    shapes and layout of the parameters are those of Deformable-DETR, of RT-DETRv2 and D-FINE, and of transformers, so
    their weights fit: `for name, param in layer.params.items(): param[...] = weights[name]`.

    Parameters
    ----------
    embed_dim : channels of queries and input, a multiple of heads
    levels, heads : how many maps, and groups of channels
    points : of each head in each level: one number, or one for each level (D-FINE: (3, 6, 3))
    method, offset_scale : as in `pydeform.ms_deform_attn_fused`; with "discrete" offsets do not learn
    projections : False leaves out value_proj and output_proj, as D-FINE does
    rng : numpy.random.Generator or seed of the projections: uniform, variance 1 / embed_dim (Glorot); biases start at 0
    dtype : of the parameters, and of the arrays it takes; reference_points may be float32 beside a half type

    Attributes
    ----------
    params : dict of arrays
        "sampling_offsets.weight" (2*heads*sum(points), embed_dim), "sampling_offsets.bias", "attention_weights.weight"
        (heads*sum(points), embed_dim), "attention_weights.bias"; "value_proj.weight", "value_proj.bias",
        "output_proj.weight", "output_proj.bias". The paper trains the first two at 0.1 times the learning rate:
        `lr_mult={"*sampling_offsets.*": 0.1}`.

    Methods
    -------
    __call__(query, reference_points, input, spatial_shapes, padding_mask=None, *, train=True)
        query (N, Lq, embed_dim), reference_points (N, Lq, 1 or levels, 2 or 4), input (N, S, embed_dim), spatial_shapes
        (levels, 2), padding_mask bool (N, S) or None -> y (N, Lq, embed_dim). Where padding_mask is true there is
        nothing to see, as in Deformable-DETR; transformers' masks are the opposite. backprop returns (grad_query,
        grad_reference_points, grad_input), the second None with method "discrete".

    References
    ----------
    arXiv:2010.04159 section 4.1 and appendix A.3.

    Examples
    --------
    >>> import numpy as np
    >>> layer = MSDeformAttn(8, levels=2, heads=2, points=(3, 1), rng=0)
    >>> query, reference = np.ones((1, 5, 8), np.float32), np.full((1, 5, 1, 2), 0.5, np.float32)
    >>> y, backprop = layer(query, reference, np.ones((1, 20, 8), np.float32), ((4, 4), (2, 2)))
    >>> y.shape, [grad.shape for grad in backprop(y)], layer.params["sampling_offsets.weight"].shape
    ((1, 5, 8), [(1, 5, 8), (1, 5, 1, 2), (1, 20, 8)], (16, 8))
    """

    def __init__(
        self,
        embed_dim: int = 256,
        levels: int = 4,
        heads: int = 8,
        points: Any = 4,
        *,
        method: str = "bilinear",
        offset_scale: float = 0.5,
        projections: bool = True,
        rng: _layer.Seed = None,
        dtype: Any = np.float32,
    ) -> None:
        embed_dim, levels, heads = _layer.positive(self, embed_dim=embed_dim, levels=levels, heads=heads)
        if embed_dim % heads:
            raise ValueError(f"{self.name}: embed_dim must be a multiple of heads = {heads}, got {embed_dim}")
        each = _checks.per_axis(self.name, "points", points, levels, 1)
        _checks.check_choice(self.name, "method", method, tuple(_gather_geometry.METHODS))
        projections = _layer.flag(self, "projections", projections)
        dtype, rng = _layer.float_dtype(self, dtype), _layer.generator(self, rng)
        self.embed_dim, self.levels, self.heads = embed_dim, levels, heads
        self.options: dict[str, Any] = {
            "points": each,
            "method": method,
            "offset_scale": _checks.number(self.name, "offset_scale", offset_scale, dtype=dtype),
        }
        sizes = {"embed_dim": embed_dim, "levels": levels, "heads": heads}
        points = each[0] if len(set(each)) == 1 else each
        super().__init__(
            settings={**sizes, **self.options, "points": points, "projections": projections, "dtype": dtype}
        )
        self.samples = heads * sum(each)
        self.sampling_offsets = linear(embed_dim, 2 * self.samples, None, dtype)
        self.sampling_offsets.params["bias"][...] = _directions(heads, each)
        self.attention_weights = linear(embed_dim, self.samples, None, dtype)
        self.value_proj = linear(embed_dim, embed_dim, rng, dtype) if projections else None
        self.output_proj = linear(embed_dim, embed_dim, rng, dtype) if projections else None
        for name in ("sampling_offsets", "attention_weights", *(("value_proj", "output_proj") if projections else ())):
            _layer.hold(self, name, getattr(self, name))

    def __call__(  # type: ignore[override]
        self,
        query: Any,
        reference_points: Any,
        input: Any,
        spatial_shapes: Any,
        padding_mask: Any = None,
        *,
        train: bool = True,
    ) -> tuple[Any, _layer.Backprop]:
        levels = self._check(query, reference_points, input, spatial_shapes, padding_mask)
        per_head = *query.shape[:2], self.heads, self.samples // self.heads
        offsets, back_offsets = along_last(self.sampling_offsets, query, train)
        logits, back_logits = along_last(self.attention_weights, query, train)
        value, back_value = along_last(self.value_proj, input, train)
        seen = None if padding_mask is None else ~padding_mask[..., None]
        value = _masked(value, seen).reshape(*input.shape[:2], self.heads, self.embed_dim // self.heads)
        arrays = value, levels, reference_points, offsets.reshape(*per_head, 2), logits.reshape(per_head)
        y, back_y = along_last(self.output_proj, ms_deform_attn_fused(*arrays, **self.options), train)
        if not train:
            return y, _layer.nothing_kept(self)
        like = _layer.like(self, y)

        def backprop(grad_y: Any) -> Any:
            _layer.check_grad(self, grad_y, like)
            grads = ms_deform_attn_fused_backward(back_y(grad_y), *arrays, **self.options)
            grad_query = back_logits(grads.attention_logits)
            if grads.sampling_offsets is not None:
                grad_query = plus(grad_query, back_offsets(grads.sampling_offsets))
            grad_value = _masked(grads.value.reshape(input.shape), seen)
            return grad_query, grads.reference_points, back_value(grad_value)

        return y, backprop

    def _check(self, query: Any, reference_points: Any, input: Any, spatial_shapes: Any, padding_mask: Any) -> Any:
        """The levels. The operator checks reference_points."""
        model = _arrays.like(self.name, "the parameters", self.params["sampling_offsets.weight"])
        _arrays.check_like(self.name, "query", query, "the parameters", model)
        _arrays.namespace(self.name, "reference_points", reference_points)
        _arrays.check_like(self.name, "input", input, "the parameters", model)
        levels = _gather_geometry.levels_of(self.name, spatial_shapes)
        _checks.check_shape(self.name, "spatial_shapes", (len(levels), 2), "(levels, 2)", (self.levels, 2))
        _checks.check_ndim(self.name, "query", query.shape, "(N, Lq, embed_dim)", 3)
        expected = *query.shape[:2], self.embed_dim
        _checks.check_shape(self.name, "query", query.shape, "(N, Lq, embed_dim)", expected)
        pixels = query.shape[0], sum(h * w for h, w in levels)
        formula = "(N, S = sum of h*w, embed_dim)"
        _checks.check_shape(self.name, "input", input.shape, formula, (*pixels, self.embed_dim))
        if padding_mask is not None:
            _arrays.check_like(self.name, "padding_mask", padding_mask, "the parameters", model._replace(dtype=None))
            if padding_mask.dtype != bool:
                raise TypeError(f"{self.name}: padding_mask must have dtype bool, got {padding_mask.dtype}")
            _checks.check_shape(self.name, "padding_mask", padding_mask.shape, "(N, S)", pixels)
        return levels


def linear(inputs: int, outputs: int, rng: _layer.Seed, dtype: Any, bias: bool = True) -> Linear:
    """Its weight is Glorot's uniform, or without a generator zero."""
    layer = Linear(inputs, outputs, bias, rng=0, dtype=dtype)
    limit = math.sqrt(6 / (inputs + outputs))
    weight = layer.params["weight"]
    weight[...] = 0 if rng is None else np.random.default_rng(rng).uniform(-limit, limit, weight.shape)
    return layer


def along_last(layer: Linear | None, x: Any, train: bool) -> tuple[Any, _layer.Backprop]:
    """`layer`, if there is one, along the last axis of x. Its backprop takes y's numbers in order, in any shape."""
    if layer is None:
        return x, lambda grad: grad
    shape, count = x.shape, math.prod(x.shape[:-1])
    y, backprop = layer(x.reshape(count, shape[-1]), train)
    outputs = y.shape[1]
    return y.reshape(*shape[:-1], outputs), lambda grad: backprop(grad.reshape(count, outputs)).reshape(shape)


def plus(a: Any, b: Any) -> Any:
    """Of half types rounded once."""
    return _arrays.rounded(_arrays.wide(a) + _arrays.wide(b), a.dtype)


def _masked(array: Any, mask: Any) -> Any:
    return array if mask is None else _arrays.rounded(_arrays.masked(_arrays.wide(array), mask), array.dtype)


def _directions(heads: int, points: tuple[int, ...]) -> Any:
    """(x, y) of each point of each head: along its direction to the edges of squares of 1, 2, ... pixels."""
    angle = 2 * np.pi / heads * np.arange(heads)
    direction = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    direction /= np.abs(direction).max(axis=-1, keepdims=True)
    steps = np.concatenate([np.arange(1, count + 1) for count in points])
    return (direction[:, None] * steps[:, None]).ravel()
