"""RoI pooling against whatever else is installed.

    python -m pydeform.bench.roi [--threads N] [--problems align,parts] [--rounds N]

prints one JSON object: problem -> "times" -> candidate -> seconds. "pydeform" and "pydeform backward" (all gradients)
are this library; the others compute the same thing, are compared with it first, and are called as their users do.

OpenVINO has no deformable RoI pooling of one group of channels: its bins are its groups. For the problem "parts" it
therefore gets an input with a group of channels for each bin, and so computes as many outputs from as many points; on
that input it is compared with us.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import pydeform
from pydeform._program import without_traceback
from pydeform.bench import timing
from pydeform.bench.timing import installed

PEERS = ("onnxruntime", "openvino", "torchvision")
BINS = 7
SIZES = (32.0, 400.0)  # of boxes, pixels of the image: log-uniform
Call = Callable[[], Any]


class Problem(NamedTuple):
    """One operator's arguments, all float32."""

    operator: str
    arrays: dict[str, Any]  # the first two are input and boxes
    options: dict[str, Any]
    grad_output: Any

    def forward(self) -> Any:
        return getattr(pydeform, self.operator)(**self.arrays, **self.options)

    def backward(self) -> Any:
        return getattr(pydeform, f"{self.operator}_backward")(self.grad_output, **self.arrays, **self.options)


def _problem(
    operator: str, boxes: int, channels: int, size: tuple[int, int], outputs: int, classes: int = 0, **options: Any
) -> Problem:
    """Boxes all over an image that is 1/spatial_scale times the size of the input; trans from normal(0, 1)."""
    rng = np.random.default_rng(1234)
    image = np.array(size[::-1]) / options["spatial_scale"]
    centres = rng.uniform(0, 1, (boxes, 2)) * image
    half = np.exp(rng.uniform(np.log(SIZES[0]), np.log(SIZES[1]), (boxes, 2))) / 2
    arrays = {
        "input": rng.standard_normal((1, channels, *size), np.float32),
        "boxes": np.concatenate([np.zeros((boxes, 1)), centres - half, centres + half], 1, dtype=np.float32),
    }
    if classes:
        arrays["trans"] = rng.standard_normal((boxes, 2 * classes, BINS, BINS), np.float32)
    return Problem(operator, arrays, options, rng.standard_normal((boxes, outputs, BINS, BINS), np.float32))


def problem(name: str) -> Problem:
    deformable: dict[str, Any] = {"pooled_size": BINS, "sample_per_part": 4, "trans_std": 0.1, "spatial_scale": 1 / 16}
    if name == "align":
        align: dict[str, Any] = {"output_size": BINS, "spatial_scale": 1 / 8, "sampling_ratio": 2, "aligned": True}
        return _problem("roi_align", 512, 256, (100, 136), 256, **align)
    if name == "pool":
        return _problem("roi_pool", 512, 256, (100, 136), 256, output_size=BINS, spatial_scale=1 / 8)
    options: dict[str, Any] = {"output_dim": 21, "group_size": BINS, **deformable}
    if name == "R-FCN":
        return _problem("deform_psroi_pool", 300, 21 * BINS**2, (38, 50), 21, 1, **options)
    if name == "R-FCN by class":
        return _problem("deform_psroi_pool", 300, 21 * BINS**2, (38, 50), 21, 21, **options)
    if name == "parts":
        return _problem("deform_psroi_pool", 512, 256, (38, 50), 256, 1, output_dim=256, **deformable)
    raise ValueError(f"problem must be one of {', '.join(PROBLEMS)}, got {name!r}")


PROBLEMS = {
    "align": "roi_align: 512 boxes on 256x100x136, 7x7 bins of 2x2 points",
    "pool": "roi_pool: 512 boxes on 256x100x136, 7x7 bins",
    "R-FCN": "deform_psroi_pool: 300 boxes on 1029x38x50, 7x7 groups, 21 outputs, 4x4 points a bin, one offset a bin",
    "R-FCN by class": "the same with an offset for each of 21 classes",
    "parts": "deform_psroi_pool: 512 boxes on 256x38x50, one group, 7x7 bins, 256 outputs, 4x4 points a bin",
}


def with_group_for_each_bin(p: Problem) -> Problem:
    """The same boxes, offsets, outputs and points on an input of which each bin reads channels of its own."""
    images, channels, *size = p.arrays["input"].shape
    rng = np.random.default_rng(99)
    grouped = rng.standard_normal((images, channels * BINS**2, *size), np.float32)
    return p._replace(arrays={**p.arrays, "input": grouped}, options={**p.options, "group_size": BINS})


def onnxruntime_forward(p: Problem, threads: int) -> Call:
    onnx, ort = importlib.import_module("onnx"), importlib.import_module("onnxruntime")
    boxes, options = p.arrays["boxes"], p.options
    feeds = {"input": p.arrays["input"]}
    if p.operator == "roi_align":
        feeds |= {"boxes": boxes[:, 1:].copy(), "index": boxes[:, 0].astype(np.int64)}
        attributes = {
            "output_height": BINS,
            "output_width": BINS,
            "sampling_ratio": options["sampling_ratio"],
            "spatial_scale": options["spatial_scale"],
            "coordinate_transformation_mode": "half_pixel",
        }
        node = onnx.helper.make_node("RoiAlign", list(feeds), ["output"], **attributes)
    else:
        feeds["boxes"] = boxes
        attributes = {"pooled_shape": [BINS, BINS], "spatial_scale": options["spatial_scale"]}
        node = onnx.helper.make_node("MaxRoiPool", list(feeds), ["output"], **attributes)
    types = {np.dtype(np.float32): onnx.TensorProto.FLOAT, np.dtype(np.int64): onnx.TensorProto.INT64}
    tensor = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "benchmark",
        [tensor(name, types[array.dtype], array.shape) for name, array in feeds.items()],
        [tensor("output", onnx.TensorProto.FLOAT, p.grad_output.shape)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 16)], ir_version=9)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feeds)[0]


def openvino_forward(p: Problem, threads: int) -> Call:
    ov, opset = importlib.import_module("openvino"), importlib.import_module("openvino.opset9")
    options, boxes = p.options, p.arrays["boxes"]
    arrays = list(p.arrays.values())
    if p.operator == "roi_align":
        arrays[1] = boxes[:, 1:].copy()
    parameters = [opset.parameter(list(array.shape), np.float32) for array in arrays]
    if p.operator == "roi_align":
        index = opset.constant(boxes[:, 0].astype(np.int32))
        sizes = (BINS, BINS, options["sampling_ratio"], options["spatial_scale"])
        node = opset.roi_align(*parameters, index, *sizes, "avg", "half_pixel_for_nn")
    else:
        node = opset.deformable_psroi_pooling(
            *parameters[:2],
            options["output_dim"],
            options["spatial_scale"],
            options["group_size"],
            "bilinear_deformable",
            options["sample_per_part"],
            options["sample_per_part"],
            options["trans_std"],
            BINS,
            parameters[2],
        )
    hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    model = ov.Model([node], parameters, "benchmark")
    request = ov.Core().compile_model(model, "CPU", hints).create_infer_request()
    # Without copies of its inputs and output, which would be on us.
    return lambda: request.infer(arrays, share_inputs=True, share_outputs=True)[0]


def torchvision_calls(p: Problem, threads: int) -> dict[str, Call]:
    torch, ops = importlib.import_module("torch"), importlib.import_module("torchvision.ops")
    torch.set_num_threads(threads)
    input, boxes = (torch.from_numpy(array) for array in p.arrays.values())
    needs_grad = input.clone().requires_grad_(True)
    operator, grad = getattr(ops, p.operator), torch.from_numpy(p.grad_output)
    output = operator(needs_grad, boxes, **p.options)
    return {
        "torchvision": lambda: operator(input, boxes, **p.options).numpy(),
        "torchvision backward": lambda: torch.autograd.grad(output, needs_grad, grad, retain_graph=True),
    }


def peers(p: Problem, threads: int) -> dict[str, Call]:
    plain = p.operator in ("roi_align", "roi_pool")
    calls: dict[str, Call] = {}
    if plain and installed("onnxruntime") and installed("onnx"):
        calls["onnxruntime"] = onnxruntime_forward(p, threads)
    if p.operator != "roi_pool" and installed("openvino"):
        calls["openvino"] = openvino_forward(p, threads)
    if plain and installed("torchvision"):
        calls |= torchvision_calls(p, threads)
    return calls


def check(p: Problem, calls: dict[str, Call], name: str) -> dict[str, float]:
    """Largest difference of each peer from us. Times of calls that compute different things mean nothing."""
    ours = p.forward()
    found = {}
    for peer, call in calls.items():
        if peer in PEERS:
            found[peer] = float(np.abs(call() - ours).max())
            if not found[peer] < 1e-4 * np.abs(ours).max():
                raise SystemExit(f"{name}: {peer} differs from pydeform by {found[peer]:.2g}")
    return found


def measure(name: str, threads: int, rounds: int) -> dict[str, Any]:
    p = problem(name)
    result, progress = timing.begun(name, PROBLEMS[name], threads)
    theirs = with_group_for_each_bin(p) if name == "parts" else p
    calls = peers(theirs, threads)
    result["largest difference"] = check(theirs, calls, name)
    calls = {"pydeform": p.forward, "pydeform backward": p.backward, **calls}
    result["times"] = {n: t._asdict() for n, t in timing.interleaved(calls, rounds, progress).items()}
    return result


def ratios(times: dict[str, Any]) -> dict[str, float]:
    """What the targets are about, of medians: the fastest peer over us, and our backward over our forward."""
    ours, backward = times["pydeform"]["median"], times["pydeform backward"]["median"]
    found = {"backward/forward": backward / ours}
    forwards = [times[peer]["median"] for peer in PEERS if peer in times]
    if forwards:
        found["fastest peer/ours"] = min(forwards) / ours
    if "torchvision backward" in times:
        found["torchvision backward/ours"] = times["torchvision backward"]["median"] / backward
    return found


bench = timing.Problems("pydeform.bench.roi", PROBLEMS, measure, ratios)

if __name__ == "__main__":
    sys.exit(without_traceback("benchmark", bench.main))
