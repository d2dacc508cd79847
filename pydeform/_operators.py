"""Every public operator as data: what its arrays and options are called, which axis they share, what shape comes out.

Bridges to other frameworks and libraries are made from this table alone, so that an operator appears in all of them as
soon as it is public. The signatures of the operators are its source; only what these do not say is written here.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import pydeform
from pydeform import _checks

Shape = tuple[Any, ...]  # of ints, or of a tracer's symbols, with which one can compute


class Operator(NamedTuple):
    """One public function and its backward."""

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    grads: type  # the NamedTuple that `backward` returns
    arguments: tuple[str, ...]  # the forward's, in order
    arrays: tuple[str, ...]  # those that are arrays, in the order of `grads`
    optional: frozenset[str]  # arrays that may be None
    fixed: frozenset[str]  # arrays whose gradient is always None
    on_request: frozenset[str]  # arrays whose gradient comes only where `needs` names them
    options: dict[str, Any]  # the other arguments, with their defaults; inspect.Parameter.empty: there is none
    keyword_only: frozenset[str]
    shared: frozenset[str]  # arrays that all results need whole; of all others, axis 0 is that of the results
    image_axis: int  # where the axes of an image begin, in results and in all arrays but those; one more is of channels
    shape: Callable[[Mapping[str, Shape], Mapping[str, Any]], Shape]  # of the result, of arrays' shapes and all options

    def of_image(self, axes: Sequence[Any]) -> tuple[Any, ...]:
        """Of things for each axis of an array, those for an image's."""
        return tuple(axes[self.image_axis : self.image_axis + len(axes) - 2])

    def with_image(self, axes: Sequence[Any], of_image: Sequence[Any]) -> tuple[Any, ...]:
        """The same with others there."""
        return (*axes[: self.image_axis], *of_image, *axes[self.image_axis + len(of_image) :])

    def bind(self, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """A call's arrays and options, all of them, with the errors that Python has for a call."""
        bound = signature_of(self.name).bind(*arguments, **keywords)
        bound.apply_defaults()
        given = bound.arguments
        return {name: given[name] for name in self.arrays}, {name: given[name] for name in self.options}

    def result_shape(self, arrays: Mapping[str, Any], options: Mapping[str, Any]) -> Shape:
        """Of anything with a shape; nothing is checked."""
        return self.shape({name: array.shape for name, array in arrays.items() if array is not None}, options)

    def for_batch(self, options: Mapping[str, Any], batch: int) -> dict[str, Any]:
        """Options of a part of a call: where they say the number of images once more, that of the part."""
        size = _size(options)
        return {**options, "size": (batch, *size[1:])} if size else dict(options)

    def without_batch(
        self, op: str, arrays: Mapping[str, Any], options: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The call for no image or box at all, of anything with a shape and a dtype, `grad_output` too: it computes
        nothing, has the dtypes and other sizes that the whole call has, and the errors, but for those of values."""
        counts = [("size", _size(options)), *((key, a.shape) for key, a in arrays.items() if a is not None)]
        counts = [(key, shape) for key, shape in counts if len(shape) and key not in self.shared]
        for (first, expected), (key, shape) in itertools.pairwise(counts):
            if shape[0] != expected[0]:
                raise ValueError(f"{op}: {key} must have the first axis of {first}, {expected[0]}, got shape {shape}")
        sizes = {
            key: array.shape if key in SHARED else (0, *array.shape[1:])
            for key, array in arrays.items()
            if array is not None
        }
        nothing = {key: np.zeros(sizes[key], a.dtype) if key in sizes else None for key, a in arrays.items()}
        return nothing, self.for_batch(options, 0)


def _size(options: Mapping[str, Any]) -> tuple[Any, ...]:
    """The option that says how large a result is; empty where there is none."""
    size: Any = options.get("size")
    return tuple(size) if isinstance(size, Sequence) or getattr(size, "ndim", 0) == 1 else ()


@functools.cache
def signature_of(name: str) -> inspect.Signature:
    return inspect.signature(getattr(pydeform, name))


@functools.cache
def operators() -> dict[str, Operator]:
    """By name: all public functions that have a backward."""
    return {name: _operator(name) for name in pydeform.__all__ if f"{name}_backward" in pydeform.__all__}


def _operator(name: str) -> Operator:
    forward, backward = getattr(pydeform, name), getattr(pydeform, f"{name}_backward")
    parameters = signature_of(name).parameters
    grads = getattr(pydeform, inspect.signature(backward).return_annotation)
    options = {key: p.default for key, p in parameters.items() if key not in grads._fields}
    boxes = {"boxes"} & set(grads._fields)
    return Operator(
        name,
        forward,
        backward,
        grads,
        tuple(parameters),
        grads._fields,
        frozenset(key for key in grads._fields if parameters[key].default is None),
        frozenset(() if name in BOXES_HAVE_GRADIENTS else boxes),
        frozenset(boxes if name in BOXES_ON_REQUEST else ()),
        options,
        frozenset(key for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY),
        frozenset(grads._fields) & SHARED | ({"input"} if boxes else set()),
        1 if name in CHANNELS_LAST else 2,
        _shape_function(name),
    )


BOXES_ON_REQUEST = ("roi_align",)
BOXES_HAVE_GRADIENTS = ("prroi_pool", *BOXES_ON_REQUEST)
# With boxes the input too: a box names its image.
SHARED = {"weight", "bias", "positions"}
CHANNELS_LAST = ("dcnv3", "dcnv4")


def _shape_function(name: str) -> Callable[[Mapping[str, Shape], Mapping[str, Any]], Shape]:
    for part, function in _SHAPES.items():
        if part in name:
            return function
    raise NotImplementedError(f"no formula for the shape of what {name} returns")


def _of_convolution(shapes: Mapping[str, Shape], options: Mapping[str, Any]) -> Shape:
    weight, size = shapes["weight"], shapes["input"][2:]
    axes, kernel = len(size), weight[2:]
    stride = _checks.per_axis("", "stride", options["stride"], axes, 1)
    dilation = _checks.per_axis("", "dilation", options.get("dilation", 1), axes, 1)
    padding = _checks.padding_pairs("", options["padding"], size, kernel, stride, dilation)
    out = [
        (n + before + after - d * (k - 1) - 1) // s + 1
        for n, (before, after), d, k, s in zip(size, padding, dilation, kernel, stride, strict=True)
    ]
    return shapes["input"][0], weight[0], *out


def _of_boxes(shapes: Mapping[str, Shape], options: Mapping[str, Any]) -> Shape:
    bins = _checks.per_axis("", "output_size", options["output_size"], 2, 1)
    return shapes["boxes"][0], shapes["input"][1], *bins


def _of_sensitive_boxes(shapes: Mapping[str, Shape], options: Mapping[str, Any]) -> Shape:
    boxes, channels, *bins = _of_boxes(shapes, options)
    return boxes, channels // math.prod(bins), *bins


def _of_deformable_bins(shapes: Mapping[str, Shape], options: Mapping[str, Any]) -> Shape:
    return shapes["boxes"][0], options["output_dim"], options["pooled_size"], options["pooled_size"]


def _of_kernel_on_maps(shapes: Mapping[str, Shape], _options: Mapping[str, Any]) -> Shape:
    batch, _, _, channels = shapes["input"]
    moves = shapes["offset"] if "offset" in shapes else shapes["offset_mask"]
    return batch, *moves[1:3], channels


def _of_attention(shapes: Mapping[str, Shape], _options: Mapping[str, Any]) -> Shape:
    batch, _, heads, channels = shapes["value"]
    places = shapes["sampling_locations"] if "sampling_locations" in shapes else shapes["sampling_offsets"]
    return batch, places[1], heads * channels


def _of_aggregation(shapes: Mapping[str, Shape], _options: Mapping[str, Any]) -> Shape:
    return shapes["features"][0], shapes["sampling_locations"][1], shapes["features"][2]


def _of_grid(shapes: Mapping[str, Shape], _options: Mapping[str, Any]) -> Shape:
    return *shapes["input"][:2], *shapes["grid"][1:-1]


def _of_image(shapes: Mapping[str, Shape], _options: Mapping[str, Any]) -> Shape:
    return shapes["input"]


def _of_affine_grid(_shapes: Mapping[str, Shape], options: Mapping[str, Any]) -> Shape:
    batch, _, *size = options["size"]
    return batch, *size, len(size)


# By a part of the operator's name; the first that fits.
_SHAPES = {
    "conv": _of_convolution,
    "deform_psroi_pool": _of_deformable_bins,
    "ps_roi": _of_sensitive_boxes,
    "roi": _of_boxes,
    "dcnv": _of_kernel_on_maps,
    "attn": _of_attention,
    "aggregation": _of_aggregation,
    "grid_sample": _of_grid,
    "warp": _of_image,
    "affine_grid": _of_affine_grid,
}
