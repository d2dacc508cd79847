"""CPU kernels write to nothing but their results and workspace, and read nothing else: no place that they are given a
pointer to is checked at run time.

Here every array that a kernel gets is a copy between two fences.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import pydeform
from pydeform.cpu import _conv_common, _roi_common, _threads
from pydeform.cpu._jit import Kernel
from pydeform.cpu._simd import at
from tests.cases.deform_conv2d import ARRAYS, CASES, make, make_grad_output
from tests.conftest import assert_same_bits
from tests.test_roi import CORNERS, OPERATORS, VARIANTS, problem, wide

FENCE = 4096  # bytes on either side
WOOD = 0xFF  # NaN in every dtype, -1 in every int


def _fenced(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A copy that is aligned like all that kernels get, and the bytes of it and of its fences."""
    around = np.full(2 * FENCE + array.nbytes + 64, WOOD, np.uint8)
    start = FENCE + -(around.ctypes.data + FENCE) % 64
    around = around[start - FENCE : start + array.nbytes + FENCE]
    copy = np.ndarray(array.shape, array.dtype, around, FENCE)
    copy[...] = array
    return copy, around


def _run_fenced(run: Any) -> Any:
    """`_threads.run` with fences around all arrays of a kernel."""

    def fenced(kernel: Any, key: Any, threads: int, *arguments: Any) -> None:
        pairs = [_fenced(a) if isinstance(a, np.ndarray) else (a, None) for a in arguments]
        run(kernel, key, threads, *(copy for copy, _ in pairs))
        for number, (array, (copy, around)) in enumerate(zip(arguments, pairs, strict=True)):
            if around is not None:
                for side, fence in ("before", around[:FENCE]), ("after", around[FENCE + array.nbytes :]):
                    what = f"{kernel.call.__name__} wrote {side} its argument {number}, {array.dtype}{array.shape}"
                    assert (fence == WOOD).all(), what
                if copy.tobytes() != array.tobytes():
                    array[...] = copy

    return fenced


def _everything(operator: str, names: Any, arrays: dict[str, Any], grad_output: Any, options: dict[str, Any]) -> Any:
    """The output, and the gradients for every subset of what may be needed."""
    yield getattr(pydeform, operator)(**arrays, **options)
    for needs in itertools.chain.from_iterable(itertools.combinations(names, k) for k in range(len(names) + 1)):
        backward = getattr(pydeform, f"{operator}_backward")
        yield from backward(grad_output, **arrays, **{**options, "needs": needs})


def _check(monkeypatch: Any, operator: str, *of_problem: Any) -> None:
    """The same bits behind fences."""
    for module in _conv_common, _roi_common:
        monkeypatch.setattr(module, "SERIAL_FLOPS", 0)  # on several threads, too
    want = list(_everything(operator, *of_problem))
    with monkeypatch.context() as patch:
        patch.setattr(_threads, "run", _run_fenced(_threads.run))
        got = list(_everything(operator, *of_problem))
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        if w is not None:
            assert_same_bits(g, w)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_roi_pooling(monkeypatch, name, dtype):
    for variant in (VARIANTS[name], wide(VARIANTS[name])):
        arrays, grad_output = problem(variant, dtype, corners=CORNERS * 2)
        names = [n for n in OPERATORS[variant.operator] if n != "boxes"]
        _check(monkeypatch, variant.operator, names, arrays, grad_output, variant.options)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_deform_conv2d(monkeypatch, name, dtype):
    case = CASES[name]
    _check(monkeypatch, "deform_conv2d", ARRAYS, make(case, dtype), make_grad_output(case, dtype), case.options)


@Kernel
def _one_too_many(thread: int, inside: Any, place: int) -> None:
    at(inside, (place,))[0] = 1


@pytest.mark.parametrize("place", [-1, 5])
def test_fences_are_looked_at(place):
    run = _run_fenced(_threads.run)
    run(_one_too_many, "d", 1, np.zeros(5), 4)
    with pytest.raises(AssertionError, match=r"_one_too_many wrote \w+ its argument 0, float64\(5,\)"):
        run(_one_too_many, "d", 1, np.zeros(5), place)
