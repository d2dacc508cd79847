"""The benchmark of grid sampling: what it times computes the same thing."""

import json

import numpy as np
import pytest

from pydeform.bench import grid as bench
from pydeform.bench import timing

SMALL = {
    "maps bilinear zeros": bench.Shape(3, (6, 5), "bilinear", "zeros"),
    "image bicubic reflection": bench.Shape(2, (7, 8), "bicubic", "reflection"),
    "volume nearest border": bench.Shape(2, (3, 4, 5), "nearest", "border"),
}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", SMALL)
    monkeypatch.setattr(timing, "BLOCK", 0)
    monkeypatch.setattr(timing, "COLD_BYTES", 8)
    monkeypatch.setattr(timing, "PAUSE", 0)
    monkeypatch.setattr(timing, "busy_elsewhere", lambda: 0.0)


@pytest.mark.skipif(not bench.installed("torch"), reason="compares with PyTorch")
@pytest.mark.parametrize("name", SMALL)
def test_torch_computes_the_same(name):
    p = bench.problem(SMALL[name])
    output, grads = p.training()
    calls = bench.torch_calls(p, 1)
    np.testing.assert_allclose(calls["torch"](), output, rtol=1e-3, atol=1e-5)
    for theirs, ours in zip(calls["torch training"]()[1], grads, strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=1e-4)


def test_a_run(small, capsys):
    assert (
        bench.bench.main(["--threads", "1", "--rounds", "1", "--problems", "maps bilinear zeros,volume nearest border"])
        == 0
    )
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(results) == ["maps bilinear zeros", "volume nearest border"]
    table = bench.bench.report(results).splitlines()
    assert len(table) == 3 and "training/forward" in table[0]


def test_what_computes_something_else_is_not_timed(small, monkeypatch):
    monkeypatch.setattr(bench, "installed", lambda _: True)
    p = bench.problem(SMALL["maps bilinear zeros"])
    output, grads = p.training()
    monkeypatch.setattr(bench, "torch_calls", lambda _p, _threads: {"torch training": lambda: (output + 1, grads)})
    with pytest.raises(SystemExit, match="maps bilinear zeros: output of torch differs"):
        bench.measure("maps bilinear zeros", 1, 1)
