"""Products of pairs of bfloat16 numbers: each kind of instruction, or what stands for it, against NumPy and the oracle.

Where the processor has no dot products of pairs, two multiply-adds stand for one, so that all but that instruction is
tried everywhere. For products of tiles nothing stands, but their machine code is looked at everywhere.
"""

import functools
import re

import ml_dtypes
import numpy as np
import pytest
from numba import njit, types

import pydeform
from pydeform._geometry import BOUNDARIES, conv_geometry
from pydeform.cpu.conv import forward_plan as conv_forward
from pydeform.cpu.conv import plan as conv_plan
from pydeform.cpu.core import blend, jit, lanes, pair_products, simd
from pydeform.cpu.core.pair_products import DOTS, TILES
from pydeform.cpu.core.simd import at
from tests.cases.deform_conv2d import CASES, expected, make, make_grad_output
from tests.codegen import PROCESSORS, assembly, loops, primitives
from tests.conftest import TOLERANCE, TOLERANCE_OF_TILES, assert_close, assert_same_bits
from tests.reference import deform_conv2d as oracle

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HAS_TILES = {"amx-tile", "amx-bf16"} <= simd.host_features() and pair_products._may_use_tiles()
KINDS = [
    pytest.param(DOTS, id="dots"),
    pytest.param(TILES, id="tiles", marks=pytest.mark.skipif(not HAS_TILES, reason="a processor without AMX")),
]
COUNT, FLAG = types.int64, types.boolean


def paired(matrix):
    """bfloat16 (k, j) as the second factor of a product: [k // 2][j][k % 2]."""
    k, j = matrix.shape
    return np.ascontiguousarray(matrix.reshape(k // 2, 2, j).transpose(0, 2, 1)).view(np.uint16)


@functools.cache
def runs(kind, vectors, vector_bytes):
    rows = pair_products.rows_of(kind)[{4: 0, 2: 1, 1: 2}[vectors]]
    native = vector_bytes == 64 and "avx512bf16" in simd.host_features()
    multiply = pair_products.multiply(rows, vectors, vector_bytes, native)
    begin, end = pair_products.begin_products, pair_products.end_products

    @njit
    def run(a, b, c, depth, accumulate):
        begin(at(a, (0, 0)))
        multiply(
            at(a, (1, 2)), a.shape[1], 1, at(b, (0, 1, 0)), b.shape[1], depth, at(c, (1, 1)), c.shape[1], accumulate
        )
        end(at(a, (0, 0)))

    return rows, run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vectors", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("depth", [0, 32, 96])
def test_multiply(kind, vectors, accumulate, depth):
    for vector_bytes in (64,) if kind == TILES else (16, 32, 64):
        rows, run = runs(kind, vectors, vector_bytes)
        rng = np.random.default_rng(depth)
        columns = vectors * vector_bytes // 4
        a = rng.standard_normal((rows + 1, depth + 3)).astype(BFLOAT16)
        b = rng.standard_normal((depth, columns + 3)).astype(BFLOAT16)
        c = rng.standard_normal((rows + 2, columns + 3)).astype(np.float32)
        want = c.astype(np.float64)
        product = a[1:, 2 : 2 + depth].astype(float) @ b[:, 1 : 1 + columns].astype(float)
        block = want[1 : 1 + rows, 1 : 1 + columns]
        block[...] = product + (block if accumulate else 0)
        run(a.view(kind), paired(b).view(kind), c, depth, accumulate)
        np.testing.assert_allclose(c, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", [DOTS, TILES], ids=["dots", "tiles"])
def test_what_is_blended_is_rounded_to_even(kind):
    copy_vectors, mix, put, lanes = blend.copy_vectors, blend.blend, pair_products.put, simd.VECTOR_BYTES // 4

    @njit
    def run(out, source, weights, vectors):
        copy_vectors(at(out, (0, 1)), at(source, (1,)), vectors)
        mix(at(out, (1, 1)), (at(source, (1,)), 0, at(weights, (0,)), 1, 0), (0, 0), vectors)
        for c in range(source.size - 1):
            put(at(out, (2, 1)), c, source[1 + c])

    weights = np.array([1, 0, 0, 0], np.float32)
    rng = np.random.default_rng(1)
    source = rng.integers(0, 2**32, 1 + 64 * lanes, dtype=np.uint32).view(np.float32)
    source[np.abs(source) < 2e-38] = 1  # some instructions round subnormal numbers to zero
    ties = np.array([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0xFF800000, 0x7FC00001], np.uint32).view(np.float32)
    source[1 : 1 + ties.size] = ties
    with np.errstate(invalid="ignore"):
        want = source[1:].astype(BFLOAT16)
    # NaN and infinity times a weight of 0 are NaN.
    out = np.full((3, source.size + 1), 99, kind)
    run(out, source, weights, 64)
    for row, what in enumerate((want, np.where(np.isfinite(source[1:]), want, np.nan).astype(BFLOAT16), want)):
        assert out[row, 0] == 99 and out[row, -1] == 99
        np.testing.assert_array_equal(out[row, 1:-1].view(BFLOAT16).astype(np.float32), what.astype(np.float32))


@pytest.mark.parametrize("kind", [DOTS, TILES], ids=["dots", "tiles"])
def test_rows_are_packed_number_by_number(kind):
    pack_rows = pair_products.pack_rows

    @njit
    def run(out, rows):
        pack_rows(at(out, (1,)), at(rows, (0, 1)), at(rows, (1, 1)))

    lanes = simd.VECTOR_BYTES // 4
    rows = np.random.default_rng(2).standard_normal((2, lanes + 2)).astype(BFLOAT16)
    out = np.full(2 * lanes + 2, 99, kind)
    run(out, rows.astype(np.float32))
    assert (out[1:-1].view(BFLOAT16).reshape(lanes, 2) == rows[:, 1:-1].T).all()
    assert out[0] == 99 and out[-1] == 99
    single = np.full(lanes + 2, 99, np.float32)
    run(single, rows.astype(np.float32))
    assert (single[1:-1] == rows[0, 1:-1]).all() and single[0] == single[-1] == 99


@pytest.fixture(params=KINDS)
def use(request, monkeypatch):
    monkeypatch.setattr(conv_plan, "pair_dtype", lambda: request.param)
    return request.param


def exact_problem(n, c, h, w, out, offset_groups, kernel, groups=1):
    """Samples, weights and all sums are exact in bfloat16 or float32, so that only the result is rounded."""
    rng = np.random.default_rng(c + out)
    taps, size = kernel[0] * kernel[1], (h + 3 - kernel[0], w + 3 - kernel[1])
    return {
        "input": 4.0 * rng.integers(-4, 5, (n, c, h, w)),
        "offset": rng.integers(-6, 7, (n, 2 * offset_groups * taps, *size)) / 2,
        "weight": rng.integers(-3, 4, (out, c // groups, *kernel)) / 4,
        "bias": rng.integers(-4, 5, out) / 2,
        "mask": rng.integers(0, 3, (n, offset_groups * taps, *size)) / 2,
    }


PROBLEMS = {
    "one channel": (1, 1, 7, 7, 1, 1, (3, 3)),
    "odd channels": (2, 3, 9, 11, 5, 1, (3, 3)),
    "odd offset groups": (1, 33, 6, 7, 40, 3, (3, 2)),
    "groups": (1, 24, 6, 7, 40, 3, (1, 1), 2),
    "odd groups": (2, 6, 8, 5, 6, 2, (3, 3), 3),
    "chunks": (1, 200, 6, 5, 17, 1, (5, 5)),
    "many outputs": (1, 64, 4, 5, 150, 4, (3, 3)),
    "planes": (1, 3, 80, 90, 3, 1, (1, 1)),
    "few outputs": (1, 48, 14, 15, 16, 1, (3, 3)),
}


@functools.cache
def solved(name):
    """Arrays, options, the gradient of the output, and what the oracle makes of them."""
    arrays, options = exact_problem(*PROBLEMS[name]), {"stride": (1, 1)}
    if name == "planes":  # few samples: the image is not copied
        options = {"stride": (20, 20)}
        arrays |= {key: np.ascontiguousarray(arrays[key][..., ::20, ::20]) for key in ("offset", "mask")}
    rest = (options["stride"], ((1, 1), (1, 1)), (1, 1))
    output = oracle.forward(*arrays.values(), *rest)
    grad_output = np.random.default_rng(3).integers(-2, 3, output.shape) / 2.0
    return arrays, options, grad_output, output, oracle.backward(grad_output, *arrays.values(), *rest)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("count", [1, 2])
def test_operator_is_exact_where_its_numbers_are(use, name, count, monkeypatch):
    arrays, options, grad_output, want, grads = solved(name)
    assert conv_plan.prefers_planes(geometry_of(arrays, options)) == (name == "planes")
    half = {key: array.astype(BFLOAT16) for key, array in arrays.items()}
    monkeypatch.setattr(conv_plan, "SERIAL_FLOPS", 0)
    with pydeform.num_threads(count):
        got = pydeform.deform_conv2d(**half, padding=1, **options)
        got_grads = pydeform.deform_conv2d_backward(grad_output.astype(BFLOAT16), **half, padding=1, **options)
    assert_same_bits(got, rounded(want))
    for field, array in got_grads._asdict().items():
        np.testing.assert_array_equal(array.astype(np.float32), rounded(grads[field]).astype(np.float32), field)


def test_a_key_stands_for_the_types_of_one_kernel(use, monkeypatch):
    """What is compiled for one is not taken to be there for the other."""
    types_of, prepare = {}, jit.Kernel.prepare

    def watched(kernel, key, arguments):
        kinds = tuple(jit.typeof(argument) for argument in arguments)
        assert types_of.setdefault((kernel, key), kinds) == kinds
        return prepare(kernel, key, arguments)

    monkeypatch.setattr(jit.Kernel, "prepare", watched)
    for name in ("odd channels", "planes"):
        arrays, options, grad_output, *_ = solved(name)
        for dtype in (np.float32, BFLOAT16, np.float64):
            cast = {key: array.astype(dtype) for key, array in arrays.items()}
            pydeform.deform_conv2d(**cast, padding=1, **options)
            pydeform.deform_conv2d_backward(grad_output.astype(dtype), **cast, padding=1, **options)
    assert len(types_of) == 12


def geometry_of(arrays, options):
    rest = {key: arrays[key] for key in ("offset", "mask")}
    return conv_geometry("test", 2, arrays["input"], arrays["weight"], arrays["bias"], options["stride"], 1, 1, **rest)


def rounded(array):
    return array.astype(np.float32).astype(BFLOAT16)


@pytest.mark.parametrize("groups", [1, 2])
def test_plain_convolution_is_exact_where_its_numbers_are(use, groups):
    arrays = exact_problem(2, 18, 9, 8, 22, 1, (3, 3), groups)
    del arrays["offset"], arrays["mask"]
    half = {key: array.astype(BFLOAT16) for key, array in arrays.items()}
    got = pydeform.conv2d(**half, padding=1, groups=groups)
    want = pydeform.conv2d(**arrays, padding=1, groups=groups)
    assert_same_bits(got, rounded(want))
    grad_output = np.random.default_rng(3).integers(-2, 3, want.shape) / 2.0
    got = pydeform.conv2d_backward(grad_output.astype(BFLOAT16), **half, padding=1, groups=groups)
    want = pydeform.conv2d_backward(grad_output, **arrays, padding=1, groups=groups)
    for field, array in got._asdict().items():
        np.testing.assert_array_equal(array, rounded(getattr(want, field)), field)


@pytest.mark.parametrize("needs", [("input",), ("offset",), ("weight",), ("bias", "mask"), ("input", "weight")])
def test_some_gradients_are_those_of_all(use, needs):
    case = CASES["past_tiles"]
    arguments = make_grad_output(case, "bfloat16"), *make(case, "bfloat16").values()
    options = {"stride": case.stride, "padding": case.padding, "dilation": case.dilation}
    every = call_backward(*arguments, **options)
    some = call_backward(*arguments, **options, needs=needs)
    for field in every._fields:
        if field in needs:
            assert_same_bits(getattr(some, field), getattr(every, field))
        else:
            assert getattr(some, field) is None


def call_backward(grad_output, input, offset, weight, bias, mask, **options):
    return pydeform.deform_conv2d_backward(grad_output, input, offset, weight, bias, mask=mask, **options)


def test_infinite_gradients_stay_where_they_are(use):
    """Behind the last output and the last position stand zeros, whatever the other factor has there."""
    arrays = exact_problem(1, 24, 5, 7, 6, 1, (1, 1), 2)
    half = {key: array.astype(BFLOAT16) for key, array in arrays.items()}
    grad_output = np.ones((1, 6, 7, 9), BFLOAT16)
    clean = pydeform.deform_conv2d_backward(grad_output, **half, padding=1)
    for value in (np.inf, np.nan):
        grad_output[0, 3:, -1, -1] = value  # of the second group
        got = pydeform.deform_conv2d_backward(grad_output, **half, padding=1)
        assert_same_bits(got.input[:, :12], clean.input[:, :12])
        assert_same_bits(got.weight[:3], clean.weight[:3])
        assert not np.isfinite(got.weight[3:].astype(np.float32)).any()


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("name", CASES)
def test_cases_agree_within_the_rounding_of_samples(use, name, boundary, monkeypatch):
    monkeypatch.setattr("tests.conftest._tolerance", TOLERANCE_OF_TILES)
    case = CASES[name]
    got = pydeform.deform_conv2d(**make(case, "bfloat16"), **case.options, boundary=boundary)
    assert_close(got, expected(name, boundary)[0], "bfloat16")
    got = call_backward(
        make_grad_output(case, "bfloat16"), *make(case, "bfloat16").values(), **case.options, boundary=boundary
    )
    for field, want in expected(name, boundary)[1].items():
        if getattr(got, field) is not None:
            # But for the weight's, gradients have no rounded samples in them.
            monkeypatch.setattr("tests.conftest._tolerance", TOLERANCE_OF_TILES if field == "weight" else TOLERANCE)
            assert_close(getattr(got, field), want, "bfloat16", field)


def test_only_bfloat16_that_has_sums_is_multiplied_in_pairs(use):
    g = oracle_geometry(groups=1)
    assert conv_plan.numbers_of(BFLOAT16, g) == use
    assert conv_plan.numbers_of(BFLOAT16, oracle_geometry(groups=4)) == np.float32  # depthwise
    for dtype in (np.float16, np.float32, np.float64):
        assert conv_plan.numbers_of(np.dtype(dtype), g) == (np.float64 if dtype == np.float64 else np.float32)


def oracle_geometry(groups):
    from pydeform import _geometry

    g = _geometry.ConvGeometry(*[1] * 6, *[(1, 1)] * 6)
    return g._replace(in_channels=4, out_channels=4, groups=groups)


@pytest.mark.parametrize(
    "name, features, expected",
    [
        ("znver4", "+avx512f,+avx512vl,+avx512bf16", DOTS),
        ("znver5", "+avx512f,+avx512vl,+avx512bf16", DOTS),
        ("cooperlake", "+avx512f,+avx512vl,+avx512bf16", None),  # no faster there than float32
        ("znver5", "+avx512f,+avx512vl", None),
        ("znver5", "+avx512f,+avx512bf16", None),  # Numba may not use vectors of 64 bytes
        ("haswell", "+avx2,+fma", None),
    ],
)
def test_the_kind_follows_the_processor(monkeypatch, name, features, expected):
    monkeypatch.setattr(pair_products.config, "CPU_NAME", name)
    monkeypatch.setattr(pair_products.config, "CPU_FEATURES", features)
    monkeypatch.setattr(pair_products, "VECTOR_BYTES", simd.host_vector_bytes())
    assert pair_products.pair_dtype.__wrapped__() == expected


@pytest.mark.parametrize("allowed", [True, False])
def test_tiles_are_used_only_where_the_system_lets_us(monkeypatch, allowed):
    features = "+avx512f,+avx512vl,+avx512bf16,+amx-tile,+amx-bf16"
    monkeypatch.setattr(pair_products.config, "CPU_NAME", "sapphirerapids")
    monkeypatch.setattr(pair_products.config, "CPU_FEATURES", features)
    monkeypatch.setattr(pair_products, "VECTOR_BYTES", 64)
    monkeypatch.setattr(pair_products, "_may_use_tiles", lambda: allowed)
    assert pair_products.pair_dtype.__wrapped__() == (TILES if allowed else None)


def arguments(kind):
    p, sums = types.CPointer(kind), types.CPointer(types.float32)
    return [p, COUNT, COUNT, p, COUNT, COUNT, sums, COUNT, FLAG], {1: conv_forward.PAIRS_ROW, 2: 1, 4: 32}


@pytest.mark.parametrize("processor", ["znver4", "znver5", "sapphirerapids"])
@pytest.mark.parametrize("rows, vectors, most", [(8, 2, 0.63), (16, 1, 1.07)])
def test_dot_products_in_machine_code(processor, rows, vectors, most):
    on = PROCESSORS[processor]
    text = assembly(pair_products.multiply(rows, vectors, 64, True), *arguments(types.uint16), on)
    busiest = max(loops(text, on), key=lambda loop: loop.multiply_adds)
    assert busiest.multiply_adds % (rows * vectors) == 0 and busiest.multiply_adds > 0
    assert busiest.stack_stores == 0 and busiest.loads_each <= most


@pytest.mark.parametrize("vectors", [1, 2])
def test_tiles_in_machine_code(vectors):
    text = assembly(
        pair_products.multiply(32, vectors, 64, True), *arguments(types.int16), PROCESSORS["sapphirerapids"]
    )
    body = re.search(r"(\.L\w+):(?:(?!\.L).)*tdpbf16ps.*?\bj\w+\s+\1\n", text, re.DOTALL).group()
    products = re.findall(r"tdpbf16ps\s+%tmm(\d), %tmm(\d), %tmm(\d)", body)
    each = [(6 + j, 4 + row, 2 * row + j) for row in range(2) for j in range(vectors)]
    passes, rest = divmod(len(products), len(each))  # the loop is unrolled
    assert sorted(products) == sorted(passes * [(str(b), str(a), str(c)) for b, a, c in each]) and rest == 0
    assert len(re.findall("tileloadd", body)) == passes * (2 + vectors) and "tilestored" not in body


@pytest.mark.parametrize("name", ["blend", "copy_vectors"])
@pytest.mark.parametrize("processor, features", [("znver5", {"avx512bf16"}), ("znver3", set()), ("neoverse-n1", set())])
def test_samples_are_rounded_in_a_few_instructions(monkeypatch, name, processor, features):
    """By one, where there is such; elsewhere without LLVM's own way, a call of what not every C library has."""
    out, p = types.CPointer(types.uint16), types.CPointer(types.float32)
    kinds = {
        "blend": [out, types.Tuple((p, types.CPointer(COUNT), p, COUNT, COUNT)), types.UniTuple(COUNT, 2), COUNT],
        "copy_vectors": [out, p, COUNT],
    }[name]
    monkeypatch.setattr(lanes, "host_features", lambda: features)
    on = PROCESSORS[processor]
    text = assembly(getattr(primitives(on.vector_bytes), name), kinds, {}, on)
    assert ("vcvtneps2bf16" in text) == bool(features) and "truncsfbf2" not in text
    assert max(loop.stack_stores for loop in loops(text, on)) == 0


def test_llvm_calls_a_function_to_round_to_bfloat16_where_there_is_no_instruction(monkeypatch):
    """Why it is not asked to."""
    monkeypatch.setattr(lanes, "host_features", lambda: {"avx512bf16"})
    kinds = [types.CPointer(types.uint16), types.CPointer(types.float32), COUNT]
    assert "truncsfbf2" in assembly(primitives(32).copy_vectors, kinds, {}, PROCESSORS["znver3"])
