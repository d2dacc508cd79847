"""Kernels of grid_sample and warp on the emulated device: what the tests of the operators do not ask of them.

Those run the same kernels against the oracle on many more problems. Here: races and bad reads, schedules, wide indices,
threads that share a query, parts of a problem, what memory the kernels ask for and how.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

import pydeform
from pydeform import _grid_geometry
from pydeform._grid_geometry import GridGeometry
from tests.cases.gather import Problem, expected, make, run, run_backward, solve_oracle
from tests.cases.gather_tests import assert_results, assert_same_results
from tests.cases.grid import CASES, FEW, Grid, Warp, every_mode
from tests.conftest import Backend, assert_close, assert_same_bits, needs_emulation, sizes_taken
from tests.cuda_emulation import device
from tests.cuda_emulation.launch import Function
from tests.test_cuda_convolution import on

pytestmark = [needs_emulation, pytest.mark.usefixtures("emulated")]
EMULATED, CPU = Backend("emulated"), Backend("cpu")
SCHEDULES = (0, 1, 5, 23)
each_operator = pytest.mark.parametrize("operator", CASES)
each_few = pytest.mark.parametrize(
    ("operator", "name"), [(operator, name) for operator, names in FEW.items() for name in names]
)
# Past what a thread, a block or a row of the launch grid takes at once, and bins longer than those sorted by insertion.
LARGE: dict[str, tuple[str, Any]] = {
    "queries": ("grid_sample", Grid((4, 8), (13, 41), 2, padding_mode="border", align_corners=True)),
    "channels": ("grid_sample", Grid((3, 2, 5), (2, 3, 2), 71, padding_mode="reflection", batch=3)),
    "taps": ("warp", Warp((17, 9), 6, "bicubic", "border")),
    "one_pixel": ("grid_sample", Grid((1, 1), (9, 10), 3, "bicubic", "reflection")),
}


def both(problem: Problem, **how: Any) -> tuple[Any, dict[str, Any]]:
    return run(EMULATED, problem), run_backward(EMULATED, problem, **how)


def geometry_of(problem: Problem) -> GridGeometry:
    make_geometry = getattr(
        _grid_geometry, {"grid_sample": "grid_geometry", "warp": "displaced_geometry"}[problem.operator]
    )
    return make_geometry(problem.operator, *problem.arrays.values(), **problem.options)


# Every access ---------------------------------------------------------------------------------------------------------


@each_few
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_in_the_check_build(operator, name, dtype):
    problem, want = make(operator, name, dtype), expected(operator, name, dtype)
    with device.settings(check=True):
        for deterministic in (False, True):
            assert_results(problem, both(problem, deterministic=deterministic), want, dtype)


@pytest.mark.parametrize("name", LARGE)
def test_large_problems_in_the_check_build(name):
    problem = make(*LARGE[name], "float64")
    with device.settings(check=True):
        for deterministic in (False, True):
            results = both(problem, deterministic=deterministic)
            assert_results(problem, results, solve_oracle(problem), "float64")


@pytest.mark.parametrize("axes", [2, 3])
def test_wild_numbers_in_the_check_build(axes):
    """No pixel is read or written because of one that is not finite, or far away, along any axis."""
    wild = [math.nan, math.inf, -math.inf, 3e38, -3e38, 2.0**31, -(2.0**31), 2.0**24]
    for size in ((3, 2, 4)[:axes], (1,) * axes):
        for options in every_mode(axes):
            problem = make("grid_sample", Grid(size, (2, 12, 2)[:axes], 2, **options), "float32")
            grid = problem.arrays["grid"].copy()
            grid[:, 0, : len(wild), ..., 0] = np.reshape(wild, (1, -1, *(1,) * (axes - 2)))
            grid[:, 1, : len(wild), ..., -1] = np.reshape(wild, (1, -1, *(1,) * (axes - 2)))
            problem = problem.replaced(grid=grid)
            broken = np.isnan(grid).any(-1)
            quiet = problem._replace(grad_output=np.where(broken[:, None], 0, problem.grad_output))
            with device.settings(check=True):
                output, grads = both(problem, deterministic=True)
                assert_same_bits(run_backward(EMULATED, quiet, deterministic=True)["input"], grads["input"])
                assert_close(run_backward(EMULATED, problem)["input"], grads["input"].astype(float), "float32")
            np.testing.assert_array_equal(np.isnan(output).all(1), broken)
            np.testing.assert_array_equal(np.isnan(output).any(1), broken)
            np.testing.assert_array_equal(np.isnan(grads["grid"]), np.broadcast_to(broken[..., None], grid.shape))
            assert np.isfinite(grads["input"]).all()


@each_operator
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float32_places_beside_half_types(operator, dtype):
    """With the digits that a half type does not have."""
    for name in FEW[operator]:
        problem = make(operator, name, dtype)
        place = problem.arrays[problem.place].astype(np.float32)
        problem = problem.replaced(**{problem.place: place + np.float32(1e-4)})
        with device.settings(check=True):
            for deterministic in (False, True):
                results = both(problem, deterministic=deterministic)
                assert_results(problem, results, solve_oracle(problem), dtype)


# The same bits --------------------------------------------------------------------------------------------------------


@each_few
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_no_schedule_shows(operator, name, dtype):
    """In a deterministic backward; only the input's gradient needs one."""
    problem, results = make(operator, name, dtype), []
    for schedule in SCHEDULES:
        with device.settings(schedule=schedule):
            results.append(both(problem, deterministic=True))
    added = both(problem)
    for result in (*results[1:], (added[0], added[1] | {"input": results[0][1]["input"]})):
        assert_same_results(result, results[0])


@pytest.mark.parametrize("name", ["queries", "taps"])
def test_additions_come_in_any_order(name):
    """Otherwise `deterministic` would be for nothing, and the test above would see nothing."""
    problem, found = make(*LARGE[name], "float32"), set()
    rng = np.random.default_rng(0)
    problem = problem._replace(grad_output=rng.normal(size=problem.grad_output.shape).astype(np.float32))
    for schedule in SCHEDULES:
        with device.settings(schedule=schedule):
            found.add(run_backward(EMULATED, problem, needs=("input",))["input"].tobytes())
    assert len(found) > 1


@each_few
def test_wide_indices_change_no_bit(monkeypatch, operator, name):
    problem = make(operator, name, "float32")
    want = both(problem, deterministic=True), both(problem)
    for module in ("grid.launches", "grid.gradients", "core.sums"):
        monkeypatch.setattr(f"pydeform.cuda.{module}.index_type", lambda *sizes: "long long")
    launched, call = [], Function.__call__
    monkeypatch.setattr(Function, "__call__", lambda self, *a, **k: launched.append(self.name) or call(self, *a, **k))
    with device.settings(check=True):
        assert_same_results(both(problem, deterministic=True), want[0])
        assert_same_results(both(problem), want[1])
    assert len(launched) == 9 and all("long long" in name for name in launched)


@each_few
def test_threads_that_share_a_query(monkeypatch, operator, name):
    """None, or as many as may; only the order of the sums of the grid's gradient depends on it."""
    from pydeform.cuda.grid import plan

    problem, outputs = make(operator, name, "float32"), []
    for warps in (0, 1 << 20):
        monkeypatch.setattr(plan, "WARPS_SHARED", warps)
        with device.settings(check=True):
            results = both(problem, deterministic=True)
        assert_results(problem, results, expected(operator, name, "float32"), "float32")
        outputs.append((results[0], results[1]["input"]))
    for one, other in zip(*outputs, strict=True):
        assert_same_bits(other, one)


def test_how_many_threads_share_a_query():
    from pydeform.cuda.grid import plan

    g = geometry_of(make("grid_sample", "zeros"))
    seen = set()
    for batch, queries, channels, processors in itertools.product(
        (1, 7), (1, 30, 5000, 10**7), (1, 3, 64, 10**6), (1, 132)
    ):
        some = g._replace(batch=batch, queries=queries, channels=channels)
        rows, slices = plan.rows_of(some, processors), plan.slices_of(some, processors)
        assert 1 <= rows <= min(channels, 65535)
        assert plan.THREADS % slices == 0 and slices <= min(channels, plan.MOST_SLICES)
        assert slices == plan.slices_of(some._replace(batch=1), processors)
        if batch * queries >= 2048 * processors:
            assert rows == 1
        seen.add((rows, slices))
    assert len(seen) > 8


@each_few
def test_an_image_does_not_depend_on_the_others(operator, name):
    """Nor on how many there are."""
    problem = make(operator, name, "float32")
    whole = both(problem, deterministic=True)
    for image in range(len(problem.grad_output)):
        part = slice(image, image + 1)
        alone = problem.replaced(**{n: a[part] for n, a in problem.arrays.items()})
        got = both(alone._replace(grad_output=problem.grad_output[part]), deterministic=True)
        assert_same_results(got, (whole[0][part], {n: a[part] for n, a in whole[1].items()}))


# Parts of a problem ---------------------------------------------------------------------------------------------------


@each_few
@pytest.mark.parametrize("queries", [1, 7, 31])
def test_taps_of_some_queries_at_a_time_change_no_bit(monkeypatch, operator, name, queries):
    """They begin and end anywhere, in the middle of images, too."""
    from pydeform.cuda.grid import gradients

    problem = make(operator, name, "float32")
    whole = run_backward(EMULATED, problem, needs=("input",), deterministic=True)["input"]
    monkeypatch.setattr(gradients, "queries_at_once", lambda *_: queries)
    chunks, plain = [], gradients._gather_taps
    monkeypatch.setattr(gradients, "_gather_taps", lambda *a: chunks.append(a[-2:]) or plain(*a))
    with device.settings(check=queries == 7):
        got = run_backward(EMULATED, problem, needs=("input",), deterministic=True)["input"]
    assert_same_bits(got, whole)
    g = geometry_of(problem)
    assert len(chunks) == math.ceil(g.batch * g.queries / queries) > 1


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_sorted_taps_stay_within_bounds(monkeypatch, dtype):
    """Their number is many times that of the queries."""
    from pydeform.cuda.core import sizes

    problem = make("grid_sample", Grid((4, 2), (40, 50), 2, "bicubic", "border"), dtype)
    monkeypatch.setattr(sizes, "WORKSPACE", 1 << 14)
    taken = sizes_taken(monkeypatch)
    grad = run_backward(EMULATED, problem, needs=("input",), deterministic=True)["input"]
    assert_close(grad, solve_oracle(problem)[1]["input"], dtype)
    assert 4 * max(taken) < sizes.WORKSPACE


# Where points are -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("length", [1, 6])
def test_points_are_on_the_same_side_of_every_pixel_as_on_the_cpu(length, dtype):
    """Next to pixels and half way between them one rounding decides. Of a NaN pixel all that read it are NaN."""
    kind, rng = np.dtype(dtype).type, np.random.default_rng(3)
    for options in every_mode(2):
        span = length - options["align_corners"]
        goals = np.arange(-4 * length, 4 * length + 1) / 2
        exact = (2 * goals / max(span, 1) - 1 + (not options["align_corners"]) / length).astype(kind)
        numbers = np.concatenate([exact, np.nextafter(exact, kind(-9)), np.nextafter(exact, kind(9))])
        grid = np.stack([numbers, np.zeros_like(numbers)], axis=-1)[None, None]
        image = rng.normal(size=(1, length, 1, length)).astype(dtype)
        for pixel in range(length):
            image[:, pixel, :, pixel] = np.nan
        problem = make("grid_sample", Grid((1, length), (1, len(numbers)), length, batch=1, **options), dtype)
        problem = problem.replaced(input=image, grid=grid)
        got, want = run(EMULATED, problem), run(CPU, problem)
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want), err_msg=str(options))
        whole = problem.replaced(input=np.nan_to_num(image))
        got, want = (run_backward(backend, whole, needs=("grid",))["grid"] for backend in (EMULATED, CPU))
        assert_close(got, want.astype(np.float64), dtype, str(options))


@pytest.mark.parametrize("axes", [2, 3])
def test_an_even_image_has_no_slope(axes):
    """Not the least one, whatever its numbers are; but toward the zeros outside."""
    for options in every_mode(axes):
        if options["padding_mode"] != "zeros":
            problem = make("grid_sample", Grid((4, 3, 5)[:axes], (3, 5, 2)[:axes], 3, **options), "float32")
            problem = problem.replaced(input=np.full_like(problem.arrays["input"], 1 / 3))
            assert not run_backward(EMULATED, problem, needs=("grid",))["grid"].any(), options


# What the kernels are given and what they read ------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [2, 3])
def test_layout_of_the_geometry(axes):
    """Every field arrives, whatever padding the struct has."""
    from pydeform.cuda.core import launch, source

    fields = source.c_fields(GridGeometry)
    values = [
        tuple(10 * i + j + 0.125 * (c.kind == "double") for j in range(axes)) if c.is_array else 10 * i + 2
        for i, c in enumerate(fields.values())
    ]
    places = [
        f"g.{name}" + f"[{j}]" * c.is_array for name, c in fields.items() for j in range(axes if c.is_array else 1)
    ]
    body = " ".join(f"p[{i}] = {place};" for i, place in enumerate(places))
    code = source.source(source.Code("grid", axes)) + f"__global__ void fields(double* p, GridGeometry g) {{ {body} }}"
    function = device.cupy.RawModule(code=code, name_expressions=("fields",)).get_function("fields")
    found = device.cupy.zeros((len(places),), np.float64)
    function((1,), (1,), (found, launch.geometry(GridGeometry(*values))))
    assert found.get().tolist() == [number for value in values for number in np.ravel(value)]


@pytest.mark.parametrize("operator, name, most", [("grid_sample", "volume", 179), ("warp", "zeros", 63)])
def test_what_an_int_cannot_count_is_refused(monkeypatch, operator, name, most):
    from pydeform import _checks
    from pydeform.cuda.grid import plan

    problem = make(operator, name, "float32")
    g = geometry_of(problem)
    assert g.queries * len(g.in_size) == most + 1
    monkeypatch.setattr(_checks, "MOST", most)
    plan.check_size.cache_clear()
    text = f"sampling operators: there must be at most {most} numbers in an image's grid on CUDA, got {most + 1}"
    try:
        for call in (run, run_backward):
            with pytest.raises(ValueError, match=text):
                call(EMULATED, problem)
    finally:
        plan.check_size.cache_clear()


@pytest.mark.parametrize("deterministic", [False, True])
def test_graphs_of_calls_that_were_never_made_before(deterministic):
    """Nothing on the host is read later, nothing waits, and no memory comes from anywhere but the stream's pool."""
    from tests.cuda_emulation import streams

    problem = make("warp", Warp((3, 5), 2 + deterministic, "bicubic", "reflection"), "float16")
    with streams.Stream(non_blocking=True) as stream:
        arrays = {n: device.cupy.asarray(a) for n, a in problem.arrays.items()}
        grad_output = device.cupy.asarray(problem.grad_output)

        def call() -> list[Any]:
            options = problem.options
            grads = pydeform.warp_backward(grad_output, **arrays, **options, deterministic=deterministic)
            return [pydeform.warp(**arrays, **options), *grads]

        want = [a.get() for a in call()]
        stream.begin_capture(streams.GLOBAL)
        captured = call()
        stream.end_capture()
    for got, array in zip(captured, want, strict=True):
        assert_same_bits(got.get(), array)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_neighbours_read_and_write_whole_sectors(dtype):
    """Of 32 bytes, where neighbouring queries read neighbouring pixels."""
    problem = make("warp", Warp((4, 64), 3, "nearest", batch=1), dtype)
    problem = problem.replaced(displacement=np.zeros_like(problem.arrays["displacement"]))
    with device.settings(check=True, profile=True) as counted:
        both(problem)
    requests = dict.fromkeys(("read", "write", "atomic"), 0)
    for (line, kind, memory), count in counted.counters().items():
        if line.startswith("grid/") and memory == "global":
            assert count.sectors == count.least_sectors, (line, kind, count)
            requests[kind] += count.requests
    assert all(requests.values()) and requests["read"] > 50


def test_a_nearest_point_reads_no_pixel_for_the_gradient_of_the_grid():
    problem = make("grid_sample", "nearest", "float32")
    with device.settings(check=True, profile=True) as counted:
        grad = run_backward(EMULATED, problem, needs=("grid",))["grid"]
    lines = {line.partition(":")[0] for (line, kind, memory), _ in counted.counters().items() if kind == "read"}
    assert not grad.any() and "grid/points.cuh" in lines
    reads = [
        line
        for (line, kind, memory), _ in counted.counters().items()
        if line.startswith("grid/backward") and (kind, memory) == ("read", "global")
    ]
    assert not reads


def test_on_older_devices():
    """Which round halves by hand."""
    problem = make("grid_sample", "bicubic_border", "bfloat16")
    with on(capability="75"):
        assert_results(problem, both(problem), expected("grid_sample", "bicubic_border", "bfloat16"), "bfloat16")
