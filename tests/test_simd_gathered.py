"""The primitives that sum, scatter and multiply samples by where their corners are, at every vector width."""

import ctypes
import functools

import numpy as np
import pytest
from numba import njit

from pydeform.cpu.core.gathered import Corners, Runs, place_in, starts_of, steps_to
from pydeform.cpu.core.jit import Kernel, inline
from pydeform.cpu.core.simd import VECTOR_BYTES, at
from pydeform.cpu.core.vector import lanes_of, load, store
from tests.codegen import primitives

WIDTHS = {width: primitives(width) for width in (0, 16, 32, 64)}
TOLERANCE = {"float32": 1e-5, "float64": 1e-13}
SAMPLES, PIXELS, ENTRY = 21, 5, 3  # of the tables' entries the first three are others
ONE = Runs(1, 0, 0, 0, 0)


@njit
def between(array, other):
    return steps_to(at(array, (0, 0)), at(other, (0, 0)))


@njit
def place(entry, like, axes):
    return place_in(entry, at(like, (0, 0)), axes)


class Problem:
    """Samples in the tables as the kernels write them; their channels 1 to channels + 1 are meant."""

    def __init__(self, dtype, axes, channels, listed):
        rng = np.random.default_rng(channels)
        self.axes, self.channels, self.corners = axes, channels, 2 ** len(axes)
        self.image = rng.standard_normal((PIXELS, channels + 3)).astype(dtype)
        self.pixels = rng.integers(0, PIXELS, (self.corners, SAMPLES))
        self.shares = rng.standard_normal((self.corners, SAMPLES)).astype(dtype)
        self.weights = rng.standard_normal((SAMPLES, 2)).astype(dtype)
        self.listed = np.array([0, 4, 17, 20]) if listed else None
        lanes = VECTOR_BYTES // dtype.itemsize
        row = -(-(SAMPLES + ENTRY) // lanes) * lanes
        self.starts, self.table = np.zeros(self.corners * row, np.int64), np.full(self.corners * row, np.nan, dtype)
        for i, s in enumerate(self.numbers):
            for k in range(self.corners):
                to = place(ENTRY + i, self.image, axes) + k * lanes
                self.starts[to] = self.image.shape[1] * self.pixels[k, s]
                self.table[to] = self.shares[k, s]

    @property
    def numbers(self):
        """Those of the samples that the tables have."""
        return np.arange(SAMPLES) if self.listed is None else self.listed

    def arguments(self):
        return self.image, self.starts, self.table, self.axes, self.listed, self.numbers.size, self.channels

    def samples(self):
        """(sample, channel), in float64."""
        found = np.zeros((self.numbers.size, self.channels))
        for i, s in enumerate(self.numbers):
            for k in range(self.corners):
                found[i] += float(self.shares[k, s]) * self.image[self.pixels[k, s], 1 : 1 + self.channels]
        return found


@pytest.fixture(params=WIDTHS, ids="{}-byte".format)
def width(request):
    return request.param


@pytest.fixture(params=("float32", "float64"))
def dtype(request):
    return np.dtype(request.param)


@pytest.fixture(params=[((), False, 5), ((0, 0), False, 1), ((0, 0), True, 40), ((0, 0), False, 131), ((), True, 70)])
def problem(request, dtype):
    axes, listed, channels = request.param
    return Problem(dtype, axes, channels, listed)


@functools.cache
def runs(width):
    p = WIDTHS[width]
    sum_samples, scatter_samples, corner_dots = p.sum_samples, p.scatter_samples, p.corner_dots

    @inline
    def corners(image, starts, table, listed):
        maps, places, shares = at(image, (0, 0)), at(starts, (0,)), at(table, (0,))
        if listed is None:
            return Corners(maps, places, shares, ENTRY, 1, None)
        return Corners(maps, places, shares, ENTRY, 1, at(listed, (0,)))

    @njit
    def sums(out, weights, image, starts, table, axes, listed, count, channels, apart=ONE):
        samples = corners(image, starts, table, listed)
        sum_samples(at(out, (1,)), samples, apart, axes, at(weights, (0, 0)), 2, count, channels)

    @njit
    def scatters(grad, weights, image, starts, table, axes, listed, count, channels, apart=ONE):
        samples = corners(image, starts, table, listed)
        scatter_samples(at(grad, (1,)), samples, apart, axes, at(weights, (0, 0)), 2, count, channels)

    @njit
    def dots(out, grad, image, starts, table, axes, listed, count, channels, apart=ONE):
        samples, own = corners(image, starts, table, listed), out.shape[1]
        corner_dots(at(out, (0, 0)), own, at(grad, (1,)), samples, apart, axes, count, channels)

    return sums, scatters, dots


def close(got, want, dtype):
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE[dtype.name] * max(1, np.abs(want).max()))


def test_sums(width, dtype, problem):
    out = np.full(problem.channels + 2, 7, dtype)
    runs(width)[0](out, problem.weights, *problem.arguments())
    assert out[0] == out[-1] == 7  # those of other groups
    close(out[1:-1], problem.weights[problem.numbers, 0].astype(float) @ problem.samples(), dtype)


# Two runs, of the same samples or of others, in channels of their own or in the same.
RUNS = pytest.mark.parametrize(
    "axes, listed, channels, entries, pixels",
    [
        (axes, False, channels, entries, pixels)
        for axes, channels in (((), 5), ((0, 0), 19), ((0, 0), 50), ((0, 0), 64))
        for entries, pixels in ((0, True), (5, True), (5, False))
    ]
    + [((0, 0), True, 50, 0, True)],  # samples are left out where all runs share them
)


class TwoRuns:
    """Of 3 samples: of the same, or of those `entries` on; each has its own part of a result, and of pixels if
    `pixels`."""

    def __init__(self, dtype, axes, listed, channels, entries, pixels):
        self.problem = problem = Problem(dtype, axes, 2 * channels, listed)
        self.apart = Runs(2, entries, channels * pixels, channels, 1)
        self.arguments = (*problem.arguments()[:-2], 3, channels, self.apart)
        self.results = [slice(1 + channels * run, 1 + channels * (run + 1)) for run in range(2)]
        self.pixels = [slice(1 + channels * run * pixels, 1 + channels * (run * pixels + 1)) for run in range(2)]
        self.numbers = [problem.numbers[entries * run : entries * run + 3] for run in range(2)]
        self.weights = [problem.weights[problem.numbers[:3], run].astype(float) for run in range(2)]

    def terms(self):
        """(run, pixel, weight times share) of each corner of each sample."""
        for run in range(2):
            for weight, s in zip(self.weights[run], self.numbers[run], strict=True):
                for k in range(self.problem.corners):
                    yield run, self.problem.pixels[k, s], weight * float(self.problem.shares[k, s])


@RUNS
def test_sums_of_runs(width, dtype, axes, listed, channels, entries, pixels):
    two = TwoRuns(dtype, axes, listed, channels, entries, pixels)
    problem, out = two.problem, np.full(2 * channels + 2, 7, dtype)
    want = np.zeros(2 * channels + 2)
    for run, pixel, scale in two.terms():
        want[two.results[run]] += scale * problem.image[pixel, two.pixels[run]].astype(float)
    runs(width)[0](out, problem.weights, *two.arguments)
    assert out[0] == out[-1] == 7
    close(out[1:-1], want[1:-1], dtype)


@RUNS
def test_scattered_sums_of_runs(width, dtype, axes, listed, channels, entries, pixels):
    two = TwoRuns(dtype, axes, listed, channels, entries, pixels)
    problem, grad = two.problem, np.arange(2 * channels + 2).astype(dtype) % 5 - 2
    want = problem.image.astype(float)
    for run, pixel, scale in two.terms():
        want[pixel, two.pixels[run]] += scale * grad[two.results[run]]
    runs(width)[1](grad, problem.weights, *two.arguments)
    close(problem.image, want, dtype)


@RUNS
def test_dots_of_runs(width, dtype, axes, listed, channels, entries, pixels):
    two = TwoRuns(dtype, axes, listed, channels, entries, pixels)
    problem, grad = two.problem, np.arange(2 * channels + 2).astype(dtype) % 5 - 2
    out = np.full((2, 3 * problem.corners), np.nan, dtype)
    runs(width)[2](out, grad, *two.arguments)
    for run in range(2):
        read = problem.image[problem.pixels[:, two.numbers[run]].T, two.pixels[run]].astype(float)
        close(out[run].reshape(3, -1), read @ grad[two.results[run]].astype(float), dtype)


def test_scattered_sums(width, dtype, problem):
    grad = np.arange(problem.channels + 2).astype(dtype) % 5 - 2
    before = problem.image.astype(float)
    for s in problem.numbers:
        for k in range(problem.corners):
            scale = float(problem.weights[s, 0]) * float(problem.shares[k, s])
            before[problem.pixels[k, s], 1 : 1 + problem.channels] += scale * grad[1:-1]
    beside = problem.image[:, [0, -2, -1]].copy()
    runs(width)[1](grad, problem.weights, *problem.arguments())
    assert (problem.image[:, [0, -2, -1]] == beside).all()
    close(problem.image, before, dtype)


def test_dots(width, dtype, problem):
    """Whatever is there before; what lies behind the last stays."""
    grad = np.arange(problem.channels + 2).astype(dtype) % 5 - 2
    out = np.full((problem.numbers.size + 1, problem.corners), np.nan, dtype)
    out[-1] = 7
    pixels = problem.image[problem.pixels[:, problem.numbers].T, 1 : 1 + problem.channels].astype(float)
    runs(width)[2](out.reshape(1, -1), grad, *problem.arguments())
    close(out[:-1], pixels @ grad[1:-1].astype(float), dtype)
    assert (out[-1] == 7).all()


def test_what_lies_beyond_the_channels_is_not_read(width, dtype):
    """An infinity there would be NaN, times 0."""
    problem = Problem(dtype, (0, 0), 19, False)
    problem.image[:, [0, -2, -1]] = np.inf
    grad, out = np.ones(21, dtype), np.zeros((SAMPLES, 4), dtype)
    grad[[0, -1]] = np.inf
    total = np.zeros(21, dtype)
    runs(width)[0](total, problem.weights, *problem.arguments())
    runs(width)[2](out.reshape(1, -1), grad, *problem.arguments())
    assert np.isfinite(out).all() and np.isfinite(total).all()


@pytest.mark.parametrize("steps", [0, 3, -3, 2**40])
def test_steps_between_arrays(dtype, steps):
    """Of arrays anywhere in memory: here the other is said to begin so many numbers beyond."""
    array = np.zeros((2, 2), dtype)
    place = array.ctypes.data + steps * dtype.itemsize
    other = np.ctypeslib.as_array(ctypes.cast(place, ctypes.POINTER(np.ctypeslib.as_ctypes_type(dtype))), (1, 1))
    assert between(array, other) == steps


@pytest.mark.parametrize("channels", [0, 1, 768, 2**31 - 1])
def test_where_pixels_start(channels):
    def kernel(pixels, channels, out):
        for i in range(0, pixels.size, lanes_of(at(pixels, (0,)))):
            store(starts_of(load(at(pixels, (i,))), channels[0]), at(out, (i,)))

    ends = np.iinfo(np.int32)
    pixels = np.random.default_rng(0).integers(ends.min, ends.max, 64, np.int32, endpoint=True)
    pixels[:4] = ends.min, ends.max, -1, 0
    out = np.zeros(64, np.int64)
    arguments = pixels, np.array([channels]), out
    Kernel(kernel).prepare("", arguments)(*arguments)
    np.testing.assert_array_equal(out, pixels.astype(np.int64) * channels)
