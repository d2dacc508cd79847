"""Layers of `pydeform.layers` as ONNX models."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx.helper import (
    make_graph,
    make_model,
    make_node,
    make_opsetid,
    make_tensor_value_info,
    np_dtype_to_tensor_dtype,
)

from pydeform import _arrays, _checks, _version, layers

OLDEST = 20  # has all nodes that are used here


class Value(NamedTuple):
    """A result in the graph. Of a batch of any size, `shape` has 1 in its place."""

    name: str
    shape: tuple[int, ...]


class Graph:
    """Nodes and initialisers, in order. Parameters have their names in `layer`."""

    def __init__(self, layer: Any, dtype: Any) -> None:
        self.dtype, self.nodes, self.initialisers = dtype, list[Any](), dict[str, Any]()
        self.parameters = {id(array): name for name, array in (layer.params | layer.state).items()}
        self.count = 0

    def name(self, op: str) -> str:
        self.count += 1
        return f"{op.lower()}_{self.count}"

    def constant(self, values: Any, dtype: Any = None) -> str:
        """Of a parameter, or of numbers in the graph's dtype or another."""
        name = self.parameters.get(id(values)) or self.name("constant")
        if name not in self.initialisers:
            array = values if name == self.parameters.get(id(values)) else np.asarray(values, dtype or self.dtype)
            self.initialisers[name] = onnx.numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def integers(self, *values: int) -> str:
        return self.constant(values, np.int64)

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        return self.split(op, 1, *inputs, **attributes)[0]

    def split(self, op: str, outputs: int, *inputs: str, **attributes: Any) -> list[str]:
        """A node of several outputs."""
        names = [self.name(op) for _ in range(outputs)]
        self.nodes.append(make_node(op, inputs, names, name=names[0], **attributes))
        return names

    def reshape(self, x: str, *shape: int) -> str:
        return self.add("Reshape", x, self.integers(*shape))

    def transpose(self, x: str, *axes: int) -> str:
        return self.add("Transpose", x, perm=axes)

    def parts(self, x: str, axis: int, *sizes: int) -> list[str]:
        return self.split("Split", len(sizes), x, self.integers(*sizes), axis=axis)


def _convolution(graph: Graph, layer: Any, x: Value) -> str:
    arguments = [graph.constant(layer.params[name]) for name in ("weight", "bias") if name in layer.params]
    return graph.add("Conv", x.name, *arguments, group=layer.options["groups"], **_window(layer, x))


def _window(layer: Any, x: Value) -> dict[str, Any]:
    """The attributes of a convolution: all begins, then all ends."""
    stride, dilation = layer.options["stride"], layer.options.get("dilation", (1,) * layer.axes)
    pairs = _checks.padding_pairs("", layer.options["padding"], x.shape[2:], layer.kernel_size, stride, dilation)
    pads = [pair[side] for side in (0, 1) for pair in pairs]
    return {"kernel_shape": layer.kernel_size, "strides": stride, "dilations": dilation, "pads": pads}


def _deformable_convolution(graph: Graph, layer: Any, x: Value) -> str:
    if layer.boundary == "dcnv1":
        raise _refusal(layer, "with boundary 'dcnv1': what DeformConv reads outside is 0")
    if layer.modulated and layer.axes == 3:
        raise _refusal(layer, "with a mask: the standard contradicts itself on its shape over three axes")
    window, weight = _window(layer, x), graph.constant(layer.params["weight"])
    arguments = [graph.constant(layer.params[name]) for name in ("offset.weight", "offset.bias")]
    offset, mask = graph.add("Conv", x.name, *arguments, **window), ""
    if layer.modulated:
        offset, logits = graph.parts(offset, 1, layer.offset_channels, layer.offset_channels // layer.axes)
        mask = graph.add("Mul", graph.add("Sigmoid", logits), graph.constant(layer.mask_scale))
    if layer.axes == 1:
        return _deformed_signal(graph, layer, (x.name, weight, offset, mask), window)
    return _deformed(graph, layer, (x.name, weight, offset, mask), window)


def _deformed(graph: Graph, layer: Any, arrays: Sequence[str], window: dict[str, Any]) -> str:
    x, weight, offset, mask = arrays
    settings, bias = layer.settings, graph.constant(layer.params["bias"]) if "bias" in layer.params else ""
    moving = settings.get("offset_groups", settings.get("position_groups"))
    groups = {"group": settings["groups"], "offset_group": moving}
    return graph.add("DeformConv", x, weight, offset, bias, mask, **groups, **window)


def _deformed_signal(graph: Graph, layer: Any, arrays: Sequence[str], window: dict[str, Any]) -> str:
    """As images of one row: runtimes have DeformConv over two axes alone."""
    rows = [graph.add("Unsqueeze", array, graph.integers(2)) if array else "" for array in arrays]
    paired = graph.add("Pad", rows[2], graph.integers(0, 0, 1, 0, 0, 0, 0, 0))  # a 0 for y before each x
    rows[2] = graph.reshape(paired, 0, 2 * layer.offset_channels, 1, -1)
    first, last = window["pads"]
    flat = {name: (1, *numbers) for name, numbers in window.items()} | {"pads": (0, first, 0, last)}
    return graph.add("Squeeze", _deformed(graph, layer, rows, flat), graph.integers(2))


def _active_convolution(graph: Graph, layer: Any, x: Value) -> str:
    weight, positions = (graph.constant(layer.params[name]) for name in ("weight", "positions"))
    size = layer(np.zeros(x.shape, graph.dtype), train=False)[0].shape[2:]
    shape = graph.add("Concat", _sizes(graph, x, 1), graph.integers(len(layer.params["positions"]), *size), axis=0)
    offset = graph.add("Expand", graph.reshape(positions, 1, -1, 1, 1), shape)
    return _deformed(graph, layer, (x.name, weight, offset, ""), _window(layer, x))


def _sizes(graph: Graph, x: Value, count: int) -> str:
    """The first ones."""
    return graph.add("Shape", x.name, end=count)


def _linear(graph: Graph, layer: Any, x: Value) -> str:
    arguments = [graph.constant(layer.params[name]) for name in ("weight", "bias") if name in layer.params]
    return graph.add("Gemm", x.name, *arguments, transB=1)


def _one_node(op: str, **attributes: Any) -> Callable[..., str]:
    return lambda graph, _layer, x: graph.add(op, x.name, **attributes)


def _global_mean(graph: Graph, _layer: Any, x: Value) -> str:
    return graph.add("ReduceMean", x.name, graph.integers(2, 3), keepdims=0)


def _max_pool(graph: Graph, layer: Any, x: Value) -> str:
    return graph.add(
        "MaxPool", x.name, kernel_shape=layer.kernel_size, strides=layer.stride, pads=[*layer.padding, *layer.padding]
    )


def _batch_norm(graph: Graph, layer: Any, x: Value) -> str:
    arrays = [layer.params["weight"], layer.params["bias"], layer.state["running_mean"], layer.state["running_var"]]
    return graph.add("BatchNormalization", x.name, *map(graph.constant, arrays), epsilon=layer.eps)


def _sequential(graph: Graph, layer: Any, x: Value) -> str:
    for part in layer.layers:
        x = _applied(graph, part, x)
    return x.name


def _spatial_transformer(graph: Graph, layer: Any, x: Value) -> str:
    features = _applied(graph, layer.localisation, x)
    theta = graph.reshape(_linear(graph, layer.head, features), -1, layer.axes, layer.axes + 1)
    if layer.output_size is None:
        size = _sizes(graph, x, len(x.shape))
    else:
        size = graph.add("Concat", _sizes(graph, x, 2), graph.integers(*layer.output_size), axis=0)
    corners = int(layer.align_corners)
    grid = graph.add("AffineGrid", theta, size, align_corners=corners)
    mode = {"bilinear": "linear", "bicubic": "cubic"}.get(layer.options["mode"], layer.options["mode"])
    padding = layer.options["padding_mode"]
    return graph.add("GridSample", x.name, grid, mode=mode, padding_mode=padding, align_corners=corners)


def _roi_align(graph: Graph, layer: Any, x: Value, boxes: Value) -> str:
    if layer.options["mode"] == "max":
        raise _refusal(layer, "with mode 'max': that of RoiAlign is another one")
    index, corners = graph.parts(boxes.name, 1, 1, 4)
    images = graph.add("Cast", graph.reshape(index, -1), to=onnx.TensorProto.INT64)
    height, width = layer.options["output_size"]
    return graph.add(
        "RoiAlign",
        x.name,
        corners,
        images,
        output_height=height,
        output_width=width,
        spatial_scale=layer.options["spatial_scale"],
        sampling_ratio=max(layer.options["sampling_ratio"], 0),
        coordinate_transformation_mode="half_pixel" if layer.options["aligned"] else "output_half_pixel",
    )


def _along_last(graph: Graph, layer: Any, x: str) -> str:
    """A Linear, if there is one, along the last axis."""
    if layer is None:
        return x
    y = graph.add("MatMul", x, graph.transpose(graph.constant(layer.params["weight"]), 1, 0))
    return graph.add("Add", y, graph.constant(layer.params["bias"])) if "bias" in layer.params else y


def _sampled(graph: Graph, maps: str, grid: str, weights: str) -> str:
    """(A, C, H, W), (A, Q, P, 2) and (A, 1, Q, P) -> (A, C, Q, P), samples with their weights."""
    return graph.add("Mul", graph.add("GridSample", maps, grid, mode="linear", padding_mode="zeros"), weights)


def _to_grid(graph: Graph, pixels: str, sizes: Any) -> str:
    """Pixels (x, y), centres at integers, as GridSample takes them."""
    scaled = graph.add("Mul", pixels, graph.constant(2 / np.array(sizes)))
    return graph.add("Add", scaled, graph.constant(1 / np.array(sizes) - 1))


def _dcn(graph: Graph, layer: Any, value: str, offset: str, mask: str, size: Any, outputs: Any) -> str:
    """`dcnv3` of channels-last value, offset (N, out_h, out_w, groups, P, 2) and mask (..., groups, P)."""
    groups, points, options = layer.groups, layer.points, layer.options
    (height, width), (out_h, out_w), channels = size, outputs, layer.channels // layer.groups
    maps = graph.transpose(graph.reshape(value, -1, height, width, groups, channels), 0, 3, 4, 1, 2)
    taps = [
        [(k - (n - 1) / 2) * d for k in range(n)]
        for n, d in zip(options["kernel_size"], options["dilation"], strict=True)
    ]
    around = np.array([(x, y) for x in taps[1] for y in taps[0]])  # column by column
    if options["remove_center"]:
        around = np.delete(around, len(around) // 2, axis=0)
    rows, columns = (np.arange(n) * s for n, s in zip(outputs, options["stride"], strict=True))
    middle = np.stack(np.meshgrid(columns, rows), axis=-1).reshape(1, 1, -1, 1, 2)
    moved = graph.add("Mul", graph.transpose(offset, 0, 3, 1, 2, 4, 5), graph.constant(options["offset_scale"]))
    moved = graph.reshape(moved, -1, groups, out_h * out_w, points, 2)
    pixels = graph.add("Add", moved, graph.constant(middle + around * options["offset_scale"]))
    grid = graph.reshape(_to_grid(graph, pixels, (width, height)), -1, out_h * out_w, points, 2)
    weights = graph.reshape(graph.transpose(mask, 0, 3, 1, 2, 4), -1, 1, out_h * out_w, points)
    samples = _sampled(graph, graph.reshape(maps, -1, channels, height, width), grid, weights)
    total = graph.add("ReduceSum", samples, graph.integers(3), keepdims=0)
    back = graph.transpose(graph.reshape(total, -1, groups, channels, out_h, out_w), 0, 3, 4, 1, 2)
    return graph.reshape(back, -1, out_h, out_w, layer.channels)


def _dcnv3(graph: Graph, layer: Any, x: Value) -> str:
    batch, *size, channels = x.shape
    per_point = layer.groups, layer.points
    first = Value(graph.transpose(x.name, 0, 3, 1, 2), (batch, channels, *size))
    maps = _applied(graph, layer.dw_conv, first)
    norm = [graph.constant(layer.norm_gelu.params[name]) for name in ("weight", "bias")]
    last = graph.transpose(maps.name, 0, 2, 3, 1)
    features = graph.add("Gelu", graph.add("LayerNormalization", last, *norm, epsilon=1e-6))
    outputs = maps.shape[2:]
    offset = graph.reshape(_along_last(graph, layer.offset, features), -1, *outputs, *per_point, 2)
    logits = graph.reshape(_along_last(graph, layer.mask, features), -1, *outputs, *per_point)
    value = _along_last(graph, layer.input_proj, x.name)
    y = _dcn(graph, layer, value, offset, graph.add("Softmax", logits), size, outputs)
    return _along_last(graph, layer.output_proj, y)


def _dcnv4(graph: Graph, layer: Any, x: Value) -> str:
    batch, *size, channels = x.shape
    groups, points = layer.groups, layer.points
    if layer.offset_mask_dw is None:
        steps = layer.options["stride"]
        ends = [graph.integers(*numbers) for numbers in ((0, 0), size, (1, 2), steps)]
        features = graph.add("Slice", x.name, *ends)
        outputs = tuple(-(-n // s) for n, s in zip(size, steps, strict=True))
    else:
        first = Value(graph.transpose(x.name, 0, 3, 1, 2), (batch, channels, *size))
        maps = _applied(graph, layer.offset_mask_dw, first)
        features, outputs = graph.transpose(maps.name, 0, 2, 3, 1), maps.shape[2:]
    packed = _along_last(graph, layer.offset_mask, features)
    used = groups * points * 3
    rest = len(layer.offset_mask.params["weight"]) - used
    if rest:
        packed, _ = graph.parts(packed, 3, used, rest)
    each = graph.reshape(packed, -1, *outputs, groups, points * 3)
    offset, mask = graph.parts(each, 4, points * 2, points)
    offset = graph.reshape(offset, -1, *outputs, groups, points, 2)
    y = _dcn(graph, layer, _along_last(graph, layer.value_proj, x.name), offset, mask, size, outputs)
    return _along_last(graph, layer.output_proj, y)


def _attention(
    graph: Graph, layer: Any, query: Value, reference_points: Value, input: Value, spatial_shapes: Any
) -> str:
    if layer.options["method"] != "bilinear":
        raise _refusal(layer, f"with method {layer.options['method']!r}: GridSample's nearest pixel is another one")
    heads, counts, queries = layer.heads, layer.options["points"], query.shape[1]
    channels, samples = layer.embed_dim // heads, sum(counts)
    offsets = graph.reshape(_along_last(graph, layer.sampling_offsets, query.name), -1, queries, heads, samples, 2)
    logits = graph.reshape(_along_last(graph, layer.attention_weights, query.name), -1, queries, heads, samples)
    weights = graph.parts(graph.transpose(graph.add("Softmax", logits), 0, 2, 1, 3), 3, *counts)
    pixels = [h * w for h, w in spatial_shapes]
    values = graph.parts(_along_last(graph, layer.value_proj, input.name), 1, *pixels)
    places = graph.parts(graph.transpose(offsets, 0, 2, 1, 3, 4), 3, *counts)
    per_level = reference_points.shape[2]
    # (N, 1, Lq, 1, 2 or 4) for each level
    references = graph.transpose(reference_points.name, 0, 2, 1, 3)
    references = graph.reshape(references, -1, per_level, 1, queries, 1, reference_points.shape[3])
    of_level = [
        graph.reshape(part, -1, 1, queries, 1, reference_points.shape[3])
        for part in graph.parts(references, 1, *[1] * per_level)
    ]
    sums = []
    for level, (height, width) in enumerate(spatial_shapes):
        reference, scale = of_level[level % per_level], graph.constant(1 / np.array((width, height)))
        if reference_points.shape[3] == 4:
            reference, box = graph.parts(reference, 4, 2, 2)
            scale = graph.add("Mul", box, graph.constant(layer.options["offset_scale"] / counts[level]))
        location = graph.add("Add", reference, graph.add("Mul", places[level], scale))
        grid = graph.add("Sub", graph.add("Mul", location, graph.constant(2)), graph.constant(1))
        maps = graph.transpose(graph.reshape(values[level], -1, height * width, heads, channels), 0, 2, 3, 1)
        sampled = _sampled(
            graph,
            graph.reshape(maps, -1, channels, height, width),
            graph.reshape(grid, -1, queries, counts[level], 2),
            graph.reshape(weights[level], -1, 1, queries, counts[level]),
        )
        sums.append(graph.add("ReduceSum", sampled, graph.integers(3), keepdims=0))
    total = graph.add("Sum", *sums)  # (N * heads, channels, Lq)
    y = graph.transpose(graph.reshape(total, -1, heads, channels, queries), 0, 3, 1, 2)
    return _along_last(graph, layer.output_proj, graph.reshape(y, -1, queries, layer.embed_dim))


EXPORTERS: dict[type, Callable[..., str]] = {
    layers.ActiveConv2d: _active_convolution,
    layers.BatchNorm2d: _batch_norm,
    **dict.fromkeys((layers.Conv1d, layers.Conv2d, layers.Conv3d), _convolution),
    layers.DCNv3: _dcnv3,
    layers.DCNv4: _dcnv4,
    **dict.fromkeys((layers.DeformConv1d, layers.DeformConv2d, layers.DeformConv3d), _deformable_convolution),
    layers.Flatten: _one_node("Flatten", axis=1),
    layers.GlobalAvgPool2d: _global_mean,
    layers.Linear: _linear,
    layers.MSDeformAttn: _attention,
    layers.MaxPool2d: _max_pool,
    layers.ReLU: _one_node("Relu"),
    layers.RoIAlign: _roi_align,
    layers.Sequential: _sequential,
    layers.Sigmoid: _one_node("Sigmoid"),
    layers.Softmax: lambda graph, layer, x: graph.add("Softmax", x.name, axis=layer.axis),
    layers.SpatialTransformer: _spatial_transformer,
}


def _refusal(layer: Any, why: str) -> ValueError:
    return ValueError(f"export: {layer.name} cannot be exported {why}")


def _exporter(layer: Any) -> Callable[..., str]:
    if type(layer) not in EXPORTERS:
        raise ValueError(f"export: {layer.name} has no equal among the nodes of ONNX")
    return EXPORTERS[type(layer)]


def _applied(graph: Graph, layer: Any, x: Value) -> Value:
    name = _exporter(layer)(graph, layer, x)
    return Value(name, layer(np.zeros(x.shape, graph.dtype), train=False)[0].shape)


def export(
    layer: layers.Layer,
    input_shape: Sequence[int | None] | Mapping[str, Any],
    path: str | os.PathLike[str] | None = None,
    opset: int = OLDEST,
) -> Any:
    """Write a layer, as it computes with train=False, as a model of standard ONNX nodes.

    Parameters
    ----------
    layer : of `pydeform.layers`, on the CPU. Not DeformRoIPool and DeformPSRoIPool, which no nodes equal; not with
        boundary "dcnv1", method "discrete" or RoIAlign's mode "max". DeformConv3d only without a mask
    input_shape : of x, say (1, 3, 224, 224); None in the place of 1: a batch of any size. RoIAlign's model has an input
        boxes (R, 5) beside it. For MSDeformAttn a dict of the shapes of query and reference_points, and spatial_shapes
        itself: its model is for maps of those sizes, its input called "input"; it has no padding_mask
    path : of a file to write; None: there is none
    opset : 20 or newer. onnxruntime 1.32 has no RoiAlign in 22 on the CPU, and DeformConv over two axes alone in
        any, so that it runs no DeformConv3d; DeformConv1d is written as images of one row

    Returns
    -------
    onnx.ModelProto
        Checked by onnx.checker; its output is called "y".

    Raises
    ------
    ValueError
        A shape or opset does not fit; a layer that has no equal, with its name.
    TypeError
        The kind of an array does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform.layers import DeformConv2d, ReLU, Sequential
    >>> from pydeform.onnx import export, run
    >>> network = Sequential(DeformConv2d(3, 8, 3, padding=1, rng=0), ReLU())
    >>> model = export(network, (None, 3, 6, 5))
    >>> [node.op_type for node in model.graph.node]
    ['Conv', 'DeformConv', 'Relu', 'Identity']
    >>> x = np.ones((2, 3, 6, 5), np.float32)
    >>> bool((run(model, {"x": x})["y"] == network(x, train=False)[0]).all())
    True
    """
    if not isinstance(layer, layers.Layer):
        raise TypeError(f"export: layer must be a layer of pydeform.layers, got {_checks.shown(layer)}")
    newest = onnx.defs.onnx_opset_version()
    if type(opset) is not int or not OLDEST <= opset <= newest:
        raise ValueError(f"export: opset must be from {OLDEST} to {newest}, got {_checks.shown(opset)}")
    exporter, shapes, levels = _exporter(layer), *_shapes(layer, input_shape)
    if any(_arrays.device_of(array) != "cpu" for array in layer.params.values()):
        raise TypeError('export: layer must be on the CPU, got one on the GPU: layer.to("cpu") brings it there')
    dtype = next((array.dtype for array in layer.params.values()), np.dtype(np.float32))
    graph = Graph(layer, dtype)
    inputs = [Value(name, tuple(n or 1 for n in shape)) for name, shape in shapes.items()]
    call: Callable[..., Any] = layer
    call(*(np.zeros(value.shape, dtype) for value in inputs), *levels, train=False)  # its own checks of the shapes
    graph.nodes.append(make_node("Identity", [exporter(graph, layer, *inputs, *levels)], ["y"]))
    kind = np_dtype_to_tensor_dtype(dtype)
    batch = {"boxes": "R"}
    told = [
        make_tensor_value_info(name, kind, [batch.get(name, "N") if n is None else n for n in shape])
        for name, shape in shapes.items()
    ]
    made = make_graph(
        graph.nodes, layer.name, told, [make_tensor_value_info("y", kind, None)], list(graph.initialisers.values())
    )
    imports = [make_opsetid("", opset)]
    model = onnx.shape_inference.infer_shapes(
        make_model(
            made,
            opset_imports=imports,
            ir_version=onnx.helper.find_min_ir_version_for(imports),
            producer_name="pydeform",
            producer_version=_version.__version__,
        )
    )
    onnx.checker.check_model(model, full_check=True)
    if path is not None:
        onnx.save(model, path)
    return model


def _shapes(layer: Any, given: Any) -> tuple[dict[str, tuple[int | None, ...]], tuple[Any, ...]]:
    """Of all inputs, None first where it is free; and spatial_shapes, if the layer takes them."""
    if isinstance(layer, layers.MSDeformAttn):
        names = {"query", "reference_points", "spatial_shapes"}
        if not isinstance(given, Mapping) or set(given) != names:
            raise ValueError(
                f"export: input_shape of MSDeformAttn must be a dict of {', '.join(sorted(names))}, "
                f"got {_checks.shown(given)}"
            )
        levels = tuple((int(h), int(w)) for h, w in given["spatial_shapes"])
        query, places = _shape(given["query"]), _shape(given["reference_points"])
        pixels = query[0], sum(h * w for h, w in levels), layer.embed_dim
        return {"query": query, "reference_points": places, "input": pixels}, (levels,)
    boxes: dict[str, tuple[int | None, ...]] = {"boxes": (None, 5)} if isinstance(layer, layers.RoIAlign) else {}
    return {"x": _shape(given)} | boxes, ()


def _shape(given: Any) -> tuple[int | None, ...]:
    expected = "a sequence of positive ints, of which the first may be None"
    try:
        first, *rest = given
        sizes = _checks.per_axis("export", "input_shape", [1 if first is None else first, *rest], len(rest) + 1, 1)
    except (TypeError, ValueError):
        raise ValueError(f"export: input_shape must be {expected}, got {_checks.shown(given)}") from None
    return (None if first is None else sizes[0], *sizes[1:])
