"""What each vector is in pydeform's terms: which operator, arrays, options and gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tests.vectors import Vector

# mmcv's own gradient of the offset, `offset`, is not the derivative of its forward; `offset_true` is.
PARAMETERS = {
    "x": "input",
    "data": "input",
    "rois": "boxes",
    "trans": "trans",
    "mask": "mask",
    "offset_true": "offset",
}

GRID = ("grid_sample", "affine_grid")
GATHER = ("dcnv3", "dcnv4", "ms_deform_attn", "ms_deform_attn_fused", "deform_aggregation")
# Running sums of what is in spatial_shapes.
DERIVED = ("level_start_index", "scale_start_index")


def outside_api(vector: Vector) -> str:
    """Why pydeform has no such operator; empty: it has."""
    if vector.meta["operator"] == "ps_roi_align" and vector.args.get("aligned") is False:
        return "MXNet's ROIAlign can be position-sensitive without the half pixel"
    if vector.args.get("mode") == "max" and "onnx_op" in vector.args:
        return "ONNX's largest of single weighted pixels"
    border = vector.meta.get("semantics", {}).get("border", "")
    if vector.meta["operator"] == "deform_conv1d" and border.startswith("clamp"):
        return "dc1d clamps positions to the padded signal"
    if vector.args.get("softmax"):
        return "DCNv4's kernel can take the softmax itself"
    if vector.meta["operator"] == "spatial_transformer":
        return "affine_grid and grid_sample in one"
    if vector.args.get("transform_type") == "warp":
        return "MXNet's grid of a flow"
    return ""


def boundary_of(vector: Vector) -> str:
    """The rule the system follows. Without `kink` it has no backward, and torchvision and dcnv2 are the same."""
    semantics = vector.meta["semantics"]
    if semantics["border"] == "mxnet_v1":
        return "dcnv1"
    assert semantics["border"] == "zeros"
    return {"floor": "torchvision", "strict": "dcnv2"}[semantics.get("kink", "floor")]


def deform_conv_options(vector: Vector) -> dict[str, Any]:
    args = vector.args
    if "onnx_op" in args and "kernel_shape" in args:  # the attributes of the node, with ONNX's defaults
        top, left, bottom, right = args.get("pads", (0, 0, 0, 0))
        stride, dilation = args.get("strides", (1, 1)), args.get("dilations", (1, 1))
        padding: Any = ((top, bottom), (left, right))
    else:
        stride, padding, dilation = args["stride"], args["padding"], args["dilation"]
    return {"stride": stride, "padding": padding, "dilation": dilation, "boundary": boundary_of(vector)}


class Call(NamedTuple):
    """A vector in pydeform's terms: operator(**arrays, **options)."""

    operator: str
    arrays: dict[str, np.ndarray]
    options: dict[str, Any]
    grads: dict[str, np.ndarray]
    channels: np.ndarray | None = None  # which channel of the vector's data each channel of the input is


def call_of(vector: Vector) -> Call:
    if vector.meta["operator"].startswith("deform_conv"):
        return deform_conv_call(vector)
    if vector.meta["operator"] in GATHER:
        return gather_call(vector)
    if vector.meta["operator"] in GRID:
        return grid_call(vector)
    inputs, args = dict(vector.inputs), vector.args
    options = {"spatial_scale": args.get("spatial_scale_effective", args["spatial_scale"])}
    if "onnx_op" in args:
        options |= {
            "output_size": (args["output_height"], args["output_width"]),
            "sampling_ratio": args["sampling_ratio"],
            "aligned": {"half_pixel": True, "output_half_pixel": False}[args["coordinate_transformation_mode"]],
        }
        return Call("roi_align", onnx_arrays(*(inputs[name] for name in ("X", "rois", "batch_indices"))), options, {})
    image = inputs["x"] if "x" in inputs else inputs["data"]
    arrays = {"input": image, "boxes": inputs["rois"]}
    grads = {PARAMETERS[name]: grad for name, grad in vector.grads.items() if name in PARAMETERS}
    operator = vector.meta["operator"]
    if operator == "psroi_pooling":
        return psroi_pooling_call(vector, arrays, options, grads)
    if operator == "deformable_psroi_pooling":
        operator = "deform_psroi_pool"
        names = ("output_dim", "pooled_size", "group_size", "sample_per_part")
        options |= {name: args[name] for name in names}
        options["part_size"] = args["part_size"] or args["pooled_size"]  # 0: as many
        options["trans_std"] = args.get("trans_std_effective", args["trans_std"])
        if not args["no_trans"]:
            arrays["trans"] = inputs["trans"]
    else:
        options["output_size"] = tuple(args["output_size"])
        if "sampling_ratio" in args:
            options["sampling_ratio"] = args["sampling_ratio"]
    if operator == "roi_align":
        options |= {"aligned": args["aligned"], "mode": args.get("pool_mode", "avg")}
    if operator == "roi_align_rotated":
        options |= {"aligned": args["aligned"], "clockwise": args["clockwise"]}
    if operator == "deform_roi_pool":
        options["gamma"] = args.get("gamma_effective", args["gamma"])
        arrays |= {name: inputs[name] for name in ("offset", "mask") if name in inputs}
    return Call(operator, arrays, options, grads)


def deform_conv_call(vector: Vector) -> Call:
    """Of one, two or three axes."""
    arrays = {PARAMETERS.get(name, name): array for name, array in vector.inputs.items()}
    grads = {PARAMETERS.get(name, name): grad for name, grad in vector.grads.items()}
    return Call(vector.meta["operator"], arrays, deform_conv_options(vector), grads)


def gather_call(vector: Vector) -> Call:
    args = vector.args
    arrays = {PARAMETERS.get(name, name): array for name, array in vector.inputs.items() if name not in DERIVED}
    grads = {PARAMETERS.get(name, name): grad for name, grad in vector.grads.items()}
    options = {name: args[name] for name in ("points", "method", "offset_scale") if name in args}
    if "kernel_h" in args:
        pairs = {"kernel_size": "kernel", "stride": "stride", "padding": "pad", "dilation": "dilation"}
        options |= {name: (args[f"{of}_h"], args[f"{of}_w"]) for name, of in pairs.items()}
        options |= {"groups": args["group"], "remove_center": bool(args["remove_center"])}
    return Call(vector.meta["operator"], arrays, options, grads)


GRID_MODES = {"linear": "bilinear", "cubic": "bicubic"}  # as ONNX has them


def grid_call(vector: Vector) -> Call:
    """Grids are (N, ..., axes), matrices (N, axes, axes + 1); `size` is among the options. MXNet's grids are as
    `channels_last` has them, its affine ones with align_corners."""
    args = vector.args
    names = {"data": "input", "X": "input", "Grid": "grid"}
    arrays = {names.get(name, name): channels_last(vector, array) for name, array in vector.inputs.items()}
    grads = {names.get(name, name): channels_last(vector, grad) for name, grad in vector.grads.items()}
    if vector.meta["operator"] == "grid_sample":
        mode = args.get("mode", "bilinear")
        options = {"mode": GRID_MODES.get(mode, mode), "padding_mode": args.get("padding_mode", "zeros")}
        return Call("grid_sample", arrays, options | {"align_corners": bool(args.get("align_corners"))}, grads)
    size = arrays.pop("size", None)
    if "target_shape" in args:  # MXNet's matrices are rows of six
        size = len(arrays["theta"]), 1, *args["target_shape"]
        arrays, grads = ({"theta": of["theta"].reshape(-1, 2, 3)} for of in (arrays, grads))
    size = args["size"] if size is None else size
    options = {"size": tuple(map(int, size)), "align_corners": bool(args.get("align_corners", "target_shape" in args))}
    return Call("affine_grid", arrays, options, grads)


def channels_last(vector: Vector, array: np.ndarray) -> np.ndarray:
    """MXNet's grids have their coordinates on the second axis; nothing else of those vectors has two channels."""
    if "grid_layout" not in vector.args or array.ndim != 4 or array.shape[1] != 2:
        return array
    return np.moveaxis(array, 1, -1)


def psroi_pooling_call(
    vector: Vector, arrays: dict[str, np.ndarray], options: dict[str, Any], grads: dict[str, np.ndarray]
) -> Call:
    """R-FCN's operator can have fewer groups than bins; pydeform's has as many, so every bin gets its own copy."""
    args = vector.args
    if "output_size" in args:
        assert vector.name.startswith("psroi_pooling/torchvision")
        options |= {"output_size": tuple(args["output_size"]), "convention": "torchvision"}
        return Call("ps_roi_pool", arrays, options, grads)
    pooled, group = args["pooled_size"], args["group_size"]
    options |= {"output_size": pooled, "convention": "rfcn"}
    if pooled == group:
        return Call("ps_roi_pool", arrays, options, grads)
    c, p, q = np.ogrid[: args["output_dim"], :pooled, :pooled]
    channels = ((c * group + p * group // pooled) * group + q * group // pooled).reshape(-1)
    arrays["input"] = arrays["input"][:, channels]
    return Call("ps_roi_pool", arrays, options, grads, channels)


def onnx_arrays(x: np.ndarray, rois: np.ndarray, batch_indices: np.ndarray) -> dict[str, np.ndarray]:
    return {"input": x, "boxes": np.concatenate([batch_indices[:, None].astype(rois.dtype), rois], axis=1)}
