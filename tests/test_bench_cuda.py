"""The GPU benchmark's own logic, with NumPy in CuPy's place: what it compares, times, reports and writes."""

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
from pydeform.bench import cuda_timing
from pydeform.bench.deform_conv2d import Shape

torch = pytest.importorskip("torch")

FORWARD = pydeform.deform_conv2d  # also while a test puts a wrong one in its place
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
    monkeypatch.setattr(bench, "_installed", lambda module: True)
    monkeypatch.setattr(cuda_timing, "one_stream", nullcontext)
    monkeypatch.setattr(cuda_timing, "smi", lambda: {"clocks.sm": "1980 MHz"})
    monkeypatch.setattr(cuda_timing, "BLOCK", 0.0)
    shapes = {"G1": Shape(2, 8, 5, 6, 1, 1, True), "G2": Shape(1, 8, 6, 7, 2, 2, False)}
    monkeypatch.setattr(bench, "SHAPES", shapes)
    monkeypatch.setattr(bench, "SMALL", ("G2",))
    yield cupy
    torch.set_float32_matmul_precision("highest")


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
