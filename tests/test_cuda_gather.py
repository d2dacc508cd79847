"""The input's gradient without float atomics, on the emulated device: sorting samples into bins, and gathering them."""

from __future__ import annotations

import importlib
import itertools
import sys
from typing import Any, NamedTuple

import numpy as np
import pytest

from pydeform._geometry import BOUNDARIES, ConvGeometry
from pydeform.cuda.core.source import FOLDER, Code, source
from tests import conftest
from tests.cases.deform_conv2d import dtype_of
from tests.conftest import TOLERANCE, assert_same_bits
from tests.cuda_emulation import device
from tests.reference.deform_conv2d import sample

SCHEDULES = (0, 1, 5, 23)


@pytest.fixture(autouse=True)
def gather(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module under test, on the emulated device."""
    if "emulated" not in conftest._kinds():
        pytest.skip("the tests of this session do not run on the emulated device")
    for module in device.stand_ins.values():
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return importlib.import_module("pydeform.cuda.conv.gather")


class Problem(NamedTuple):
    g: ConvGeometry
    columns: np.ndarray  # (taps, N * P, channels), of all output pixels and taps
    offset: np.ndarray  # (N, offset_groups, taps, 2, P)
    mask: np.ndarray | None  # (N, offset_groups, taps, P)

    @property
    def taps(self) -> int:
        return self.columns.shape[0]

    def points(self) -> np.ndarray:
        """(N, offset_groups, taps, P, 2) sampling points (y, x)."""
        g = self.g
        oy, ox = np.divmod(np.arange(g.out_size[0] * g.out_size[1]), g.out_size[1])
        ky, kx = np.divmod(np.arange(self.taps), g.kernel[1])
        y = oy * g.stride[0] - g.pad[0] + ky[:, None] * g.dilation[0]
        x = ox * g.stride[1] - g.pad[1] + kx[:, None] * g.dilation[1]
        return np.moveaxis(self.offset.astype(np.float64), 3, 4) + np.stack([y, x], -1)

    def accumulator(self) -> np.ndarray:
        shape = (self.g.batch, self.g.in_size[0] * self.g.in_size[1], self.columns.shape[2])
        return np.random.default_rng(17).integers(-9, 9, shape).astype(self.columns.dtype)


def problem(
    dtype: str = "float32",
    *,
    batch: int = 2,
    size: tuple[int, int] = (4, 5),
    out: tuple[int, int] = (5, 3),
    kernel: tuple[int, int] = (2, 3),
    offset_groups: int = 2,
    channels: int = 6,
    mask: bool = True,
    boundary: str = "torchvision",
) -> Problem:
    """Values that every dtype has exactly, samples all over the image and around it."""
    rng = np.random.default_rng(3)
    g = ConvGeometry(
        *(batch, channels, 1, 1, offset_groups, BOUNDARIES.index(boundary), size, out, kernel, (1, 2), (1, 1), (2, 1))
    )
    taps, pixels = kernel[0] * kernel[1], out[0] * out[1]
    storage, sums = dtype_of(dtype), np.float64 if dtype == "float64" else np.float32
    columns = rng.integers(-64, 65, (taps, batch * pixels, channels)) / 32
    masks = rng.integers(-8, 9, (batch, offset_groups, taps, pixels)) / 8
    offset = rng.integers(-20, 21, (batch, offset_groups, taps, 2, pixels)) / 8
    return Problem(g, columns.astype(sums), offset.astype(storage), masks.astype(storage) if mask else None)


def expected(p: Problem) -> np.ndarray:
    """Eq. 5, one sample at a time."""
    g = p.g
    result = p.accumulator().astype(np.float64)
    width = p.columns.shape[2] // g.offset_groups
    image = np.zeros((g.in_size[0], g.in_size[1]))
    for b, og, tap, pixel in np.ndindex(p.points().shape[:4]):
        m = 1.0 if p.mask is None else float(p.mask[b, og, tap, pixel])
        part = slice(og * width, (og + 1) * width)
        y, x = p.points()[b, og, tap, pixel]
        for row, column, share in sample(image, y, x, BOUNDARIES[g.boundary]).pixels:
            gradient = p.columns[tap, b * g.out_size[0] * g.out_size[1] + pixel, part]
            result[b, row * g.in_size[1] + column, part] += m * share * gradient
    return result


def run(gather: Any, p: Problem, chunks: Any = None) -> np.ndarray:
    """The accumulator after these chunks (first, count, tap0, taps); None: all in one."""
    everything = p.columns.shape[1]
    offset, mask, sums = (None if a is None else device.cupy.asarray(a) for a in (p.offset, p.mask, p.accumulator()))
    for first, count, tap0, taps in chunks or [(0, everything, 0, p.taps)]:
        part = np.ascontiguousarray(p.columns[tap0 : tap0 + taps, first : first + count])
        columns = device.cupy.asarray(part)
        gather.accumulate(Code("conv"), columns, offset, mask, sums, p.g, p.columns.shape[2], first, count, tap0, taps)
    return sums.get()


def assert_is_the_oracles(got: np.ndarray, p: Problem) -> None:
    want, tolerance = expected(p), TOLERANCE["float64" if p.offset.dtype == np.float64 else "float32"]
    atol = tolerance.of_largest * np.abs(want).max()
    np.testing.assert_allclose(got.astype(np.float64), want, rtol=tolerance.relative, atol=atol)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_against_the_oracle_in_the_check_build(gather, dtype, boundary):
    p = problem(dtype, boundary=boundary, mask=dtype != "float64")
    with device.settings(check=True):
        assert_is_the_oracles(run(gather, p), p)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_samples_on_every_border(gather, boundary):
    """Every multiple of 1/2 from two pixels before the image to two past it."""
    points = np.array(list(itertools.product(np.arange(-2, 6.5, 0.5), np.arange(-2, 5.5, 0.5))))
    p = problem(batch=1, size=(4, 3), out=(17, 15), kernel=(1, 1), offset_groups=1, channels=3, boundary=boundary)
    p = p._replace(offset=(p.offset + points.T - p.points()[0, 0, 0].T).astype(np.float32))
    np.testing.assert_array_equal(p.points()[0, 0, 0], points)
    assert_is_the_oracles(run(gather, p), p)


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_samples_that_are_nowhere(gather, dtype):
    p = problem(dtype)
    flat = p.offset.reshape(-1, 2, 15)
    flat[0, 0, 3] = flat[3, 1, 0] = np.nan
    flat[1, 0, 2] = flat[5, 0, 14] = np.inf
    flat[2, 1, 7] = -np.inf
    flat[4, :, 1] = np.nan, np.inf
    flat[6, :, 2] = np.finfo(p.offset.dtype).max
    with device.settings(check=True):
        got = run(gather, p)
    assert np.isfinite(got).all()
    assert_is_the_oracles(got, p)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_an_infinite_gradient_stays_at_its_pixels(gather, boundary):
    """A pixel that gave weight 0 to samples of other cells would turn NaN."""
    p = problem(batch=1, channels=2, boundary=boundary)
    p = p._replace(offset=p.offset + np.float32(1 / 16))  # no corner has weight 0
    for pixel in range(p.columns.shape[1]):
        one = p._replace(columns=np.zeros_like(p.columns))
        one.columns[0, pixel] = np.inf
        with np.errstate(invalid="ignore"):  # a mask of 0
            np.testing.assert_array_equal(np.isfinite(run(gather, one)), np.isfinite(expected(one)))


def test_no_sample_at_all(gather):
    p = problem()
    p = p._replace(offset=np.full_like(p.offset, np.nan))
    assert_same_bits(run(gather, p), p.accumulator())


def test_all_samples_in_one_cell(gather):
    """Bins too long for insertion, and their neighbours empty; unsorted ids would give other bits."""
    p = problem(batch=1, out=(9, 7), kernel=(2, 2), offset_groups=1)
    inside = np.random.default_rng(1).integers(1, 8, p.offset.shape) / 8 + [[1], [2]]
    p = p._replace(offset=(inside - np.moveaxis(problem_origin(p), -1, -2)).astype(np.float32))
    assert (np.floor(p.points()) == [1, 2]).all()
    assert 9 * 7 * 4 > 4 * gather_short_bin()
    results = []
    for schedule in SCHEDULES:
        with device.settings(schedule=schedule, check=schedule == 1):
            results.append(run(gather, p))
    assert_is_the_oracles(results[0], p)
    for result in results[1:]:
        assert_same_bits(result, results[0])


def problem_origin(p: Problem) -> np.ndarray:
    """Where each sample would be without its offset."""
    return p._replace(offset=np.zeros_like(p.offset)).points()


def gather_short_bin() -> int:
    return int(source(Code("conv")).partition("constexpr int SHORT_BIN = ")[2].partition(";")[0])


@pytest.mark.parametrize("length", [31, 32, 33, 34, 100, 257])
def test_bins_of_many_lengths_are_sorted(gather, length):
    """Directly: ids in an order that no schedule would give."""
    rng = np.random.default_rng(length)
    lengths = np.array([0, length, 1, 2, 0, length - 1, 3])
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    patterns = (
        lambda n: rng.permutation(n),
        lambda n: np.arange(n)[::-1],
        lambda n: np.arange(n),
        lambda n: np.arange(n) * 7 % max(n, 1),
    )
    for pattern in patterns:
        host = np.concatenate([pattern(n) for n in lengths]).astype(np.int32)
        ids = device.cupy.asarray(host)
        arguments = (device.cupy.asarray(starts), ids, np.int32(len(lengths)))
        gather._launch(Code("conv"), "sort_bins<int>", len(lengths), arguments)
        parts = np.split(host, starts[1:-1])
        np.testing.assert_array_equal(ids.get(), np.concatenate([np.sort(part) for part in parts]))


def test_no_schedule_and_no_index_type_shows(gather, monkeypatch):
    p = problem(size=(2, 3))
    results = []
    for schedule in SCHEDULES:
        with device.settings(schedule=schedule):
            results.append(run(gather, p))
    monkeypatch.setattr(gather, "index_type", lambda *sizes: "long long")
    with device.settings(check=True):
        results.append(run(gather, p))
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("channels", [2, 66, 280])
def test_more_channels_than_a_warp_holds(gather, channels):
    p = problem(batch=1, size=(2, 3), out=(3, 2), channels=channels)
    with device.settings(check=True):
        assert_is_the_oracles(run(gather, p), p)


def test_chunks_begin_and_end_anywhere(gather):
    """In the middle of images and of the taps; images that a chunk does not touch keep their bits."""
    p = problem(batch=3)
    parts = [(0, 7, 0, 6), (7, 25, 0, 2), (7, 25, 2, 4), (32, 13, 0, 6)]
    assert_is_the_oracles(run(gather, p, parts), p)
    before, after = p.accumulator(), run(gather, p, [(16, 9, 1, 3)])
    assert_same_bits(after[[0, 2]], before[[0, 2]])
    assert (after[1] != before[1]).any()


def test_lanes_read_side_by_side(gather):
    """No more sectors of the columns than the bytes fill; 32 channels for each offset group are one request."""
    p = problem(batch=1, channels=64)
    with device.settings(profile=True) as counted:
        run(gather, p)
    lines = (FOLDER / "conv" / "gather.cuh").read_text().splitlines()
    (line,) = [number for number, text in enumerate(lines, 1) if "sum[r] += factor" in text]
    reads = counted.counters()[f"conv/gather.cuh:{line}", "read", "global"]
    assert reads.requests > 100
    assert reads.sectors == reads.least_sectors == 4 * reads.requests
