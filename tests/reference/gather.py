"""Operators whose outputs are weighted sums of samples of maps, one sample at a time, in float64.

    output[out] = sum over its terms of weight * map(y, x)

An operator is the list of its terms: which map, where in pixels of it, how much, and to which output. What comes back
to y, x and the weight of each term is then handed on to the arguments that they were computed from. Only the channels
of one sample are taken at once. Slow on purpose; nothing here is shared with the library under test.

A sample counts strictly inside (-1, length), and there pixels outside the map are 0. At whole numbers its slope is the
one from the right. At exactly -1 it is 0; with kink="floor" it is the one from the right there as well, as pure PyTorch
code has it.
"""

import math
from typing import NamedTuple

import numpy as np


class Sample(NamedTuple):
    """Channels at a point, their slopes, and the pixels they were made of as (row, column, share)."""

    value: np.ndarray
    slope_y: np.ndarray
    slope_x: np.ndarray
    pixels: list


class Term(NamedTuple):
    key: tuple  # of the numbers that say where and how much
    out: tuple
    map: tuple
    y: float
    x: float
    weight: float


def bilinear(image, y, x, kink="strict"):
    """A map (h, w, channels) at a point."""
    height, width, channels = image.shape
    value, slope_y, slope_x, pixels = np.zeros(channels), np.zeros(channels), np.zeros(channels), []
    if math.isnan(y) or math.isnan(x):
        return _not_a_number(channels)
    lowest = -1 if kink == "floor" else math.nextafter(-1, 0)
    if not (lowest <= y < height and lowest <= x < width):
        return Sample(value, slope_y, slope_x, pixels)
    top, left = math.floor(y), math.floor(x)
    for row, of_row, sign_y in ((top, 1 - (y - top), -1), (top + 1, y - top, 1)):
        for column, of_column, sign_x in ((left, 1 - (x - left), -1), (left + 1, x - left, 1)):
            if 0 <= row < height and 0 <= column < width:  # others are never read
                value += of_row * of_column * image[row, column]
                slope_y += sign_y * of_column * image[row, column]
                slope_x += sign_x * of_row * image[row, column]
                pixels.append((row, column, of_row * of_column))
    if -1 in (y, x):  # the value is 0 by rule, not by a product
        value, pixels = np.zeros(channels), []
    return Sample(value, slope_y, slope_x, pixels)


def one_pixel(image, y, x):
    """A map at whole numbers that are inside it, or at NaN."""
    if math.isnan(y) or math.isnan(x):
        return _not_a_number(image.shape[2])
    flat = np.zeros(image.shape[2])
    return Sample(image[int(y), int(x)], flat, flat, [(int(y), int(x), 1.0)])


def _not_a_number(channels):
    """No pixel was read, so none gets a gradient."""
    nan = np.full(channels, math.nan)
    return Sample(nan, nan, nan, [])


def gather(output, maps, terms, sample):
    for term in terms:
        output[term.out] += term.weight * sample(maps[term.map], term.y, term.x).value
    return output


def scatter(grad_output, maps, grad_maps, terms, sample):
    """Adds to the maps' gradients; (key, gradient of y, of x, of the weight) of every term."""
    for term in terms:
        point, grad = sample(maps[term.map], term.y, term.x), grad_output[term.out]
        for row, column, share in point.pixels:
            grad_maps[term.map][row, column] += term.weight * share * grad
        slope_y, slope_x = (grad * point.slope_y).sum(), (grad * point.slope_x).sum()
        yield term.key, term.weight * slope_y, term.weight * slope_x, (grad * point.value).sum()


def _float64(*arrays):
    return [np.ascontiguousarray(a).astype(np.float64) for a in arrays]


def _sampler(method, kink):
    if method == "discrete":
        return one_pixel
    return lambda image, y, x: bilinear(image, y, x, kink)


# Attention over maps of several sizes --------------------------------------------------------------------------------


def ms_deform_attn(
    value,
    spatial_shapes,
    sampling_locations,
    attention_weights,
    *,
    points=None,
    method="bilinear",
    kink="strict",
):
    value, locations, weights = _float64(value, sampling_locations, attention_weights)
    shapes, levels, locations, weights = _flat(spatial_shapes, locations, weights, points)
    batch, queries, heads, _ = weights.shape
    output = np.zeros((batch, queries, heads, value.shape[3]))
    terms = _attention_terms(shapes, levels, locations, weights, method)
    gather(output, _maps_of_levels(value, shapes), terms, _sampler(method, kink))
    return output.reshape(batch, queries, heads * value.shape[3])


def ms_deform_attn_backward(
    grad_output,
    value,
    spatial_shapes,
    sampling_locations,
    attention_weights,
    *,
    points=None,
    method="bilinear",
    kink="strict",
):
    """Gradients of sum(grad_output * ms_deform_attn(...)), as a dict under the arguments' names."""
    of_locations, of_weights = np.shape(sampling_locations), np.shape(attention_weights)
    grad_output, value, locations, weights = _float64(grad_output, value, sampling_locations, attention_weights)
    shapes, levels, locations, weights = _flat(spatial_shapes, locations, weights, points)
    grad_value, grad_locations, grad_weights = np.zeros_like(value), np.zeros_like(locations), np.zeros_like(weights)
    terms = _attention_terms(shapes, levels, locations, weights, method)
    grad_output = grad_output.reshape(*weights.shape[:3], value.shape[3])
    maps, grad_maps = _maps_of_levels(value, shapes), _maps_of_levels(grad_value, shapes)
    for key, grad_y, grad_x, grad_weight in scatter(grad_output, maps, grad_maps, terms, _sampler(method, kink)):
        height, width = shapes[levels[key[3]]]
        grad_locations[key] = grad_x * width, grad_y * height
        grad_weights[key] = grad_weight
    return {
        "value": grad_value,
        "sampling_locations": None if method == "discrete" else grad_locations.reshape(of_locations),
        "attention_weights": grad_weights.reshape(of_weights),
    }


def _flat(spatial_shapes, locations, weights, points):
    """Sizes of the levels, the level of each point, and arrays with one axis for all points of a head."""
    shapes = [(int(height), int(width)) for height, width in spatial_shapes]
    if points is None:
        points = (weights.shape[4],) * len(shapes)
    levels = [level for level, count in enumerate(points) for _ in range(count)]
    leading = weights.shape[:3]
    return shapes, levels, locations.reshape(*leading, len(levels), 2), weights.reshape(*leading, len(levels))


def _maps_of_levels(value, shapes):
    """Views of value, by (image, level, head)."""
    maps, start = {}, 0
    for level, (height, width) in enumerate(shapes):
        for b, head in np.ndindex(len(value), value.shape[2]):
            maps[b, level, head] = value[b, start : start + height * width, head].reshape(height, width, -1)
            assert np.shares_memory(maps[b, level, head], value) or not value.size
        start += height * width
    assert start == value.shape[1]
    return maps


def _attention_terms(shapes, levels, locations, weights, method):
    for key in np.ndindex(*weights.shape):
        b, q, head, point = key
        height, width = shapes[levels[point]]
        x, y = locations[key]
        if method == "discrete":
            y = np.clip(np.trunc(y * height + 0.5), 0, height - 1)
            x = np.clip(np.trunc(x * width + 0.5), 0, width - 1)
        else:
            y, x = y * height - 0.5, x * width - 0.5
        yield Term(key, (b, q, head), (b, levels[point], head), y, x, weights[key])


# The same from offsets, references and logits ------------------------------------------------------------------------


def ms_deform_attn_fused(
    value,
    spatial_shapes,
    reference_points,
    sampling_offsets,
    attention_logits,
    *,
    points=None,
    offset_scale=0.5,
    **options,
):
    """`options`: method and kink, as above."""
    references, offsets, logits = _float64(reference_points, sampling_offsets, attention_logits)
    shapes, levels, offsets, logits = _flat(spatial_shapes, offsets, logits, points)
    locations = _locations(shapes, levels, references, offsets, offset_scale)
    return ms_deform_attn(value, shapes, locations, _softmax(logits), points=_counts(shapes, levels), **options)


def ms_deform_attn_fused_backward(
    grad_output,
    value,
    spatial_shapes,
    reference_points,
    sampling_offsets,
    attention_logits,
    *,
    points=None,
    offset_scale=0.5,
    **options,
):
    references, offsets, logits = _float64(reference_points, sampling_offsets, attention_logits)
    shapes, levels, offsets, logits = _flat(spatial_shapes, offsets, logits, points)
    locations, weights = _locations(shapes, levels, references, offsets, offset_scale), _softmax(logits)
    counts = _counts(shapes, levels)
    grads = ms_deform_attn_backward(grad_output, value, shapes, locations, weights, points=counts, **options)
    of_weights = grads["attention_weights"]
    of_logits = weights * (of_weights - (weights * of_weights).sum(-1, keepdims=True))
    found = {"value": grads["value"], "reference_points": None, "sampling_offsets": None}
    if grads["sampling_locations"] is not None:
        grad_references, grad_offsets = np.zeros_like(references), np.zeros_like(offsets)
        for key in np.ndindex(*weights.shape):
            b, q, _, point = key
            level = levels[point]
            place = b, q, level if references.shape[2] > 1 else 0
            reference, grad = references[place], grads["sampling_locations"][key]
            grad_references[place][:2] += grad
            if len(reference) == 4:
                scale = offset_scale / levels.count(level)
                # No part in the size of the box has a sample outside, where an infinite offset leads.
                grad_references[place][2:] += np.where(grad == 0, 0, grad * offsets[key] * scale)
                grad_offsets[key] = grad * reference[2:] * scale
            else:
                height, width = shapes[level]
                grad_offsets[key] = grad / (width, height)
        found["reference_points"] = grad_references
        found["sampling_offsets"] = grad_offsets.reshape(np.shape(sampling_offsets))
    return found | {"attention_logits": of_logits.reshape(np.shape(attention_logits))}


def _counts(shapes, levels):
    """Points of each level."""
    return [levels.count(level) for level in range(len(shapes))]


def _locations(shapes, levels, references, offsets, offset_scale):
    """A reference is (x, y), and offsets are in pixels; or a box (cx, cy, w, h), and they are in parts of it."""
    locations = np.empty_like(offsets)
    for key in np.ndindex(*offsets.shape[:-1]):
        b, q, _, point = key
        level = levels[point]
        reference = references[b, q, level if references.shape[2] > 1 else 0]
        if len(reference) == 4:
            locations[key] = reference[:2] + offsets[key] / levels.count(level) * reference[2:] * offset_scale
        else:
            height, width = shapes[level]
            locations[key] = reference + offsets[key] / (width, height)
    return locations


def _softmax(logits):
    """Over all points of a head."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


# Aggregation over cameras --------------------------------------------------------------------------------------------


def deform_aggregation(features, spatial_shapes, sampling_locations, weights):
    features, locations, weights = _float64(features, sampling_locations, weights)
    batch, anchors, *_, groups = weights.shape
    output = np.zeros((batch, anchors, groups, features.shape[2] // groups))
    terms = _aggregation_terms(spatial_shapes, locations, weights)
    gather(output, _maps_of_cameras(features, spatial_shapes, groups), terms, bilinear)
    return output.reshape(batch, anchors, features.shape[2])


def deform_aggregation_backward(grad_output, features, spatial_shapes, sampling_locations, weights):
    grad_output, features, locations, weights = _float64(grad_output, features, sampling_locations, weights)
    batch, anchors, *_, groups = weights.shape
    grads = {"features": np.zeros_like(features)}
    grads |= {"sampling_locations": np.zeros_like(locations), "weights": np.zeros_like(weights)}
    maps, grad_maps = (_maps_of_cameras(a, spatial_shapes, groups) for a in (features, grads["features"]))
    terms = _aggregation_terms(spatial_shapes, locations, weights)
    grad_output = grad_output.reshape(batch, anchors, groups, features.shape[2] // groups)
    for key, grad_y, grad_x, grad_weight in scatter(grad_output, maps, grad_maps, terms, bilinear):
        *place, camera, scale, _ = key
        height, width = spatial_shapes[camera][scale]
        grads["sampling_locations"][(*place, camera)] += grad_x * width, grad_y * height
        grads["weights"][key] = grad_weight
    return grads


def _maps_of_cameras(features, spatial_shapes, groups):
    """Views of features, by (image, camera, scale, group)."""
    maps, start = {}, 0
    by_group = features.reshape(*features.shape[:2], groups, features.shape[2] // groups)
    for camera, scales in enumerate(spatial_shapes):
        for scale, (height, width) in enumerate(scales):
            for b, g in np.ndindex(len(features), groups):
                maps[b, camera, scale, g] = by_group[b, start : start + height * width, g].reshape(height, width, -1)
                assert np.shares_memory(maps[b, camera, scale, g], features) or not features.size
            start += height * width
    assert start == features.shape[1]
    return maps


def _aggregation_terms(spatial_shapes, locations, weights):
    """A point outside the picture of a camera is none: it has no term, whatever its weight, even where pixels at the
    border would reach it."""
    for key in np.ndindex(*weights.shape):
        b, anchor, point, camera, scale, g = key
        height, width = spatial_shapes[camera][scale]
        x, y = locations[b, anchor, point, camera]
        if math.isnan(x) or math.isnan(y) or (0 < x < 1 and 0 < y < 1):
            place = y * height - 0.5, x * width - 0.5
            yield Term(key, (b, anchor, g), (b, camera, scale, g), *place, weights[key])


# DCNv3, DCNv4 --------------------------------------------------------------------------------------------------------


def dcnv3(input, offset, mask, *, kink="strict", **options):
    """`options` are those of `_Taps`."""
    input, offset, mask = _float64(input, offset, mask)
    taps = _Taps(input, **options)
    output = np.zeros((len(input), *taps.out, taps.groups, input.shape[3] // taps.groups))
    gather(output, _maps_of_groups(input, taps.groups), taps.terms(offset, mask), _sampler("bilinear", kink))
    return output.reshape(*output.shape[:3], input.shape[3])


def dcnv3_backward(grad_output, input, offset, mask, *, kink="strict", **options):
    grad_output, input, offset, mask = _float64(grad_output, input, offset, mask)
    taps = _Taps(input, **options)
    grads = {"input": np.zeros_like(input), "offset": np.zeros_like(offset), "mask": np.zeros_like(mask)}
    maps, grad_maps = _maps_of_groups(input, taps.groups), _maps_of_groups(grads["input"], taps.groups)
    of_offset, of_mask = taps.by_point(grads["offset"], grads["mask"])
    grad_output = grad_output.reshape(len(input), *taps.out, taps.groups, input.shape[3] // taps.groups)
    terms = taps.terms(offset, mask)
    for key, grad_y, grad_x, grad_weight in scatter(grad_output, maps, grad_maps, terms, _sampler("bilinear", kink)):
        of_offset[key] = grad_x * taps.offset_scale, grad_y * taps.offset_scale
        of_mask[key] = grad_weight
    return grads


def dcnv4(input, offset_mask, **options):
    return dcnv3(input, *unpack(offset_mask, **options), **options)


def dcnv4_backward(grad_output, input, offset_mask, **options):
    grads = dcnv3_backward(grad_output, input, *unpack(offset_mask, **options), **options)
    return {"input": grads["input"], "offset_mask": pack(grads["offset"], grads["mask"], options.get("groups", 1))}


def unpack(offset_mask, *, kernel_size=3, groups=1, remove_center=False, **_):
    """Offset and mask of dcnv3; numbers that fill up a row are not read."""
    points = math.prod(_pair(kernel_size)) - remove_center
    leading = offset_mask.shape[:3]
    rows = offset_mask[..., : groups * points * 3].reshape(*leading, groups, points * 3)
    offset, mask = rows[..., : points * 2], rows[..., points * 2 :]
    return offset.reshape(*leading, groups * points * 2), mask.reshape(*leading, groups * points)


def pack(offset, mask, groups):
    """For each group all its offsets, then its masks; zeros up to a multiple of 8."""
    leading, points = mask.shape[:3], mask.shape[3] // groups
    rows = np.zeros((*leading, -(-groups * points * 3 // 8) * 8), mask.dtype)
    parts = [offset.reshape(*leading, groups, points * 2), mask.reshape(*leading, groups, points)]
    rows[..., : groups * points * 3] = np.concatenate(parts, axis=4).reshape(*leading, groups * points * 3)
    return rows


def _pair(value):
    return (value, value) if np.ndim(value) == 0 else tuple(value)


def _maps_of_groups(input, groups):
    """Views of input, by (image, group)."""
    by_group = input.reshape(*input.shape[:3], groups, input.shape[3] // groups)
    return {(b, g): by_group[b, :, :, g] for b, g in np.ndindex(len(input), groups)}


class _Taps:
    """Points of the kernel, its columns from left to right and each from top to bottom."""

    def __init__(
        self,
        input,
        kernel_size=3,
        stride=1,
        padding=1,
        dilation=1,
        groups=1,
        offset_scale=1.0,
        remove_center=False,
    ):
        self.kernel, self.stride, self.dilation = _pair(kernel_size), _pair(stride), _pair(dilation)
        pads = [_pair(pad) for pad in _pair(padding)]
        self.before, self.groups, self.offset_scale = [pad[0] for pad in pads], groups, offset_scale
        sizes = zip(input.shape[1:3], self.kernel, self.stride, pads, self.dilation, strict=True)
        self.out = tuple((size + sum(pad) - d * (k - 1) - 1) // s + 1 for size, k, s, pad, d in sizes)
        rows, columns = self.kernel
        self.points = [(ky, kx) for kx in range(columns) for ky in range(rows)]
        if remove_center:
            self.points.remove((rows // 2, columns // 2))

    def by_point(self, offset, mask):
        shape = (len(offset), *self.out, self.groups, len(self.points))
        return offset.reshape(*shape, 2), mask.reshape(shape)

    def terms(self, offset, mask):
        offset, mask = self.by_point(offset, mask)
        for key in np.ndindex(*mask.shape):
            b, oy, ox, g, point = key
            x, y = offset[key]
            ky, kx = self.points[point]
            yield Term(key, (b, oy, ox, g), (b, g), self._place(0, oy, ky, y), self._place(1, ox, kx, x), mask[key])

    def _place(self, axis, out, tap, moved):
        """The kernel and its offsets are stretched by offset_scale around its middle, a whole pixel."""
        middle = self.dilation[axis] * (self.kernel[axis] - 1) // 2
        stretched = (tap * self.dilation[axis] + moved) * self.offset_scale
        return out * self.stride[axis] - self.before[axis] + middle * (1 - self.offset_scale) + stretched
