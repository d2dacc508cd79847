"""The SIMD primitives of RoI pooling at every vector width, against NumPy, on pointers that are not aligned."""

import ctypes
import functools
import mmap

import numpy as np
import pytest
from numba import njit, typeof

from pydeform.cpu.core import bands, simd
from pydeform.cpu.core.bands import BAND, Band, Points, Slots
from pydeform.cpu.core.jit import Kernel
from pydeform.cpu.core.simd import at
from pydeform.cpu.core.weighted import Pixels
from tests.codegen import primitives

WIDTHS = {width: primitives(width) for width in (0, 16, 32, 64)}
TOLERANCE = {"float32": 2e-6, "float64": 1e-14}


@pytest.fixture(params=WIDTHS, ids="{}-byte".format)
def width(request):
    return request.param


@pytest.fixture(params=("float32", "float64"))
def dtype(request):
    return np.dtype(request.param)


def lanes_of(width, dtype):
    return max(width // dtype.itemsize, 1)


def a_list(rng, dtype, count, pixels):
    """Places with repetitions, and three rows of weights."""
    return rng.integers(0, pixels, count).astype(np.int32), rng.standard_normal((3, count)).astype(dtype)


def close(got, want, dtype):
    np.testing.assert_allclose(got, want, rtol=0, atol=50 * TOLERANCE[dtype.name])


def test_module_exports_the_width_of_this_machine():
    assert simd.VECTOR_BYTES in WIDTHS


@functools.cache
def runs_weighted_sum(width):
    weighted_sum = WIDTHS[width].weighted_sum

    @njit
    def run(out, image, index, weights, count, vectors, scale, accumulate):
        stride = image.shape[1]
        listed = Pixels(at(image, (0, 1)), at(index, (0,)), at(weights, (0, 0)), count, stride)
        weighted_sum(at(out, (1,)), listed, vectors, scale, accumulate)

    return run


@pytest.mark.parametrize("vectors", [1, 7, 8, 21])
@pytest.mark.parametrize("count", [0, 5])
def test_weighted_sum(width, dtype, vectors, count):
    run = runs_weighted_sum(width)
    rng = np.random.default_rng(vectors)
    stride = vectors * lanes_of(width, dtype) + 3
    image, out = rng.standard_normal((6, stride)).astype(dtype), rng.standard_normal(stride).astype(dtype)
    index, weights = a_list(rng, dtype, count, 6)
    for accumulate in (False, True):
        want, n = out.astype(np.float64), vectors * lanes_of(width, dtype)
        total = sum((float(w) * image[i, 1 : 1 + n].astype(float) for i, w in zip(index, weights[0], strict=True)), 0.0)
        want[1 : 1 + n] = (total + (want[1 : 1 + n] if accumulate else 0)) * 0.25
        run(
            out,
            image,
            np.append(index, 0),
            np.pad(weights, ((0, 0), (0, 1))),
            count,
            vectors,
            dtype.type(0.25),
            accumulate,
        )
        close(out, want, dtype)


@functools.cache
def runs_weighted_dots(width):
    weighted_dots = WIDTHS[width].weighted_dots

    @njit
    def run(grad, image, index, w, vectors):
        weights = at(w, (0, 0)), at(w, (1, 0)), at(w, (2, 0))
        listed = Pixels(at(image, (0, 1)), at(index, (0,)), weights, index.shape[0], image.shape[1])
        return weighted_dots(at(grad, (1,)), listed, vectors)

    return run


@pytest.mark.parametrize("vectors", [1, 2, 5])
def test_weighted_dots(width, dtype, vectors):
    run = runs_weighted_dots(width)
    rng = np.random.default_rng(vectors)
    n = vectors * lanes_of(width, dtype)
    image, grad = rng.standard_normal((6, n + 1)).astype(dtype), rng.standard_normal(n + 2).astype(dtype)
    index, weights = a_list(rng, dtype, 7, 6)
    want = weights.astype(float) @ image[index, 1 : 1 + n].astype(float) @ grad[1 : 1 + n].astype(float)
    close(run(grad, image, index, weights, vectors), want, dtype)


@pytest.mark.parametrize("vectors", [3, 8])
def test_scatter_is_the_transpose_of_the_sum(width, dtype, vectors):
    scatter = WIDTHS[width].scatter
    rng = np.random.default_rng(vectors)
    n = vectors * lanes_of(width, dtype)
    image, grad = rng.standard_normal((6, n + 3)).astype(dtype), rng.standard_normal(n + 2).astype(dtype)
    index, weights = a_list(rng, dtype, 7, 6)
    want = image.astype(np.float64)
    for i, w in zip(index, weights[0], strict=True):  # places repeat
        want[i, 1 : 1 + n] += float(w) * 0.5 * grad[1 : 1 + n].astype(float)

    @njit
    def run(grad, image, index, weights, vectors, scale):
        scatter(
            *(at(grad, (1,)), at(image, (0, 1)), at(index, (0,)), at(weights, (0, 0))),
            *(index.shape[0], image.shape[1], vectors, scale),
        )

    run(grad, image, index, weights, vectors, dtype.type(0.5))
    close(image, want, dtype)


def test_a_lane_for_itself_has_the_bits_of_a_vector(dtype):
    """Planes and copies with channels last are two ways to the same result."""
    rng = np.random.default_rng(1)
    channels = 64 // dtype.itemsize
    image = rng.standard_normal((9, channels)).astype(dtype)
    index, weights = a_list(rng, dtype, 12, 9)
    grad = rng.standard_normal(channels).astype(dtype)

    def both(width):
        weighted_sum, scatter = WIDTHS[width].weighted_sum, WIDTHS[width].scatter
        vectors, times = (1, channels) if width == 0 else (channels * dtype.itemsize // width, 1)

        @njit
        def run(out, target, grad, image, index, weights, scale):
            for c in range(times):
                listed = Pixels(at(image, (0, c)), at(index, (0,)), at(weights, (0, 0)), index.shape[0], image.shape[1])
                weighted_sum(at(out, (c,)), listed, vectors, scale, False)
                scatter(
                    *(at(grad, (c,)), at(target, (0, c)), at(index, (0,)), at(weights, (0, 0))),
                    *(index.shape[0], image.shape[1], vectors, scale),
                )

        out, target = np.zeros(channels, dtype), image.copy()
        run(out, target, grad, image, index, weights, dtype.type(1 / 3))
        return out.tobytes(), target.tobytes()

    assert both(0) == both(16) == both(32) == both(64)


@pytest.mark.parametrize("accumulate", [False, True])
def test_largest_pixel(width, dtype, accumulate):
    """The first of equal values, and NaN over all: the first NaN."""
    largest = WIDTHS[width].largest_pixel
    n = 2 * lanes_of(width, dtype)
    rng = np.random.default_rng(4)
    image = rng.integers(-2, 3, (6, n)).astype(dtype)
    image[2, 0] = image[4, 0] = np.nan
    image[:, -1] = -np.inf
    index = np.array([3, 0, 2, 5, 4], np.int32)
    out, winner = np.full(n, 1, dtype), np.full(n, 7, f"i{dtype.itemsize}")

    @njit
    def run(out, winner, image, index, accumulate):
        listed = Pixels(at(image, (0, 0)), at(index, (0,)), at(out, (0,)), index.shape[0], image.shape[1])
        largest(at(out, (0,)), at(winner, (0,)), listed, 2, 10, accumulate)

    want, want_winner = out.copy(), winner.copy()
    for c in range(n):
        best, number = (out[c], 7) if accumulate else (image[index[0], c], 10)
        for i, place in enumerate(index):
            value = image[place, c]
            if not np.isnan(best) and (np.isnan(value) or value > best):
                best, number = value, 10 + i
        want[c], want_winner[c] = best, number
    run(out, winner, image, index, accumulate)
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(winner, want_winner)


def test_largest_point(width, dtype):
    """Four weighted pixels make a value; a negative place stands for the value 0, whatever lies there."""
    largest = WIDTHS[width].largest_point
    n = lanes_of(width, dtype)
    rng = np.random.default_rng(5)
    image = rng.standard_normal((6, n)).astype(dtype) - dtype.type(3)
    image[0] = np.nan
    index = rng.integers(1, 6, (4, 4)).astype(np.int32)
    index[2] = -1
    weights = rng.uniform(0, 1, (4, 4)).astype(dtype)
    weights[1] = 0.01
    out, winner = np.zeros(n, dtype), np.zeros(n, f"i{dtype.itemsize}")

    @njit
    def run(out, winner, image, index, weights, count):
        listed = Pixels(at(image, (0, 0)), at(index, (0, 0)), at(weights, (0, 0)), count, image.shape[1])
        largest(at(out, (0,)), at(winner, (0,)), listed, 1, 0, False)

    run(out, winner, image, index, weights, 4)
    assert (out == 0).all() and (winner == 2).all()
    run(out, winner, image, index, weights, 2)
    values = np.einsum("ik,ikc->ic", weights[:2], image[index[:2]])
    close(out, values.max(axis=0), dtype)
    np.testing.assert_array_equal(winner, values.argmax(axis=0))


def last_of_a_page(values):
    """A copy that ends where a page does, behind which lies one that nobody may touch."""
    size = -(-values.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, size + mmap.PAGESIZE)
    address = np.frombuffer(pages, np.uint8).ctypes.data
    protect = ctypes.CDLL(None).mprotect
    protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    assert protect(address + size, mmap.PAGESIZE, 0) == 0
    copy = np.frombuffer(pages, values.dtype, len(values), offset=size - values.nbytes)
    copy[:] = values
    return copy


# Bands ----------------------------------------------------------------------------------------------------------------


def lists_by_hand(starts, sizes, samples, first_point, reach, highest, count_inside, flat):
    """What `band_lists` says, point by point, in the dtype of `starts`: weights and slopes by pixel."""
    real = starts.dtype.type
    for start, size in zip(starts, sizes, strict=True):
        points = real(samples or np.ceil(size))
        weights, slopes, inside = {}, {}, 0
        for i in range(int(points)):
            y = start + (real(i) + real(first_point)) * size / points
            if not -reach <= y <= highest + reach:
                continue
            inside += 1
            place = min(max(y, real(0)), real(highest))
            lower = int(place)
            moves = not (y <= 0 or y >= highest or (flat and place == lower))
            upper = lower + (lower < highest and not (flat and place == lower))
            for pixel, weight, slope in ((lower, 1 - (place - lower), -moves), (upper, place - lower, moves)):
                weights[pixel] = weights.get(pixel, 0) + weight * (pixel == lower or upper > lower)
                slopes[pixel] = slopes.get(pixel, 0) + slope
        yield weights, slopes, inside if count_inside else points


def run_band_lists(arrays, bins, numbers, count_inside, flat, sloped):
    found = np.zeros(1, bool)
    run_kernel(_band_lists, *arrays, bins, numbers, count_inside, flat, sloped, found)
    return found[0]


def run_kernel(kernel, *arguments):
    kernel.prepare(tuple(map(typeof, arguments)), arguments)(*arguments)


@Kernel
def _band_lists(starts, sizes, index, weights, entries, counts, bins, numbers, count_inside, flat, sloped, found):
    slots = Slots(
        *(at(starts, (0,)), at(sizes, (0,)), at(index, (0, 0)), at(weights, (0, 0, 0)), at(entries, (0,))),
        *(at(counts, (0,)), index.shape[1]),
    )
    points = Points(numbers[0], numbers[1], numbers[2], numbers[3], count_inside, flat, sloped)
    found[0] = bands.band_lists(slots, bins, points)


@pytest.mark.parametrize("index_type", ["int32", "int64"])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("samples", [0, 1, 4, 8])
def test_band_lists(dtype, samples, flat, index_type):
    """Bins in the middle, over either end, outside, and at pixels."""
    first_point, reach, highest = (0.0, 0.5, 9) if flat else (0.5, 1.0, 9)
    starts = np.array([0.3, 1.5, -1.75, 7.6, -3, 11, 4.25, 8], dtype)
    sizes = np.array([0.7, 2, 3.5, 4, 1.5, 1, 0, 2.75], dtype)
    if samples:
        sizes = np.minimum(sizes, samples)
    row = 11
    numbers = tuple(map(dtype.type, (samples, first_point, reach, highest)))
    for count_inside in (False, True):
        index, weights = np.full((BAND, row), -7, index_type), np.full((BAND, 2, row), 7, dtype)
        entries, counts = np.zeros(BAND, np.int64), np.zeros(BAND, dtype)
        arrays = starts, sizes, index, weights, entries, counts
        assert run_band_lists(arrays, BAND, numbers, count_inside, flat, False)
        assert (weights[:, 1] == 7).all()
        assert run_band_lists(arrays, BAND, numbers, count_inside, flat, True)
        assert (weights[:, :, BAND:] == 7).all() and (index[:, BAND:] == -7).all()
        by_hand = lists_by_hand(starts, sizes, samples, first_point, reach, highest, count_inside, flat)
        for s, (wanted, slopes, count) in enumerate(by_hand):
            n = entries[s]
            pixels = range(index[s, 0], index[s, 0] + n)
            assert n == (max(wanted) - min(wanted) + 1 if wanted else 0)
            assert counts[s] == count
            np.testing.assert_array_equal(index[s, :n], pixels)
            close(weights[s, 0, :n], [wanted.get(pixel, 0) for pixel in pixels], dtype)
            np.testing.assert_array_equal(weights[s, 1, :n], [slopes.get(pixel, 0) for pixel in pixels])


def test_bins_that_band_lists_leaves_to_others(dtype):
    """One that is too long, one whose points leave pixels out, one in descending order, and one of many points; beyond
    the bins that were asked for it does not matter what there is."""
    starts = np.array([1, 1, 5, 2, 1, 1, 1, 1], dtype)
    sizes = np.array([2, 8.5, -1, 4.5, 3, 2, np.nan, -np.inf], dtype)
    index, weights = np.zeros((BAND, 8), np.int32), np.zeros((BAND, 2, 8), dtype)
    entries, counts = np.zeros(BAND, np.int64), np.zeros(BAND, dtype)
    arrays = starts, sizes, index, weights, entries, counts

    def listed(arrays, bins, samples):
        numbers = tuple(map(dtype.type, (samples, 0, 0, 30)))
        return run_band_lists(arrays, bins, numbers, False, False, False)

    assert not listed(arrays, 6, 0)
    np.testing.assert_array_equal(entries[:6] < 0, [False, True, True, False, False, False])
    assert not listed(arrays, 6, 4)
    np.testing.assert_array_equal(entries[:6] < 0, [False, True, True, True, False, False])
    good = [0, 0, 4, 4, 5, 5, 6, 7]
    arrays = starts[good], sizes[good], *arrays[2:]
    assert listed(arrays, 6, 4)
    assert not listed(arrays, 7, 4)
    assert not listed(arrays, 6, 9)


@Kernel
def _bands(plane, x0, width, rows, y, x, columns, room, grad, found):
    band = Band(at(plane, (x0,)), at(rows, (0,)), rows.shape[0], width, room, columns)
    dots = bands.band_dots(band, at(y, (0, 0)), at(y, (1, 0)), at(x, (0, 0)), at(x, (1, 0)))
    found[0], found[1], found[2] = dots
    found[3] = bands.band_sum(band, at(y, (0, 0)), at(x, (0, 0)))
    bands.band_scatter(band, at(y, (0, 0)), at(x, (0, 0)), grad)


@pytest.mark.parametrize("end", ["plane", "page"])
@pytest.mark.parametrize("columns", range(1, BAND + 1))
def test_bands(dtype, columns, end):
    """Beyond the last column NaN changes nothing and is not written to. Where the plane ends it is not even read:
    behind the last number of "page" lies memory that nobody may touch."""
    rng = np.random.default_rng(columns)
    width, x0 = 11, 2
    rows = np.array([0, 2, 3], np.int32)
    size = 3 * width + x0 + columns  # the last row ends with the band
    plane = rng.standard_normal(size + BAND).astype(dtype)
    plane[size:] = np.nan
    room = size + BAND
    if end == "page":
        room = size
        plane = last_of_a_page(plane[:size])
    room -= x0
    y, x = rng.standard_normal((2, 3)).astype(dtype), rng.standard_normal((2, BAND)).astype(dtype)
    x[:, columns:] = np.nan

    places = rows[:, None] * width + x0 + np.arange(columns)
    read = plane[places].astype(float)
    want = [y[i].astype(float) @ read @ x[j, :columns].astype(float) for i, j in ((0, 0), (1, 0), (0, 1))]
    after = plane.astype(np.float64)
    after[places] += 0.5 * np.outer(y[0], x[0, :columns])
    found = np.zeros(4, dtype)
    run_kernel(_bands, plane, x0, width, rows, y, x, columns, room, dtype.type(0.5), found)
    close(found, [*want, want[0]], dtype)
    np.testing.assert_allclose(plane, after, rtol=0, atol=50 * TOLERANCE[dtype.name], equal_nan=True)
