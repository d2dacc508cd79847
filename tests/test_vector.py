"""Vectors as values in kernels, against NumPy."""

import operator

import numpy as np
import pytest
from numba import TypingError

from pydeform.cpu.core import vector
from pydeform.cpu.core.jit import Kernel
from pydeform.cpu.core.simd import advance, at
from pydeform.cpu.core.squares import row_numbers, rows_of, store_columns
from pydeform.cpu.core.vector import (
    ceil,
    convert,
    fabs,
    first_lanes,
    floor,
    fma,
    from_lane,
    gather_numbered,
    gather_pairs,
    is_any,
    lane_numbers,
    lanes_of,
    largest_of,
    load,
    load_beside,
    load_first,
    load_lanes,
    load_where,
    room_for,
    select,
    splat,
    store,
    store_where,
    sum_of,
)

load_eight = load_lanes(8)
LENGTH = 64  # of arrays: some vectors of any width
REAL = (np.float32, np.float64)
INTEGER = (np.int32, np.int64)


def run(function, *arrays):
    """The kernel's `function` of arrays, which are contiguous."""
    kernel = Kernel(function)
    kernel.prepare("", arrays)(*arrays)


def numbers(dtype, seed=0):
    values = np.random.default_rng(seed).integers(-4, 5, LENGTH).astype(dtype)
    if np.dtype(dtype).kind == "f":
        values /= 2
        values[[3, 17, 40]] = np.nan, np.inf, -np.inf
    return values


def test_as_many_lanes_as_a_vector_of_this_machine_has():
    def lanes(wide, narrow, out):
        out[0], out[1] = lanes_of(at(wide, (0,))), lanes_of(at(narrow, (0,)))

    out = np.zeros(2, np.int64)
    run(lanes, np.zeros(1), np.zeros(1, np.float32), out)
    assert list(out) == [vector.VECTOR_BYTES // 8, vector.VECTOR_BYTES // 4]


ARITHMETIC = (operator.add, operator.sub, operator.mul, operator.truediv)


@pytest.mark.parametrize("dtype", [*REAL, *INTEGER])
@pytest.mark.parametrize("operation", ARITHMETIC, ids=lambda f: f.__name__)
def test_arithmetic(dtype, operation):
    def kernel(x, y, out):
        for i in range(0, LENGTH, lanes_of(at(x, (0,)))):
            a, b = load(at(x, (i,))), load(at(y, (i,)))
            store(operation(operation(a, b), 2), at(out, (i,)))

    x, y = numbers(dtype), numbers(dtype, 1)
    out = np.zeros(LENGTH, dtype)
    if operation is operator.truediv and dtype in INTEGER:
        with pytest.raises(TypingError):
            run(kernel, x, y, out)
        return
    run(kernel, x, y, out)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(out, operation(operation(x, y), dtype(2)))


def test_nothing_is_fused_and_a_number_beside_a_vector_has_its_type():
    def kernel(x, y, out):
        for i in range(0, LENGTH, lanes_of(at(x, (0,)))):
            store(0.1 - load(at(x, (i,))) * load(at(y, (i,))), at(out, (i,)))

    x, y = (np.random.default_rng(seed).random(LENGTH, np.float32) for seed in (0, 1))
    out = np.zeros(LENGTH, np.float32)
    run(kernel, x, y, out)
    np.testing.assert_array_equal(out, np.float32(0.1) - x * y)


COMPARISONS = (operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne)


@pytest.mark.parametrize("dtype", [*REAL, *INTEGER])
@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda f: f.__name__)
def test_comparisons_and_masks(dtype, comparison):
    def kernel(x, y, out):
        for i in range(0, LENGTH, lanes_of(at(x, (0,)))):
            a, b = load(at(x, (i,))), load(at(y, (i,)))
            mask = (comparison(a, b) | (a == 1)) & ~(b == 1)
            store(select(mask, a, 7), at(out, (i,)))

    x, y = numbers(dtype), numbers(dtype, 1)
    out = np.zeros(LENGTH, dtype)
    run(kernel, x, y, out)
    np.testing.assert_array_equal(out, np.where((comparison(x, y) | (x == 1)) & ~(y == 1), x, dtype(7)))


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("integer", INTEGER)
def test_integers_beside_floats(dtype, integer):
    def kernel(x, integers, out):
        for i in range(0, LENGTH, lanes_of(at(x, (0,)))):
            a = load(at(x, (i,)))
            whole = convert(floor(a), at(integers, (0,))) + load_beside(at(integers, (i,)), a)
            store(whole, at(integers, (i,)))
            store(convert(whole, at(x, (0,))), at(out, (i,)))

    x = np.nan_to_num(numbers(dtype), nan=0, posinf=2.0**31 - 256, neginf=-(2.0**31))
    integers = np.random.default_rng(2).integers(-9, 9, LENGTH).astype(integer)
    integers[x == -(2.0**31)] = 0
    expected, out = np.floor(x).astype(integer) + integers, np.zeros(LENGTH, dtype)
    run(kernel, x, integers, out)
    np.testing.assert_array_equal(integers, expected)
    np.testing.assert_array_equal(out, expected.astype(dtype))


@pytest.mark.parametrize("wide, narrow", [(np.float64, np.float32), (np.int64, np.int32)])
def test_wider_and_narrower(wide, narrow):
    def kernel(x, out, back):
        for i in range(0, LENGTH, lanes_of(at(x, (0,)))):
            a = convert(load(at(x, (i,))), at(out, (0,)))
            store(a, at(out, (i,)))
            store(convert(a, at(x, (0,))), at(back, (i,)))

    for first, second in ((wide, narrow), (narrow, wide)):
        x, out, back = numbers(first), np.zeros(LENGTH, second), np.zeros(LENGTH, first)
        run(kernel, x, out, back)
        np.testing.assert_array_equal(out, x.astype(second))
        np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 17, LENGTH - 1, LENGTH])
def test_behind_the_last_number_nothing_is_read(dtype, count):
    def kernel(x, out, size):
        for i in range(0, LENGTH, lanes_of(at(x, (0,)))):
            store(load_first(advance(at(x, (0,)), i), size[0] - i), at(out, (i,)))

    x, out = numbers(dtype), np.full(LENGTH, 9, dtype)
    run(kernel, x, out, np.array([count]))
    np.testing.assert_array_equal(out, np.where(np.arange(LENGTH) < count, x, dtype(0)))


def test_vectors_of_two_types_are_not_mixed():
    def mixed(x, y):
        store(load(at(x, (0,))) + load(at(y, (0,))), at(x, (0,)))

    with pytest.raises(TypingError):
        run(mixed, np.zeros(LENGTH), np.zeros(LENGTH, np.float32))

    def stored(x, y):
        store(load(at(x, (0,))), at(y, (0,)))

    with pytest.raises(TypingError):
        run(stored, np.zeros(LENGTH), np.zeros(LENGTH, np.int64))


@pytest.mark.parametrize("dtype", REAL)
def test_functions_of_vectors(dtype):
    def kernel(x, out, flag):
        a = load_eight(at(x, (0,)))
        store(ceil(a), at(out, (0, 0)))
        store(fabs(a), at(out, (1, 0)))
        store(fma(2, a, a), at(out, (2, 0)))
        store(fma(x[1], a, splat(3, a)), at(out, (3, 0)))
        store(from_lane(a, 5) + lane_numbers(a), at(out, (4, 0)))
        store(select(flag[0], a, 9), at(out, (5, 0)))
        store(select((a > 0) & flag[1], a, 9), at(out, (6, 0)))
        out[7, 0], out[7, 1] = sum_of(a), largest_of(a)
        out[7, 2], out[7, 3] = is_any(a > 3), is_any(a > 4)
        room = room_for(a)
        store(a, advance(room, 8))
        out[7, 4] = room[15]

    x = np.array([-1.5, 2, 0.25, 4, -3, 3.5, 1, -0.75], dtype)
    out = np.zeros((8, 8), dtype)
    run(kernel, x, out, np.array([True, False]))
    rows = np.ceil(x), abs(x), 3 * x, 2 * x + 3, 3.5 + np.arange(8), x, np.full(8, 9)
    np.testing.assert_array_equal(out[:7], rows)
    np.testing.assert_array_equal(out[7, :5], (x.sum(), 4, 1, 0, x[7]))


@pytest.mark.parametrize("dtype", INTEGER)
def test_lanes_of_integers(dtype):
    def kernel(x, out):
        store(from_lane(load_eight(at(x, (0,))), 2) + lane_numbers(load_eight(at(x, (0,)))), at(out, (0,)))

    out = np.zeros(8, dtype)
    run(kernel, np.arange(8, dtype=dtype) * 3, out)
    np.testing.assert_array_equal(out, 6 + np.arange(8))


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("count", range(9))
def test_where_a_mask_is_false_nothing_is_touched(dtype, count):
    def kernel(x, out, count):
        inside = first_lanes(count[0], load_eight(at(x, (0,))))
        store_where(inside, load_where(inside, at(x, (8,))), at(out, (0,)))
        store(load_where(inside, at(x, (8,))), at(out, (8,)))

    x, out = np.arange(1, 17, dtype=dtype), np.full(16, 99, dtype)
    run(kernel, x, out, np.array([count]))
    is_inside = np.arange(8) < count
    np.testing.assert_array_equal(out, np.r_[np.where(is_inside, x[8:], 99), np.where(is_inside, x[8:], 0)])


@pytest.mark.parametrize("dtype", REAL)
def test_squares(dtype):
    def kernel(x, out):
        a = load_eight(at(x, (0,)))
        store_columns(rows_of(a) * 10 + row_numbers(a), at(out, (1, 2)), out.shape[1])

    out = np.full((10, 12), 99, dtype)
    want = out.copy()
    want[1:9, 2:10] = 10 * np.arange(1, 9)[:, None] + np.arange(8)
    run(kernel, np.arange(1, 9, dtype=dtype), out)
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("dtype", REAL)
def test_numbers_from_here_and_there(dtype):
    """Where a place is negative nothing far away is read; what is there without the sign may be NaN."""

    def kernel(x, places, one, low, high):
        for i in range(0, LENGTH, lanes_of(at(one, (0,)))):
            place = load_beside(at(places, (i,)), load(at(one, (i,))))
            exists = place >= 0
            store(gather_numbered(at(x, (0,)), at(places, (i,)), place), at(one, (i,)))
            first, second = gather_pairs(exists, at(x, (0,)), place)
            store(select(exists, first, -1), at(low, (i,)))
            store(select(exists, second, -1), at(high, (i,)))

    rng = np.random.default_rng(0)
    x = np.concatenate([[np.nan], rng.standard_normal(99)]).astype(dtype)
    places = rng.integers(1, 99, LENGTH).astype(np.int32)
    places[::3] = rng.choice([-(2**31), 5 - 2**31], places[::3].size)
    one, low, high = np.zeros((3, LENGTH), dtype)
    run(kernel, x, places, one, low, high)
    exists = places >= 0
    np.testing.assert_array_equal(one, np.where(exists, x[places * exists], 0))
    np.testing.assert_array_equal(low, np.where(exists, x[places * exists], -1))
    np.testing.assert_array_equal(high, np.where(exists, x[places * exists + 1], -1))
