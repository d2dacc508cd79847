"""pydeform.onnx: nodes and models run by our operators, runtimes checked with them, layers written as models."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import pydeform
from pydeform import layers
from tests.cases.onnxruntime_deform_conv import PUBLISHED
from tests.onnx_cases import node_cases

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
bridge = pytest.importorskip("pydeform.onnx")
nodes = pytest.importorskip("pydeform.onnx._nodes")
exporting = pytest.importorskip("pydeform.onnx._export")

ROOT = Path(__file__).parents[1]
# Of the installed onnx: its own cases, by their node.
COUNTS = {"DeformConv": 4, "RoiAlign": 3, "MaxRoiPool": 0, "GridSample": 18, "AffineGrid": 4}
GRID = np.linspace(-1.3, 1.2, 1 * 3 * 4 * 2).reshape(1, 3, 4, 2)


def make_node(op: str, names: str, **attributes: Any) -> Any:
    """ "_" among the names of the inputs is one that is left out."""
    inputs = ["" if name == "_" else name for name in names.split()]
    return onnx.helper.make_node(op, inputs, ["Y"], **attributes)


def one(node: Any, feed: Mapping[str, Any], opset: int) -> np.ndarray:
    return bridge.run(node, feed, opset=opset)["Y"]


def model_of(node: Any, feed: Mapping[str, Any], opset: int) -> Any:
    made = nodes.model_of(node, [onnx.helper.make_opsetid("", opset)], feed)
    made.ir_version = 9
    return made


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def deform_conv_feed(axes: int = 2, mask: bool = True) -> dict[str, np.ndarray]:
    size, kernel = (5, 6, 4)[:axes], (2, 3, 1)[:axes]
    taps, out = int(np.prod(kernel)), [n - k + 1 for n, k in zip(size, kernel, strict=True)]
    feed = {"X": values(2, 4, *size), "W": values(6, 2, *kernel, seed=1), "B": values(6, seed=2)}
    feed["offset"] = values(2, 2 * taps * axes, *out, seed=3)
    return feed | ({"mask": values(2, 2 * taps, *out, seed=4)} if mask else {})


DEFORM_CONV = make_node("DeformConv", "X W offset B mask", group=2, offset_group=2)


# Nodes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", COUNTS)
def test_node_cases(op, monkeypatch):
    """With the tolerance of ONNX itself. The versions are the newest; those before are tested below."""
    if not COUNTS[op]:
        with pytest.raises(ModuleNotFoundError):
            node_cases(monkeypatch, op)
        return
    cases = node_cases(monkeypatch, op)
    assert len(cases) == COUNTS[op], [case.name for case in cases]
    for case in cases:
        for inputs, want in case.data_sets:
            names = [value.name for value in case.model.graph.input]
            got = bridge.run(case.model, dict(zip(names, inputs, strict=True)))
            for a, b in zip(got.values(), want, strict=True):
                assert a.dtype == b.dtype
                np.testing.assert_allclose(a, b, rtol=case.rtol, atol=case.atol, err_msg=case.name)


def test_expanded_node_cases_have_none_of_our_nodes(monkeypatch):
    from onnx.backend.test.case import node

    node_cases(monkeypatch, "AffineGrid")
    cases = [case for case in node.collect_testcases() if case.name.startswith("test_affine_grid")]
    expanded = [case for case in cases if case.name.endswith("_expanded")]
    assert (len(cases), len(expanded)) == (8, 4)
    assert not {n.op_type for case in expanded for n in case.model.graph.node} & COUNTS.keys()


def test_every_version_is_known():
    newest = onnx.defs.onnx_opset_version()
    published: dict[str, set[int]] = {op: set() for op in COUNTS}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "" and schema.name in published:
            published[schema.name].add(schema.since_version)
    for op, versions in published.items():
        assert {version for version in nodes.NODES[op].versions if version <= newest} == versions, op


def test_a_newer_version_is_not_taken_for_one_that_is_known(monkeypatch):
    known = nodes.NODES["MaxRoiPool"]
    monkeypatch.setitem(nodes.NODES, "MaxRoiPool", known._replace(versions={1: {}}))
    feed = {"x": values(1, 1, 4, 4), "rois": np.zeros((1, 5), np.float32)}
    with pytest.raises(NotImplementedError, match="MaxRoiPool: pydeform does not know version 22 of it"):
        one(make_node("MaxRoiPool", "x rois", pooled_shape=[1, 1]), feed, 22)
    assert one(make_node("MaxRoiPool", "x rois", pooled_shape=[1, 1]), feed, 21).shape == (1, 1, 1, 1)


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: case.name)
def test_numbers_of_onnxruntimes_own_tests(case):
    arrays = case.arrays()
    names = " ".join(name if name in arrays else "_" for name in ("X", "W", "offset", "B", "mask"))
    attributes = {"kernel_shape": case.weight[2:], "offset_group": case.offset_group} | (case.attributes or {})
    got = one(make_node("DeformConv", names, **attributes), arrays, case.opset)
    want = case.want()
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    kind = np.float64
    np.testing.assert_allclose(got.astype(kind), want.astype(kind), rtol=case.tolerance, atol=case.tolerance)


def test_how_many_tests_of_onnxruntime_there_are():
    assert len({case.name for case in PUBLISHED}) == 22


def test_number_of_onnxruntimes_own_test_of_max_roi_pool():
    x = (np.arange(108, dtype=np.float32) / 10).reshape(1, 3, 6, 6)
    rois = np.array([[0, 1, 1, 2, 3]] * 3, np.float32)
    got = one(make_node("MaxRoiPool", "x rois", pooled_shape=[1, 1]), {"x": x, "rois": rois}, 1)
    np.testing.assert_allclose(got[:, :, 0, 0], [[2, 5.6, 9.2]] * 3, rtol=1e-6)


@pytest.mark.parametrize("opset", [19, 22])
@pytest.mark.parametrize("mask", [False, True])
def test_deform_conv_as_onnxruntime(opset, mask):
    feed = deform_conv_feed(mask=mask)
    node = make_node("DeformConv", "X W offset B mask" if mask else "X W offset B", group=2, offset_group=2)
    assert bridge.check(model_of(node, feed, opset), feed) is None


ROI = {"X": values(2, 3, 7, 8), "rois": np.float32([[1, 1, 5, 4], [0, 2, 6.5, 7]]), "i": np.array([1, 0])}


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize(
    ("opset", "given"), [(10, None), (16, None), (16, "half_pixel"), (16, "output_half_pixel")], ids=str
)
def test_roi_align_as_onnxruntime(opset, given, mode):
    """Without a mode of coordinates each version has its own; "max" is ONNX's, not mmcv's."""
    attributes = {} if given is None else {"coordinate_transformation_mode": given}
    size = {"output_height": 3, "output_width": 2, "spatial_scale": 0.5, "sampling_ratio": 1}
    node = make_node("RoiAlign", "X rois i", mode=mode, **size, **attributes)
    assert bridge.check(model_of(node, ROI, opset), ROI) is None
    if mode == "avg":
        boxes = np.concatenate([ROI["i"][:, None].astype(np.float32), ROI["rois"]], axis=1)
        aligned = opset == 16 and given != "output_half_pixel"
        want = pydeform.roi_align(ROI["X"], boxes, (3, 2), 0.5, 1, aligned)
        np.testing.assert_array_equal(one(node, ROI, opset), want)
        if opset == 16:  # 22 is the same with another dtype more, which onnxruntime does not have
            np.testing.assert_array_equal(one(node, ROI, 22), want)


def test_roi_align_adapts_by_default():
    node = make_node("RoiAlign", "X rois i", output_height=2, output_width=1)
    assert bridge.check(model_of(node, ROI, 16), ROI) is None


def test_max_roi_pool_as_onnxruntime():
    feed = {"X": ROI["X"], "rois": np.concatenate([ROI["i"][:, None].astype(np.float32), ROI["rois"]], axis=1)}
    node = make_node("MaxRoiPool", "X rois", pooled_shape=[3, 2], spatial_scale=0.7)
    assert bridge.check(model_of(node, feed, 1), feed) is None
    np.testing.assert_array_equal(one(node, feed, 22), one(node, feed, 1))


@pytest.mark.parametrize("align_corners", [0, 1])
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize(("opset", "modes"), [(16, "bilinear nearest bicubic"), (20, "linear nearest cubic")])
def test_grid_sample_as_onnxruntime(opset, modes, padding_mode, align_corners):
    feed = {"X": values(1, 2, 5, 4), "grid": GRID.astype(np.float32)}
    for mode in modes.split():
        options = {"mode": mode, "padding_mode": padding_mode, "align_corners": align_corners}
        assert bridge.check(model_of(make_node("GridSample", "X grid", **options), feed, opset), feed) is None
        if opset == 20:
            same = [one(make_node("GridSample", "X grid", **options), feed, version) for version in (20, 22)]
            np.testing.assert_array_equal(*same)


@pytest.mark.parametrize(("opset", "wrong"), [(16, "linear"), (16, "cubic"), (20, "bilinear"), (22, "bicubic")])
def test_words_of_another_version_are_refused(opset, wrong):
    feed = {"X": values(1, 2, 5, 4), "grid": GRID.astype(np.float32)}
    with pytest.raises(ValueError, match=f"GridSample {opset}: mode must be one of .*, got '{wrong}'"):
        one(make_node("GridSample", "X grid", mode=wrong), feed, opset)


def test_defaults_of_grid_sample():
    feed = {"X": values(1, 2, 5, 4), "grid": GRID.astype(np.float32)}
    want = pydeform.grid_sample(*feed.values())
    for opset in (16, 20, 22):
        np.testing.assert_array_equal(one(make_node("GridSample", "X grid"), feed, opset), want)


@pytest.mark.parametrize("align_corners", [0, 1])
@pytest.mark.parametrize("size", [(2, 1, 3, 4), (2, 1, 2, 3, 4)], ids=str)
def test_affine_grid_as_onnxruntime(size, align_corners):
    axes = len(size) - 2
    feed = {"theta": values(2, axes, axes + 1), "size": np.array(size)}
    node = make_node("AffineGrid", "theta size", align_corners=align_corners)
    assert bridge.check(model_of(node, feed, 20), feed) is None
    assert one(node, {**feed, "theta": feed["theta"].astype(np.float64)}, 20).dtype == np.float64


@pytest.mark.parametrize(
    ("op", "names", "arrays", "attributes"),
    [
        ("GridSample", "X grid", (np.arange(20).reshape(1, 1, 5, 4), GRID), {"mode": "nearest"}),
        ("GridSample", "X grid", (values(1, 2, 5), GRID[..., :1, :1].astype(np.float32)[0]), {"mode": "cubic"}),
        ("GridSample", "X grid", (values(1, 2, 3, 4, 5), np.zeros((1, 1, 1, 2, 3), np.float32)), {"mode": "cubic"}),
        ("GridSample", "X grid", (values(1, 2, 5, 4), GRID), {}),  # of float32 at float64
        ("RoiAlign", "X rois i", tuple(ROI.values()), {"mode": "max"}),
    ],
)
def test_what_we_have_no_operator_for_is_left_to_the_reference(op, names, arrays, attributes):
    feed, node = dict(zip(names.split(), arrays, strict=True)), make_node(op, names, **attributes)
    (want,) = onnx.reference.ReferenceEvaluator(model_of(node, feed, 22)).run(None, feed)
    np.testing.assert_array_equal(one(node, feed, 22), want)
    assert one(node, feed, 22).dtype == want.dtype


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_axes_of_deform_conv(axes):
    feed = deform_conv_feed(axes)
    padding, stride, dilation = ((0, 1), (2, 0), (1, 1))[:axes], (2, 1, 1)[:axes], (1, 2, 1)[:axes]
    operator = getattr(pydeform, f"deform_conv{axes}d")
    out = [
        (n + sum(p) - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(feed["X"].shape[2:], padding, dilation, feed["W"].shape[2:], stride, strict=True)
    ]
    feed |= {name: values(2, feed[name].shape[1], *out) for name in ("offset", "mask")}
    options = {"stride": stride, "padding": padding, "dilation": dilation, "mask": feed["mask"]}
    want = operator(feed["X"], feed["offset"], feed["W"], feed["B"], **options)
    attributes = {"strides": stride, "dilations": dilation, "pads": [p[side] for side in (0, 1) for p in padding]}
    node = make_node("DeformConv", "X W offset B mask", group=2, offset_group=2, **attributes)
    np.testing.assert_array_equal(one(node, feed, 22), want)


# Dtypes, layouts, values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_dtypes(dtype):
    feed = {name: array.astype(dtype) for name, array in deform_conv_feed().items()}
    x, weight, bias, offset, mask = feed.values()
    got = one(DEFORM_CONV, feed, 22)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, pydeform.deform_conv2d(x, offset, weight, bias, mask=mask))
    rois = {name: array if name == "i" else array.astype(dtype) for name, array in ROI.items()}
    assert one(make_node("RoiAlign", "X rois i"), rois, 22).dtype == dtype


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_types_count_all_images(dtype):
    x = np.zeros((3001, 1, 1, 1), dtype)
    x[2999] = 7
    feed = {"X": x, "rois": np.array([[0, 0, 1, 1]], dtype), "i": np.array([2999])}
    assert one(make_node("RoiAlign", "X rois i"), feed, 22).item() == 7


def test_layouts_and_inputs_that_stay():
    feed = deform_conv_feed()
    want = one(DEFORM_CONV, feed, 22)
    strange = {name: np.asfortranarray(array) for name, array in feed.items()}
    for array in strange.values():
        array.flags.writeable = False
    np.testing.assert_array_equal(one(DEFORM_CONV, strange, 22), want)
    x = values(3, 4)
    assert not np.shares_memory(x, one(make_node("Flatten", "x"), {"x": x}, 22))


def test_nan_and_infinite_offsets():
    feed = deform_conv_feed()
    feed["offset"][0, :, 0, 0], feed["offset"][1, :, 1, 1] = np.nan, np.inf
    got = one(DEFORM_CONV, feed, 22)
    assert np.isnan(got[0, :, 0, 0]).all() and np.isnan(got).sum() == 6
    np.testing.assert_array_equal(got[1, :, 1, 1], feed["B"])


def test_no_boxes():
    feed = {**ROI, "rois": np.zeros((0, 4), np.float32), "i": np.zeros(0, np.int64)}
    for mode in ("avg", "max"):
        assert one(make_node("RoiAlign", "X rois i", mode=mode, output_height=2), feed, 16).shape == (0, 3, 2, 1)


def test_threads():
    feed = deform_conv_feed()
    want = one(DEFORM_CONV, feed, 22)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: one(DEFORM_CONV, feed, 22), range(8)):
            np.testing.assert_array_equal(got, want)


# Models ---------------------------------------------------------------------------------------------------------------

IMAGES = "float[2, 4, 5, 6] X, float[6, 2, 2, 3] W, float[6] B, float[2, 24, 4, 4] offset, float[2, 12, 4, 4] mask"
FUNCTION = f"""<ir_version: 9, opset_import: ["" : 22, "local" : 1]>
g ({IMAGES}) => (float[2, 6, 4, 4] Y) {{ Y = local.Twice <groups = 2> (X, W, offset, B, mask) }}
<opset_import: ["" : 22], domain: "local">
Twice <groups> (X, W, offset, B, mask) => (Y) {{
    y = DeformConv <group: int = @groups, offset_group: int = @groups> (X, W, offset, B, mask)
    Y = Add (y, y)
}}"""
BRANCH = f"""<ir_version: 9, opset_import: ["" : 22]>
g (bool c, {IMAGES}) => (float[2, 6, 4, 4] Y) {{
    Y = If (c) <
        then_branch = a () => (float[2, 6, 4, 4] p) {{
            q = DeformConv <group = 2, offset_group = 2> (X, W, offset, B, mask)
            p = Add (q, q)
        }},
        else_branch = b () => (float[2, 6, 4, 4] r) {{ r = Conv <group = 2> (X, W, B) }}
    >
}}"""


@pytest.mark.parametrize("text", [FUNCTION, BRANCH], ids=["function", "branch"])
def test_nodes_in_functions_and_branches_are_ours(text, tmp_path):
    model, feed = onnx.parser.parse_model(text), deform_conv_feed()
    given = feed if text is FUNCTION else {**feed, "c": np.array(True)}
    twice = 2 * one(DEFORM_CONV, feed, 22)
    np.testing.assert_array_equal(bridge.run(model, given)["Y"], twice)
    onnx.save(model, tmp_path / "model.onnx")
    np.testing.assert_array_equal(bridge.run(tmp_path / "model.onnx", given)["Y"], twice)
    assert bridge.check(model, given) is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"offset": None}, ValueError, "inputs of the model, X, W, offset, B, mask; missing: offset; unknown: none"),
        ({"more": np.ones(1)}, ValueError, "missing: none; unknown: more"),
        ({"X": np.ones((2, 4, 5, 6), int)}, TypeError, "input must have dtype float64, .*, got int64"),
        ({"X": values(2, 4, 5)}, ValueError, r"W must have shape \(oC, C/group, \*kernel\), got \(6, 2, 2, 3\)"),
        ({"X": values(2, 6, 5, 6)}, ValueError, "group must be C of X over that of W: 6 expected, got 4"),
        ({"offset": values(2, 12, 4, 4)}, ValueError, "offset has channels: 12 expected, got 24"),
        ({"mask": values(2, 24, 4, 4)}, ValueError, r"mask must have shape .* = \(2, 12, 4, 4\), got \(2, 24, 4, 4\)"),
    ],
    ids=str,
)
def test_errors_of_inputs(change, error, message):
    feed = {name: array for name, array in (deform_conv_feed() | change).items() if array is not None}
    with pytest.raises(error, match=message):
        one(DEFORM_CONV, feed, 22)


@pytest.mark.parametrize(
    ("op", "names", "attributes", "message"),
    [
        ("DeformConv", "X W offset", {"kernel_shape": [3, 3]}, r"kernel_shape must be that of W: \(2, 3\) expected"),
        ("DeformConv", "X W offset", {"pads": [1, 1]}, "pads must be 2 begins, then 2 ends"),
        ("RoiAlign", "X rois i", {"mode": "min"}, "mode must be one of 'avg', 'max', got 'min'"),
        (
            "RoiAlign",
            "X rois i",
            {"coordinate_transformation_mode": "?"},
            "RoiAlign 22: coordinate_transformation_mode",
        ),
        ("GridSample", "X grid", {"padding_mode": "wrap"}, "padding_mode must be one of"),
    ],
)
def test_errors_of_attributes(op, names, attributes, message):
    more = {"group": 2, "offset_group": 2} if op == "DeformConv" else {}
    feed = {**deform_conv_feed(), **{n: a for n, a in ROI.items() if op == "RoiAlign"}, "grid": GRID.astype(np.float32)}
    with pytest.raises(ValueError, match=message):
        one(make_node(op, names, **attributes, **more), {name: feed[name] for name in names.split()}, 22)


def test_errors_of_models():
    with pytest.raises(TypeError, match=r"run: model must be an onnx.ModelProto or the path of one, got int"):
        bridge.run(3, {})
    with pytest.raises(TypeError, match="run: opset must be None where the model says its own"):
        bridge.run(model_of(DEFORM_CONV, deform_conv_feed(), 22), deform_conv_feed(), opset=22)
    with pytest.raises(FileNotFoundError):
        bridge.run("no such model.onnx", {})


# A checker ------------------------------------------------------------------------------------------------------------

CHAIN = """<ir_version: 9, opset_import: ["" : 20]>
g (float[1, 2, 5, 4] x, float[1, 3, 4, 2] grid) => (float[1, 2, 3, 4] y) {
    a = Relu (x)
    b = GridSample (a, grid)
    [last] c = GridSample <align_corners = 1> (a, grid)
    y = Add (b, c)
}"""


def chain() -> tuple[Any, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A model, what goes in, and all its results."""
    model = onnx.parser.parse_model(CHAIN)
    feed = {"x": values(1, 2, 5, 4), "grid": GRID.astype(np.float32)}
    everything = onnx.ModelProto()
    everything.CopyFrom(model)
    everything.graph.output.extend(onnx.ValueInfoProto(name=name) for name in "abc")
    return model, feed, bridge.run(everything, feed)


def test_a_right_runtime_passes():
    model, feed, right = chain()
    assert bridge.check(model, feed) is None
    assert bridge.check(model, feed, runtime=lambda _: right) is None
    assert bridge.check(model, feed, runtime=lambda _: {"y": right["y"]}) is None


def wrong_by(array: np.ndarray, much: float) -> np.ndarray:
    changed = array.copy()
    changed[0, 1, 2, 3] += much
    return changed


def test_the_first_wrong_node_is_named():
    """And not those that follow it, whose numbers are as wrong."""
    model, feed, right = chain()
    wrong = {**right, "c": wrong_by(right["c"], 0.5)}
    wrong["y"] = right["b"] + wrong["c"]
    found = bridge.check(model, feed, runtime=lambda _: wrong)
    assert found[:3] == ("last", "GridSample", "c")
    assert found.what.startswith("differs by 0.5 at [0, 1, 2, 3], where ")
    assert str(found).startswith("node last (GridSample), output c: differs by 0.5 ")
    # told by its result alone; without names nodes have numbers
    assert bridge.check(model, feed, runtime=lambda _: {"y": wrong["y"]})[:3] == ("3", "Add", "y")
    # each node is held against its own inputs: what is wrong before it is not its fault
    early = {**right, "b": wrong_by(right["b"], 0.5), "c": wrong["c"]}
    assert bridge.check(model, feed, runtime=lambda _: early).node == "1"


def test_what_a_runtime_may_do_is_not_held_against_the_next_node():
    """A small error, within the tolerance, is all that is left of a difference."""
    text = '<ir_version: 9, opset_import: ["" : 20]> g (float[n] x) => (float[n] y)'
    model, x = onnx.parser.parse_model(text + "{ a = Relu (x) y = Sub (a, x) }"), np.ones(3, np.float32)
    rough = x + np.float32(5e-5)
    assert bridge.check(model, {"x": x}, runtime=lambda _: {"a": rough, "y": rough - x}) is None
    assert bridge.check(model, {"x": x}, runtime=lambda _: {"y": rough - x}).op_type == "Sub"


def test_tolerance():
    model, feed, right = chain()
    largest = float(abs(right["b"]).max())
    for much, seen in ((0.9, False), (1.1, True)):
        wrong = {"b": wrong_by(right["b"], much * 1e-3 * largest)}
        assert (bridge.check(model, feed, runtime=lambda _, w=wrong: w, tolerance=1e-3) is not None) == seen


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda b: b[..., :3], r"has shape (1, 2, 3, 3) and dtype float32, expected (1, 2, 3, 4) and float32"),
        (lambda b: b.astype(np.float64), "dtype float64, expected"),
        (lambda b: wrong_by(b, np.nan), "differs by inf at [0, 1, 2, 3]"),
        (lambda b: wrong_by(b, np.inf), "differs by inf at [0, 1, 2, 3]"),
    ],
)
def test_kinds_of_difference(change, what):
    model, feed, right = chain()
    found = bridge.check(model, feed, runtime=lambda _: {"b": change(right["b"])})
    assert found.node == "1" and what in found.what


def test_nan_and_infinity_that_belong_there_are_no_difference():
    model, feed, _ = chain()
    feed["x"][0, 0, 0, 0], feed["x"][0, 1, 4, 3] = np.nan, np.inf
    feed["grid"][0, 0, 0] = np.nan
    outputs = bridge.run(model, feed)
    assert np.isnan(outputs["y"]).any()
    assert bridge.check(model, feed, runtime=lambda _: outputs) is None


def test_integers_must_be_equal():
    node = make_node("ArgMax", "x", axis=1, keepdims=0)
    feed = {"x": values(2, 5)}
    model, right = model_of(node, feed, 20), one(node, feed, 20)
    assert bridge.check(model, feed) is None
    found = bridge.check(model, feed, runtime=lambda _: {"Y": right + np.array([1, 0])})
    assert found.what == "differs at 1 of 2 elements"


@pytest.mark.parametrize(("dtype", "seen"), [(np.float16, 5e-3), (ml_dtypes.bfloat16, 4e-2)])
def test_half_types_have_their_own_tolerance(dtype, seen):
    feed = {"X": np.ones((1, 1, 3, 3), dtype), "grid": np.zeros((1, 1, 1, 2), dtype)}
    model = model_of(make_node("GridSample", "X grid"), feed, 22)
    for much, wrong in ((seen / 4, False), (seen, True)):
        told = {"Y": np.full((1, 1, 1, 1), 1 + much).astype(dtype)}
        assert (bridge.check(model, feed, runtime=lambda _, t=told: t) is not None) == wrong


def test_nodes_that_nobody_else_knows():
    text = '<ir_version: 9, opset_import: ["" : 20, "own" : 1]> g (float[n] x) => (float[n] y)'
    model, x = onnx.parser.parse_model(text + "{ z = own.Thing (x) y = Relu (z) }"), values(4)
    assert bridge.check(model, {"x": x}, runtime=lambda _: {"z": -x, "y": np.maximum(-x, 0)}) is None
    assert bridge.check(model, {"x": x}, runtime=lambda _: {"z": -x, "y": np.maximum(x, 0)}).op_type == "Relu"
    with pytest.raises(ValueError, match="check: runtime must tell results that can be compared, got z"):
        bridge.check(model, {"x": x}, runtime=lambda _: {"z": -x})
    with pytest.raises(ValueError, match="check: the reference has no Thing, so runtime must tell z"):
        bridge.check(model, {"x": x}, runtime=lambda _: {"y": x})


def test_errors_of_check():
    model, feed, _ = chain()
    for told, got in (({}, "nothing"), ({"x": feed["x"]}, "x")):
        with pytest.raises(ValueError, match=f"check: runtime must tell results that can be compared, got {got}"):
            bridge.check(model, feed, runtime=lambda _, told=told: told)
    with pytest.raises(ValueError, match="check: runtime must tell results of nodes by name, got other"):
        bridge.check(model, feed, runtime=lambda _: {"y": 1, "other": 2})
    with pytest.raises(ValueError, match="check: feed must have the inputs of the model, x, grid; missing: grid"):
        bridge.check(model, {"x": feed["x"]})
    with pytest.raises(TypeError, match="check: model must be"):
        bridge.check(None, feed)
    with pytest.raises(TypeError, match="check: tolerance must be"):
        bridge.check(model, feed, tolerance="small")


def test_a_wrong_level_of_lowered_attention_is_named():
    """A runtime that takes pixel centres of one GridSample for corners."""
    layer, levels = randomised(layers.MSDeformAttn(8, 2, 2, 2)), ((4, 5), (2, 3))
    model = bridge.export(layer, {"query": (1, 7, 8), "reference_points": (1, 7, 1, 2), "spatial_shapes": levels})
    feed = {"query": values(1, 7, 8), "reference_points": abs(values(1, 7, 1, 2)), "input": values(1, 26, 8)}
    wrong = onnx.ModelProto()
    wrong.CopyFrom(model)
    second = [node for node in wrong.graph.node if node.op_type == "GridSample"][1]
    second.attribute.append(onnx.helper.make_attribute("align_corners", 1))
    names = [name for node in wrong.graph.node for name in node.output]
    del wrong.graph.output[:]
    wrong.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    found = bridge.check(model, feed, runtime=lambda given: bridge.run(wrong, given))
    assert found[:2] == (second.name, "GridSample")


# Layers as models -----------------------------------------------------------------------------------------------------


def randomised(layer: Any) -> Any:
    """With numbers that move samples and make no two channels alike."""
    rng = np.random.default_rng(5)
    for param in layer.params.values():
        param += rng.normal(0, 0.3, param.shape).astype(param.dtype)
    for array in layer.state.values():
        array[...] = rng.uniform(0.5, 1.5, array.shape)
    return layer


def localisation(features: int) -> Any:
    return layers.Sequential(layers.Conv2d(4, features, 3, rng=0), layers.ReLU(), layers.GlobalAvgPool2d())


VOLUMES = layers.Sequential(layers.Flatten(), layers.Linear(4 * 5 * 6 * 3, 8, rng=0))
BOXES = np.float32([[1, 1, 1, 6, 7], [0, 2, 3, 8, 5]])
LEVELS = ((4, 5), (2, 3))
# A layer, the shape of x, without the batch.
EXPORTED = {
    "Conv1d": (layers.Conv1d(4, 6, 3, 2, "same", groups=2), (9,)),
    "Conv2d": (layers.Conv2d(4, 6, (3, 2), 2, "same", (1, 2), groups=2), (9, 8)),
    "Conv3d": (layers.Conv3d(4, 6, (1, 2, 3), 2, ((0, 1), 1, 0), bias=False), (4, 9, 8)),
    "DeformConv1d": (layers.DeformConv1d(4, 6, 3, 2, ((0, 1),), 2, 2, 2, modulated=True), (9,)),
    "DeformConv1d without mask": (layers.DeformConv1d(4, 6, 3, bias=False), (9,)),
    "DeformConv2d": (
        layers.DeformConv2d(4, 6, (3, 2), (2, 1), ((0, 1), 1), (1, 2), 2, 2, modulated=True, mask_scale=2),
        (9, 8),
    ),
    "DeformConv2d without mask": (layers.DeformConv2d(4, 6, 3, bias=False, boundary="dcnv2"), (9, 8)),
    "ActiveConv2d": (layers.ActiveConv2d(4, 6, 3, 2, 1, 2, 2), (9, 8)),
    "Linear": (layers.Linear(4, 3), ()),
    "Linear without bias": (layers.Linear(4, 3, bias=False), ()),
    "Flatten": (layers.Flatten(), (3, 2)),
    "ReLU": (layers.ReLU(), (3,)),
    "Sigmoid": (layers.Sigmoid(), (3,)),
    "Softmax": (layers.Softmax(1), (3,)),
    "GlobalAvgPool2d": (layers.GlobalAvgPool2d(), (3, 5)),
    "MaxPool2d": (layers.MaxPool2d((3, 2), (2, 1), (1, 0)), (7, 5)),
    "BatchNorm2d": (layers.BatchNorm2d(4, eps=1e-2), (7, 5)),
    "SpatialTransformer": (
        layers.SpatialTransformer(localisation(8), None, "bicubic", "border", True),
        (9, 8),
    ),
    "SpatialTransformer of a size": (
        layers.SpatialTransformer(localisation(8), (4, 6), "bilinear", "reflection"),
        (9, 8),
    ),
    "SpatialTransformer nearest": (layers.SpatialTransformer(localisation(8), (4, 6), "nearest"), (9, 8)),
    "SpatialTransformer of volumes": (layers.SpatialTransformer(VOLUMES, (2, 3, 4), axes=3), (5, 6, 3)),
    "DCNv3": (layers.DCNv3(4, groups=2), (5, 6)),
    "DCNv3 with options": (layers.DCNv3(4, 3, 2, 2, 2, 2, 1.5, True, dw_kernel_size=5), (7, 6)),
    "DCNv3 with an oblong kernel": (layers.DCNv3(4, (3, 5), 1, (1, 2), 1, 2), (5, 6)),
    "DCNv4": (layers.DCNv4(4, groups=2), (5, 6)),
    "DCNv4 with options": (layers.DCNv4(4, 3, 2, 1, 1, 2, 0.7, dw_kernel_size=3, projections=False), (5, 6)),
    "DCNv4 of few inputs": (layers.DCNv4(4, 3, (2, 3), 1, 1, 2), (5, 6)),
    "Sequential": (
        layers.Sequential(
            layers.DeformConv2d(4, 4, 3, modulated=True), layers.BatchNorm2d(4), layers.Sequential(layers.ReLU())
        ),
        (9, 8),
    ),
    "RoIAlign": (layers.RoIAlign((3, 2), 0.5, 2, True), (7, 5)),
    "RoIAlign adaptive": (layers.RoIAlign((3, 2), 0.5), (7, 5)),
    "MSDeformAttn": (layers.MSDeformAttn(4, 2, 2, 2), (1, 2)),
    "MSDeformAttn ragged": (layers.MSDeformAttn(4, 2, 2, (3, 1), projections=False), (2, 2)),
    "MSDeformAttn in boxes": (layers.MSDeformAttn(4, 2, 2, (3, 1), offset_scale=0.3), (2, 4)),
    "MSDeformAttn in one box": (layers.MSDeformAttn(4, 2, 2, (3, 1)), (1, 4)),
}
REFUSED = {
    "DeformRoIPool": (layers.DeformRoIPool(3, 4, hidden=4), "DeformRoIPool has no equal among the nodes of ONNX"),
    "DeformPSRoIPool": (layers.DeformPSRoIPool(2), "DeformPSRoIPool has no equal among the nodes of ONNX"),
    "DeformConv2d": (layers.DeformConv2d(4, 6, 3, boundary="dcnv1"), "DeformConv2d .* with boundary 'dcnv1'"),
    "DeformConv3d": (layers.DeformConv3d(4, 6, 3, modulated=True), "DeformConv3d .* with a mask"),
    "RoIAlign": (layers.RoIAlign(3, mode="max"), "RoIAlign .* with mode 'max'"),
    "MSDeformAttn": (layers.MSDeformAttn(4, 2, method="discrete", heads=2), "MSDeformAttn .* with method 'discrete'"),
}
LAST = ("DCNv3", "DCNv4")  # have their channels last


def feed_of(name: str, shape: tuple[int, ...], batch: int = 2) -> tuple[Any, dict[str, np.ndarray], tuple[Any, ...]]:
    """What `export` takes for a shape, the arrays, and what the layer takes beside them."""
    kind = name.split()[0]
    if kind == "MSDeformAttn":
        told = {"query": (None, 7, 4), "reference_points": (None, 7, *shape), "spatial_shapes": LEVELS}
        places = np.random.default_rng(1).random((batch, 7, *shape)).astype(np.float32)
        return (
            told,
            {"query": values(batch, 7, 4), "reference_points": places, "input": values(batch, 26, 4)},
            (LEVELS,),
        )
    of_x = (*shape, 4) if kind in LAST else (4, *shape)
    feed = {"x": values(batch, *of_x)}
    return (None, *of_x), feed | ({"boxes": BOXES} if kind == "RoIAlign" else {}), ()


@pytest.mark.parametrize("name", EXPORTED)
def test_layers_come_back_from_onnxruntime(name):
    layer, shape = EXPORTED[name]
    told, feed, more = feed_of(name, shape)
    randomised(layer)
    model = bridge.export(layer, told)
    want = layer(*feed.values(), *more, train=False)[0]
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(["y"], feed)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * abs(want).max())
    (ours,) = bridge.run(model, feed).values()
    np.testing.assert_allclose(ours, want, rtol=0, atol=1e-5 * abs(want).max())
    # parameters keep their names, and none is there twice
    names = [tensor.name for tensor in model.graph.initializer]
    assert {*layer.params} <= {*names} and len(names) == len(set(names))


def test_deform_conv3d_comes_back():
    """From ONNX's reference with our operator: onnxruntime has none over three axes."""
    layer, x = (
        randomised(layers.DeformConv3d(2, 3, (2, 1, 3), 1, (0, 1, 0), groups=1, offset_groups=2)),
        values(2, 2, 4, 5, 6),
    )
    model = bridge.export(layer, (None, 2, 4, 5, 6), opset=22)
    want = layer(x, train=False)[0]
    np.testing.assert_allclose(bridge.run(model, {"x": x})["y"], want, rtol=0, atol=1e-5 * abs(want).max())


def test_every_layer_is_exported_or_refused():
    public = {name for name, kind in vars(layers).items() if inspect.isclass(kind)} - {"Layer"}
    tested = {name.split()[0] for name in EXPORTED} | {"DeformConv3d"}
    assert {layer.__name__ for layer in exporting.EXPORTERS} == tested
    refused = {name for name, (_, message) in REFUSED.items() if "no equal" in message}
    assert public == tested | refused and not tested & refused


@pytest.mark.parametrize("name", REFUSED)
def test_refused_layers_are_named(name):
    layer, message = REFUSED[name]
    shape: Any = (1, 4, 9, 8, 7) if name == "DeformConv3d" else (1, 4, 9, 8)
    if name == "MSDeformAttn":
        shape = {"query": (1, 7, 4), "reference_points": (1, 7, 1, 2), "spatial_shapes": LEVELS}
    with pytest.raises(ValueError, match=f"export: {message}"):
        bridge.export(layer, shape)


def test_a_refused_layer_inside_is_named():
    class Own(layers.ReLU):
        pass

    with pytest.raises(ValueError, match="export: Own has no equal"):
        bridge.export(layers.Sequential(layers.ReLU(), Own()), (1, 3))


@pytest.mark.parametrize("opset", [20, 21, 22])
def test_opsets(opset, tmp_path):
    layer = randomised(layers.Sequential(layers.DeformConv2d(4, 4, 3, modulated=True), layers.Softmax(1)))
    model = bridge.export(layer, (2, 4, 9, 8), tmp_path / "model.onnx", opset)
    assert [i.version for i in model.opset_import] == [opset]
    x = values(2, 4, 9, 8)
    (got,) = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"]).run(None, {"x": x})
    np.testing.assert_allclose(got, layer(x, train=False)[0], rtol=1e-5, atol=1e-6)
    assert [d.dim_value for d in model.graph.output[0].type.tensor_type.shape.dim] == list(got.shape)


def test_a_layer_twice_has_its_parameters_once():
    layer = layers.Linear(4, 4, rng=0)
    twice = layers.Sequential(layer, layers.ReLU(), layer)
    model, x = bridge.export(twice, (None, 4)), values(3, 4)
    assert [tensor.name for tensor in model.graph.initializer] == ["0.weight", "0.bias"]
    np.testing.assert_allclose(bridge.run(model, {"x": x})["y"], twice(x, train=False)[0], rtol=1e-5, atol=1e-6)


def test_nothing_is_a_model_too():
    x = values(2, 3)
    np.testing.assert_array_equal(bridge.run(bridge.export(layers.Sequential(), (2, 3)), {"x": x})["y"], x)


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_dtypes_of_layers(dtype):
    layer = layers.Sequential(layers.Conv2d(2, 3, 3, rng=0, dtype=dtype), layers.ReLU())
    x = values(1, 2, 5, 6).astype(dtype)
    got = bridge.run(bridge.export(layer, (None, 2, 5, 6)), {"x": x})["y"]
    assert got.dtype == dtype
    np.testing.assert_allclose(got, layer(x, train=False)[0], rtol=1e-2 if dtype == np.float16 else 1e-12, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, (1, 3)), TypeError, "export: layer must be a layer of pydeform.layers, got None"),
        ((layers.Linear(3, 2), (1, 4)), ValueError, r"Linear: x must have shape \(N, in_features\) = \(N, 3\), got"),
        ((layers.Linear(3, 2), (1, None)), ValueError, "export: input_shape must be a sequence of positive ints"),
        ((layers.Linear(3, 2), 3), ValueError, "export: input_shape must be a sequence of positive ints"),
        ((layers.Linear(3, 2), ()), ValueError, "export: input_shape must be a sequence of positive ints"),
        ((layers.Linear(3, 2), (1, 3), None, 19), ValueError, "export: opset must be from 20 to .*, got 19"),
        ((layers.MSDeformAttn(4, 2, 2), (1, 2, 4)), ValueError, "must be a dict of query, reference_points, spatial"),
    ],
)
def test_errors_of_export(arguments, error, message):
    with pytest.raises(error, match=message):
        bridge.export(*arguments)


# Documentation --------------------------------------------------------------------------------------------------------


def test_page_runs(tmp_path):
    from tests.test_house import SNIPPET, read

    blocks = SNIPPET.findall(read("docs/bridges/onnx.md"))
    assert blocks
    (tmp_path / "page.py").write_text("\n".join(blocks), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.match(r"node deformconv_8 \(DeformConv\), output deformconv_\d+: differs by [1-9]", done.stdout)
