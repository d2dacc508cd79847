"""The benchmark of convolutions over one to three axes: what it times computes the same thing."""

import json

import numpy as np
import pytest

from pydeform.bench import conv as bench
from pydeform.bench import timing

SMALL = {
    "1-D": bench.Shape("deform_conv1d", 2, 4, (9,), 3),
    "3-D": bench.Shape("deform_conv3d", 2, 4, (3, 5, 4), 3),
    "depthwise 2-D": bench.Shape("deform_conv2d", 1, 4, (9, 8), 5, 2, True),
    "depthwise 3-D": bench.Shape("deform_conv3d", 1, 3, (4, 3, 5), 3, 1, True),
    "active": bench.Shape("active_conv2d", 2, 4, (6, 7), 3),
}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", SMALL)
    monkeypatch.setattr(timing, "BLOCK", 0)
    monkeypatch.setattr(timing, "PAUSE", 0)
    monkeypatch.setattr(timing, "busy_elsewhere", lambda: 0.0)


@pytest.mark.parametrize("name", SMALL)
def test_grid_sample_computes_the_same(name):
    pytest.importorskip("torch")
    p = bench.problem(SMALL[name])
    np.testing.assert_allclose(bench.grid_sample_call(p, 1)(), p.forward(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["1-D", "3-D"])
def test_products_are_those_of_the_shape(name):
    p = bench.problem(SMALL[name])
    channels, taps, places = 4, SMALL[name].kernel ** len(SMALL[name].size), p.grad_output[0, 0].size
    for what, call in bench.product_calls(p, 1).items():
        shapes = [result.shape for result in call()]
        assert shapes[0] == (channels, places)
        rest = [(channels * taps, places), (channels, channels * taps)] if what.startswith("three") else []
        assert shapes[1:] == rest


def test_a_run(small, capsys):
    assert bench.bench.main(["--threads", "1", "--rounds", "1", "--problems", "1-D,depthwise 3-D"]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(results) == ["1-D", "depthwise 3-D"]
    table = bench.bench.report(results).splitlines()
    assert len(table) == 3 and "ours/product" in table[0]
    assert bench.ratios(results["1-D"]["times"])["ours/product"] > 0
    assert "ours/product" not in bench.ratios(results["depthwise 3-D"]["times"])


def test_what_computes_something_else_is_not_timed(small, monkeypatch):
    pytest.importorskip("torch")
    made = bench.grid_sample_call
    monkeypatch.setattr(bench, "grid_sample_call", lambda p, threads: lambda: made(p, threads)() + 1)
    with pytest.raises(SystemExit, match="1-D: grid_sample differs"):
        bench.measure("1-D", 1, 1)


def test_a_problem_that_is_not_known(capsys):
    with pytest.raises(SystemExit):
        bench.bench.main(["--problems", "4-D"])
    assert "problems must be among 1-D,3-D" in capsys.readouterr().err
