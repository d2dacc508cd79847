"""Kernels of the operators that gather on the emulated device: what the tests of the operators do not ask of them.

Those run the same kernels against the oracle on many more problems. Here: races and bad reads, schedules, wide indices,
teams of every size, narrow loads, parts of a problem, what memory the kernels ask for and how.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

import pydeform
from pydeform import _gather_geometry
from pydeform._gather_geometry import GatherGeometry, SampleTable
from tests.cases import grid
from tests.cases.gather import (
    CASES,
    FEW,
    OPERATORS,
    Aggregation,
    Attention,
    Dcn,
    Problem,
    expected,
    make,
    run,
    run_backward,
    solve_oracle,
)
from tests.cases.gather_tests import assert_results, assert_same_results
from tests.conftest import Backend, assert_same_bits, needs_emulation, sizes_taken
from tests.cuda_emulation import device
from tests.test_cuda_convolution import on

pytestmark = [needs_emulation, pytest.mark.usefixtures("emulated")]
EMULATED, CPU = Backend("emulated"), Backend("cpu")
SCHEDULES = (0, 1, 5, 23)
each_operator = pytest.mark.parametrize("operator", OPERATORS)
each_few = pytest.mark.parametrize(
    ("operator", "name"), [(operator, name) for operator in OPERATORS for name in FEW[operator]]
)
# Past what a team takes at once: 32 lanes of 16 bytes, samples of a query, words of a table.
LARGE: dict[str, tuple[str, Any]] = {
    "channels": ("ms_deform_attn", Attention(((2, 3), (1, 2)), (2, 3), 1, 300, 1, 2)),
    "points": ("ms_deform_attn_fused", Attention(((4, 4), (2, 2)), (41, 30), 3, 8, 2, 2, references=(True, 4))),
    "places": ("deform_aggregation", Aggregation((((3, 4), (2, 2)), ((2, 3), (1, 1))), 3, 8, 2, 3, 20)),
    "taps": ("dcnv4", Dcn((4, 3), 2, 16, (7, 11), padding=((3, 3), (5, 5)))),
    "pixels": ("dcnv3", Dcn((17, 33), 2, 8, (1, 2), (3, 2), ((0, 0), (0, 1)))),
}


def both(problem: Problem, **how: Any) -> tuple[Any, dict[str, Any]]:
    return run(EMULATED, problem), run_backward(EMULATED, problem, **how)


# Every access ---------------------------------------------------------------------------------------------------------


@each_few
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_in_the_check_build(operator, name, dtype):
    problem, want = make(operator, name, dtype), expected(operator, name, dtype)
    with device.settings(check=True):
        for deterministic in (False, True):
            assert_results(problem, both(problem, deterministic=deterministic), want, dtype)


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_large_problems_in_the_check_build(name, dtype):
    problem = make(*LARGE[name], dtype)
    with device.settings(check=True):
        assert_results(problem, both(problem, deterministic=dtype == "float64"), solve_oracle(problem), dtype)


@each_operator
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_older_devices(operator, dtype):
    """Which add one number at a time, and round halves by hand."""
    name = FEW[operator][0]
    problem = make(operator, name, dtype)
    with on(capability="75"):
        assert_results(problem, both(problem), expected(operator, name, dtype), dtype)


# The same bits --------------------------------------------------------------------------------------------------------


@each_few
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_no_schedule_shows(operator, name, dtype):
    """In a deterministic backward; only the value's gradient needs one."""
    problem, results = make(operator, name, dtype), []
    for schedule in SCHEDULES:
        with device.settings(schedule=schedule):
            results.append(both(problem, deterministic=True))
    added = both(problem)
    own = next(iter(added[1]))
    assert own in ("value", "features", "input")
    for result in (*results[1:], (added[0], added[1] | {own: results[0][1][own]})):
        assert_same_results(result, results[0])


@each_operator
def test_additions_come_in_any_order(operator):
    """Otherwise `deterministic` would be for nothing, and the test above would see nothing."""
    problem, found = make(operator, LARGE["pixels"][1] if "dcn" in operator else FEW[operator][0], "float32"), set()
    weights = next(iter(problem.numbers))
    rng = np.random.default_rng(0)
    problem = problem._replace(grad_output=rng.normal(size=problem.grad_output.shape).astype(np.float32))
    for schedule in SCHEDULES:
        with device.settings(schedule=schedule):
            found.add(run_backward(EMULATED, problem, needs=(weights,))[weights].tobytes())
    assert len(found) > 1


@each_few
def test_wide_indices_change_no_bit(monkeypatch, operator, name):
    problem = make(operator, name, "float32")
    want = both(problem, deterministic=True), both(problem)
    for module in ("gather.launches", "gather.gradients", "core.sums"):
        monkeypatch.setattr(f"pydeform.cuda.{module}.index_type", lambda *sizes: "long long")
    assert_same_results(both(problem, deterministic=True), want[0])
    assert_same_results(both(problem), want[1])


@each_few
def test_teams_of_every_size(monkeypatch, operator, name):
    """As many lanes as there are channels, or up to 32, which share the samples."""
    from pydeform.cuda.gather import plan

    problem, want = make(operator, name, "float32"), expected(operator, name, "float32")
    for warps in (0, 1 << 20):
        monkeypatch.setattr(plan, "WARPS_SHARED", warps)
        with device.settings(check=warps > 0):
            assert_results(problem, both(problem), want, "float32")


@pytest.mark.parametrize("channels, dtype", [(8, "float16"), (4, "bfloat16"), (6, "float32"), (12, "float16")])
@pytest.mark.parametrize("offset", [0, 1, 2, 4])
def test_loads_are_as_wide_as_arrays_allow(monkeypatch, channels, dtype, offset):
    """An array that begins a few numbers behind a multiple of 16 bytes gives the bits of its copy."""
    import cupy

    from pydeform.cuda.gather import launches

    problem, widths = make("ms_deform_attn", Attention(((2, 3),), (3,), 2, channels, queries=2), dtype), []
    want = both(problem)
    monkeypatch.setattr(
        launches, "launch_items", lambda e, *a, go=launches.launch_items: widths.append(e.split(", ")[2]) or go(e, *a)
    )
    value = problem.arrays["value"]
    memory = cupy.zeros((value.size + offset,), value.dtype)
    memory[offset:] = cupy.asarray(value.ravel())
    shifted = memory[offset:].reshape(value.shape)
    arrays = {n: cupy.asarray(a) for n, a in problem.numbers.items()} | {"value": shifted}
    output = pydeform.ms_deform_attn(**arrays, spatial_shapes=((2, 3),), **problem.options)
    grads = pydeform.ms_deform_attn_backward(
        cupy.asarray(problem.grad_output), **arrays, spatial_shapes=((2, 3),), **problem.options
    )
    assert_same_results((output.get(), {n: a.get() for n, a in grads._asdict().items()}), want)
    assert int(widths[0].rstrip(">")) == math.gcd(16, offset * value.itemsize, channels * value.itemsize)


# Parts of a problem ---------------------------------------------------------------------------------------------------


@each_operator
@pytest.mark.parametrize("queries", [1, 2, 4])
def test_sorted_bins_of_some_queries_at_a_time(monkeypatch, operator, queries):
    """They begin and end anywhere, in the middle of images, too."""
    from pydeform.cuda.gather import gradients

    name = FEW[operator][0]
    problem, launched = make(operator, name, "float32"), []
    monkeypatch.setattr(gradients, "WORKSPACE", 1)
    plain = gradients._gather_chunk

    def chunk(given: Any, grad_output: Any, sums: Any, chunk: Any) -> None:
        launched.append(chunk)
        if chunk.first % queries == 0:
            last = given.gathering.numbers.batch * given.gathering.numbers.queries
            plain(given, grad_output, sums, chunk._replace(queries=min(queries, last - chunk.first)))

    monkeypatch.setattr(gradients, "_gather_chunk", chunk)
    with device.settings(check=queries > 2):
        got = both(problem, deterministic=True)
    assert len(launched) > queries and all(one.queries == 1 for one in launched)
    assert_results(problem, got, expected(operator, name, "float32"), "float32")


@pytest.mark.parametrize("name", ["three_levels", "ragged", "ragged_per_level", "many_queries", "many_points"])
@pytest.mark.parametrize("shared", [2000, 1000, 300])
def test_blocks_with_less_shared_memory(monkeypatch, name, shared):
    """Fewer queries, fewer groups of one at a time, and a warp for each."""
    from pydeform.cuda.gather import plan

    monkeypatch.setattr(plan, "DEFAULT_SHARED", shared)
    operator = "ms_deform_attn_fused"
    problem, want = make(operator, name, "float32"), expected(operator, name, "float32")
    with device.settings(check=True):
        assert_results(problem, both(problem), want, "float32")


def test_rows_of_a_block_fit():
    from pydeform.cuda.gather import plan

    g = geometry_of("ms_deform_attn_fused", Attention(((4, 4),), (1,), references=(False, 4))).numbers

    def rows(samples: int, groups: int, lanes: int) -> plan.Rows:
        return plan.rows_of(g._replace(samples=samples, groups=groups), plan.Team(lanes, lanes), 12, 4)

    assert rows(16, 8, 4)[0::2] == (256, 8)
    assert rows(36, 8, 4)[0::2] == (256, 8)
    seen = set()
    for samples, groups, lanes in itertools.product((1, 16, 100, 500, 3000, 20000), (1, 3, 8, 70), (1, 4, 32)):
        found = rows(samples, groups, lanes)
        threads, team, queries, shared = found
        assert threads % 32 == 0 and team.team <= 32 and team.lanes == lanes
        assert queries == 1 or queries * groups <= threads // team.team
        assert shared == threads // team.team * samples * 12 + queries * 16
        assert shared <= plan.DEFAULT_SHARED or (threads, team.team) == (32, 32)
        seen.add((queries > 1, threads, team.team))
    assert len(seen) > 8


def test_a_few_points_more_than_shared_memory_has():
    """One query and head of up to all of a block's shared memory; then an error says what does not fit."""
    from pydeform.cuda.core import launch

    most = (launch.device().shared - 2 * 4) // 12  # beside the gradient of the reference point
    assert most * 12 > 48 << 10
    case = Attention(((4, 4),), (most,), 1, 8, 1, 1, references=(False, 2))
    problem = make("ms_deform_attn_fused", case, "float32")
    assert_results(problem, both(problem), solve_oracle(problem), "float32")
    problem = make("ms_deform_attn_fused", case._replace(points=(most + 1,)), "float32")
    text = r"ms_deform_attn_fused_backward: the points .* shared memory, \d+ bytes, got \d+ points, which take \d+"
    with pytest.raises(ValueError, match=text):
        run_backward(EMULATED, problem)


# Where samples are ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_samples_are_on_the_same_side_of_every_pixel_as_on_the_cpu(dtype):
    """Of a NaN pixel only the samples beside it are NaN. Places end next to pixels, where one rounding decides."""
    case = Dcn((24, 40), 1, 1, (2, 2), (1, 1), ((2, 3), (1, 4)), (2, 3), 0.7, batch=1)
    problem = make("dcnv3", case, dtype)
    g = geometry_of("dcnv3", case)
    kind, table, rng = np.dtype(dtype).type, g.samples, np.random.default_rng(8)
    y, x = np.divmod(np.arange(g.numbers.queries), g.numbers.out_w)
    base = [kind(g.numbers.start[a] + at) - kind(g.numbers.back[a]) for a, at in enumerate((y, x))]
    offset = np.empty((g.numbers.queries, g.numbers.samples, 2), dtype)
    for a in range(2):
        goal = rng.integers(0, case.in_size[a], offset.shape[:2])
        number = ((goal - base[a][:, None]) / kind(0.7)).astype(dtype) - table.shift[a].astype(dtype)
        steps = rng.integers(-1, 2, number.shape)
        offset[..., 1 - a] = np.nextafter(number, number + steps.astype(dtype))
    image = rng.normal(size=problem.arrays["input"].shape).astype(dtype)
    image[:, ::3], image[:, :, ::3] = np.nan, np.nan
    mask = np.zeros_like(problem.arrays["mask"])
    for sample in range(g.numbers.samples):  # one sample of each query at a time
        one = mask.reshape(g.numbers.queries, -1).copy()
        one[:, sample] = 1
        single = np.where(one[..., None] > 0, offset, kind(1e6))
        moved = problem.replaced(
            input=image, offset=single.reshape(problem.arrays["offset"].shape), mask=one.reshape(mask.shape)
        )
        got, want = run(EMULATED, moved), run(CPU, moved)
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
        assert 0.1 < np.isnan(want).mean() < 0.9


# What the kernels are given and what they read ------------------------------------------------------------------------


def geometry_of(operator: str, case: Any) -> _gather_geometry.Gather:
    problem = make(operator, case, "float32")
    if "dcn" in operator:
        check = lambda *_: None  # noqa: E731
        options = problem.options | {"packed": operator == "dcnv4"}
        return _gather_geometry.dcn_geometry(operator, problem.arrays, check, **options)
    names = ("sampling_offsets", "attention_logits")
    return _gather_geometry.attention_geometry(
        operator, problem.numbers, case.shapes, names, case.points, case.method, 0.5
    )


def test_layout_of_the_geometry_and_of_the_table():
    """Every field arrives, whatever padding the structs have."""
    from pydeform.cuda.core import launch, source
    from pydeform.cuda.gather import plan

    values = [
        tuple(10 * i + j + 0.125 * (c.kind == "double") for j in range(c.length)) if c.is_array else 10 * i + 2
        for i, c in enumerate(source.c_fields(GatherGeometry).values())
    ]
    flat = [number for value in values for number in (value if isinstance(value, tuple) else (value,))]
    places = [
        f"g.{name}" + f"[{j}]" * c.is_array
        for name, c in source.c_fields(GatherGeometry).items()
        for j in range(c.length or 1)
    ]
    for dtype, c_type in ((np.float32, "float"), (np.float64, "double")):
        row = np.zeros(1, plan.row_type(dtype))
        names = [name for name in row.dtype.names if name != "_"]
        for i, name in enumerate(names):
            row[name] = 100 + i if row[name].ndim == 1 else (100 + i, 200 + i)
        table = [number for name in names for number in np.ravel(row[name]).tolist()]
        places_of_row = [
            f"row->{name}" + f"[{j}]" * (row[name].ndim > 1) for name in names for j in range(row[name].size)
        ]
        body = " ".join(f"p[{i}] = {place};" for i, place in enumerate([*places, *places_of_row]))
        head = "template <class A> __global__ void fields(double* p, const SampleRow<A>* row, GatherGeometry g)"
        size = len(flat) + len(table)
        code = source.source(source.Code("gather")) + f"{head} {{ {body} p[{size}] = sizeof(*row); }}"
        expression = f"fields<{c_type}>"
        function = device.cupy.RawModule(code=code, name_expressions=(expression,)).get_function(expression)
        found = device.cupy.zeros((size + 1,), np.float64)
        words = device.cupy.asarray(row.view(np.uint32))
        function((1,), (1,), (found, words, launch.geometry(GatherGeometry(*values))))
        assert found.get().tolist() == [*flat, *table, row.dtype.itemsize]


def test_a_table_in_pieces_arrives():
    """They are arguments of launches, of up to 3,584 bytes."""
    from pydeform.cuda.gather import launches, plan

    for samples in (1, 9, 63, 64, 65, 300):
        table = SampleTable([(3, 4), (2, 5)], np.arange(samples) * 2 // samples)
        gathering = _gather_geometry.Gather(None, table)  # type: ignore[arg-type]
        maps = len(np.unique(table.level))
        for dtype in (np.float32, np.float64):
            with device.settings(check=True):
                found = launches.table_of(gathering, np.dtype(dtype)).get().view(plan.row_type(dtype))
            assert len(found) == samples + maps
            np.testing.assert_array_equal(found["size"][:samples].T, table.size)
            np.testing.assert_array_equal(found["number"][:samples], table.number)
            np.testing.assert_array_equal(found["scale"][:samples].T, table.scale)
            np.testing.assert_array_equal(
                found["first_cell"], [0] * (samples - samples // 2) + [20] * (samples // 2) + [0, 20][:maps]
            )


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_nothing_has_the_size_of_all_locations(monkeypatch, dtype, deterministic):
    """From raw offsets and logits; sorted bins come within bounds of their own."""
    from pydeform.cuda.gather import gradients

    case = Attention(((2, 2), (1, 2)), (4, 4), 3, 1, 2, 40, references=(True, 4))
    problem = make("ms_deform_attn_fused", case, dtype)
    monkeypatch.setattr(gradients, "WORKSPACE", 1 << 10)
    taken = sizes_taken(monkeypatch)
    output = run(EMULATED, problem)
    run_backward(EMULATED, problem, needs=("value", "reference_points"), deterministic=deterministic)
    weights = problem.arrays["attention_logits"].size
    assert output.size in taken and problem.arrays["reference_points"].size in taken
    assert max(taken) < weights


@pytest.mark.parametrize(
    ("limit", "most", "text"),
    [
        (
            "MOST_CELLS",
            86,
            "at most 86 pixels of an image, with a row and a column more of each map on CUDA, got 87",
        ),
        ("MOST_COLUMNS", 7, "at most 7 columns in a map on CUDA, got 8"),
    ],
)
def test_what_an_int_cannot_count_is_refused(monkeypatch, limit, most, text):
    from pydeform.cuda.core import sizes
    from pydeform.cuda.gather import plan

    monkeypatch.setattr(sizes if hasattr(sizes, limit) else plan, limit, most)
    plan.check_size.cache_clear()
    problem = make("ms_deform_attn", "three_levels", "float32")
    try:
        for call in (run, run_backward):
            with pytest.raises(ValueError, match=text):
                call(EMULATED, problem)
    finally:
        plan.check_size.cache_clear()


def test_graphs_of_calls_that_were_never_made_before():
    """Nothing on the host is read later, nothing waits, and no memory comes from anywhere but the stream's pool."""
    from tests.cuda_emulation import streams

    problem = make("deform_aggregation", Aggregation((((3, 3),), ((2, 2),)), 2, 4), "float16")
    with streams.Stream(non_blocking=True) as stream:
        arrays = {n: device.cupy.asarray(a) for n, a in problem.numbers.items()}
        grad_output = device.cupy.asarray(problem.grad_output)

        def call() -> list[Any]:
            shapes = problem.arrays["spatial_shapes"]
            grads = pydeform.deform_aggregation_backward(grad_output, spatial_shapes=shapes, **arrays)
            return [pydeform.deform_aggregation(spatial_shapes=shapes, **arrays), *grads]

        want = [a.get() for a in call()]
        stream.begin_capture(streams.GLOBAL)
        captured = call()
        stream.end_capture()
    for got, array in zip(captured, want, strict=True):
        assert_same_bits(got.get(), array)


@pytest.mark.parametrize("dtype, channels", [("float16", 16), ("float32", 8), ("float64", 4), ("bfloat16", 32)])
@pytest.mark.parametrize("operator", ["ms_deform_attn_fused", "deform_aggregation", "dcnv4"])
def test_channels_are_read_and_written_in_whole_sectors(operator, dtype, channels):
    """Of 32 bytes: pixels, gradients, outputs, and what is added to pixels."""
    cases = {
        "ms_deform_attn_fused": Attention(((4, 4), (4, 2)), (2, 2), 4, channels, 1, 8),
        "deform_aggregation": Aggregation((((4, 4),), ((4, 2),)), 4, channels, 1, 8),
        "dcnv4": Dcn((5, 4), 4, channels, batch=1),
    }
    problem = make(operator, cases[operator], dtype)
    with device.settings(check=True, profile=True) as counted:
        both(problem)
    requests = dict.fromkeys(("read", "write", "atomic"), 0)
    for (line, kind, memory), count in counted.counters().items():
        if line.startswith("core/words.cuh:") and memory == "global":
            assert count.sectors == count.least_sectors, (line, kind, count)
            requests[kind] += count.requests
    assert all(requests.values()) and requests["read"] > 50


def test_points_that_no_camera_sees_are_not_read():
    """Most are such: neither pixels nor gradients are loaded for them, and lanes do not go through them."""
    problem = make("deform_aggregation", Aggregation((((4, 4), (2, 2)), ((4, 2), (1, 1))), 2, 32, 1, 8, 8), "float16")

    def requests(places: np.ndarray) -> tuple[int, int]:
        with device.settings(check=True, profile=True) as counted:
            moved = problem.replaced(sampling_locations=places)
            run(EMULATED, moved)
            run_backward(EMULATED, moved, needs=("sampling_locations", "weights"))
        found = counted.counters().items()
        return tuple(
            sum(count.requests for (line, kind, _), count in found if line.startswith("core/words") and kind == which)
            for which in ("read", "write")
        )

    inside = np.full_like(problem.arrays["sampling_locations"], 0.5)
    outside, one = np.full_like(inside, 1.5), np.full_like(inside, 1.5)
    one[:, :, 0, 0] = 0.5
    (all_reads, writes), (few_reads, _), none = requests(inside), requests(one), requests(outside)
    assert none == (0, writes) and writes > 0
    assert 0 < few_reads < all_reads / 2


def test_every_operator_has_cases_here():
    assert (
        set(OPERATORS)
        == set(CASES) - set(grid.CASES)
        == {operator for operator, _ in LARGE.values()} | {"ms_deform_attn"}
    )
