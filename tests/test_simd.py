"""The SIMD primitives at every vector width, against NumPy, on pointers that are not aligned."""

import functools

import numpy as np
import pytest
from numba import njit

from pydeform.cpu.core import product
from pydeform.cpu.core import simd as core
from pydeform.cpu.core.simd import at
from tests.codegen import primitives

WIDTHS = {width: primitives(width) for width in (16, 32, 64)}
TOLERANCE = {"float32": 2e-6, "float64": 1e-15}


@pytest.fixture(params=WIDTHS, ids="{}-byte".format)
def simd(request):
    return WIDTHS[request.param]


@pytest.fixture(params=("float32", "float64"))
def dtype(request):
    return np.dtype(request.param)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def close(got, want, dtype, scale=1.0):
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE[dtype.name] * scale)


def test_module_exports_the_width_of_this_machine():
    assert core.VECTOR_BYTES in WIDTHS
    assert (product.WIDE_ROWS, product.ROWS, product.NARROW_ROWS) == product.rows_for(core.VECTOR_BYTES)


@pytest.mark.parametrize("features, expected", [("+sse2", 16), ("+avx,+avx2", 16), ("+avx2,+fma", 32)])
def test_width_follows_the_features_numba_compiles_for(monkeypatch, features, expected):
    monkeypatch.setattr(core.config, "CPU_FEATURES", features)
    assert core.host_vector_bytes() == expected
    monkeypatch.setattr(core.config, "CPU_FEATURES", features + ",+avx512f,+avx512vl")
    assert core.host_vector_bytes() == 64


BLOCKS = ("multiply_wide", "multiply_tile", "multiply_narrow")


@functools.cache
def runs_multiply(width, name):
    multiply = getattr(WIDTHS[width], name)
    rows = product.rows_for(width)[BLOCKS.index(name)]

    @njit
    def run(a, b, c, depth, accumulate):
        multiply(at(a, (1, 0)), a.shape[1], 1, at(b, (0, 1)), b.shape[1], depth, at(c, (1, 1)), c.shape[1], accumulate)
        # The same product with the roles of row and step exchanged, as the weight gradient uses it.
        transposed = np.ascontiguousarray(a[1:, :].T)
        multiply(
            at(transposed, (0, 0)),
            1,
            transposed.shape[1],
            at(b, (0, 1)),
            b.shape[1],
            depth,
            at(c, (2 + rows, 1)),
            c.shape[1],
            accumulate,
        )

    return run


@pytest.mark.parametrize("depth", [0, 1, 2, 7])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_products(simd, dtype, rng, depth, accumulate, name):
    run = runs_multiply(simd.vector_bytes, name)
    rows = product.rows_for(simd.vector_bytes)[BLOCKS.index(name)]
    vectors = (product.panel_vectors(simd.vector_bytes), 2, 1)[BLOCKS.index(name)]
    columns = vectors * simd.vector_bytes // dtype.itemsize
    a = rng.standard_normal((rows + 1, depth + 3)).astype(dtype)
    b = rng.standard_normal((depth + 1, columns + 5)).astype(dtype)
    c = rng.standard_normal((2 * rows + 3, columns + 3)).astype(dtype)
    want = c.astype(np.float64)
    for first in (1, 2 + rows):
        want_here = a[1:, :depth].astype(np.float64) @ b[:depth, 1 : columns + 1].astype(np.float64)
        block = want[first : first + rows, 1 : columns + 1]
        block[...] = want_here + (block if accumulate else 0)
    run(a, b, c, depth, accumulate)
    close(c, want, dtype, 10)


@pytest.mark.parametrize("vectors", [0, 1, 3])
def test_copy_vectors(simd, dtype, rng, vectors):
    copy_vectors = simd.copy_vectors

    @njit
    def run(out, source, vectors):
        copy_vectors(at(out, (1,)), at(source, (2,)), vectors)

    count = vectors * simd.vector_bytes // dtype.itemsize
    source, out = rng.standard_normal(count + 3).astype(dtype), np.full(count + 3, 99, dtype)
    run(out, source, vectors)
    assert (out[1 : 1 + count] == source[2 : 2 + count]).all()
    assert out[0] == 99 and (out[1 + count :] == 99).all()


AXES = {2: (0,), 4: (0, 0), 8: (0, 0, 0)}  # by corners of a cell


def corners_of(rng, dtype, pixels, channels, number):
    """An image, and pixels of it with weights, in tables with a column beside theirs."""
    image = rng.standard_normal((pixels, channels)).astype(dtype)
    corners, weights = rng.integers(0, pixels, (number, 2)), rng.random((number, 2)).astype(dtype)
    corners[-1] = corners[0]  # two of them are one pixel
    corners[:, 0], weights[:, 0] = 10**6, np.nan  # of another sample
    return image, corners.astype(np.int32), weights


@functools.cache
def runs_blend(width, number, listed):
    blend, axes = WIDTHS[width].blend, AXES[number]

    @njit
    def run(out, image, i, w, vectors):
        index = at(i, (0, 1)) if listed else np.int64(0)
        blend(at(out, (1,)), (at(image, (0, 2)), index, at(w, (0, 1)), w.shape[1], image.shape[1]), axes, vectors)

    return run


@pytest.mark.parametrize("vectors", [0, 1, 3])
@pytest.mark.parametrize("number", AXES)
@pytest.mark.parametrize("listed", [True, False])
def test_blend(simd, dtype, rng, vectors, number, listed):
    count = vectors * simd.vector_bytes // dtype.itemsize
    image, corners, weights = corners_of(rng, dtype, 9, count + 3, number)
    out = np.full(count + 5, 99, dtype)
    runs_blend(simd.vector_bytes, number, listed)(out, image, corners, weights, vectors)
    pixels = corners[:, 1] if listed else np.arange(number)
    close(out[1 : 1 + count], weights[:, 1] @ image[pixels, 2 : 2 + count], dtype, 10)
    assert (out[1 + count :] == 99).all() and out[0] == 99


@functools.cache
def runs_blend_dots(width, number, scatter):
    blend_dots = WIDTHS[width].blend_dots_scatter if scatter else WIDTHS[width].blend_dots
    axes = AXES[number]

    @njit
    def run(out, grad, image, grad_image, i, w, channels):
        cell = at(image, (0, 2)), at(i, (0, 1)), at(w, (0, 1)), w.shape[1], image.shape[1]
        return blend_dots(at(out, (0,)), at(grad, (0,)), at(grad_image, (0, 2)), cell, axes, channels)

    return run


@pytest.mark.parametrize("channels", [1, 3, 4, 8, 21, 32, 75])
@pytest.mark.parametrize("number", AXES)
@pytest.mark.parametrize("scatter", [False, True])
def test_blend_backward(simd, dtype, rng, channels, number, scatter):
    width = channels + 4  # what stands right and left belongs to others
    image, corners, weights = corners_of(rng, dtype, 9, width, number)
    room = simd.vector_bytes // dtype.itemsize
    grad = np.full(channels + room, np.inf, dtype)  # behind the channels, nor may these
    grad[:channels] = rng.standard_normal(channels)
    image[:, channels + 2 :] = np.nan  # must not leak into the dots

    out = np.zeros(channels + room, dtype)
    grad_image = rng.standard_normal(image.shape).astype(dtype)
    want = grad_image.astype(np.float64)
    run = runs_blend_dots(simd.vector_bytes, number, scatter)
    dots = run(out, grad, image, grad_image, corners, weights, channels)
    inside = image[corners[:, 1], 2 : 2 + channels].astype(np.float64)
    close(out[:channels], weights[:, 1] @ inside, dtype, 10)
    close(dots, inside @ grad[:channels], dtype, 40)
    if scatter:
        for k, w in zip(corners[:, 1], weights[:, 1], strict=True):
            want[k, 2 : 2 + channels] += w * grad[:channels]
    close(grad_image, want, dtype, 10)


@pytest.mark.parametrize("shifted", [False, True])
def test_transpose_block(simd, dtype, rng, shifted):
    transpose = simd.transpose_block_shifted if shifted else simd.transpose_block
    lanes = simd.vector_bytes // dtype.itemsize

    @njit
    def run(source, target, shift):
        transpose(at(source, (1, 2)), source.shape[1], at(target, (2, 1)), target.shape[1], at(shift, (1,)))

    source = rng.standard_normal((lanes + 2, lanes + 3)).astype(dtype)
    target = np.full((lanes + 3, lanes + 2), 99, dtype)
    shift = rng.standard_normal(lanes + 1).astype(dtype)
    want = target.copy()
    want[2 : 2 + lanes, 1 : 1 + lanes] = source[1 : 1 + lanes, 2 : 2 + lanes].T + shifted * shift[1:, None]
    run(source, target, shift)
    np.testing.assert_array_equal(target, want)


@pytest.mark.parametrize("count", [0, 1, 5, 64, 133])
def test_sum_values(simd, dtype, rng, count):
    sum_values = simd.sum_values

    @njit
    def run(source, count):
        return sum_values(at(source, (1,)), count)

    source = rng.standard_normal(count + 2).astype(dtype)
    close(run(source, count), source[1 : 1 + count].astype(np.float64).sum(), dtype, 30)


def test_at_refuses_an_index_of_another_rank():
    from numba.core.errors import TypingError

    @njit
    def run(source):
        return at(source, (1,))

    with pytest.raises(TypingError):
        run(np.zeros((2, 3)))
