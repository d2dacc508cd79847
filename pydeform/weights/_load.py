"""State dicts into layers: whose names are which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydeform import _interop
from pydeform.layers import _layer

# How our names end, and theirs of the same array. mmcv's packs and CharlesShang's DCNv2, where one convolution computes
# offsets and mask, as here; MXNet's symbols, its Gluon layers, its normalisation.
ENDS = {
    f"{ours}{array}": [f"{theirs}{array}" for theirs in others]
    for array in ("weight", "bias")
    for ours, others in {
        "offset.": ("conv_offset.", "conv_offset_mask.", "offset_"),
        "": ("deformable_conv_",),
    }.items()
} | {"running_mean": ["moving_mean"], "running_var": ["moving_var"]}
ENDS["weight"].append("gamma")
ENDS["bias"].append("beta")
# What is in state dicts and follows from options, or counts: of BatchNorm2d, RT-DETRv2, D-FINE.
NOT_LOADED = ("num_batches_tracked", "n_points_scale", "num_points_scale")


def load(
    layer: _layer.Layer, weights: Mapping[str, Any], prefix: str = "", names: Mapping[str, str] | None = None
) -> None:
    """Put the arrays whose names begin with `prefix` into `layer`, in place.

    Layers have the names of the modules that they are: `MSDeformAttn` those of Deformable-DETR, mmcv and transformers,
    `DCNv3` and `DCNv4` those of their authors' code, and all others PyTorch's. Where the field has several names,
    they are known: the branch "offset" of a `DeformConv2d` is mmcv's "conv_offset", "conv2_offset" beside "conv2" in
    Detectron2 and old mmcv, "offset_weight" in MXNet. A `Sequential` is an nn.Sequential.

    Parameters
    ----------
    layer : of the same sizes
    weights : names and arrays, from `read`, or the state dict of a module. Any arrays that operators take
    prefix : how the layer's names begin there, up to their own: "backbone.layer3.0.conv2."
    names : what a part of the layer is called, in full, where its name is not known: torchvision's module has no
        branch for offsets, yours may be {"offset": "backbone.layer3.0.my_offsets"}

    Raises
    ------
    ValueError
        An array is missing, has another shape, or is under `prefix` and not of the layer; values that do not fit the
        layer's dtype.
    TypeError
        The kind or dtype of an array does not fit.

    Notes
    -----
    mmcv's modulated packs have modulated=True; MXNet's layers have mask_scale=2 and boundary="dcnv2", its
    DeformableConvolution has boundary="dcnv1". After an error nothing has been changed.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform.layers import DeformConv2d
    >>> layer = DeformConv2d(4, 8, 3, bias=False, modulated=True, rng=0)
    >>> shapes = {"conv2.weight": (8, 4, 3, 3), "conv2.conv_offset.weight": (27, 4, 3, 3), "conv2.conv_offset.bias": 27}
    >>> load(layer, {name: np.ones(shape, np.float32) for name, shape in shapes.items()}, "conv2.")
    >>> float(layer.params["offset.weight"].mean())
    1.0
    """
    op, others = "load", dict(names or {})
    if not isinstance(layer, _layer.Layer):
        raise TypeError(f"{op}: layer must be a Layer, got {type(layer).__qualname__}")
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"{op}: weights must be a dict of arrays, as `read` returns it, got {type(weights).__qualname__}"
        )
    targets = {**layer.params, **layer.state}
    unused = [part for part in others if not any(name.startswith(f"{part}.") for name in targets)]
    if unused:
        raise ValueError(f"{op}: names must name parts of {layer.name}, got {', '.join(unused)}")
    theirs = {}
    for name in targets:
        found = next((their for their in _candidates(name, prefix, others) if their in weights), None)
        if found is not None:
            theirs[name] = found
    known = set(theirs.values())
    arrays = {name: _native(op, their, weights[their]) for name, their in theirs.items()}
    for their in weights:
        if their.startswith(prefix) and their not in known and not their.endswith(NOT_LOADED):
            arrays[their] = None
    source = f"weights under {prefix!r}" if prefix else "weights"
    for name, array in _layer.fitting(op, source, layer.name, targets, arrays).items():
        targets[name][...] = array


def _candidates(name: str, prefix: str, others: Mapping[str, str]) -> Iterator[str]:
    """What the array may be called."""
    part = next((part for part in others if name.startswith(f"{part}.")), None)
    full = prefix + name if part is None else others[part] + name.removeprefix(part)
    yield full
    for end, their_ends in ENDS.items():
        if full.endswith(end):
            yield from (full.removesuffix(end) + their_end for their_end in their_ends)
    yield "_offset.".join(full.rsplit(".offset.", 1))


def _native(op: str, name: str, array: Any) -> Any:
    return _interop.to_native(op, {name: array})[0][name]
