"""Kernels for few channels in a group, on the emulated device: what the tests of the operators do not ask of them.

Those run the same kernels against the oracle on many more problems. Here: races and bad reads, schedules, wide indices,
and the parts in which a deterministic gradient is computed.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np
import pytest

import pydeform
from pydeform._geometry import ConvGeometry
from tests import conftest
from tests.cases.deform_conv2d import ARRAYS, Case, make, make_grad_output
from tests.conftest import assert_close, assert_same_bits
from tests.cuda_emulation import device
from tests.cuda_emulation.launch import Function
from tests.reference import conv2d as plain_reference
from tests.reference import deform_conv2d as reference
from tests.test_cuda_convolution import on

DTYPES = ("float64", "float32", "float16", "bfloat16")
SCHEDULES = (0, 1, 5, 23)
# Channels 4, 5 of group 0 and 6, 7 of group 1 share an offset group; samples end outside on every side.
# Some pixels are read by no tap, and some would be by output pixels before the first or between two.
CASE = Case(2, 12, 5, 4, 4, (2, 3), (2, 2), ((1, 2), (2, 2)), (3, 2), groups=2, offset_groups=3, reach=3)


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module under test, on the emulated device; every problem goes through it."""
    if "emulated" not in conftest._kinds():
        pytest.skip("the tests of this session do not run on the emulated device")
    for module in device.stand_ins.values():
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("pydeform.cuda.core.sizes.DIRECT_CHANNELS", 1000)
    return importlib.import_module("pydeform.cuda.conv.direct")


def on_device(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: None if a is None else device.cupy.asarray(a) for name, a in arrays.items()}


def run(arrays: dict[str, Any], grad_output: Any, options: dict[str, Any], **how: Any) -> dict[str, Any]:
    """The output and every gradient of deform_conv2d, or of conv2d where there is no offset."""
    sent, grad_output = on_device(arrays), device.cupy.asarray(grad_output)
    if "offset" in arrays:
        output = pydeform.deform_conv2d(**sent, **options)
        grads = pydeform.deform_conv2d_backward(grad_output, **sent, **options, **how)
    else:
        output = pydeform.conv2d(**sent, **options)
        grads = pydeform.conv2d_backward(grad_output, **sent, **options, **how)
    results = {"output": output, **grads._asdict()}
    return {name: None if a is None else a.get() for name, a in results.items()}


def deformable(dtype: str = "float32", case: Case = CASE) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    return make(case, dtype), make_grad_output(case, dtype), case.options


def plain(dtype: str = "float32") -> tuple[dict[str, Any], Any, dict[str, Any]]:
    arrays, grad_output, options = deformable(dtype)
    kept = {name: arrays[name] for name in ("input", "weight", "bias")}
    return kept, grad_output, {**options, "groups": CASE.groups}


def assert_is_the_oracles(got: dict[str, Any], problem: tuple[Any, Any, Any], dtype: str) -> None:
    arrays, grad_output, options = problem
    oracle = reference if "offset" in arrays else plain_reference
    grads = oracle.backward(grad_output, **arrays, **options)
    want = {"output": oracle.forward(**arrays, **options), **grads}
    for name, array in got.items():
        assert_close(array, want[name], dtype, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_deformable_kernels_in_the_check_build(dtype):
    problem = deformable(dtype)
    for deterministic in (False, True):
        with device.settings(check=True):
            got = run(*problem, deterministic=deterministic)
        assert_is_the_oracles(got, problem, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_kernels_in_the_check_build(dtype):
    problem = plain(dtype)
    with device.settings(check=True):
        got = run(*problem)
    assert_is_the_oracles(got, problem, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_schedule_shows(dtype):
    """But in the atomic additions."""
    results = []
    for schedule in SCHEDULES:
        with device.settings(schedule=schedule):
            atomic, sorted = run(*deformable(dtype)), run(*deformable(dtype), deterministic=True)
            results.append({"plain": run(*plain(dtype)), "atomic": atomic, "sorted": sorted})
    for result in results[1:]:
        for kind in ("plain", "atomic", "sorted"):
            for name, array in result[kind].items():
                if (kind, name) != ("atomic", "input"):
                    assert_same_bits(array, results[0][kind][name], f"{kind}: {name}")
    for result in results:
        assert_close(result["atomic"]["input"], result["sorted"]["input"].astype(np.float64), dtype)


# Of images of 36 pixels, which a step of a block's threads goes through seven at a time; the last slice is a short one.
SLICED = Case(24, 2, 6, 7, 2, (1, 2))


@pytest.mark.parametrize("index", ["int", "long long"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_over_pixels_in_slices(direct, monkeypatch, dtype, index):
    """Where there are fewer elements than the device has room for blocks; on a small device one block sums each."""
    problem, seen = deformable(dtype, SLICED), {}
    monkeypatch.setattr(direct, "SHORTEST_SLICE", 1)
    monkeypatch.setattr(direct, "index_type", lambda *sizes: index)

    def record(function: Any, grid: Any, *args: Any, call: Any = Function.__call__, **kwargs: Any) -> Any:
        seen[function.name.partition("<")[0]] = grid
        return call(function, grid, *args, **kwargs)

    monkeypatch.setattr(Function, "__call__", record)
    results = []
    for schedule in SCHEDULES:
        with on(check=True, schedule=schedule, processors=5):
            results.append(run(*problem, deterministic=True))
    assert (seen["weight_direct"], seen["bias_gradient"], seen["add_parts"]) == ((8, 2), (2, 4), (2,))
    for other in results[1:]:
        for name, array in other.items():
            assert_same_bits(array, results[0][name], name)
    assert_is_the_oracles(results[0], problem, dtype)
    with on(processors=1):
        alone = run(*problem, deterministic=True)
    assert seen["weight_direct"] == (8, 1)
    assert_is_the_oracles(alone, problem, dtype)


def test_wide_indices_change_no_bit(monkeypatch):
    with device.settings(schedule=0):
        want = [run(*deformable()), run(*deformable(), deterministic=True), run(*plain())]
        for module in ("direct", "gather"):
            monkeypatch.setattr(f"pydeform.cuda.conv.{module}.index_type", lambda *sizes: "long long")
        got = [run(*deformable()), run(*deformable(), deterministic=True), run(*plain())]
    for one, other in zip(got, want, strict=True):
        for name, array in one.items():
            assert_same_bits(array, other[name], name)


def test_deterministic_needs_change_no_bit():
    problem = deformable()
    every = run(*problem, deterministic=True)
    for needs in (("input",), ("offset",), ("mask", "weight"), ("input", "mask"), ()):
        got = run(*problem, deterministic=True, needs=needs)
        for name in ARRAYS:
            if name in needs:
                assert_same_bits(got[name], every[name], name)
            else:
                assert got[name] is None


# Chunks of the deterministic gradient ---------------------------------------------------------------------------------


@pytest.mark.parametrize("workspace", [1, 20_000, 60_000])
def test_chunks_add_up(monkeypatch, direct, workspace):
    """Whatever their size; and an image's gradient has the same bits alone as in its batch."""
    case = Case(3, 3, 13, 11, 2, (1, 2), padding=((0, 0), (1, 0)), groups=1, offset_groups=3)
    problem = deformable("float32", case)
    monkeypatch.setattr(direct, "WORKSPACE", workspace)
    g = ConvGeometry(3, 3, 2, 1, 3, 0, (13, 11), (13, 11), (1, 2), (1, 1), (0, 1), (1, 1))
    count = len(list(direct.chunks(g, 4, workspace)))
    assert count == {1: 3 * 2 * 2, 20_000: 3, 60_000: 1}[workspace]
    got = run(*problem, deterministic=True)
    assert_is_the_oracles(got, problem, "float32")
    arrays, grad_output, options = problem
    for b in range(case.batch):
        image = slice(b, b + 1)
        alone = {name: a if name in ("weight", "bias") else a[image] for name, a in arrays.items()}
        again = run(alone, grad_output[image], options, deterministic=True)
        assert_same_bits(again["input"], got["input"][image])


@pytest.mark.parametrize("workspace", [1, 5_000, 100_000, 1_000_000, 10**9])
@pytest.mark.parametrize(("out_h", "out_w"), [(1, 1), (7, 9), (16, 24), (31, 17)])
def test_chunks_cover_every_sample_once_and_keep_to_their_bytes(direct, out_h, out_w, workspace):
    g = ConvGeometry(5, 6, 2, 1, 2, 0, (9, 8), (out_h, out_w), (3, 2), (1, 1), (0, 0), (1, 1))
    pixels, taps = out_h * out_w, 6
    seen = np.zeros((taps, g.batch * pixels), int)
    for first, count, tap0, some in direct.chunks(g, 4, workspace):
        assert count > 0 and some > 0
        seen[tap0 : tap0 + some, first : first + count] += 1
        whole = first % pixels == 0 and count % pixels == 0
        assert whole or (
            first % pixels + count <= pixels and (count % direct.TILE == 0 or (first + count) % pixels == 0)
        )
        columns = some * count * g.in_channels * 4
        assert columns <= max(workspace, direct.TILE * g.in_channels * 4)
    assert (seen == 1).all()
