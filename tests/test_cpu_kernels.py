"""What is special about the CPU backend: vector widths, index types, the cache of compiled kernels, threads."""

import gc
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numba
import numpy as np
import pytest
from numba.core.types.functions import BaseFunction

import pydeform
from pydeform import _geometry
from pydeform.cpu.conv import backward_kernel, backward_plan, forward_kernel, forward_plan
from pydeform.cpu.conv import plan as conv_plan
from pydeform.cpu.conv import weights as conv_weights
from pydeform.cpu.core import jit, memory, parallel, simd, sizes
from tests.cases.deform_conv2d import CASES, make
from tests.conftest import assert_same_bits, poison, take_no_spare
from tests.reference import deform_conv2d as reference

ROOT = Path(__file__).parents[1]


def run_python(code, **environment):
    """Run code in a new interpreter that finds pydeform and the tests."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


AGAINST_ORACLE = """
import numpy as np
import pydeform
from pydeform import _geometry
from pydeform.cpu.core import simd
from tests.reference import deform_conv2d as oracle

rng = np.random.default_rng(3)
arrays = dict(
    input=rng.standard_normal((2, 12, 7, 9)),
    offset=2 * rng.standard_normal((2, 36, 5, 9)),
    weight=rng.standard_normal((10, 6, 3, 3)),
    bias=rng.standard_normal(10),
    mask=rng.random((2, 18, 5, 9)),
)
want = oracle.forward(*arrays.values(), (1, 1), ((0, 0), (1, 1)), (1, 1))
got = pydeform.deform_conv2d(**arrays, padding=(0, 1))
np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
grad = rng.standard_normal(want.shape)
want = oracle.backward(grad, *arrays.values(), (1, 1), ((0, 0), (1, 1)), (1, 1))
got = pydeform.deform_conv2d_backward(grad, **arrays, padding=(0, 1))
for name in arrays:
    np.testing.assert_allclose(getattr(got, name), want[name], rtol=1e-11, atol=1e-11, err_msg=name)
print("vector bytes", simd.VECTOR_BYTES)
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names x86 features")
def test_kernels_without_avx():
    """The whole operator with 16-byte vectors and without fused multiply-add."""
    done = run_python(
        AGAINST_ORACLE, NUMBA_CPU_NAME="nehalem", NUMBA_CPU_FEATURES="+sse2,+sse3,+sse4.1,+sse4.2,+ssse3,+popcnt"
    )
    assert done.returncode == 0, done.stderr
    assert "vector bytes 16" in done.stdout


def test_an_image_of_2_to_the_31_pixels_takes_the_wide_index():
    assert sizes.pixel_dtype(2**15 * (2**16 - 1)) == np.int32
    assert sizes.pixel_dtype(2**31) == np.int64


def test_both_index_types_give_the_same_bits(monkeypatch):
    rng = np.random.default_rng(5)
    arrays = (
        rng.standard_normal((1, 3, 6, 5)),
        3 * rng.standard_normal((1, 18, 6, 5)),
        rng.standard_normal((4, 3, 3, 3)),
    )
    grad = rng.standard_normal((1, 4, 6, 5))
    narrow = pydeform.deform_conv2d(*arrays, padding=1)
    narrow_grads = pydeform.deform_conv2d_backward(grad, *arrays, padding=1)
    asked = []
    monkeypatch.setattr(sizes, "pixel_dtype", lambda pixels: asked.append(pixels) or np.dtype(np.int64))
    for module in (forward_plan, backward_plan):  # plans are kept
        monkeypatch.setattr(module, "_kept", module._kept.__wrapped__)
    wide = pydeform.deform_conv2d(*arrays, padding=1)
    wide_grads = pydeform.deform_conv2d_backward(grad, *arrays, padding=1)
    assert set(asked) == {30} and len(asked) > 1
    np.testing.assert_array_equal(wide, narrow)
    for name in ("input", "offset", "weight"):
        np.testing.assert_array_equal(getattr(wide_grads, name), getattr(narrow_grads, name))


def test_tiles_of_any_size_give_the_same_bits(monkeypatch):
    """They are as large as the second-level cache allows, and weights that do not fit there are asked for ahead."""
    rng = np.random.default_rng(6)
    x, offset, weight = (
        rng.standard_normal(shape, np.float32) for shape in ((2, 80, 24, 27), (2, 18, 24, 27), (70, 80, 3, 3))
    )
    plans, outputs = [], []
    make = forward_plan._kept.__wrapped__
    monkeypatch.setattr(forward_kernel, "prepared", lambda *of: plans.append(make(*of)) or plans[-1])
    for cache in (1 << 10, 1 << 18, 1 << 21, 1 << 40):
        monkeypatch.setattr(forward_plan, "second_level_cache", lambda cache=cache: cache)
        with pydeform.num_threads(1):
            outputs.append(pydeform.deform_conv2d(x, offset, weight, padding=1))
    assert len({prepared.plan.positions for prepared in plans}) > 1
    assert [prepared.plan.ahead > 0 for prepared in plans] == [True, True, False, False]
    for output in outputs[1:]:
        assert_same_bits(output, outputs[0])


def assert_products_are_exact(dtype, ins, outs, size, kernel):
    """Of -1, 0 and 1, whose sums every dtype holds."""
    rng = np.random.default_rng(outs)
    kernel_h, kernel_w = kernel
    out_h, out_w = size[0] - kernel_h + 1, size[1] - kernel_w + 1
    x, weight, grad = (
        rng.integers(-1, 2, shape) for shape in ((2, ins, *size), (outs, ins, *kernel), (2, outs, out_h, out_w))
    )
    output, grad_input = np.zeros((2, outs, out_h, out_w)), np.zeros(x.shape)
    grad_weight = np.zeros(weight.shape)
    for i in range(kernel_h):
        for j in range(kernel_w):
            rows, columns = slice(i, i + out_h), slice(j, j + out_w)
            output += np.einsum("nchw,oc->nohw", x[:, :, rows, columns], weight[:, :, i, j])
            grad_input[:, :, rows, columns] += np.einsum("nohw,oc->nchw", grad, weight[:, :, i, j])
            grad_weight[:, :, i, j] = np.einsum("nohw,nchw->oc", grad, x[:, :, rows, columns])
    for array in (output, grad_input, grad_weight):
        assert np.array_equal(array.astype(dtype).astype(float), array)
    got = pydeform.conv2d(x.astype(dtype), weight.astype(dtype))
    np.testing.assert_array_equal(got.astype(float), output)
    grads = pydeform.conv2d_backward(grad.astype(dtype), x.astype(dtype), weight.astype(dtype))
    np.testing.assert_array_equal(grads.input.astype(float), grad_input)
    np.testing.assert_array_equal(grads.weight.astype(float), grad_weight)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("outs", [1, 8, 9, 16, 17, 25, 32, 33, 48, 49, 64, 65, 130])
def test_outputs_that_fill_any_part_of_a_panel(monkeypatch, dtype, outs):
    poison(monkeypatch)
    for ins in (3, 16, 41):
        for kernel in ((1, 1), (2, 1)):
            assert_products_are_exact(dtype, ins, outs, (5, 7), kernel)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_kernels_of_more_taps_than_are_turned_at_once(monkeypatch, dtype):
    assert conv_weights.TAPS < 9 * 9
    poison(monkeypatch)
    for ins, outs in ((17, 33), (32, 32)):
        assert_products_are_exact(dtype, ins, outs, (9, 10), (9, 9))


@pytest.mark.parametrize("largest", [0, 1 << 40])
def test_images_of_few_channels_are_two_pieces_or_two_blocks(monkeypatch, largest):
    rng = np.random.default_rng(7)
    x, offset, weight, grad = (
        rng.standard_normal(shape) for shape in ((2, 34, 14, 14), (2, 18, 14, 14), (3, 34, 3, 3), (2, 3, 14, 14))
    )
    want = reference.backward(grad, x, offset, weight, None, None, (1, 1), ((1, 1), (1, 1)), (1, 1))
    plans, make = [], backward_plan._kept.__wrapped__
    monkeypatch.setattr(backward_plan, "SMALL_IMAGE", largest)
    monkeypatch.setattr(backward_kernel, "prepared", lambda *of: plans.append(make(*of)) or plans[-1])
    monkeypatch.setattr(conv_plan, "SERIAL_FLOPS", 0)
    results = []
    for threads in (1, 2, 3):
        with pydeform.num_threads(threads):
            results.append(pydeform.deform_conv2d_backward(grad, x, offset, weight, padding=1))
            alone = pydeform.deform_conv2d_backward(grad[1:], x[1:], offset[1:], weight, padding=1)
        for name in ("input", "offset"):
            assert_same_bits(getattr(alone, name)[0], getattr(results[-1], name)[1], name)
    assert {(len(plan.tables.blocks), plan.plan.pieces) for plan in plans} == {(1, 2) if largest else (2, 1)}
    for name in ("input", "offset", "weight"):
        for got in results:
            assert_same_bits(getattr(got, name), getattr(results[0], name), name)
        np.testing.assert_allclose(getattr(results[0], name), want[name], rtol=1e-10, atol=1e-11)


def test_a_large_image_of_few_channels_has_one_gradient():
    """More would be most of the memory."""
    for channels, side, blocks, pieces in ((3, 100, 1, 2), (3, 2000, 1, 1), (64, 100, 1, 2), (64, 600, 2, 1)):
        shape = (1, channels, side, side)
        g = _geometry.conv_geometry(
            "test", 2, np.broadcast_to(np.float32(0), shape), np.ones((8, channels, 3, 3)), None, 1, 1, 1
        )
        single, needs = np.dtype(np.float32), frozenset({"input"})
        prepared = backward_plan.prepared(g, single, single, 2, False, False, False, needs)
        assert (len(prepared.tables.blocks), prepared.plan.pieces) == (blocks, pieces)


@pytest.mark.parametrize("answer", [0, ValueError, OSError, AttributeError])
def test_a_system_that_does_not_know_its_cache(monkeypatch, answer):
    def sysconf(name):
        if answer:
            raise answer
        return answer

    monkeypatch.setattr("os.sysconf", sysconf)
    assert simd.second_level_cache() == 1 << 20


TINY = """
import numpy as np, pydeform
x = np.ones((1, 1, 3, 3), np.float32)
print(pydeform.conv2d(x, np.ones((1, 1, 3, 3), np.float32)).item())
"""


def test_an_unwritable_cache_folder_is_said_once_and_does_no_harm(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("no folder can be made below a file")
    done = run_python(TINY, NUMBA_CACHE_DIR=str(blocked / "cache"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "9.0"
    assert done.stderr.count("not writable") == 1


@jit.Kernel
def mark(thread, counters, done, by, order):
    parallel.call_helpers(thread, counters)
    for phase in range(2):
        unit = parallel.claim_near(counters, 1, thread, len(done)) if phase else parallel.claim(counters, 0)
        while unit < len(done):
            done[unit] += 1
            order[thread, by[thread]] = unit
            by[thread] += 1
            parallel.finish(counters, phase)
            unit = parallel.claim_near(counters, 1, thread, len(done)) if phase else parallel.claim(counters, 0)
        parallel.wait_for(counters, phase, len(done))
    parallel.let_helpers_go(thread, counters)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_unit_is_done_once_by_any_number_of_threads(threads):
    done, by, order = np.zeros(1000, np.int64), np.zeros(threads, np.int64), np.zeros((threads, 2000), np.int64)
    parallel.run(mark, "test", threads, parallel.new_counters(2), done, by, order)
    assert (done == 2).all() and by.sum() == 2000


def marks(units, threads):
    return np.zeros(units, np.int64), np.zeros(threads, np.int64), np.zeros((threads, 2 * units))


def test_who_finds_no_unit_takes_no_step():
    """Else a third thread that came too late took that of one on its side, whose unit nobody did."""
    counters, arrays = parallel.new_counters(2), marks(4, 2)
    call = mark.prepare("few", (0, counters, *arrays))
    near, finished = 2 * parallel._STRIDE, parallel._FINISHED * parallel._STRIDE
    counters[0] = counters[finished] = counters[near] = counters[near + finished] = 4
    counters[near + 1 : near + 3] = 2
    for thread in (0, 1):
        call(thread, counters, *arrays)
    assert counters[near + 1 : near + 3].tolist() == [2, 2] and not arrays[0].any()


def test_threads_claim_from_both_ends():
    counters, done, by, order = parallel.new_counters(2), *(np.zeros(n, np.int64) for n in (10, 2)), np.zeros((2, 20))
    call = mark.prepare("both ends", (0, counters, done, by, order))
    counters[:] = 0
    near = 2 * parallel._STRIDE
    counters[0] = counters[parallel._FINISHED * parallel._STRIDE] = 10  # nothing to do in phase 0
    counters[near : near + 3] = 4, 1, 3  # claimed: unit 0 by an even thread, 9, 8 and 7 by odd ones
    counters[near + parallel._FINISHED * parallel._STRIDE] = 7  # those, and what is claimed by the other below
    counters[near] += 3
    call(1, counters, done, by, order)
    assert order[1, : by[1]].tolist() == [6, 5, 4] and done.tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0]
    counters[near] = 7
    counters[near + parallel._FINISHED * parallel._STRIDE] = 7
    call(0, counters, done, by, order)
    assert order[0, : by[0]].tolist() == [1, 2, 3] and done.tolist() == [0, 1, 1, 1, 1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("count", [0, -1, True])
def test_set_num_threads_refuses(count):
    with pytest.raises(ValueError, match="set_num_threads: count must be an int >= 1"):
        pydeform.set_num_threads(count)


def test_set_num_threads_refuses_what_is_no_int():
    with pytest.raises(TypeError, match=r"^set_num_threads: count must be an int >= 1, got 1\.5$"):
        pydeform.set_num_threads(1.5)


@pytest.mark.parametrize("name", CASES)
def test_kernels_neither_read_what_they_did_not_write_nor_write_past_the_end(monkeypatch, name):
    """The same bits from a workspace full of NaN, and the gaps between its arrays untouched."""
    blocks = []

    def poisoned(*parts):
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in parts]
        block = np.full(sum(sizes) + 192 * (len(parts) + 1), 0xFF, np.uint8)  # 0xFF...: NaN in every float type
        start = -block.ctypes.data % 64 + 64
        arrays, gaps = [], []
        for (shape, dtype), size in zip(parts, sizes, strict=True):
            arrays.append(np.ndarray(shape, dtype, block, start))
            end = start + size
            start = end + -end % 64 + 64
            gaps.append(block[end:start])
        blocks.append(gaps)
        return arrays

    case = CASES[name]
    arrays = make(case)
    options = {**case.options, **{key: arrays[key] for key in ("bias", "mask")}}
    call = (arrays["input"], arrays["offset"], arrays["weight"])
    output = pydeform.deform_conv2d(*call, **options)
    grad = np.random.default_rng(1).standard_normal(output.shape)
    grads = pydeform.deform_conv2d_backward(grad, *call, **options)
    take_no_spare(monkeypatch)
    monkeypatch.setattr(memory, "workspace", poisoned)
    assert_same_bits(pydeform.deform_conv2d(*call, **options), output)
    again = pydeform.deform_conv2d_backward(grad, *call, **options)
    for one, other in zip(again, grads, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_same_bits(one, other)
    assert blocks or case.batch == 0
    assert all((gap == 0xFF).all() for gaps in blocks for gap in gaps)


def test_what_arguments_rule_out_is_not_compiled(monkeypatch):
    """What stands under the other condition has no type: Numba by itself leaves it out for None alone."""
    monkeypatch.setattr(jit, "cache_directory", lambda: None)

    def function(out, maybe):
        if maybe is None:
            out[0] = len(maybe or (1,))
        if maybe is not None:
            out[0] = maybe.shape[0]

    kernel, out = jit.Kernel(function), np.zeros(1)
    for key, maybe, want in (("none", None, 1), ("array", np.zeros(5), 5)):
        kernel.prepare(key, (out, maybe))(out, maybe)
        assert out[0] == want
    with pytest.raises(numba.TypingError):
        numba.njit(function)(out, np.zeros(5))


def test_numba_is_asked_once_what_an_operation_is(monkeypatch):
    asked = []
    usual = BaseFunction.get_call_type

    def get_call_type(function, context, args, kws):
        asked.append((function, args, tuple(kws.items())))
        return usual(function, context, args, kws)

    monkeypatch.setattr(jit, "cache_directory", lambda: None)
    monkeypatch.setattr(jit, "_resolved", {})
    monkeypatch.setattr(BaseFunction, "get_call_type", get_call_type)

    def first(out, a, b):
        out[0] = (a[0] + b) * (a[1] + b) + a[2] * a[3]

    def second(out, a, b):
        out[0] = a[0] * a[1] + b

    arguments, out = (np.arange(4.0) + 1, 0.5), np.zeros(1)
    for function, want in ((first, 1.5 * 2.5 + 12), (second, 2.5)):
        jit.Kernel(function).prepare("one", (out, *arguments))(out, *arguments)
        assert out[0] == want
        assert asked and len(asked) == len(set(asked))
        assert BaseFunction.get_call_type is get_call_type
    with pytest.raises(numba.TypingError):
        jit.Kernel(lambda out: out + "text").prepare("one", (np.zeros(1),))
    assert BaseFunction.get_call_type is get_call_type


@pytest.mark.parametrize("was_on", [True, False])
def test_compiling_leaves_the_garbage_collector_as_it_was(monkeypatch, was_on):
    monkeypatch.setattr(jit, "cache_directory", lambda: None)
    seen = []
    compile_it = numba.core.dispatcher.Dispatcher.compile

    def compiles(dispatcher, signature):
        seen.append(gc.isenabled())
        return compile_it(dispatcher, signature)

    monkeypatch.setattr(numba.core.dispatcher.Dispatcher, "compile", compiles)
    (gc.enable if was_on else gc.disable)()
    try:
        jit.Kernel(lambda out: None).prepare("one", (np.zeros(1),))
        with pytest.raises(numba.TypingError):
            jit.Kernel(lambda out: out.nothing).prepare("one", (np.zeros(1),))
        assert gc.isenabled() == was_on and seen == [False, False]
    finally:
        gc.enable()


def test_without_a_compiler_there_are_no_kernels():
    """And whoever switched it off is told so."""
    program = "import numpy as np, pydeform; pydeform.conv2d(np.ones((1, 1, 3, 3)), np.ones((1, 1, 1, 1)))"
    done = run_python(program, NUMBA_DISABLE_JIT="1")
    assert done.returncode == 1
    said = "RuntimeError: pydeform computes in kernels that Numba compiles, which NUMBA_DISABLE_JIT forbids"
    assert done.stderr.splitlines()[-1] == said
