"""Each primitive of core/primitives.cuh, lane by lane, against the PTX manual's definition written out in NumPy.

The kernels of conformance.cu run on the emulation, and their PTX, as NVRTC makes it, in an interpreter, where the
strings inside `asm` have their turn. On a machine with a GPU they run there too. All must agree in every bit; sums of
mma and wgmma only nearly, as the hardware adds up in an order and width of its own.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import re
import shutil
import sys
from contextlib import nullcontext

import ml_dtypes
import numpy as np
import pytest

from tests.conftest import assert_same_bits
from tests.cuda_emulation import build, device, nvrtc, ptx

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation is compiled with g++")
CODE = build.inlined("conformance.cu")
PTX_CODE = CODE  # a fault may be in the one and not in the other
PRIMITIVES = CODE.partition('#line 1 "core/primitives.cuh"')[2].partition("\n#line")[0]
WGMMA = "warpgroup_products"
ARCHITECTURES = ("75", "80", "90a")
NEW_ONLY = ("80", "90a")  # with bf16, tf32 and cp.async
DTYPES = {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16), "float": np.dtype(np.float32)}
# Of the sum of the products' magnitudes: float32 additions of up to 16 products, in hardware with truncation.
SUM_TOLERANCE = 1e-6
LANES = np.arange(32)


def real_cupy():
    """CuPy itself, on a machine that has a GPU."""
    if sys.modules.get("cupy") is device.cupy or importlib.util.find_spec("cupy") is None:
        return None
    cupy = importlib.import_module("cupy")
    return cupy if cupy.is_available() else None


@functools.cache
def expressions(architecture):
    halves = ("f16", "bf16")
    names = [f"{kernel}<{T}>" for kernel in ("widen", "narrow", "pack") for T in halves]
    names += ["widen<float>", "narrow<float>", "widen_double", "tf32_part", "load", "copies", "reductions"]
    names += ["products<f16>", "matrices<false>", "matrices<true>", "shuffles<32>", "shuffles<8>"]
    names += ["votes", "atomics", "arithmetic", "permuted_bytes"]
    if architecture != "75":
        names += ["products<bf16>", "products<float>", "products_from_zero"]
    if architecture == "90a":
        kinds = [*((T, "true") for T in DTYPES), ("float", "false")]
        names += [f"{WGMMA}<{T}, {N}, {add}>" for T, add in kinds for N in (64, 128, 256)]
    return (*names, "denormals", "double_denormals")


@functools.cache
def module(cupy, architecture):
    """On a device all but those that CuPy does not compile."""
    if cupy is device.cupy:
        return cupy.RawModule(code=CODE, architecture=architecture, name_expressions=expressions(architecture))
    return cupy.RawModule(code=CODE, options=("-std=c++17",), name_expressions=expressions(architecture.rstrip("a")))


def kernel_of(cupy, architecture, expression):
    if cupy is not device.cupy and expression.startswith(WGMMA):
        return importlib.import_module("pydeform.cuda.core.sm_90a").kernel(CODE, expression)
    return module(cupy, architecture).get_function(expression)


def run_on(cupy, architecture, expression, inputs, outputs, block, grid, shared_mem):
    """The kernel's arguments: input arrays, outputs, scalars."""
    kernel = kernel_of(cupy, architecture, expression)
    arrays = [cupy.asarray(a) for a in inputs if isinstance(a, np.ndarray)]
    scalars = [a for a in inputs if not isinstance(a, np.ndarray)]
    results = [cupy.asarray(a) for a in outputs]
    if shared_mem > 48 << 10:
        kernel.max_dynamic_shared_size_bytes = shared_mem
    kernel((grid,), (block,), (*arrays, *results, *scalars), shared_mem=shared_mem)
    return [cupy.asnumpy(a) for a in results]


def run(architecture, expression, inputs, *outputs, block=32, grid=1, shared_mem=0, tolerance=None):
    """The outputs on the emulation, in every schedule the same, and on the GPU if there is one that can run this."""
    capability = architecture.rstrip("a")
    found = []
    for check, schedule in ((True, 0), (False, 1), (False, 5)):
        with device.settings(check=check, schedule=schedule, capability=capability):
            found.append(run_on(device.cupy, architecture, expression, inputs, outputs, block, grid, shared_mem))
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            assert_same_bits(a, b)
    others = []
    if nvrtc.toolkits():
        others.append(run_ptx(architecture, expression, inputs, outputs, block, grid, shared_mem))
    cupy = real_cupy()
    if cupy and cupy.cuda.Device().compute_capability == capability:
        others.append(run_on(cupy, architecture, expression, inputs, outputs, block, grid, shared_mem))
    for other in others:
        for emulated, real in zip(found[0], other, strict=True):
            if tolerance is None:
                assert_same_bits(*map(_with_one_nan, (emulated, real)))
            else:
                assert (np.abs(emulated - real) <= tolerance).all()
    return found[0]


def run_ptx(architecture, expression, inputs, outputs, block, grid, shared_mem):
    """What NVRTC makes of the kernel, its `asm` included, instruction by instruction."""
    every = expressions(architecture) if PTX_CODE == CODE else (expression,)
    text, names = nvrtc.cached_ptx(nvrtc.toolkits()[-1], PTX_CODE, every, architecture, ("-std=c++17",))
    results = [a.copy() for a in outputs]
    arrays = [a.copy() for a in inputs if isinstance(a, np.ndarray)]
    scalars = [a for a in inputs if not isinstance(a, np.ndarray)]
    with np.errstate(all="ignore"):
        ptx.kernel(text, names[expression]).run(grid, block, (*arrays, *results, *scalars), shared_mem)
    return results


def _with_one_nan(a):
    """Every NaN becomes the same: the hardware has its own favourites."""
    if a.dtype.kind == "f" or a.dtype == ml_dtypes.bfloat16:
        with np.errstate(invalid="ignore"):  # signalling NaNs
            a = np.where(a != a, np.asarray(np.nan, a.dtype), a)
    return a


def same(got, want):
    assert_same_bits(*map(_with_one_nan, (got, want)))


# Mantissas: ties of f16 and bf16 and their neighbours, the largest, and others that carry over when rounded.
TAILS = (0, 1, 0xFFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0x17FFF, 0x18000, 0x7FFFFF, 0x7FF000)


def floats():
    """Every exponent, ties, neighbours of ties, denormals, infinities, NaN."""
    random = np.random.default_rng(0).integers(0, 2**32, 4096, dtype=np.uint32)
    near_ties = [(exponent << 23) + tail for exponent in range(256) for tail in TAILS]
    bits = np.concatenate([random, np.array(near_ties, np.uint32), np.array(near_ties, np.uint32) | 1 << 31])
    return bits[: len(bits) // 32 * 32].view(np.float32)


def tied_to_even(v, dtype):
    """float32 to a shorter type by exact arithmetic: the nearest of its values, of two the one with the even code."""
    codes = np.arange(0x8000, dtype=np.uint16)  # the values without a sign, in order
    with np.errstate(invalid="ignore"):  # signalling NaNs
        values = codes.view(dtype).astype(np.float64)
    finite = codes[np.isfinite(values)]
    ladder = values[finite]
    step = ladder[-1] - ladder[-2]
    with np.errstate(invalid="ignore"):
        magnitude = np.abs(v.astype(np.float64))
    above = np.clip(np.searchsorted(ladder, magnitude), 1, len(ladder) - 1)
    low, high = ladder[above - 1], ladder[above]
    middle = (low + high) / 2
    up = (magnitude > middle) | ((magnitude == middle) & (finite[above] % 2 == 0))
    code = np.where(up, finite[above], finite[above - 1])
    code = np.where(magnitude == 0, 0, code)
    code = np.where(magnitude >= ladder[-1] + step / 2, finite[-1] + 1, code)  # infinity
    code = np.where(np.isnan(v), 0x7FFF, code)
    return (code | np.where(np.signbit(v) & ~np.isnan(v), 0x8000, 0)).astype(np.uint16).view(dtype)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("T", ["f16", "bf16"])
def test_to_float(T, architecture):
    every = np.arange(65536).astype(np.uint16)
    if T == "bf16":
        want = (every.astype(np.uint32) << 16).view(np.float32)
    else:
        sign, exponent, fraction = every >> 15, (every >> 10 & 31).astype(int), every & 1023
        value = np.where(exponent == 0, fraction / 2.0**24, (1 + fraction / 1024) * 2.0 ** (exponent - 15))
        value = np.where(exponent == 31, np.where(fraction == 0, np.inf, np.nan), value)
        want = np.where(sign == 1, -value, value).astype(np.float32)
    (got,) = run(architecture, f"widen<{T}>", [every], np.zeros(65536, np.float32), block=256, grid=256)
    same(got, want)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("T", ["f16", "bf16"])
def test_from_float(T, architecture):
    v = floats()
    want = tied_to_even(v, DTYPES[T])
    (got,) = run(architecture, f"narrow<{T}>", [v], np.zeros(len(v), np.uint16), grid=len(v) // 32)
    same(got.view(DTYPES[T]), want)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("T", ["f16", "bf16"])
def test_pack2(T, architecture):
    low = floats()
    high = np.roll(low, 17)
    (got,) = run(architecture, f"pack<{T}>", [low, high], np.zeros(len(low), np.uint32), grid=len(low) // 32)
    same((got & 0xFFFF).astype(np.uint16).view(DTYPES[T]), tied_to_even(low, DTYPES[T]))
    same((got >> 16).astype(np.uint16).view(DTYPES[T]), tied_to_even(high, DTYPES[T]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_wide_types_stay_as_they_are(architecture):
    v = floats()
    for kernel in ("widen<float>", "narrow<float>"):
        (got,) = run(architecture, kernel, [v], np.zeros(len(v), np.float32), grid=len(v) // 32)
        assert_same_bits(got, v)
    v = np.random.default_rng(1).standard_normal(32) * 1e-200
    (got,) = run(architecture, "widen_double", [v], np.zeros(32))
    assert_same_bits(got, v)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tf32_high(architecture):
    """The nearest of the two numbers with 13 bits of zeros at the end; the lower one where the other is infinite."""
    v = floats()
    v[:3] = np.finfo(np.float32).max, -np.finfo(np.float32).max, np.nextafter(np.float32(3.4e38), np.float32(0))
    (got,) = run(architecture, "tf32_part", [v], np.zeros(len(v), np.float32), grid=len(v) // 32)
    assert not (got.view(np.uint32) & 0x1FFF).any()
    assert (got[np.isinf(v)] == v[np.isinf(v)]).all() and not np.isfinite(got[np.isnan(v)]).any()
    v, got = v[np.isfinite(v)].astype(np.float64), got[np.isfinite(v)]
    lower = (v.astype(np.float32).view(np.uint32) & 0xFFFFE000).view(np.float32)
    upper = (lower.view(np.uint32) + 0x2000).view(np.float32)
    nearest = np.where((np.abs(v - lower) < np.abs(upper - v)) | np.isinf(upper), lower, upper)
    assert (got == nearest).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_load16(architecture):
    v = np.random.default_rng(2).integers(0, 2**32, (32, 4), dtype=np.uint32)
    (got,) = run(architecture, "load", [v], np.zeros((32, 4), np.uint32))
    same(got, v[::-1])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(transposed, architecture):
    """Register m of lane l: elements 2 (l % 4) and the next of row l / 4 of matrix m (of column l / 4 if .trans)."""
    rows = np.arange(256, dtype=np.uint16).reshape(32, 8) * 257
    place = np.random.default_rng(3).permutation(40)[:32].astype(np.int32)
    kernel = f"matrices<{str(transposed).lower()}>"
    (got,) = run(architecture, kernel, [rows, place], np.zeros((32, 4), np.uint32), shared_mem=640)
    want = np.zeros_like(got)
    for lane in range(32):
        for m in range(4):
            matrix = rows[8 * m : 8 * m + 8]
            matrix = matrix.T if transposed else matrix
            first, second = matrix[lane // 4, 2 * (lane % 4)], matrix[lane // 4, 2 * (lane % 4) + 1]
            want[lane, m] = int(first) | int(second) << 16
    same(got, want)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cp_async(architecture):
    """Groups land in order; a copy that is not valid writes zeros."""
    v = np.random.default_rng(4).integers(1, 2**32, (96, 4), dtype=np.uint32)
    valid = np.random.default_rng(5).integers(0, 2, 96).astype(np.int32)
    outputs = np.zeros((64, 4), np.uint32), np.zeros((96, 4), np.uint32)
    seen, got = run(architecture, "copies", [v, valid], *outputs, shared_mem=1536)
    want = np.zeros_like(v)
    for group in range(3):
        for lane in range(32):
            want[32 * group + (lane ^ 5)] = v[32 * group + lane] * valid[32 * group + lane]
    same(got, want)
    same(seen, want[:64])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_red_add4(architecture):
    """Eight threads of two blocks add to each place, small integers, so that no order rounds."""
    v = np.random.default_rng(6).integers(-99, 99, (64, 4)).astype(np.float32)
    start = np.random.default_rng(7).integers(-99, 99, (8, 4)).astype(np.float32)
    (got,) = run(architecture, "reductions", [v], start, grid=2)
    same(got, start + v.reshape(8, 8, 4).sum(0))


def flushed(v):
    """A denormal is a zero of its sign."""
    v = np.asarray(v, np.float32)
    return np.where(np.abs(v) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), v), v)


def near_the_smallest_normal():
    """Of both signs, from 0 to four times that number, every other one below it."""
    v = np.random.default_rng(12).uniform(-4, 4, 32).astype(np.float32) * np.finfo(np.float32).tiny
    v[::2] /= 4
    return v


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_denormals_are_flushed(architecture):
    """CuPy compiles with -ftz=true: a float32 denormal counts as 0 and none results, and atomics flush anyway."""
    v, start = near_the_smallest_normal(), np.tile(near_the_smallest_normal()[::-1], 2)
    added, got = run(architecture, "denormals", [v], start, np.zeros((5, 32), np.float32))
    a, b = flushed(v), flushed(np.roll(v, -1))
    want = [a + b, a * b, 0.5 * a.astype(np.float64) + b, 0.5 * a.astype(np.float64), a > 0]
    same(got, np.stack([flushed(w) for w in want]))
    same(added, flushed(flushed(start) + np.tile(a, 2)))
    assert 8 < (a == 0).sum() < 24 and (got[0] == 0).any() and (got[3] == 0).sum() > (a == 0).sum()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_double_denormals_stay(architecture):
    v = near_the_smallest_normal().astype(np.float64) * 2.0**-896  # the exponents of float64's denormals
    (got,) = run(architecture, "double_denormals", [v], np.zeros(32))
    want = v * 0.5 + np.roll(v, -1)
    assert ((want != 0) & (np.abs(want) < np.finfo(np.float64).tiny)).sum() > 8
    same(got, want)


def test_tensor_cores_of_the_emulation_keep_denormals():
    """Each product of 2**-70 and 2**-64 is one, and so is the sum of 16."""
    a, b = (np.full(2, value, DTYPES["bf16"]).view(np.uint32) for value in (2.0**-70, 2.0**-64))
    given = np.zeros((32, 10), np.uint32)
    given[:, :4], given[:, 4:6] = a, b
    with device.settings(capability="80"):
        arguments = [given], [np.zeros((32, 4), np.float32)]
        (got,) = run_on(device.cupy, "80", "products<bf16>", *arguments, block=32, grid=1, shared_mem=0)
    assert (got == np.float32(2.0**-130)).all()


def test_launches_leave_the_arithmetic_as_it_was():
    """Also one that fails in the middle: two of 16 lanes would shuffle with ones that are not there."""
    cupy, half = device.cupy, np.float32(0.5)
    with device.settings(capability="80"):
        kernel = module(cupy, "80").get_function("shuffles<32>")
        for lanes, outcome in ((32, nullcontext()), (16, pytest.raises(device.EmulationError, match="has returned"))):
            with outcome:
                kernel((1,), (lanes,), (cupy.zeros(32, np.float32), cupy.zeros(160, np.float32)))
            assert np.float32(1e-40) * half != 0


def operand(random, shape, dtype, exact):
    """Small integers, whose sums are exact, or random numbers; tf32 ones carry 13 more bits, which must not count."""
    v = random.integers(-8, 9, shape) if exact else random.standard_normal(shape)
    v = v.astype(dtype)
    if dtype != np.float32:
        return v, v.astype(np.float64)
    high = (v.view(np.uint32) & 0xFFFFE000).view(np.float32)
    low = random.integers(0, 2**13, shape, dtype=np.uint32)
    low[v == 0] = 0
    return (high.view(np.uint32) | low).view(np.float32), high.astype(np.float64)


def words(row):
    """A row of 32 bytes of a matrix as its eight registers."""
    return np.ascontiguousarray(row).view(np.uint32)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    "kernel, architecture",
    [("f16", "75"), *itertools.product((*DTYPES, "from zero"), NEW_ONLY)],
)
def test_mma(kernel, architecture, exact):
    """m16n8k16 (m16n8k8 for tf32). With g = lane / 4 and t = lane % 4, and P elements in a register, lane holds
    a0: row g, k = P t ...; a1: row g + 8; a2: row g, k = P (t + 4) ...; a3: row g + 8 of these; b0: column g,
    k = P t ...; b1: k = P (t + 4) ...; d0, d1: row g, columns 2 t and 2 t + 1; d2, d3: row g + 8."""
    from_zero = kernel == "from zero"
    dtype, random = DTYPES["float" if from_zero else kernel], np.random.default_rng(8)
    depth = 32 // dtype.itemsize
    a, a_value = operand(random, (16, depth), dtype, exact)
    b, b_value = operand(random, (8, depth), dtype, exact)  # column by column
    d = random.integers(-50, 50, (16, 8)).astype(np.float32)
    given, want = np.zeros((32, 10), np.uint32), np.zeros((32, 4))
    product = (0 if from_zero else d) + a_value @ b_value.T
    for lane in range(32):
        g, t = divmod(lane, 4)
        given[lane, :4] = words(a[g])[t], words(a[g + 8])[t], words(a[g])[t + 4], words(a[g + 8])[t + 4]
        given[lane, 4:6] = words(b[g])[t], words(b[g])[t + 4]
        places = (g, 2 * t), (g, 2 * t + 1), (g + 8, 2 * t), (g + 8, 2 * t + 1)
        given[lane, 6:] = np.array([d[place] for place in places], np.float32).view(np.uint32)
        want[lane] = [product[place] for place in places]
    scale = SUM_TOLERANCE * (np.abs(d).max() + (np.abs(a_value) @ np.abs(b_value).T).max())
    tolerance = 0 if exact else scale
    expression = "products_from_zero" if from_zero else f"products<{kernel}>"
    (got,) = run(architecture, expression, [given], np.zeros((32, 4), np.float32), tolerance=tolerance)
    assert (np.abs(got - want) <= tolerance).all()


def swizzled(rows):
    """Rows of 128 bytes as a wgmma tile: chunk c of 16 bytes of row r is at place c ^ (r % 8)."""
    chunks = np.ascontiguousarray(rows).view(np.uint32).reshape(len(rows), 8, 4)
    tile = np.empty_like(chunks)
    for r in range(len(rows)):
        for c in range(8):
            tile[r, c ^ (r % 8)] = chunks[r, c]
    return tile


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("N", [64, 128, 256])
@pytest.mark.parametrize("T, add", [*((T, True) for T in DTYPES), ("float", False)])
def test_wgmma(T, add, N, steps, exact):
    """d[i] of a thread: row 16 (warp % 4) + lane / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (lane % 4) + i % 2."""
    dtype, random = DTYPES[T], np.random.default_rng(9)
    depth, used = 128 // dtype.itemsize, steps * 32 // dtype.itemsize
    a, a_value = operand(random, (64, depth), dtype, exact)
    b, b_value = operand(random, (N, depth), dtype, exact)
    start = random.integers(-50, 50, (64, N)).astype(np.float32)
    product = (start if add else 0) + a_value[:, :used] @ b_value[:, :used].T
    thread, i = np.ogrid[:128, : N // 2]
    row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (i // 2 % 2)
    column = 8 * (i // 4) + 2 * (thread % 4) + i % 2
    scale = SUM_TOLERANCE * (np.abs(start).max() + (np.abs(a_value) @ np.abs(b_value).T).max())
    (got,) = run(
        "90a",
        f"warpgroup_products<{T}, {N}, {str(add).lower()}>",
        [_vectors(swizzled(a)), _vectors(swizzled(b)), np.ascontiguousarray(start[row, column]), np.int32(steps)],
        np.zeros((128, N // 2), np.float32),
        block=128,
        shared_mem=8192 + 128 * N,
        tolerance=0 if exact else scale,
    )
    assert (np.abs(got - product[row, column]) <= (0 if exact else scale)).all()


def _vectors(tile):
    return np.ascontiguousarray(tile).view(np.float32)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("width", [32, 8])
def test_shuffles(width, architecture):
    v = np.arange(32, dtype=np.float32) * 3
    (got,) = run(architecture, f"shuffles<{width}>", [v], np.zeros((5, 32), np.float32))
    first, inside = LANES - LANES % width, LANES % width
    sources = [
        first + 5,
        first + (inside ^ 3),
        np.where(inside >= 2, LANES - 2, LANES),
        np.where(inside + 2 < width, LANES + 2, LANES),
        LANES ^ 1,
    ]
    same(got, np.stack([v[source] for source in sources]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ballot(architecture):
    v = np.random.default_rng(10).integers(-1, 2, 32).astype(np.int32)
    (got,) = run(architecture, "votes", [v], np.zeros(32, np.uint32))
    every = sum(1 << lane for lane in range(32) if v[lane])
    half = sum(1 << lane for lane in range(16) if not v[lane])
    same(got, np.where(LANES < 16, every ^ half << 16, every).astype(np.uint32))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_atomics(architecture):
    i, f, d = run(architecture, "atomics", [], np.zeros(65, np.int32), np.zeros(4, np.float32), np.zeros(4), grid=2)
    t = np.arange(64)
    same(i, np.concatenate([[64], 100 + t]).astype(np.int32))
    same(f, (0.5 * t).reshape(16, 4).sum(0).astype(np.float32))
    same(d, (0.25 * t).reshape(16, 4).sum(0))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_byte_perm(architecture):
    """Byte i of the result is that of the eight of a and b, a's first, which digit i of the selector names."""
    random = np.random.default_rng(12)
    a, b = random.integers(0, 2**32, (2, 32), dtype=np.uint32)
    digits = random.integers(0, 8, (32, 4))
    selectors = (digits << np.arange(0, 16, 4)).sum(1).astype(np.uint32)
    (got,) = run(architecture, "permuted_bytes", [a, b, selectors], np.zeros(32, np.uint32))
    every = np.stack([a, b], 1).view(np.uint8)
    same(got, np.take_along_axis(every, digits, 1).view(np.uint32)[:, 0])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_arithmetic(architecture):
    """A product of two float32 numbers is exact in float64."""
    v = (np.random.default_rng(11).standard_normal(32) * 4).astype(np.float32)
    v[3], v[9], v[20] = 0.0, -2.0, 2.5
    a, b, c = (np.roll(v, -i).astype(np.float64) for i in range(3))
    (got,) = run(architecture, "arithmetic", [v], np.zeros((8, 32), np.float32))
    steps = np.clip(np.trunc(4 * a), -5, 7) + 0.0  # an int has no -0.0
    want = [np.floor(a), a * b + c, np.floor(a * 3), a * b + c, np.fmin(a, b), np.fmax(a, b), -a, steps]
    same(got, np.stack(want).astype(np.float32))


# What differs between device and emulation ---------------------------------------------------------------------------
def test_what_is_told_apart_computes_nothing():
    """Plain C++ among the instructions would be a text that the emulation never runs."""
    apart = PRIMITIVES.partition("namespace ptx {")[2].partition("}  // namespace ptx")[0]
    apart = re.sub(r'//.*|"[^"]*"|template <.*?>|^#(?:.*\\\n)*.*', "", apart, flags=re.MULTILINE)
    assert apart.count("asm") > 15
    assert not re.findall(r".*(?:\?| [-+*/%&|^=<>]+ |\b(?:if|for|while|switch)\b|__(?!cvta)\w+\().*", apart)


PLAIN_FAULTS = {  # in branches that only some devices take: what is right, what is wrong, the test that sees it
    "no rule for NaN": ("v != v ? 0x7fff : (u", "(u", lambda: test_from_float("bf16", "75")),
    "ties go up": ("0x7fff + (u >> 16 & 1)", "0x8000", lambda: test_from_float("bf16", "75")),
    "halves change places": (
        "from_float<T>(low).bits |",
        "from_float<T>(high).bits |",
        lambda: test_pack2("f16", "75"),
    ),
    "wrong half of k": ("mma_k8(d, a[2], a[3], b1)", "mma_k8(d, a[2], a[3], b0)", lambda: test_mma("f16", "75", True)),
    "reads what is not valid": ("valid ? load16(source) :", "true ? load16(source) :", lambda: test_cp_async("75")),
    "adds twice": ("atomicAdd(p + 3, d)", "atomicAdd(p + 2, d)", lambda: test_red_add4("80")),
    "too short a stride": ("(1024 >> 4) << 32", "(512 >> 4) << 32", lambda: test_wgmma("f16", True, 64, 1, True)),
}


@pytest.mark.parametrize("fault", PLAIN_FAULTS)
def test_fault_of_plain_text_is_seen(fault, monkeypatch):
    right, wrong, test = PLAIN_FAULTS[fault]
    assert PRIMITIVES.count(right) == 1
    monkeypatch.setattr(sys.modules[__name__], "CODE", CODE.replace(right, wrong))
    module.cache_clear()
    try:
        with pytest.raises((AssertionError, device.EmulationError)):
            test()
    finally:
        module.cache_clear()


ASM_FAULTS = [  # what is right, what is wrong, the test that sees it
    (
        '"f"(high), "f"(low));\n  return r;\n}\nPYDEFORM_DEVICE uint32_t cvt_bf',
        '"f"(low), "f"(high));\n  return r;\n}\nPYDEFORM_DEVICE uint32_t cvt_bf',
        lambda: test_pack2("f16", "80"),
    ),
    ("cvt.rn.bf16x2.f32 %0, %1, %2", "cvt.rn.bf16x2.f32 %0, %2, %1", lambda: test_pack2("bf16", "80")),
    ("cvt.rn.f16.f32", "cvt.rz.f16.f32", lambda: test_from_float("f16", "75")),
    ("x4.shared.b16 {%0, %1, %2, %3}", "x4.shared.b16 {%0, %2, %1, %3}", lambda: test_ldmatrix(False, "75")),
    ("x4.trans.shared.b16 {%0, %1, %2, %3}", "x4.trans.shared.b16 {%0, %1, %3, %2}", lambda: test_ldmatrix(True, "75")),
    ("x4.trans.shared", "x4.shared", lambda: test_ldmatrix(True, "75")),
    ("[%0], [%1], 16, %2;", "[%0], [%1], 16;", lambda: test_cp_async("80")),
    ("cp.async.commit_group;", "", lambda: test_cp_async("80")),
    ("{%1, %2, %3, %4}", "{%1, %2, %4, %3}", lambda: test_red_add4("90a")),
    (
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};",
        "{%4, %6, %5, %7}, {%8, %9}, {%0, %1, %2, %3};",
        lambda: test_mma("bf16", "80", True),
    ),
    ("{%8, %9}, {%0, %1, %2, %3};", "{%9, %8}, {%0, %1, %2, %3};", lambda: test_mma("float", "80", True)),
    (
        'f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "',
        'f32 {%0, %2, %1, %3}, {%4, %5, %6, %7}, {%8, %9}, "',
        lambda: test_mma("from zero", "80", True),
    ),
    ("{%10, %10, %10, %10}", "{%0, %1, %2, %3}", lambda: test_mma("from zero", "80", False)),
    ('"r"(a0), "r"(a1), "r"(b)', '"r"(a1), "r"(a0), "r"(b)', lambda: test_mma("f16", "75", True)),
    (
        'MMA("m16n8k16.row.col.f32.bf16.bf16.f32")',
        'MMA("m16n8k16.row.col.f32.f16.f16.f32")',
        lambda: test_mma("bf16", "80", True),
    ),
    ('"}, " a_tile ", " b_tile', '"}, " b_tile ", " a_tile', lambda: test_wgmma("f16", True, 64, 1, True)),
    (
        '"%0, %1, %2, %3, %4, %5, %6, %7, %8',
        '"%0, %1, %3, %2, %4, %5, %6, %7, %8',
        lambda: test_wgmma("f16", True, 64, 1, True),
    ),
    (
        '"+f"(d[i + 4]), "+f"(d[i + 5])',
        '"+f"(d[i + 5]), "+f"(d[i + 4])',
        lambda: test_wgmma("float", True, 128, 4, True),
    ),
    (
        "PYDEFORM_D32(32), PYDEFORM_D32(64), ",
        "PYDEFORM_D32(64), PYDEFORM_D32(32), ",
        lambda: test_wgmma("bf16", True, 256, 1, True),
    ),
    ('add ", 0;', 'add ", 2;', lambda: test_wgmma("float", False, 64, 1, True)),
    (
        ', "k16", ".f32.f16.f16", ", 0, 0"',
        ', "k16", ".f32.f16.f16", ", 0, 1"',
        lambda: test_wgmma("f16", True, 64, 1, True),
    ),
    (', "k16", ".f32.bf16.bf16"', ', "k16", ".f32.f16.f16"', lambda: test_wgmma("bf16", True, 64, 1, True)),
    ("wgmma.fence.sync.aligned;", "", lambda: test_wgmma("f16", True, 64, 1, True)),
    ("wgmma.wait_group.sync.aligned %0;", "", lambda: test_wgmma("f16", True, 64, 1, True)),
]


@pytest.mark.skipif(not nvrtc.toolkits(), reason="NVRTC is not installed")
@pytest.mark.parametrize("number", range(len(ASM_FAULTS)))
def test_fault_of_asm_is_seen(number, monkeypatch):
    """With the emulation as it is: what runs the PTX must differ from it, or refuse."""
    right, wrong, test = ASM_FAULTS[number]
    assert PRIMITIVES.count(right) == 1
    monkeypatch.setattr(sys.modules[__name__], "PTX_CODE", CODE.replace(right, wrong))
    with pytest.raises((AssertionError, ptx.Unknown, RuntimeError)):
        test()
