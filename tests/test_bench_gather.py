"""The benchmark of the operators that gather samples: what it times computes the same thing."""

import json

import numpy as np
import pytest

from pydeform.bench import gather as bench
from pydeform.bench import timing

SMALL = {
    "rf-detr": bench.Attention(7, ((5, 4),), 2, 3, 2),
    "encoder": bench.Attention(26, ((4, 5), (2, 3)), 2, 8, 3, True),
    "sparse4d": bench.Aggregation(4, 3, 2, ((6, 5), (3, 4)), 8, 2),
    "dcnv3 7": bench.Dcn("dcnv3", 5, 32),
    "dcnv4 7": bench.Dcn("dcnv4", 6, 16),
}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", SMALL)
    monkeypatch.setattr(timing, "BLOCK", 0)
    monkeypatch.setattr(timing, "COLD_BYTES", 8)
    monkeypatch.setattr(timing, "PAUSE", 0)
    monkeypatch.setattr(timing, "busy_elsewhere", lambda: 0.0)


@pytest.mark.parametrize("name", SMALL)
def test_others_compute_the_same(name):
    p = bench.problem(SMALL[name])
    others = [bench.loop_call(p)] if isinstance(p.shape, bench.Attention) else []
    if bench.installed("torch"):
        others.append(bench.grid_sample_call(p, 1))
    for other in others:
        np.testing.assert_allclose(other(), p.forward(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["rf-detr", "encoder", "sparse4d", "dcnv3 7"])
def test_reading_reads_the_pixels_of_all_samples(name):
    """With a unit vector in each pixel the operator gives the shares of the pixels that it reads."""
    p = bench.problem(SMALL[name])
    maps, _, weights = p.arrays
    shape, groups = p.arrays[maps].shape, p.options.get("groups", 1)
    if name.startswith("dcn"):
        pixels = shape[1] * shape[2]
        unit = np.tile(np.eye(pixels, dtype=np.float32), groups).reshape(*shape[:3], groups * pixels)
    elif name == "sparse4d":
        unit = np.eye(shape[1], dtype=np.float32)[None]
    else:
        unit = np.tile(np.eye(shape[1], dtype=np.float32), shape[2]).reshape(1, shape[1], shape[2], shape[1])
    arrays = {**p.arrays, maps: unit, weights: np.ones_like(p.arrays[weights])}
    if "sampling_locations" in arrays:  # what lies outside by less than a pixel has a share, but is not read
        arrays["sampling_locations"] = np.clip(arrays["sampling_locations"], 0.01, 0.99)
    p = p._replace(arrays=arrays)
    shares, read = p.forward().reshape(-1, unit.shape[-1] // groups), bench.reading_call(p)()
    assert read.any()
    assert (shares[read > 0] > 0).all()
    assert name.startswith("dcn") or (read[shares > 0] > 0).all()


def test_a_run(small, capsys):
    assert bench.bench.main(["--threads", "1", "--rounds", "1", "--problems", "rf-detr,sparse4d,dcnv3 7"]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(results) == ["rf-detr", "sparse4d", "dcnv3 7"]
    table = bench.bench.report(results).splitlines()
    assert len(table) == 4 and "ours/loop" in table[0]
    assert bench.ratios(results["sparse4d"]["times"])["ours/reading"] > 0
    assert ("grid_sample/ours, repeated" in bench.ratios(results["dcnv3 7"]["times"])) == bench.installed("torch")


def test_what_computes_something_else_is_not_timed(small, monkeypatch):
    made = bench.loop_call
    monkeypatch.setattr(bench, "loop_call", lambda p: lambda: made(p)() + 1)
    with pytest.raises(SystemExit, match="rf-detr: loop differs"):
        bench.measure("rf-detr", 1, 1)
