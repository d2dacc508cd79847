"""Backends, tolerances and the comparer that every test uses."""

from __future__ import annotations

import importlib.util
import os
from typing import Any, NamedTuple

import hypothesis
import numpy as np
import pytest

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


def assert_close(got: Any, want: np.ndarray, dtype: str, what: str = "") -> None:
    """`got` has this dtype and equals the float64 `want` as nearly as the dtype allows, NaN where it has NaN."""
    assert got.dtype.name == dtype, f"{what}: dtype {got.dtype.name}, want {dtype}"
    tolerance = TOLERANCE[dtype]
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
    """Equal shape, dtype and bytes; unlike ==, this tells 0.0 from -0.0 and lets NaN equal itself."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype), what
    assert got.tobytes() == want.tobytes(), f"{what}: bits differ, by up to {np.abs(got - want).max(initial=0)}"


class Backend(NamedTuple):
    """Where arrays live during a test. Tests make NumPy arrays, send them there and take results back."""

    name: str

    def array(self, a: Any) -> Any:
        if a is None or self.name == "cpu":
            return a
        import cupy

        return cupy.asarray(a)

    def numpy(self, a: Any) -> Any:
        return a if a is None or self.name == "cpu" else a.get()


def _available(name: str) -> bool:
    if name == "cpu":
        return True
    if importlib.util.find_spec("cupy") is None or importlib.util.find_spec("pydeform.cuda.deform_conv2d") is None:
        return False
    import cupy

    return cupy.is_available()


def _backends() -> list[str]:
    """Those that PYDEFORM_TEST_BACKENDS names, all of which must be there, or else whatever this machine has."""
    asked = os.environ.get("PYDEFORM_TEST_BACKENDS")
    if asked is None:
        return [name for name in ("cpu", "cuda") if _available(name)]
    names = [name.strip() for name in asked.split(",") if name.strip()]
    for name in names:
        if name not in ("cpu", "cuda"):
            raise pytest.UsageError(f"PYDEFORM_TEST_BACKENDS: must be cpu, cuda or cpu,cuda, got {asked!r}")
        if not _available(name):
            raise pytest.UsageError(f"PYDEFORM_TEST_BACKENDS={asked}: {name} is not available here")
    return names


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        names = _backends()
        metafunc.parametrize("backend", [Backend(name) for name in names], ids=names, scope="session")
