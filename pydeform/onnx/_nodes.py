"""What the nodes of ONNX are in pydeform's terms, and their evaluation."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx.inliner
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_grid_sample import GridSample
from onnx.reference.ops.op_roi_align import RoiAlign

import pydeform
from pydeform import _checks


class Call(NamedTuple):
    """operator(*arguments, **options)."""

    operator: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class Node(NamedTuple):
    """One type of node."""

    # By version: the attributes that versions differ in, with pydeform's word for each value; None: it has no such one
    versions: dict[int, dict[str, dict[Any, Any]]]
    # Of the inputs, and the attributes with the schema's defaults; None where there is no such operator
    call: Callable[[tuple[Any, ...], dict[str, Any]], Call | None]
    reference: type = OpRun  # computes what is left then


def _deform_conv(inputs: tuple[Any, ...], attributes: dict[str, Any]) -> Call | None:
    x, weight, offset, bias, mask = (*inputs, None, None)[:5]
    axes = x.ndim - 2
    if axes not in DEFORM_CONV:
        raise ValueError(f"DeformConv: X must have 1, 2 or 3 spatial axes, got shape {x.shape}")
    _checks.check_ndim("DeformConv", "W", weight.shape, "(oC, C/group, *kernel)", x.ndim)
    _checks.check_ndim("DeformConv", "offset", offset.shape, f"(N, offset_group*K*{axes}, *out)", x.ndim)
    kernel, taps = weight.shape[2:], int(np.prod(weight.shape[2:]))
    told = attributes["kernel_shape"]
    _says("kernel_shape", "that of W", kernel, kernel if told is None else tuple(told))
    _says("group", "C of X over that of W", x.shape[1], attributes["group"] * weight.shape[1])
    _says("offset_group", "such that offset has channels", offset.shape[1], attributes["offset_group"] * taps * axes)
    pads = attributes["pads"] or [0] * 2 * axes
    if len(pads) != 2 * axes:
        raise ValueError(f"DeformConv: pads must be {axes} begins, then {axes} ends, got {pads}")
    options = {
        "stride": tuple(attributes["strides"] or [1] * axes),
        "padding": tuple(zip(pads[:axes], pads[axes:], strict=True)),
        "dilation": tuple(attributes["dilations"] or [1] * axes),
        "mask": mask,
    }
    return Call(DEFORM_CONV[axes], (x, offset, weight, bias), options)


def _says(attribute: str, what: str, expected: Any, got: Any) -> None:
    """Our operators take these from shapes."""
    if expected != got:
        raise ValueError(f"DeformConv: {attribute} must be {what}: {expected} expected, got {got}")


def _roi_align(inputs: tuple[Any, ...], attributes: dict[str, Any]) -> Call | None:
    x, rois, batch_indices = inputs
    _checks.check_shape("RoiAlign", "rois", rois.shape, "(num_rois, 4)", (len(batch_indices), 4))
    if attributes["mode"] == "max":  # the largest of single pixels times their weights
        return None
    wide = rois.astype(np.float32) if rois.dtype.itemsize == 2 else rois  # half types cannot count all images
    boxes = np.concatenate([batch_indices[:, None].astype(wide.dtype), wide], axis=1)
    options = {
        "output_size": (attributes["output_height"], attributes["output_width"]),
        "spatial_scale": attributes["spatial_scale"],
        "sampling_ratio": attributes["sampling_ratio"],
        "aligned": attributes["coordinate_transformation_mode"],
        "mode": attributes["mode"],
    }
    return Call(pydeform.roi_align, (x, boxes), options)


def _max_roi_pool(inputs: tuple[Any, ...], attributes: dict[str, Any]) -> Call | None:
    return Call(pydeform.roi_pool, inputs, {"output_size": tuple(attributes["pooled_shape"])} | _scale(attributes))


def _scale(attributes: dict[str, Any]) -> dict[str, Any]:
    return {"spatial_scale": attributes["spatial_scale"]}


def _grid_sample(inputs: tuple[Any, ...], attributes: dict[str, Any]) -> Call | None:
    x, grid = inputs
    mode = attributes["mode"]
    fits = x.ndim == 4 or (x.ndim == 5 and mode != "bicubic")
    same = grid.dtype in (x.dtype, np.float32) if x.dtype.itemsize == 2 else grid.dtype == x.dtype
    if not fits or not same or x.dtype.name not in _checks.FLOAT_DTYPES:
        return None
    options = {"mode": mode, "padding_mode": attributes["padding_mode"]}
    return Call(pydeform.grid_sample, inputs, options | {"align_corners": bool(attributes["align_corners"])})


def _affine_grid(inputs: tuple[Any, ...], attributes: dict[str, Any]) -> Call | None:
    theta, size = inputs
    return Call(pydeform.affine_grid, (theta, size.tolist()), {"align_corners": bool(attributes["align_corners"])})


DEFORM_CONV = {1: pydeform.deform_conv1d, 2: pydeform.deform_conv2d, 3: pydeform.deform_conv3d}  # by axes
ALIGNED = {"coordinate_transformation_mode": {"half_pixel": True, "output_half_pixel": False}}
MODES = {"mode": {"linear": "bilinear", "nearest": "nearest", "cubic": "bicubic"}}
NODES = {
    "DeformConv": Node({19: {}, 22: {}}, _deform_conv),
    "RoiAlign": Node(
        {10: {"coordinate_transformation_mode": {None: False}}, 16: ALIGNED, 22: ALIGNED}, _roi_align, RoiAlign
    ),
    "MaxRoiPool": Node({1: {}, 22: {}}, _max_roi_pool),
    "GridSample": Node(
        {16: {"mode": {mode: mode for mode in MODES["mode"].values()}}, 20: MODES, 22: MODES}, _grid_sample, GridSample
    ),
    "AffineGrid": Node({20: {}}, _affine_grid),
}


class _Evaluated(OpRun):
    """A node that pydeform computes."""

    op_domain = ""

    def __init__(self, onnx_node: Any, run_params: dict[str, Any], schema: Any = None) -> None:
        # without a schema the reference takes the newest, and the defaults of another version with it
        schema = schema or onnx.defs.get_schema(onnx_node.op_type, run_params["opsets"][onnx_node.domain])
        self.version = schema.since_version
        if self.version not in NODES[onnx_node.op_type].versions:
            raise NotImplementedError(f"{onnx_node.op_type}: pydeform does not know version {self.version} of it")
        super().__init__(onnx_node, run_params, schema)

    def _run(self, *inputs: Any, **attributes: Any) -> tuple[Any, ...]:
        node = NODES[self.op_type]
        for name, words in node.versions[self.version].items():
            given = attributes.get(name)
            if given not in words:
                allowed = ", ".join(map(repr, words))
                raise ValueError(f"{self.op_type} {self.version}: {name} must be one of {allowed}, got {given!r}")
            attributes[name] = words[given]
        call = node.call(inputs, attributes)
        if call is not None:
            return (call.operator(*call.arguments, **call.options),)
        for name, words in node.versions[max(node.versions)].items():  # the reference knows the newest words alone
            attributes[name] = {ours: theirs for theirs, ours in words.items()}[attributes[name]]
        found: tuple[Any, ...] = super()._run(*inputs, **attributes)
        return found


_CLASSES = [
    type(name, (_Evaluated,) if node.reference is OpRun else (_Evaluated, node.reference), {})
    for name, node in NODES.items()
]


def new_ops() -> list[type]:
    """Classes with which ONNX's reference evaluates DeformConv, RoiAlign, MaxRoiPool, GridSample and AffineGrid by us.

    Each follows the version of its node that the model asks for. What pydeform has no operator for is left to the
    reference's own code: RoiAlign with mode "max", which is not that of `roi_align`, and GridSample of integers, along
    one axis or more than three, or cubic in volumes. DeformConv has one, two or three axes here; its mask has one
    channel for each tap and offset group on all of them. float16 and bfloat16 are summed in float32. In a model's own
    functions the reference keeps its nodes: `onnx.inliner` puts them in place, as `run` and `check` do.

    Returns
    -------
    list of subclasses of onnx.reference.op_run.OpRun

    Examples
    --------
    >>> import numpy as np
    >>> from onnx import parser
    >>> from onnx.reference import ReferenceEvaluator
    >>> from pydeform.onnx import new_ops
    >>> model = parser.parse_model(
    ...     '<ir_version: 9, opset_import: ["" : 22]> g (float[1, 1, 6, 6] x, float[1, 5] boxes)'
    ...     "=> (float[1, 1, 2, 2] y) { y = MaxRoiPool <pooled_shape = [2, 2]> (x, boxes) }"
    ... )
    >>> x = np.arange(36, dtype=np.float32).reshape(1, 1, 6, 6)
    >>> ReferenceEvaluator(model, new_ops=new_ops()).run(None, {"x": x, "boxes": np.float32([[0, 0, 0, 3, 3]])})[0]
    array([[[[ 7.,  9.],
             [19., 21.]]]], dtype=float32)
    """
    return list(_CLASSES)


def loaded(op: str, model: Any) -> Any:
    """A ModelProto, of what may be one or the path of one, without functions of its own: no new op gets into them."""
    if isinstance(model, str | os.PathLike):
        model = onnx.load(model)
    if not isinstance(model, onnx.ModelProto):
        raise TypeError(f"{op}: model must be an onnx.ModelProto or the path of one, got {type(model).__name__}")
    return onnx.inliner.inline_local_functions(model) if model.functions else model


def check_feed(op: str, model: Any, feed: Mapping[str, Any]) -> None:
    initialised = {tensor.name for tensor in model.graph.initializer}
    names = [value.name for value in model.graph.input]
    missing = [name for name in names if name not in feed and name not in initialised]
    unknown = [name for name in feed if name not in names]
    if missing or unknown:
        raise ValueError(
            f"{op}: feed must have the inputs of the model, {', '.join(names)}; "
            f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}"
        )


def evaluate(model: Any, outputs: Sequence[str], feed: Mapping[str, Any]) -> dict[str, Any]:
    try:
        found = ReferenceEvaluator(model, new_ops=new_ops()).run(list(outputs), dict(feed))
    except TypeError as error:  # the reference hides what a node raised behind an error that names neither
        raise (error.__cause__ if isinstance(error.__cause__, TypeError) else error) from None
    # some nodes give views of what they are given
    return {n: np.array(a) if isinstance(a, np.ndarray) else a for n, a in zip(outputs, found, strict=True)}


def model_of(node: Any, opset_imports: Sequence[Any], feed: Mapping[str, Any]) -> Any:
    """A model of one node, for inputs like these."""
    inputs = [_value(name, feed.get(name)) for name in dict.fromkeys(node.input) if name]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
    graph = onnx.helper.make_graph([node], node.op_type, inputs, outputs)
    return onnx.helper.make_model(graph, opset_imports=opset_imports)


def _value(name: str, array: Any) -> Any:
    if not isinstance(array, np.ndarray):
        return onnx.ValueInfoProto(name=name)
    return onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)


def run(model: Any, feed: Mapping[str, Any], *, opset: int | None = None) -> dict[str, Any]:
    """Outputs of a model, its deformable nodes computed by pydeform and all others by ONNX's reference.

    Parameters
    ----------
    model : onnx.ModelProto, the path of one, or an onnx.NodeProto of ONNX's own domain
    feed : NumPy array for the name of each input; one with an initialiser may be left out
    opset : of a node alone; None: the newest of the installed onnx

    Returns
    -------
    dict of arrays
        By the names of the outputs. They share no memory with `feed`.

    Raises
    ------
    ValueError
        An input is missing or unknown, a shape or attribute does not fit.
    TypeError
        The kind or dtype of an array does not fit.

    Notes
    -----
    `new_ops` says which nodes are ours. The reference is not fast: a model of mostly other nodes takes long.

    Examples
    --------
    >>> import numpy as np
    >>> from onnx.helper import make_node
    >>> from pydeform.onnx import run
    >>> node = make_node("AffineGrid", ["theta", "size"], ["grid"])
    >>> run(node, {"theta": np.eye(2, 3)[None], "size": np.array([1, 1, 1, 2])})["grid"].tolist()
    [[[[-0.5, 0.0], [0.5, 0.0]]]]
    """
    if isinstance(model, onnx.NodeProto):
        version = onnx.defs.onnx_opset_version() if opset is None else opset
        model = model_of(model, [onnx.helper.make_opsetid("", version)], feed)
    elif opset is not None:
        raise TypeError("run: opset must be None where the model says its own")
    model = loaded("run", model)
    check_feed("run", model, feed)
    return evaluate(model, [value.name for value in model.graph.output], feed)
