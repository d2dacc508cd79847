"""The GPU benchmarks' own logic, with NumPy in CuPy's place: what they compare, time, report and write."""

import json
import runpy
import sys
import time
import types
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

import pydeform
from pydeform.bench import cuda_deform_conv2d as bench
from pydeform.bench import cuda_roi, cuda_timing, roi
from pydeform.bench.deform_conv2d import Shape

torch = pytest.importorskip("torch")

FORWARD = pydeform.deform_conv2d  # also while a test puts a wrong one in its place
ALIGN = {
    "roi_align": (pydeform.roi_align, pydeform.roi_align_backward),
    "ps_roi_align": (pydeform.ps_roi_align, pydeform.ps_roi_align_backward),
}
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


class Event:
    done = False

    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        pass


class DeformConv2d(torch.autograd.Function):
    """What torchvision would compute, by our CPU kernels."""

    @staticmethod
    def forward(context, x, offset, weight, bias, mask, options):
        context.save_for_backward(x, offset, weight, bias, mask)
        context.options = options
        x, offset, weight, bias, mask = (None if a is None else a.detach() for a in (x, offset, weight, bias, mask))
        return FORWARD(x, offset, weight, bias, mask=mask, **options)

    @staticmethod
    def backward(context, grad_output):
        x, offset, weight, bias, mask = (None if a is None else a.detach() for a in context.saved_tensors)
        grads = pydeform.deform_conv2d_backward(
            grad_output.contiguous(), x, offset, weight, bias, mask=mask, **context.options
        )
        return grads.input, grads.offset, grads.weight, grads.bias, grads.mask, None


class RoiAlign(torch.autograd.Function):
    """The same for pooling, under two names. Like torchvision, without bfloat16."""

    @staticmethod
    def forward(context, name, x, boxes, options):
        assert not boxes.requires_grad
        if x.dtype is torch.bfloat16:
            raise RuntimeError(f"\"{name}_forward_kernel\" not implemented for 'BFloat16'\nmore")
        context.save_for_backward(x, boxes)
        context.name, context.options = name, options
        return ALIGN[name][0](x.detach(), boxes, **options)

    @staticmethod
    def backward(context, grad_output):
        x, boxes = (a.detach() for a in context.saved_tensors)
        grads = ALIGN[context.name][1](grad_output.contiguous(), x, boxes, **context.options)
        return None, grads.input, None, None


@pytest.fixture
def machine(monkeypatch):
    """A GPU of which nothing is real, and tiny shapes."""
    properties = {"name": b"NVIDIA Nothing 1", "multiProcessorCount": 1, "l2CacheSize": 1, "totalGlobalMem": 1}
    cuda = types.SimpleNamespace(
        Event=Event,
        Device=lambda: types.SimpleNamespace(id=0, attributes={"L2CacheSize": 4000}),
        get_elapsed_time=lambda a, b: (b.time - a.time) * 1e3,
        runtime=types.SimpleNamespace(
            getDeviceProperties=lambda _: properties | {"major": 9, "minor": 0},
            driverGetVersion=lambda: 13000,
            runtimeGetVersion=lambda: 13000,
        ),
    )
    cupy = types.ModuleType("cupy")
    cupy.asarray, cupy.cuda = np.asarray, cuda
    cupy.RawKernel = lambda source, name: lambda grid, block, arguments: None
    cupy.get_default_memory_pool = lambda: types.SimpleNamespace(free_all_blocks=lambda: None)
    vision = types.ModuleType("torchvision.ops")
    vision.deform_conv2d = lambda x, offset, weight, bias, padding, dilation, mask: DeformConv2d.apply(
        x, offset, weight, bias, mask, {"padding": padding, "dilation": dilation}
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.ops", vision)
    monkeypatch.setattr(bench, "installed", lambda module: True)
    monkeypatch.setattr(cuda_timing, "one_stream", nullcontext)
    monkeypatch.setattr(cuda_timing, "smi", lambda: {"clocks.sm": "1980 MHz"})
    monkeypatch.setattr(cuda_timing, "BLOCK", 0.0)
    shapes = {"G1": Shape(2, 8, 5, 6, 1, 1, True), "G2": Shape(1, 8, 6, 7, 2, 2, False)}
    monkeypatch.setattr(bench, "SHAPES", shapes)
    monkeypatch.setattr(bench, "SMALL", ("G2",))
    yield cupy
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def pooling(machine, monkeypatch):
    """That GPU for RoI pooling: its torchvision, and problems of few boxes on small images."""

    def roi_align(input, boxes, output_size, spatial_scale=1.0, sampling_ratio=-1, aligned=False):
        options = {"spatial_scale": spatial_scale, "sampling_ratio": sampling_ratio, "aligned": aligned}
        return RoiAlign.apply("roi_align", input, boxes, {"output_size": output_size, **options})

    def ps_roi_align(input, boxes, output_size, spatial_scale=1.0, sampling_ratio=-1):
        options = {"spatial_scale": spatial_scale, "sampling_ratio": sampling_ratio}
        return RoiAlign.apply("ps_roi_align", input, boxes, {"output_size": output_size, **options})

    vision = sys.modules["torchvision.ops"]
    vision.roi_align, vision.ps_roi_align = roi_align, ps_roi_align
    full = roi._problem
    sizes = {(38, 50): (10, 13), (100, 136): (18, 20)}

    def small(operator, boxes, channels, size, outputs, classes=0, **options):
        return full(operator, 4, channels, sizes[size], outputs, classes, **options)

    monkeypatch.setattr(roi, "_problem", small)
    monkeypatch.setattr(cuda_roi, "installed", lambda module: True)
    return vision


def test_everything_is_compared_and_timed(machine):
    kept = []
    results = bench.run(("G1", "G2"), bench.DTYPES, 60, lambda found: kept.append(json.dumps(found)))
    assert set(results["G1"]) == {"float16", "float32", "bfloat16", "tf32"}
    assert set(results["G2"]) == set(bench.DTYPES)
    assert len(kept) == 9 and json.loads(kept[-1]) == json.loads(json.dumps(results))
    assert bench.wrong(results) == []
    grads = ("input", "offset", "weight", "bias", "mask")
    names = {"output", *grads, *(f"{name} deterministic" for name in grads)}
    assert set(results["G1"]["float16"]["difference"]) == names
    assert set(results["G2"]["float32"]["difference"]) == {name for name in names if "mask" not in name}
    assert set(results["G1"]["float32"]["forward"]) == {"pydeform", "torchvision", "dense", "products"}
    assert "pydeform deterministic" in results["G1"]["float32"]["backward"]
    assert "torchvision" not in results["G1"]["bfloat16"]["forward"]
    for what in ("forward", "backward"):
        for timings in results["G1"]["tf32"][what].values():
            assert timings["calls"] == cuda_timing.ROUNDS * cuda_timing.FEWEST
            assert 0 < timings["minimum"] <= timings["median"] and timings["host"] > 0
        table = bench.report(results, what).splitlines()
        assert len(table) == 10
        assert ("deterministic" in table[0]) == (what == "backward")


def test_a_wrong_result_is_told(machine, monkeypatch):
    for factor, text in ((1.01, "0.01"), (np.nan, "nan")):
        monkeypatch.setattr(pydeform, "deform_conv2d", lambda *a, f=factor, **k: FORWARD(*a, **k) * np.float32(f))
        (told,) = bench.wrong(bench.run(("G1",), ("float32",), 60))
        assert told == f"G1 float32: output differs by {text} of the largest value"


def test_time_that_is_over_ends_it(machine, capsys):
    assert bench.run(("G1", "G2"), ("float32",), -1) == {}
    assert capsys.readouterr().err == "G1 float32: no time left\nG2 float32: no time left\n"


def test_copies_exceed_the_cache_twice(machine):
    p = bench.sent(bench.problem(bench.SHAPES["G1"]), "float32")
    size = sum(getattr(p, name).nbytes for name in bench.NAMES)
    many = bench.copies(p, 10 * size)
    assert len(many) == 20 and many[0] is p
    assert many[1].input is not p.input and np.array_equal(many[1].input, p.input)
    assert len(bench.copies(p, 0)) == 1 and len(bench.copies(p, 10**9 * size)) == bench.MOST_COPIES


def test_a_device_that_outruns_the_host_is_measured_again(machine, monkeypatch):
    ahead, asked = [], []
    monkeypatch.setattr(cuda_timing, "waiter", lambda: ahead.append)

    class Late(Event):
        @property
        def done(self):
            return len(ahead) == 2  # the first block after the warm-up

    monkeypatch.setattr(machine.cuda, "Event", Late)
    cuda_timing.interleaved({"call": asked.append}, lambda text: None)
    assert ahead[0] == 0 and ahead[2] == 4 * ahead[1]
    assert ahead[3:] == [ahead[2]] * (cuda_timing.ROUNDS - 1)


def test_the_program_writes_what_it_measured(machine, monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    path = tmp_path / "deform_conv2d.json"
    arguments = ["--shapes", "G2", "--dtypes", "float32,float16", "--output", str(path)]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(BENCHMARKS / "bench_cuda_deform_conv2d.py"), run_name="__main__")
    assert end.value.code == 0
    written = json.loads(path.read_text())
    assert written["gpu"]["name"] == "NVIDIA Nothing 1" and written["gpu"]["clocks.sm"] == "1980 MHz"
    assert written["gpu afterwards"] == {} and "torch" in written["versions"]
    assert set(written["speed"]["G2"]) == {"float32", "float16"}
    shown = capsys.readouterr().out
    assert "torchvision/ours" in shown and f"written: {path}" in shown


def test_names_are_checked():
    with pytest.raises(SystemExit):
        bench.main(["--shapes", "G9"])
    with pytest.raises(SystemExit):
        bench.main(["--dtypes", "int8"])


# RoI pooling ---------------------------------------------------------------------------------------------------------
def test_every_pooling_is_compared_and_timed(pooling):
    kept = []
    results = cuda_roi.run(cuda_roi.PROBLEMS, cuda_roi.DTYPES, 60, lambda found: kept.append(json.dumps(found)))
    assert set(results) == set(cuda_roi.PROBLEMS)
    assert all(set(by_dtype) == set(cuda_roi.DTYPES) for by_dtype in results.values())
    assert len(kept) == 18 and json.loads(kept[-1]) == json.loads(json.dumps(results))
    assert cuda_roi.wrong(results) == []
    for name, by_dtype in results.items():
        for dtype, result in by_dtype.items():
            shared = name in ("align", "ps_align")
            ourselves = "" if dtype == "float32" else "ourselves in float32"
            assert result["compared with"] == ("torchvision" if shared else ourselves)
            names = {"output", "input"} if shared else {"output", "input", "trans"}
            assert set(result["difference"]) == (names if result["compared with"] else set())
            timed = {"pydeform", "torchvision"} if shared and dtype != "bfloat16" else {"pydeform"}
            assert set(result["forward"]) == set(result["backward"]) == timed
            for what in ("forward", "backward"):
                for timings in result[what].values():
                    assert timings["calls"] == cuda_timing.ROUNDS * cuda_timing.FEWEST
                    assert 0 < timings["minimum"] <= timings["median"] and timings["host"] > 0
    assert results["align"]["float32"]["no torchvision"] == ""
    reason = "not supported: \"ps_roi_align_forward_kernel\" not implemented for 'BFloat16'"
    assert results["ps_align"]["bfloat16"]["no torchvision"] == reason
    assert results["parts"]["float16"]["no torchvision"] == "no such operator"
    for what in ("forward", "backward"):
        assert len(cuda_roi.report(results, what).splitlines()) == 19


def test_pooling_problems_are_those_of_the_targets():
    """At full size: what the report's targets are about."""
    found = {name: cuda_roi.problem(name) for name in cuda_roi.PROBLEMS}
    shapes = {
        "parts": ((1, 256, 38, 50), (512, 256, 7, 7), (512, 2, 7, 7), 1 / 16),
        "align": ((1, 256, 100, 136), (512, 256, 7, 7), None, 1 / 8),
        "parts large": ((1, 256, 100, 136), (512, 256, 7, 7), (512, 2, 7, 7), 1 / 8),
        "ps_align": ((1, 1029, 38, 50), (300, 21, 7, 7), None, 1 / 16),
        "R-FCN": ((1, 1029, 38, 50), (300, 21, 7, 7), (300, 2, 7, 7), 1 / 16),
        "R-FCN by class": ((1, 1029, 38, 50), (300, 21, 7, 7), (300, 42, 7, 7), 1 / 16),
    }
    for name, (input, output, trans, scale) in shapes.items():
        p = found[name]
        assert list(p.arrays) == (["input", "boxes", "trans"] if trans else ["input", "boxes"])
        assert p.arrays["input"].shape == input and p.grad_output.shape == output
        assert p.arrays["boxes"].shape == (output[0], 5) and (not trans or p.arrays["trans"].shape == trans)
        assert p.options["spatial_scale"] == pytest.approx(scale, rel=2e-3)
        x1, y1, x2, y2 = p.arrays["boxes"][:, 1:].T * p.options["spatial_scale"]
        assert (x1 < x2).all() and (y1 < y2).all()
        assert input[3] / 2 < ((x1 + x2) / 2).max() < input[3] and input[2] / 2 < ((y1 + y2) / 2).max() < input[2]


@pytest.mark.parametrize("name", ("align", "ps_align"))
@pytest.mark.parametrize("dtype", ("float32", "float16", "bfloat16"))
def test_no_point_is_on_a_border(machine, name, dtype):
    """Where a box of 16 bits would put it if the scale were a power of two, and rounding decide whether it counts."""
    p = cuda_roi.mapped(cuda_roi.problem(name), lambda array: cuda_roi.on_device(array, dtype))
    _, x1, y1, x2, y2 = p.arrays["boxes"].astype(np.float64).T * p.options["spatial_scale"]
    at = (2 * np.arange(14) + 1) / 28
    for first, last, length in ((x1, x2, p.arrays["input"].shape[3]), (y1, y2, p.arrays["input"].shape[2])):
        points = first[:, None] - 0.5 + (last - first)[:, None] * at
        assert min(abs(points + 1).min(), abs(points - length).min()) > 1e-4


@pytest.mark.parametrize("factor, text", ((1.01, "0.0099"), (np.nan, "nan")))
def test_a_peer_that_computes_something_else_is_told(pooling, monkeypatch, factor, text):
    right = pooling.roi_align
    monkeypatch.setattr(pooling, "roi_align", lambda *a, **k: right(*a, **k) * factor)
    told = cuda_roi.wrong(cuda_roi.run(("align",), ("float32",), 60))
    assert told == [
        f"align float32: {what} differs from torchvision by {text} of the largest value" for what in ("output", "input")
    ]


def test_results_of_other_shapes_differ():
    assert cuda_roi._difference(np.ones((2, 3)), torch.ones(2, 3)) == 0
    assert cuda_roi._difference(np.ones((2, 3)), torch.ones(2, 1)) == np.inf


def test_a_pooling_that_is_wrong_in_16_bits_is_told(pooling, monkeypatch):
    right = pydeform.deform_psroi_pool

    def doubled(input, *arguments, **options):
        return right(input, *arguments, **options) * (2 if input.dtype == np.float16 else 1)

    monkeypatch.setattr(pydeform, "deform_psroi_pool", doubled)
    (told,) = cuda_roi.wrong(cuda_roi.run(("parts",), ("float16", "float32"), 60))
    assert told == "parts float16: output differs from ourselves in float32 by 1 of the largest value"


def test_pooling_without_peers(pooling, monkeypatch):
    monkeypatch.setattr(cuda_roi, "installed", lambda module: module == "torch")
    found = cuda_roi.run(("align",), ("float16", "float32"), 60)["align"]
    assert found["float16"]["compared with"] == "ourselves in float32" and found["float32"]["compared with"] == ""
    assert set(found["float16"]["forward"]) == {"pydeform"} and found["float16"]["no torchvision"] == "not installed"
    monkeypatch.setattr(cuda_roi, "installed", lambda module: False)
    found = cuda_roi.run(("align",), ("float16",), 60)
    assert found["align"]["float16"]["difference"] == {} and cuda_roi.wrong(found) == []
    assert cuda_roi.report(found, "backward").splitlines()[1].split()[4:8] == ["-"] * 4


def test_only_what_is_not_implemented_is_passed_over(pooling, monkeypatch):
    def raising(error):
        def roi_align(*arguments, **options):
            raise error

        monkeypatch.setattr(pooling, "roi_align", roi_align)
        return cuda_roi.torchvisions([cuda_roi.problem("align")])

    assert raising(NotImplementedError("Could not run it")) == ({}, "not supported: Could not run it")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        raising(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_pooling_stops_when_its_time_is_over(pooling, capsys):
    assert cuda_roi.run(("parts", "align"), ("float16",), -1) == {}
    assert capsys.readouterr().err == "parts float16: no time left\nalign float16: no time left\n"


def test_blocks_go_on_among_the_copies(pooling):
    p = cuda_roi.problem("parts")
    size = sum(array.nbytes for array in p.arrays.values())
    many = cuda_roi.copies(p, 10 * size)
    assert len(many) == 20 and many[0] is p
    assert many[1].arrays["input"] is not p.arrays["input"] and many[1].grad_output is not p.grad_output
    assert np.array_equal(many[1].arrays["trans"], p.arrays["trans"])
    assert len(cuda_roi.copies(p, 0)) == 1 and len(cuda_roi.copies(p, 10**9 * size)) == cuda_roi.MOST_COPIES
    asked = []
    call = cuda_roi.rotating(asked.append, 5)
    for _ in range(3):
        for number in range(3):
            call(number)
    assert asked == [0, 1, 2, 3, 4, 0, 1, 2, 3]


def test_targets_of_pooling():
    def timings(**medians):
        return {name: {"median": seconds, "minimum": seconds, "host": 1e-5} for name, seconds in medians.items()}

    fast = timings(pydeform=10e-6, torchvision=30e-6)
    assert cuda_roi.target("align", "float16", "forward", fast) == ("2 times", pytest.approx(1.5))
    assert cuda_roi.target("ps_align", "float32", "backward", fast) == ("3 times", pytest.approx(1))
    alone = timings(pydeform=60e-6)
    for name in ("parts", "parts large"):
        assert cuda_roi.target(name, "bfloat16", "forward", alone) == ("90 us", pytest.approx(1.5))
        assert cuda_roi.target(name, "float32", "forward", alone) is None
        assert cuda_roi.target(name, "float16", "backward", alone) is None
    assert cuda_roi.target("R-FCN", "float16", "forward", alone) is None
    results = {"align": {"float16": {"forward": fast}}, "parts": {"float16": {"forward": alone}}}
    rows = [line.split() for line in cuda_roi.report(results, "forward").splitlines()]
    assert rows[1] == ["align", "float16", "10.0", "10.0", "30.0", "3.00", "2", "times", "1.50", "10"]
    assert rows[2] == ["parts", "float16", "60.0", "60.0", "-", "-", "90", "us", "1.50", "10"]


def test_the_pooling_program_writes_what_it_measured(pooling, monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    path = tmp_path / "roi.json"
    arguments = ["--problems", "ps_align,R-FCN by class", "--dtypes", "float32,float16", "--output", str(path)]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(BENCHMARKS / "bench_cuda_roi.py"), run_name="__main__")
    assert end.value.code == 0
    written = json.loads(path.read_text())
    assert written["gpu"]["name"] == "NVIDIA Nothing 1" and written["gpu afterwards"] == {}
    assert "torch" in written["versions"] and set(written["problems"]) == {"ps_align", "R-FCN by class"}
    assert set(written["speed"]["ps_align"]) == {"float32", "float16"}
    shown = capsys.readouterr().out
    assert "torchvision/ours" in shown and f"written: {path}" in shown
    with pytest.raises(SystemExit):
        cuda_roi.main(["--problems", "nothing"])
