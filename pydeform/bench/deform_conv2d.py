"""Deformable convolution against whatever else is installed, on shapes from small to large.

    python -m pydeform.bench.deform_conv2d [--threads N] [--shapes W1,W5] [--rounds N]

prints one JSON object: shape -> "forward" and "training" (forward and backward) -> candidate -> seconds.
"pydeform" is this library; "openvino", "onnxruntime" and "torchvision" compute the same thing, are compared with it
first, and are called as their users call them. The rest are references: "dense ..." is the plain convolution of that
size, "products ..." the bare matrix products without any sampling (one forward, three with gradients). All in float32,
but "... bfloat16", whose arrays are in that already.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import pydeform
from pydeform._program import count, without_traceback
from pydeform.bench import timing
from pydeform.bench.timing import installed


class Shape(NamedTuple):
    """A 3x3 convolution of stride 1 that keeps the size and the number of channels."""

    batch: int
    channels: int
    height: int
    width: int
    dilation: int
    offset_groups: int
    mask: bool


SHAPES = {
    "W1": Shape(1, 64, 56, 56, 1, 1, True),
    "W2": Shape(2, 256, 28, 28, 1, 4, True),
    "W3": Shape(1, 512, 38, 50, 2, 4, False),
    "W4": Shape(8, 128, 28, 28, 1, 1, True),
    "W5": Shape(1, 16, 32, 32, 1, 1, True),
    "W6": Shape(1, 64, 512, 512, 1, 1, True),
}
TAPS = 9
BUSY = 0.2  # processors' worth of other programs' work above which a time is worth little
RUNTIMES = ("openvino", "onnxruntime")
PEERS = (*RUNTIMES, "torchvision")


class Problem(NamedTuple):
    shape: Shape
    input: Any
    offset: Any
    weight: Any
    bias: Any
    mask: Any
    grad_output: Any

    @property
    def options(self) -> dict[str, Any]:
        return {"padding": self.shape.dilation, "dilation": self.shape.dilation, "mask": self.mask}


def problem(shape: Shape) -> Problem:
    """Offsets from normal(0, 2), masks from a sigmoid, a weight that keeps the variance. float32."""
    n, c, h, w = shape[:4]
    rng = np.random.default_rng(1234)

    def normal(*size: int) -> Any:
        return rng.standard_normal(size, np.float32)

    logits = normal(n, shape.offset_groups * TAPS, h, w)
    return Problem(
        shape,
        input=normal(n, c, h, w),
        offset=2 * normal(n, shape.offset_groups * TAPS * 2, h, w),
        weight=normal(c, c, 3, 3) / np.float32(np.sqrt(c * TAPS)),
        bias=normal(c),
        mask=1 / (1 + np.exp(-logits)) if shape.mask else None,
        grad_output=normal(n, c, h, w),
    )


def in_bfloat16(p: Problem) -> Problem:
    half = importlib.import_module("ml_dtypes").bfloat16
    return Problem(p.shape, *(None if a is None else a.astype(half) for a in p[1:]))


def ours_forward(p: Problem) -> Any:
    return pydeform.deform_conv2d(p.input, p.offset, p.weight, p.bias, **p.options)


def ours_backward(p: Problem) -> Any:
    return pydeform.deform_conv2d_backward(p.grad_output, p.input, p.offset, p.weight, p.bias, **p.options)


def onnxruntime_forward(p: Problem, threads: int) -> Callable[[], Any] | None:
    onnx, ort = importlib.import_module("onnx"), importlib.import_module("onnxruntime")
    feeds = {"input": p.input, "offset": p.offset} | ({} if p.mask is None else {"mask": p.mask})
    d = p.shape.dilation
    node = onnx.helper.make_node(
        "DeformConv",
        ["input", "weight", "offset", "bias", "mask" if p.shape.mask else ""],
        ["output"],
        kernel_shape=[3, 3],
        pads=[d] * 4,
        dilations=[d] * 2,
        offset_group=p.shape.offset_groups,
    )
    tensor = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "benchmark",
        [tensor(name, onnx.TensorProto.FLOAT, array.shape) for name, array in feeds.items()],
        [tensor("output", onnx.TensorProto.FLOAT, p.input.shape)],
        [onnx.numpy_helper.from_array(p.weight, "weight"), onnx.numpy_helper.from_array(p.bias, "bias")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except ort.capi.onnxruntime_pybind11_state.NotImplemented:
        return None  # 1.23 knows the operator and cannot run it
    return lambda: session.run(None, feeds)[0]


def openvino_forward(p: Problem, threads: int) -> Callable[[], Any]:
    ov, opset = importlib.import_module("openvino"), importlib.import_module("openvino.opset8")
    arrays = [p.input, p.offset] + ([] if p.mask is None else [p.mask])
    parameters = [opset.parameter(list(array.shape), np.float32) for array in arrays]
    d = [p.shape.dilation] * 2
    node = opset.deformable_convolution(
        *parameters[:2],
        opset.constant(p.weight),
        [1, 1],
        d,
        d,
        d,
        mask=None if p.mask is None else parameters[2],
        deformable_group=p.shape.offset_groups,
        bilinear_interpolation_pad=True,
    )
    model = ov.Model([opset.add(node, opset.constant(p.bias.reshape(1, -1, 1, 1)))], parameters, "benchmark")
    hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = ov.Core().compile_model(model, "CPU", hints).create_infer_request()
    # Without copies of its inputs and output, which would be on us.
    return lambda: request.infer(arrays, share_inputs=True, share_outputs=True)[0]


def torch_tensors(p: Problem, threads: int, gradients: bool) -> Any:
    torch = importlib.import_module("torch")
    torch.set_num_threads(threads)
    arrays = (p.input, p.offset, p.weight, p.bias, p.mask)
    return torch, [None if a is None else torch.from_numpy(a).requires_grad_(gradients) for a in arrays]


def torchvision_call(p: Problem, threads: int, gradients: bool) -> Callable[[], Any]:
    torch, (x, offset, weight, bias, mask) = torch_tensors(p, threads, gradients)
    operator = importlib.import_module("torchvision.ops").deform_conv2d
    d = p.shape.dilation
    wanted = [a for a in (x, offset, weight, bias, mask) if a is not None]

    def call() -> Any:
        y = operator(x, offset, weight, bias, padding=d, dilation=d, mask=mask)
        return torch.autograd.grad(y, wanted, torch.from_numpy(p.grad_output)) if gradients else y.numpy()

    return call


def dense_call(p: Problem, threads: int, gradients: bool, dtype: str = "float32") -> Callable[[], Any]:
    torch, (x, _, weight, bias, _) = torch_tensors(p, threads, gradients)
    x, weight, bias = (a.detach().to(getattr(torch, dtype)).requires_grad_(gradients) for a in (x, weight, bias))
    grad_output = torch.from_numpy(p.grad_output).to(x.dtype)
    d = p.shape.dilation

    def call() -> Any:
        y = torch.nn.functional.conv2d(x, weight, bias, padding=d, dilation=d)
        return torch.autograd.grad(y, (x, weight, bias), grad_output) if gradients else y

    return call


def products(p: Problem, threads: int, gradients: bool) -> dict[str, Callable[[], Any]]:
    """The matrix products of one call, image by image.

    Forward:   [O, CK] [CK, L] -> [O, L]
    Columns:   [CK, O] [O, L]  -> [CK, L]
    Weight:    [O, L]  [L, CK] -> [O, CK]
    """
    weight = p.weight.reshape(p.shape.channels, -1)
    grad = p.grad_output[0].reshape(p.shape.channels, -1)
    some = np.random.default_rng(0).standard_normal(1 << 20, np.float32)
    columns = np.resize(some, (weight.shape[1], grad.shape[1]))
    pairs = [(weight, columns), (weight.T, grad), (grad, columns.T)]
    return blas_calls(pairs[: 3 if gradients else 1], p.shape.batch, threads)


def blas_calls(pairs: list[tuple[Any, Any]], images: int, threads: int) -> dict[str, Callable[[], list[Any]]]:
    """All products of `pairs`, `images` times, by each BLAS at hand, into memory that is there already."""
    results = [np.empty((a.shape[0], b.shape[1]), np.float32) for a, b in pairs]
    triples = [(a, b, out) for (a, b), out in zip(pairs, results, strict=True)]

    def repeated(product: Callable[[Any, Any, Any], object], operands: list[Any]) -> Callable[[], list[Any]]:
        def call() -> list[Any]:
            for _ in range(images):
                for a, b, out in operands:
                    product(a, b, out)
            return results

        return call

    calls = {"products numpy": repeated(lambda a, b, out: np.matmul(a, b, out=out), triples)}
    if installed("scipy"):
        sgemm = importlib.import_module("scipy.linalg.blas").sgemm
        # Fortran's order: the transposed product, of transposed views.
        calls["products scipy"] = repeated(lambda a, b, out: _sgemm(sgemm, b.T, a.T, out.T), triples)
    if installed("torch"):
        torch = importlib.import_module("torch")
        torch.set_num_threads(threads)
        tensors = [tuple(map(torch.from_numpy, triple)) for triple in triples]
        calls["products torch"] = repeated(lambda a, b, out: torch.mm(a, b, out=out), tensors)
    return calls


def _sgemm(sgemm: Any, a: Any, b: Any, out: Any) -> None:
    """out = a @ b without a copy: what is not in Fortran's order is so when transposed."""
    trans_a, trans_b = not a.flags.f_contiguous, not b.flags.f_contiguous
    sgemm(1.0, a.T if trans_a else a, b.T if trans_b else b, 0.0, out, trans_a, trans_b, overwrite_c=1)


def forward_candidates(p: Problem, threads: int) -> dict[str, Callable[[], Any]]:
    half = in_bfloat16(p)
    calls: dict[str, Callable[[], Any]] = {
        "pydeform": lambda: ours_forward(p),
        "pydeform bfloat16": lambda: ours_forward(half),
    }
    if installed("openvino"):
        calls["openvino"] = openvino_forward(p, threads)
    if installed("onnxruntime") and installed("onnx") and (call := onnxruntime_forward(p, threads)):
        calls["onnxruntime"] = call
    if installed("torchvision"):
        calls["torchvision"] = torchvision_call(p, threads, gradients=False)
    if installed("torch"):
        calls["dense torch"] = dense_call(p, threads, gradients=False)
        calls["dense torch bfloat16"] = dense_call(p, threads, gradients=False, dtype="bfloat16")
    return calls | products(p, threads, gradients=False)


def training_candidates(p: Problem, threads: int) -> dict[str, Callable[[], Any]]:
    half = in_bfloat16(p)
    calls: dict[str, Callable[[], Any]] = {
        "pydeform": lambda: (ours_forward(p), ours_backward(p)),
        "pydeform backward": lambda: ours_backward(p),
        "pydeform bfloat16": lambda: (ours_forward(half), ours_backward(half)),
    }
    if installed("torchvision"):
        calls["torchvision"] = torchvision_call(p, threads, gradients=True)
    if installed("torch"):
        calls["dense torch"] = dense_call(p, threads, gradients=True)
        calls["dense torch bfloat16"] = dense_call(p, threads, gradients=True, dtype="bfloat16")
    return calls | products(p, threads, gradients=True)


def differences(calls: dict[str, Callable[[], Any]], name: str) -> dict[str, float]:
    """Largest difference of each peer from us. Times of calls that compute different things mean nothing."""
    ours = calls["pydeform"]()
    found = {}
    for peer in PEERS:
        if peer in calls:
            found[peer] = float(np.abs(calls[peer]() - ours).max())
            if not found[peer] < 1e-4 * np.abs(ours).max():
                raise SystemExit(f"{name}: {peer} differs from pydeform by {found[peer]:.2g}")
    return found


def measure(name: str, threads: int, rounds: int, runtimes: bool = True) -> dict[str, Any]:
    p = problem(SHAPES[name])
    time.sleep(timing.PAUSE)
    result: dict[str, Any] = {"busy elsewhere": timing.busy_elsewhere()}
    for what, candidates in (("forward", forward_candidates), ("training", training_candidates)):

        def progress(text: str, what: str = what) -> None:
            timing.show_progress(f"{name} {what}, threads {threads}: {text}")

        progress("setting up")
        calls = {n: c for n, c in candidates(p, threads).items() if runtimes or not _needs_wide_vectors(n)}
        if what == "forward":
            result["largest difference"] = differences(calls, name)
        result[what] = {n: t._asdict() for n, t in timing.interleaved(calls, rounds, progress).items()}
    return result


def _needs_wide_vectors(name: str) -> bool:
    """Cannot be told to do without, or takes seconds then."""
    return name in RUNTIMES or name.endswith("bfloat16")


def fastest(timings: dict[str, Any], names: tuple[str, ...]) -> tuple[str, float] | None:
    """(candidate, median) of the fastest whose name starts with one of `names`."""
    medians = {n: t["median"] for n, t in timings.items() if n.startswith(names) and n != "pydeform"}
    return min(medians.items(), key=lambda item: item[1]) if medians else None


def report(results: dict[str, Any], what: str) -> str:
    """A table in milliseconds, median and minimum, with the ratios that matter below each other at the right."""
    columns = list(dict.fromkeys(name for result in results.values() for name in result[what]))
    ratios: dict[str, list[float]] = {"peer/ours": [], "ours/products": []}
    rows = []
    for shape, result in results.items():
        timings = result[what]
        row = [shape] + [f"{t['median'] * 1e3:.3g}/{t['minimum'] * 1e3:.3g}" for t in timings.values()]
        ours, peer, bare = timings["pydeform"]["median"], fastest(timings, PEERS), fastest(timings, ("products",))
        for key, value in (("peer/ours", peer and peer[1] / ours), ("ours/products", bare and ours / bare[1])):
            row.append(f"{value:.2f}" if value else "-")
            if value:
                ratios[key].append(value)
        rows.append(row)
    busy = [shape for shape, result in results.items() if (result.get("busy elsewhere") or 0) > BUSY]
    warning = f"\nother programs kept the processors busy during {', '.join(busy)}: measure again" if busy else ""
    means = [f"{timing.geometric_mean(v):.2f}" if v else "-" for v in ratios.values()]
    rows.append(["mean", *[""] * len(columns), *means])
    return timing.table([what, *columns, *ratios], rows) + warning


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pydeform.bench.deform_conv2d")
    parser.add_argument("--threads", type=count, default=pydeform.get_num_threads())
    parser.add_argument("--shapes", default=",".join(SHAPES), type=timing.names_among("shapes", SHAPES))
    parser.add_argument("--rounds", type=count, default=7)
    parser.add_argument("--no-runtimes", action="store_true", help="without OpenVINO, onnxruntime and bfloat16")
    options = parser.parse_args(argv)
    pydeform.set_num_threads(options.threads)
    results = {name: measure(name, options.threads, options.rounds, not options.no_runtimes) for name in options.shapes}
    timing.show_progress("")
    print(json.dumps(results))
    return 0


def run(threads: int, shapes: list[str], rounds: int, runtimes: bool = True) -> dict[str, Any]:
    """`measure` for several shapes in a process of its own, whose libraries all use that many threads."""
    more = () if runtimes else ("--no-runtimes",)
    return timing.in_own_process(__name__, threads, "--shapes", ",".join(shapes), "--rounds", str(rounds), *more)


if __name__ == "__main__":
    sys.exit(without_traceback("benchmark", main))
