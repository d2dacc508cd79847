"""CPU kernels write to nothing but their results and workspace, and read nothing else: no place that they are given a
pointer to is checked at run time.

Here every array that a kernel gets is a copy between two fences, and what nobody has written to yet is full of NaN, of
zeros, or of numbers that lie outside of everything.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import pydeform
from pydeform.cpu import gather as gather_cpu
from pydeform.cpu.conv import plan as conv_plan
from pydeform.cpu.core import memory, pair_products, parallel
from pydeform.cpu.core.jit import Kernel
from pydeform.cpu.core.simd import at
from pydeform.cpu.gather import plan as gather_plan
from pydeform.cpu.grid import plan as grid_plan
from pydeform.cpu.roi import plan as roi_plan
from tests.cases import gather
from tests.cases.deform_conv2d import ARRAYS, CASES, make, make_grad_output
from tests.cases.gather_tests import CPU, assert_same_results, both
from tests.conftest import arrays_in, assert_same_bits, map_arrays, take_no_spare
from tests.test_roi import CORNERS, OPERATORS, VARIANTS, problem, wide
from tests.test_simd_roi import last_of_a_page

FENCE = 4096  # bytes on either side
WOOD = 0xFF  # NaN in every dtype, -1 in every int
FILLS = WOOD, 0x00, 0x7F  # the last: 3e38 or 1e306 as a float, 2e9 or 9e18 as an int


def _fenced(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A copy that is aligned like all that kernels get, and the bytes of it and of its fences."""
    around = np.full(2 * FENCE + array.nbytes + 64, WOOD, np.uint8)
    start = FENCE + -(around.ctypes.data + FENCE) % 64
    around = around[start - FENCE : start + array.nbytes + FENCE]
    copy = np.ndarray(array.shape, array.dtype, around, FENCE)
    copy[...] = array
    return copy, around


def _run_fenced(run: Any) -> Any:
    """`parallel.run` with fences around all arrays of a kernel."""

    def fenced(kernel: Any, key: Any, threads: int, *arguments: Any) -> None:
        # One copy of each: DCNv4's places and weights are in the same array.
        fences = {id(array): (array, *_fenced(array)) for array in arrays_in(arguments)}
        run(kernel, key, threads, *map_arrays(lambda array: fences[id(array)][1], arguments))
        for number, (array, copy, around) in enumerate(fences.values()):
            for side, fence in ("before", around[:FENCE]), ("after", around[FENCE + array.nbytes :]):
                what = f"{kernel.call.__name__} wrote {side} its array {number}, {array.dtype}{array.shape}"
                assert (fence == WOOD).all(), what
            if copy.tobytes() != array.tobytes():
                array[...] = copy

    return fenced


class _Filled:
    """NumPy, but its empty arrays are full of one byte."""

    def __init__(self, byte: int) -> None:
        self._byte = byte

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def empty(self, *arguments: Any) -> np.ndarray:
        array = np.empty(*arguments)
        array.view(np.uint8)[...] = self._byte
        return array


def _results(
    operator: str, subsets: Any, arrays: dict[str, Any], grad_output: Any, options: dict[str, Any]
) -> Iterator[Any]:
    """The output, and the gradients for each of some subsets of what may be needed."""
    yield getattr(pydeform, operator)(**arrays, **options)
    for needs in subsets:
        backward = getattr(pydeform, f"{operator}_backward")
        yield from backward(grad_output, **arrays, **{**options, "needs": needs})


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """The same bits behind fences, on two threads and on one, whatever is in fresh memory."""
    before = pydeform.get_num_threads()
    for module in (roi_plan, conv_plan, gather_plan, grid_plan):
        monkeypatch.setattr(module, "SERIAL_FLOPS", 0)  # on several threads, however small
    run, used = parallel.run, set()

    def watched(kernel: Any, key: Any, threads: int, *arguments: Any) -> None:
        used.add(threads)
        _run_fenced(run)(kernel, key, threads, *arguments)

    def check(operator: str, names: Any, *of_problem: Any, all_subsets: bool = False) -> None:
        subsets = [tuple(names)]
        if all_subsets:
            subsets += itertools.chain.from_iterable(itertools.combinations(names, k) for k in range(len(names)))
        want = list(_results(operator, subsets, *of_problem))
        for threads, fill in itertools.product((2, 1), FILLS):
            pydeform.set_num_threads(threads)
            used.clear()
            some = subsets if threads == 2 and fill == WOOD else subsets[:1]
            with monkeypatch.context() as patch:
                take_no_spare(patch)
                patch.setattr(memory, "np", _Filled(fill))
                patch.setattr(parallel, "run", watched)
                got = list(_results(operator, some, *of_problem))
            assert max(used, default=threads) == threads  # none of an empty batch
            for g, w in zip(got, want[: len(got)], strict=True):
                assert (g is None) == (w is None)
                if w is not None:
                    assert_same_bits(g, w)

    yield check
    pydeform.set_num_threads(before)


def _magnitudes(dtype: str) -> np.ndarray:
    """From a pixel to the largest number: each power of two at which something is rounded, and others between."""
    largest = np.finfo(dtype).max
    return np.array([3.5, 100, 4100.25, 2**22 + 0.5, 2**23, 1e8, 2**31, 2**52 + 0.5, 2**63, 1e30, largest / 4, largest])


def _far_corners(dtype: str) -> np.ndarray:
    """Boxes around the image, towards it, from it on, upside down over it, past it, and flat ones."""
    m, zero, one = _magnitudes(dtype), np.zeros(12), np.ones(12)
    rows = (-m, -m, m, m), (-m, zero, one, m), (one, one, m, m), (m, m, -m, -m), (m / 2, -m, m, zero), (-m, one, m, one)
    return np.concatenate([np.stack(row, axis=1) for row in rows])


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_roi_pooling(check, name, dtype):
    for variant in (VARIANTS[name], wide(VARIANTS[name])):
        arrays, grad_output = problem(variant, dtype, corners=CORNERS * 2)
        names = [n for n in OPERATORS[variant.operator] if n != "boxes"]
        check(variant.operator, names, arrays, grad_output, variant.options, all_subsets=True)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_far_boxes(check, name, dtype):
    variant = VARIANTS[name]
    variant = variant._replace(options={**variant.options, "spatial_scale": 1.0})
    many = {"sample_per_part": 2**31 - 1} if "sample_per_part" in variant.options else {"sampling_ratio": 2**24 + 1}
    if variant.operator == "roi_align_rotated":
        many = {"sampling_ratio": 60}  # whose points are no product of rows and columns: each is looked at
    variants = [variant, wide(variant)]
    if "sample_per_part" in variant.options or "sampling_ratio" in variant.options or variant.is_adaptive:
        variants += [variant._replace(options={**variant.options, **many})]
    for one in variants:
        arrays, grad_output = problem(one, dtype, corners=_far_corners(dtype))
        names = [n for n in OPERATORS[one.operator] if n != "boxes"]
        check(one.operator, names, arrays, grad_output, one.options)


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.offset_name and variant.offset])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_bins_moved_far_away(check, name, dtype):
    for variant in (VARIANTS[name], wide(VARIANTS[name])):
        arrays, grad_output = problem(variant, dtype, corners=CORNERS * 4)
        offset = arrays[variant.offset_name]
        signs = np.random.default_rng(2).choice([-1, 0, 1], offset.size)
        offset[...] = (np.resize(_magnitudes(dtype), offset.size) * signs).reshape(offset.shape)
        names = [n for n in OPERATORS[variant.operator] if n != "boxes"]
        check(variant.operator, names, arrays, grad_output, variant.options)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_deform_conv2d(check, name, dtype, monkeypatch):
    # In pairs, on every processor.
    monkeypatch.setattr(conv_plan, "pair_dtype", lambda: pair_products.pair_dtype() or pair_products.DOTS)
    case = CASES[name]
    arrays, grad_output = make(case, dtype), make_grad_output(case, dtype)
    check("deform_conv2d", ARRAYS, arrays, grad_output, case.options, all_subsets=True)
    offset, coordinates = arrays["offset"], "float32" if dtype == "bfloat16" else dtype
    signs = np.random.default_rng(2).choice([-1, 0, 1], offset.size)
    arrays["offset"] = (np.resize(_magnitudes(coordinates), offset.size) * signs).reshape(offset.shape)
    arrays["offset"] = arrays["offset"].astype(coordinates)
    check("deform_conv2d", ARRAYS, arrays, grad_output, case.options)


@pytest.mark.parametrize("operator", gather.CASES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_gathering(check, operator, dtype):
    for name in gather.CASES[operator]:
        one = gather.make(operator, name, dtype)
        check(operator, list(one.numbers), one.arrays, one.grad_output, one.options)
    for name in gather.FEW[operator]:
        one = gather.make(operator, name, dtype)
        place = one.arrays[one.place]
        signs = np.random.default_rng(2).choice([-1, 0, 1], place.shape)
        place[...] = np.resize(_magnitudes(dtype), place.shape) * signs
        check(operator, list(one.numbers), one.arrays, one.grad_output, one.options)


@pytest.mark.parametrize("operator", gather.OPERATORS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_groups_whose_pixels_are_brought_together_first(monkeypatch, check, operator, dtype):
    """The same bits as from where a caller has them; `check` tries threads, fences and poisoned memory."""
    prepared, taken = gather_plan.prepared, set()

    def watched(*arguments: Any) -> Any:
        how = prepared(*arguments)
        taken.add((how.plan.apart, how.plan.along))
        return how

    def take(**sizes: Any) -> None:
        prepared.cache_clear()
        taken.clear()
        for name, value in sizes.items():
            monkeypatch.setattr(gather_plan, name, value)

    monkeypatch.setattr(gather_cpu, "prepared", watched)
    together, everything = set(), {"READS": 0, "FORWARD_READS": 0, "CACHE_LINE": 1, "second_level_cache": lambda: -1}
    for name in gather.CASES[operator]:
        one = gather.make(operator, name, dtype)
        place = one.arrays[one.place].reshape(-1)
        place[:3] = np.array([np.nan, np.inf, -np.finfo(dtype).max])[: place.size]
        of_problem = operator, [tuple(one.numbers)], one.arrays, one.grad_output, one.options
        take(MAP_BYTES=-1, **everything)
        want = list(_results(*of_problem))
        assert taken <= {(0, 0)}
        take(MAP_BYTES=1 << 30)
        for g, w in zip(_results(*of_problem), want, strict=True):
            assert (g is None) == (w is None)
            if w is not None:
                assert_same_bits(g, w)
        together |= taken
        check(operator, list(one.numbers), *of_problem[2:], all_subsets=name in gather.FEW[operator])
    prepared.cache_clear()
    assert ((1, 1) in together) == (operator != "deform_aggregation" and operator != "ms_deform_attn_fused")
    assert ((1, 0) in together) == (operator == "ms_deform_attn_fused")


@pytest.mark.parametrize("operator", gather.CASES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_nothing_is_read_behind_what_is_given(operator, dtype):
    """Each array lies at the end of memory that may be read."""
    for name in gather.CASES[operator]:
        one = gather.make(operator, name, dtype)
        if not one.grad_output.size:
            continue
        output, *last = (last_of_a_page(a.ravel()).reshape(a.shape) for a in (one.grad_output, *one.numbers.values()))
        moved = one.replaced(**dict(zip(one.numbers, last, strict=True)))._replace(grad_output=output)
        assert_same_results(both(CPU, moved), both(CPU, one), name)


@Kernel
def _one_too_many(thread: int, inside: Any, place: int) -> None:
    at(inside, (place,))[0] = 1


@pytest.mark.parametrize("place", [-1, 5])
def test_fences_are_looked_at(place):
    run = _run_fenced(parallel.run)
    run(_one_too_many, "d", 1, np.zeros(5), 4)
    with pytest.raises(AssertionError, match=r"_one_too_many wrote \w+ its array 0, float64\(5,\)"):
        run(_one_too_many, "d", 1, np.zeros(5), place)
