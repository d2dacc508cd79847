"""Backends, tolerances and the comparer that every test uses."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import hypothesis
import numpy as np
import pytest

from tests import draw

hypothesis.settings.register_profile("pydeform", derandomize=True, max_examples=20, deadline=None, database=None)
hypothesis.settings.load_profile("pydeform")


class Tolerance(NamedTuple):
    """|got - want| <= relative * |want| + of_largest * max(|want|)."""

    relative: float
    of_largest: float


# Half types sum in float32, so all that remains is the rounding of the result: at most half a unit in its last place
# (2**-11 and 2**-8 relative), the second column is the float32 sum.
TOLERANCE = {
    "float64": Tolerance(1e-12, 1e-13),
    "float32": Tolerance(5e-6, 3e-6),
    "float16": Tolerance(2**-11 * 1.01, 1e-5),
    "bfloat16": Tolerance(2**-8 * 1.01, 1e-5),
}


# Tiles on CUDA round each sample to the half type before the tensor cores multiply it: half a unit in its last place
# for each term of a sum, which is within that of the largest sum.
TOLERANCE_OF_TILES = {
    **TOLERANCE,
    "float16": Tolerance(2**-11 * 1.01, 2**-11),
    "bfloat16": Tolerance(2**-8 * 1.01, 2**-8),
}
_tolerance = TOLERANCE  # of the backend that the running test is on


def tolerance_of(backend: str, is_convolution: bool) -> dict[str, Tolerance]:
    if backend.endswith("_tiles"):
        return TOLERANCE_OF_TILES
    if backend == "cpu" and is_convolution:
        from pydeform.cpu.core import pair_products

        if pair_products.pair_dtype() is not None:  # this processor multiplies samples in bfloat16 too
            return {**TOLERANCE, "bfloat16": TOLERANCE_OF_TILES["bfloat16"]}
    return TOLERANCE


def assert_close(got: Any, want: np.ndarray, dtype: str, what: str = "") -> None:
    """`got` has this dtype and equals the float64 `want` as nearly as the dtype allows, NaN where it has NaN."""
    assert got.dtype.name == dtype, f"{what}: dtype {got.dtype.name}, want {dtype}"
    tolerance = _tolerance[dtype]
    finite = np.abs(want[np.isfinite(want)])
    largest = float(finite.max()) if finite.size else 0.0
    np.testing.assert_allclose(
        got.astype(np.float64),
        want,
        rtol=tolerance.relative,
        atol=tolerance.of_largest * largest,
        err_msg=what,
        equal_nan=True,
    )


def assert_same_bits(got: Any, want: Any, what: str = "") -> None:
    """Equal shape, dtype and bytes; unlike ==, this tells 0.0 from -0.0 and lets NaN equal itself.

    The bytes are nothing for `assert`: where `CI` is set, pytest would look for their shortest difference, which takes
    it half an hour for some thousand of them.
    """
    assert (got.shape, got.dtype) == (want.shape, want.dtype), what
    numbers = [np.frombuffer(a.tobytes(), f"V{got.dtype.itemsize}") for a in (got, want)]
    differ = np.flatnonzero(numbers[0] != numbers[1])
    if differ.size:
        first = tuple(int(i) for i in np.unravel_index(differ[0], got.shape))
        raise AssertionError(f"{what}: bits differ, of {differ.size} of {got.size} numbers, the first at {first}")


class Backend(NamedTuple):
    """Where arrays live during a test. Tests make NumPy arrays, send them there and take results back.

    "cuda" is a device, "emulated" the same kernels and launches on tests/cuda_emulation. Each comes twice: with
    "_tiles" every convolution goes through the kernels for many channels, with "_direct" through those for few.
    """

    name: str

    @property
    def on_cpu(self) -> bool:
        return self.name == "cpu"

    def array(self, a: Any) -> Any:
        if a is None or self.on_cpu:
            return a
        import cupy

        return cupy.asarray(a)

    def numpy(self, a: Any) -> Any:
        return a if a is None or self.on_cpu else a.get()


# Parts of the names of tests of operators that gather: on CUDA they go one way, however many channels there are.
GATHER = ("attn", "aggregation", "dcnv", "grid", "warp", "properties_gather", "vectors_gather", "errors_gather")
KINDS = ("cpu", "cuda", "emulated")
WAYS = {"_direct": 1 << 30, "_tiles": 1}  # fewest channels of a group that go through tiles


def _missing(kind: str) -> str:
    """Why this machine has no such backend; empty: it has."""
    if kind == "emulated":
        return "" if shutil.which("g++") else "no g++ that compiles the kernels"
    if kind == "cuda":
        if importlib.util.find_spec("cupy") is None:
            return "CuPy is not installed"
        import cupy

        return "" if cupy.is_available() else "CuPy finds no device"
    return ""


@functools.cache
def _kinds() -> tuple[str, ...]:
    """Those that PYDEFORM_TEST_BACKENDS names, all of which must be there, or else whatever this machine has."""
    asked = os.environ.get("PYDEFORM_TEST_BACKENDS")
    if asked is None:
        return "cpu", *[kind for kind in ("cuda", "emulated") if not _missing(kind)][:1]
    kinds = tuple(name.strip() for name in asked.split(",") if name.strip())
    for kind in kinds:
        if kind not in KINDS:
            raise pytest.UsageError(f"PYDEFORM_TEST_BACKENDS: must be some of {', '.join(KINDS)}, got {asked!r}")
        if _missing(kind):
            raise pytest.UsageError(f"PYDEFORM_TEST_BACKENDS={asked}: no {kind} here: {_missing(kind)}")
    return kinds


def pytest_report_header() -> str:
    missing = [f"{kind} ({_missing(kind)})" for kind in KINDS if kind not in _kinds() and _missing(kind)]
    drawn = f"; drawn by {os.environ[draw.VARIABLE]}" if os.environ.get(draw.VARIABLE) else ""
    return f"backends: {', '.join(_kinds())}" + (f"; not here: {', '.join(missing)}" if missing else "") + drawn


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        gathers = any(part in metafunc.module.__name__ for part in GATHER)
        names = [kind + way for kind in _kinds() for way in ([""] if kind == "cpu" or gathers else WAYS)]
        metafunc.parametrize("backend", [Backend(name) for name in names], ids=names, scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seed = os.environ.get(draw.VARIABLE)
    if seed:
        items[:], others = draw.split(items, seed)
        config.hook.pytest_deselected(items=others)


# Modules that have had CuPy itself since tests were collected, and would keep it in tests on the emulated device.
HOLDERS_OF_CUPY = pytest.StashKey[list[str]]()


def pytest_collection_finish(session: pytest.Session) -> None:
    holders = [name for name, module in sys.modules.items() if name.startswith("pydeform.") and hasattr(module, "cupy")]
    session.config.stash[HOLDERS_OF_CUPY] = holders


# Tests that choose what device they run on. One process has either CuPy or its stand-in.
needs_emulation = pytest.mark.skipif(
    "emulated" not in _kinds(), reason="not on the emulated device (PYDEFORM_TEST_BACKENDS=cpu,emulated chooses it)"
)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """`import cupy` gives the emulated device."""
    _emulate(monkeypatch)


def _emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.cuda_emulation import device

    for module in device.stand_ins.values():
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(device.build.cache_folder()))


def sizes_taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of the arrays that are made on the device from now on."""
    import cupy

    taken: list[int] = []
    for name in ("empty", "zeros", "empty_like", "zeros_like"):
        make_array = getattr(cupy, name)

        def record(*args: Any, make_array: Any = make_array, **kwargs: Any) -> Any:
            array = make_array(*args, **kwargs)
            taken.append(array.size)
            return array

        monkeypatch.setattr(cupy, name, record)
    return taken


@pytest.fixture(autouse=True)
def _on_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test's backend needs around it."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    name = params["backend"].name if "backend" in params else "cpu"
    if name.startswith("emulated"):
        _emulate(monkeypatch)
    for way, most_channels in WAYS.items():
        if name.endswith(way):
            from pydeform.cuda.core import sizes

            monkeypatch.setattr(sizes, "DIRECT_CHANNELS", most_channels)
    if "backend" in params:
        gathers = any(part in request.node.module.__name__ for part in GATHER)
        is_convolution = "roi" not in request.node.nodeid and not gathers
        monkeypatch.setattr("tests.conftest._tolerance", tolerance_of(name, is_convolution))


def map_arrays(function: Callable[[np.ndarray], Any], value: Any) -> Any:
    """The arguments of a kernel with another array for each, in tuples as well."""
    if isinstance(value, np.ndarray):
        return function(value)
    if isinstance(value, tuple):
        items = [map_arrays(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def arrays_in(value: Any) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    map_arrays(found.append, value)
    return found


def take_no_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every workspace is new, so that what a test fills fresh memory with is what kernels get."""
    from pydeform.cpu.core import memory

    monkeypatch.setattr(memory.Workspace, "take", lambda workspace: memory.workspace(*workspace._parts))


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workspace and results are full of NaN before the CPU's kernels start."""
    from pydeform.cpu.core import memory

    def poisoned(size: int, make: Any = memory._aligned) -> Any:
        block, origin = make(size)
        block[...] = 0xFF
        return block, origin

    take_no_spare(monkeypatch)
    monkeypatch.setattr(memory, "_aligned", poisoned)


class Threads:
    """set_num_threads of a test in which no problem is too small for threads."""

    def __init__(self, run: Callable[..., None]) -> None:
        # All threads of a call begin at the same time, which helpers need not. Else the helpers that there are help.
        self.together = True
        self._run, self._calls, self._before = run, 0, times_helped()

    def __call__(self, count: int) -> None:
        import pydeform

        pydeform.set_num_threads(count)

    def run(self, kernel: Any, key: Any, threads: int, *arguments: Any) -> None:
        import pydeform

        assert threads > 1 or pydeform.get_num_threads() == 1, f"{kernel.call.__name__} runs on one thread"
        if not self.together or threads == 1:
            self._run(kernel, key, threads, *arguments)
            return
        call, start = kernel.prepare(key, (0, *arguments)), threading.Barrier(threads)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda thread: start.wait(60) or call(thread, *arguments), range(threads)))
        self._calls += 1

    def had_others(self) -> bool:
        return self._calls > 0 or times_helped() > self._before


def times_helped() -> int:
    """How often a helper has had a part in a call."""
    from pydeform.cpu.core import parallel

    return sum(int(helper.place[parallel._DONE]) for helper in parallel._helpers)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Threads]:
    import pydeform
    from pydeform.cpu.conv import plan as conv_plan
    from pydeform.cpu.core import parallel
    from pydeform.cpu.gather import plan as gather_plan
    from pydeform.cpu.grid import plan as grid_plan
    from pydeform.cpu.roi import plan as roi_plan

    for module in conv_plan, gather_plan, grid_plan, roi_plan:
        monkeypatch.setattr(module, "SERIAL_FLOPS", 0)
    threads = Threads(parallel.run)
    monkeypatch.setattr(parallel, "run", threads.run)
    before = pydeform.get_num_threads()
    yield threads
    pydeform.set_num_threads(before)
    assert threads.had_others(), "no other thread had a part in this test of threads"
