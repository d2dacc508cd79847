"""Kernels wait for the work of other threads wherever they need it. x86 and luck hide a wait that is missing, so here
another thread has claimed work and does not finish it: the kernel must wait for as long as that takes."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import math
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numba import types

import pydeform
from pydeform.cpu.conv import backward_kernel as conv_backward
from pydeform.cpu.core import memory, parallel
from pydeform.cpu.core.jit import Kernel, inline
from pydeform.cpu.roi import plan as roi_plan
from tests.cases.deform_conv2d import Case, make, make_grad_output
from tests.conftest import assert_same_bits, map_arrays, take_no_spare
from tests.test_roi import VARIANTS, problem, wide

FOLDER = Path(parallel.__file__).parents[1]
NAMES = [".".join(path.relative_to(FOLDER).with_suffix("").parts) for path in sorted(FOLDER.rglob("[!_]*.py"))]
MODULES = [importlib.import_module(f"pydeform.cpu.{name}") for name in NAMES]
FAR = 1 << 40  # units: more than any phase has
PAUSE = 0.1  # seconds that a kernel gets to go on although it should wait: one that waits right is never too slow


# Problems that enter every phase of the kernels -------------------------------------------------------------------


def convolve(case: Case) -> None:
    arrays = make(case, "float32")
    pydeform.deform_conv2d(**arrays, **case.options)


def convolve_backward(case: Case) -> None:
    arrays, grad_output = make(case, "float32"), make_grad_output(case, "float32")
    pydeform.deform_conv2d_backward(grad_output, **arrays, **case.options)


def pool(name: str, channels: Callable[[Any], Any]) -> None:
    variant = channels(VARIANTS[name])
    arrays, _ = problem(variant, "float32")
    getattr(pydeform, variant.operator)(**arrays, **variant.options)


def pool_backward(name: str, channels: Callable[[Any], Any]) -> None:
    variant = channels(VARIANTS[name])
    arrays, grad_output = problem(variant, "float32", corners=CROWD)
    getattr(pydeform, f"{variant.operator}_backward")(grad_output, **arrays, **variant.options)


def as_it_is(variant: Any) -> Any:
    return variant


def gathered() -> dict[str, Any]:
    rng = np.random.default_rng(3)
    arrays = {"input": rng.standard_normal((2, 30, 30, 64)), "offset_mask": rng.standard_normal((2, 30, 30, 112))}
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def gather() -> None:
    pydeform.dcnv4(**gathered(), groups=4)


def gather_backward() -> None:
    arrays = gathered()
    pydeform.dcnv4_backward(np.ones_like(arrays["input"]), **arrays, groups=4)


def sampled() -> dict[str, Any]:
    rng = np.random.default_rng(4)
    arrays = {"input": rng.standard_normal((2, 40, 50, 60)), "grid": rng.uniform(-1.2, 1.2, (2, 90, 100, 2))}
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def sample() -> None:
    pydeform.grid_sample(**sampled())


def sample_backward() -> None:
    pydeform.grid_sample_backward(np.ones((2, 40, 90, 100), np.float32), **sampled())


def move_boxes(name: str) -> None:
    variant = wide(VARIANTS[name])
    arrays, grad_output = problem(variant, "float32", corners=CROWD)
    getattr(pydeform, f"{variant.operator}_backward")(grad_output, **arrays, **variant.options, needs=("boxes",))


CROWD = [(0.625, 1.375, 4.875, 4.125), (-1.75, 2.25, 3.125, 7.375)] * 20  # boxes for which a copy of the image pays
DENSE = Case(2, 80, 14, 15, 18, (3, 3), padding=((1, 1), (1, 1)), groups=1, offset_groups=1)
DEPTHWISE = Case(2, 140, 16, 15, 140, (2, 2), groups=140, offset_groups=2)

# Name, the kernel that it runs, the problem.
PROBLEMS = {
    "dense": ("_forward", functools.partial(convolve, DENSE)),
    "depthwise": ("_forward", functools.partial(convolve, DEPTHWISE)),
    "dense backward": ("_backward", functools.partial(convolve_backward, DENSE)),
    "depthwise backward": ("_backward", functools.partial(convolve_backward, DEPTHWISE)),
    "mean": ("_mean", functools.partial(pool, "deform_roi_pool", wide)),
    "largest pixel": ("_largest", functools.partial(pool, "roi_pool", wide)),
    "largest point": ("_largest", functools.partial(pool, "roi_align_max", wide)),
    "few": ("_planes", functools.partial(pool, "roi_align_aligned", as_it_is)),
    "mean backward": ("_mean_backward", functools.partial(pool_backward, "deform_roi_pool", wide)),
    "largest backward": ("_largest_backward", functools.partial(pool_backward, "roi_pool", wide)),
    "boxes of means": ("_edges_of_means", functools.partial(move_boxes, "roi_align_aligned")),
    "boxes of the largest": ("_edges_of_largest", functools.partial(move_boxes, "roi_align_max")),
    "grid": ("sample", sample),
    "grid backward": ("sample_backward", sample_backward),
    "gather": ("gather", gather),
    "gather backward": ("gather_backward", gather_backward),
    "few backward": ("_planes_backward", functools.partial(pool_backward, "deform_psroi_pool_parts", as_it_is)),
}


class Call(NamedTuple):
    kernel: Kernel
    arguments: tuple[Any, ...]  # without the number of the thread

    def fresh(self) -> Call:
        """With arrays of its own: as they were before the first call."""
        return self._replace(arguments=map_arrays(np.copy, self.arguments))

    @property
    def counters(self) -> np.ndarray:
        return self.arguments[0]

    def run(self, thread: int, counters: np.ndarray | None = None) -> None:
        self.kernel.call(thread, self.counters if counters is None else counters, *self.arguments[1:])


@pytest.fixture(params=PROBLEMS)
def call(request, monkeypatch) -> Call:
    """What a problem would call, with a workspace and results full of NaN."""
    name, run = PROBLEMS[request.param]
    calls = []

    def poisoned(*parts: Any, make: Any = memory.workspace) -> Any:
        arrays = make(*parts)
        for array in arrays:
            array.view(np.uint8)[...] = 0xFF
        return arrays

    def keep(kernel: Kernel, key: Any, threads: int, *arguments: Any) -> None:
        kernel.prepare(key, (0, *arguments))
        assert threads == 2
        calls.append(Call(kernel, map_arrays(np.copy, arguments)))

    take_no_spare(monkeypatch)
    for module in MODULES:
        for attribute, value in (("workspace", poisoned), ("SERIAL_FLOPS", 0)):
            if hasattr(module, attribute):
                monkeypatch.setattr(module, attribute, value)
    monkeypatch.setattr(roi_plan, "SLICE_CHANNELS", 8)  # several slices, which take turns in the same memory
    monkeypatch.setattr(roi_plan, "SLICE_BYTES", 1)
    monkeypatch.setattr(parallel, "run", keep)
    monkeypatch.setattr(parallel, "get_num_threads", lambda: 2)
    roi_plan._kept.cache_clear()
    try:
        run()
    finally:
        roi_plan._kept.cache_clear()
    (call,) = calls
    assert call.kernel.call.__name__ == name
    return call


def claimed(phase: int) -> int:
    return 2 * phase * parallel._STRIDE + parallel._CLAIMED * parallel._STRIDE


def finished(phase: int) -> int:
    return 2 * phase * parallel._STRIDE + parallel._FINISHED * parallel._STRIDE


def phases_of(call: Call) -> list[int]:
    """Those in which a plain run has something to do."""
    alone = call.fresh()
    alone.run(0)
    phases = [p for p in range(phases_with_room(call)) if alone.counters[finished(p)]]
    assert phases == list(range(phases_with_room(call)))  # there is work for all
    return phases


def phases_with_room(call: Call) -> int:
    return 3 if call.kernel is conv_backward._backward else call.counters.size // parallel.own_counters(1)


class Running:
    """A call in a thread."""

    def __init__(self, call: Call) -> None:
        self._errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._thread.start()

    def _run(self, call: Call) -> None:
        try:
            call.run(0)
        except BaseException as error:
            self._errors.append(error)

    def reach(self, condition: Callable[[], bool]) -> None:
        """Come to where it should wait, and stay there."""
        until = time.monotonic() + 60
        while not condition():
            assert self._thread.is_alive(), f"the kernel has ended: {self._errors}"
            assert time.monotonic() < until, "the kernel does not come to where it should wait"
            self._thread.join(0.001)
        self._thread.join(PAUSE)
        assert self._thread.is_alive(), "the kernel does not wait for what another thread has claimed"

    def end(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive(), "the kernel waits although all is done"
        assert not self._errors, self._errors


def test_a_kernel_waits_for_every_phase(call):
    """All units of a phase are another thread's, which begins when the kernel waits; the results are those of one."""
    want = call.fresh()
    want.run(0)
    for phase in phases_of(call):
        got = call.fresh()
        got.counters[claimed(phase)] = FAR
        running = Running(got)
        running.reach(lambda got=got, phase=phase: got.counters[claimed(phase)] > FAR)
        others = np.full_like(got.counters, FAR)  # the other phases: all claimed, all finished
        others[claimed(phase) : claimed(phase + 1)] = 0
        others[parallel.own_counters(phases_with_room(call)) :] = 0  # nor has it helpers
        got.run(1, others)
        assert others[finished(phase)] == want.counters[finished(phase)] > 0
        got.counters[finished(phase)] = others[finished(phase)]
        running.end()
        expected = results_of(want)
        for name, array in results_of(got).items():
            assert_same_bits(array, expected[name], f"{name} where phase {phase} is another thread's")


def results_of(call: Call) -> dict[str, np.ndarray]:
    """What the call is for, by names."""
    code = call.kernel.call.py_func.__code__
    names = code.co_varnames[2 : code.co_argcount]  # behind the thread and the counters
    arguments = dict(zip(names, call.arguments[1:], strict=True))
    if isinstance(arguments.get("grads"), tuple):
        arguments |= {f"grad_{name}": a for name, a in arguments["grads"]._asdict().items() if name != "output"}
    found = {name: a for name, a in arguments.items() if name in RESULTS}
    assert found
    return found


RESULTS = {"output", "grad_input", "grad_offset", "grad_moves", "grad_mask", "grad_weight", "grad_bias"}
RESULTS |= {"grad_value", "grad_locations", "grad_weights", "grad_boxes", "grad_grid"}


@pytest.mark.parametrize("call", ["dense backward", "depthwise backward"], indirect=True)
def test_sums_over_blocks_wait_for_the_block_before(call):
    """The first block is another thread's. It says how far it has come, and what it has left is there to add to."""
    tables, geometry, plan = call.arguments[-3:]
    blocks = tables.blocks
    taps = math.prod(geometry.kernel)
    assert list(blocks["previous"][:2]) == [-1, 0] and plan.splits == geometry.batch > 1 and plan.tiles > 1
    got = call.fresh()
    own, units = parallel.own_counters(3), plan.splits * len(blocks)
    assert plan.pieces == 1
    progress = got.counters[own:]  # of the first image's blocks
    offsets = results_of(got)["grad_offset"]
    got.counters[claimed(1)] = 1
    running = Running(got)
    for step in range(plan.tiles * taps):
        running.reach(lambda step=step: got.counters[claimed(1)] > 1 and progress[1] >= step)
        assert progress[1] == step and got.counters[finished(1)] == 0
        tile, tap = divmod(step, taps)
        offsets[0, 0, tap, :, tile * plan.positions : (tile + 1) * plan.positions] = 1e6
        progress[0] += 1
    running.reach(lambda: got.counters[claimed(1)] == units + 1 and got.counters[finished(1)] == units - 1)
    got.counters[finished(1)] += 1
    running.end()
    assert (offsets[0, 0] > 1e5).all() and (offsets[0, 0] != 1e6).mean() > 0.8


# No kernel, phase or order is forgotten ---------------------------------------------------------------------------


def test_every_kernel_is_here():
    found = {name: value for module in MODULES for name, value in vars(module).items() if isinstance(value, Kernel)}
    kernels = {
        name for name, kernel in found.items() if next(iter(inspect.signature(kernel.call).parameters)) == "thread"
    }
    assert len(found) - len(kernels) == 2  # conversions, in one thread
    assert kernels == {kernel for kernel, _ in PROBLEMS.values()}


def calls_in_functions() -> dict[str, dict[str, list[str]]]:
    """By function: the phase, or the counter, that each primitive of threads is called for."""
    found: dict[str, dict[str, list[str]]] = {}
    for path in FOLDER.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                for node in ast.walk(function):
                    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in PRIMITIVES:
                        of_function = found.setdefault(function.name, {name: [] for name in PRIMITIVES})
                        of_function[node.func.id].append(ast.unparse(node.args[1]))
    return found


PRIMITIVES = ("claim", "claim_near", "finish", "wait_for", "advance_counter", "wait_until")


def test_kernels_call_their_helpers_first_and_let_them_go_last():
    kernels = {
        name: kernel for module in MODULES for name, kernel in vars(module).items() if isinstance(kernel, Kernel)
    }
    for name in {kernel for kernel, _ in PROBLEMS.values()}:
        (function,) = ast.parse(inspect.getsource(kernels[name].call.py_func)).body
        statements = function.body[1:] if ast.get_docstring(function) else function.body
        assert ast.unparse(statements[0]) == "call_helpers(thread, counters)", name
        assert ast.unparse(statements[-1]) == "let_helpers_go(thread, counters)", name
        assert not any(isinstance(node, ast.Return | ast.Raise) for node in ast.walk(function)), name


def test_no_part_of_a_kernel_raises():
    """Else a call would end while its helpers use the caller's arrays."""
    compiled = [
        function
        for path in FOLDER.rglob("*.py")
        for function in ast.parse(path.read_text()).body
        if isinstance(function, ast.FunctionDef)
        and {"inline", "inline_always", "Kernel"} & {getattr(by, "id", "") for by in function.decorator_list}
    ]
    assert len(compiled) > 100
    for function in compiled:
        assert not any(isinstance(node, ast.Raise | ast.Assert) for node in ast.walk(function)), function.name


def test_every_phase_is_claimed_finished_and_waited_for():
    """`wait_until` is tested above for one kernel: whoever calls it elsewhere writes that test for it."""
    functions = calls_in_functions()
    assert len(functions) > 8
    for name, calls in functions.items():
        claims = {*calls["claim"], *calls["claim_near"]}
        assert claims == set(calls["finish"]) == set(calls["wait_for"]), name
        assert len(calls["wait_for"]) == len(set(calls["wait_for"])), name
    assert {name for name, calls in functions.items() if calls["wait_until"] or calls["advance_counter"]} == {
        "_block_of_tile"
    }


ORDERS = {
    "claim": (parallel.claim, 0, "count"),
    "claim_near": (parallel.claim_near, 2, "count"),
    "finish": (parallel.finish, 0, "count"),
    "wait_for": (parallel.wait_for, 1, "wait"),
    "advance_counter": (parallel.advance_counter, 0, "count"),
    "wait_until": (parallel.wait_until, 1, "wait"),
}


@pytest.mark.parametrize("name", PRIMITIVES)
def test_memory_orders(name):
    """Who waits for a unit sees what was written before it was finished, on machines that order less than x86, too."""
    primitive, values, kind = ORDERS[name]
    functions = (
        lambda counters, index: primitive(counters, index),
        lambda counters, index, value: primitive(counters, index, value),
        lambda counters, index, value, other: primitive(counters, index, value, other),
    )
    function = inline(functions[values])
    function.compile((types.int64[::1], *[types.int64] * (1 + values)))
    (text,) = function.inspect_llvm().values()
    orders = re.findall(r"\b(acq_rel|acquire|release|seq_cst|monotonic|unordered)\b", text)
    counted = re.findall(r"atomicrmw add (?:i64\*|ptr) \S+ i64 1 acq_rel", text)
    waited = re.findall(r"load atomic i64, (?:i64\*|ptr) \S+ acquire, align 8", text)
    assert orders == (["acq_rel"] * len(counted) if kind == "count" else ["acquire"] * len(waited))
    assert len(counted if kind == "count" else waited) > 0


def test_memory_orders_of_calls():
    """A helper sees what it is called with, and the caller what it has done."""

    @Kernel
    def both(thread, counters):
        parallel.call_helpers(thread, counters)
        parallel.let_helpers_go(thread, counters)

    both.call.compile((types.int64, types.int64[::1]))
    (kernel,) = both.call.inspect_llvm().values()
    waiting = parallel._await_calls().library.get_llvm_str()
    pointer = r"(?:i64\*|ptr) \S+"
    for text, changes, stores in (
        (kernel, 2, {("called", "release")}),
        (waiting, 1, {(str(parallel._FREE), "release"), ("0", "seq_cst"), ("1", "seq_cst")}),
    ):
        found = re.findall(rf"cmpxchg {pointer}, i64 (\S+), i64 (\S+) acq_rel acquire", text)
        assert len({(old[0], new[0]) for old, new in found}) == changes
        stored = re.findall(rf"store atomic i64 (\S+), {pointer} (\w+), align 8", text)
        assert {("called" if value[0] == "%" else value, order) for value, order in stored} == stores
        loaded = re.findall(rf"load atomic i64, {pointer} acquire, align 8", text)
        assert text.count("cmpxchg") == len(found) and text.count("load atomic") == len(loaded) > 0
        assert text.count("store atomic") == len(stored)
    assert len(re.findall(rf"atomicrmw xchg {pointer}, i64 0 seq_cst", waiting)) == waiting.count("atomicrmw") == 1


def test_atomics_are_written_for_helpers_only():
    written = {
        path.name
        for path in FOLDER.rglob("*.py")
        if re.search(r"atomic_rmw|load_atomic|store_atomic|cmpxchg", path.read_text())
    }
    assert written == {"atomics.py", "parallel.py"}
