"""Convolutions over one and three axes, and active ones, on the emulated device: each way that a problem can take.

What two axes share with them is in test_cuda_convolution.py, test_cuda_direct.py and test_cuda_gather.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.cases.axes import GRADS, Case, expected, make
from tests.conftest import needs_emulation
from tests.test_cuda_convolution import EMULATED, assert_near, on

pytestmark = needs_emulation
SCHEDULES = (0, 1, 5)

LINE = Case(2, 20, (23,), 9, (3,), (2,), ((1, 2),), (2,), offset_groups=5)
VOLUME = Case(2, 16, (3, 4, 5), 10, (2, 1, 2), (1, 2, 1), ((1, 0), (0, 1), (1, 1)), (1, 1, 2), 2, 4, boundary="dcnv1")
ACTIVE = Case(2, 24, (5, 6), 7, (2, 3), (1, 2), ((1, 0), (1, 1)), (1, 1), offset_groups=3, kind="active")
PLAIN_LINE = LINE._replace(kind="plain", groups=1, offset_groups=1)
PLAIN_VOLUME = VOLUME._replace(kind="plain", offset_groups=1, stride=(2, 1, 3), padding=((1, 1), (0, 1), (2, 1)))
# One unit across several tiles of channels: an offset group that is summed when the next begins.
LONG = Case(1, 160, (4, 5), 6, (1, 2), (1, 1), ((0, 0), (1, 0)), (1, 1), offset_groups=2, kind="active")


@pytest.fixture(params=["tiles", "direct"])
def way(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    choose(monkeypatch, request.param)
    return str(request.param)


def choose(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    from pydeform.cuda import _conv_common

    monkeypatch.setattr(_conv_common, "DIRECT_CHANNELS", {"tiles": 1, "direct": 1 << 30}[way])


def solve(case: Case, arrays: dict[str, Any], needs: Any = GRADS, **how: Any) -> dict[str, Any]:
    """The output and every gradient."""
    from pydeform.cuda import conv

    sent = {name: EMULATED.array(a) for name, a in arrays.items()}
    given, g = (*(sent[name] for name in GRADS),), case.geometry
    input, offset, weight, bias, mask = given
    output = conv.forward(input, offset, weight, bias, mask, g)
    grads = conv.backward(sent["grad_output"], input, offset, weight, bias, mask, g, frozenset(needs), **how)
    found = {"output": output, **grads}
    return {name: EMULATED.numpy(a) for name, a in found.items() if a is not None}


def float32_offsets(arrays: dict[str, Any]) -> dict[str, Any]:
    return {**arrays, "offset": arrays["offset"].astype(np.float32)}


# Every way ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "capability", "dtype"),
    [
        (LINE, "90", "float32"),
        (LINE, "80", "bfloat16"),
        (VOLUME, "90", "float16"),
        (VOLUME, "80", "float32"),
        (VOLUME, "75", "float64"),
        (ACTIVE, "90", "float16"),
        (ACTIVE, "75", "float64"),
        (LONG, "90", "float16"),
        (PLAIN_LINE, "80", "float32"),
        (PLAIN_VOLUME, "90", "float16"),
    ],
    ids=lambda value: f"{value.kind}{len(value.kernel)}" if isinstance(value, Case) else value,
)
def test_by_tiles(emulated, monkeypatch, case, capability, dtype):
    choose(monkeypatch, "tiles")
    arrays = make(case, dtype)
    if (case, dtype) == (VOLUME, "float16"):
        arrays = float32_offsets(arrays)
    with on(capability=capability, check=dtype != "float32", schedule=5):
        for deterministic in (False, True):
            assert_near(solve(case, arrays, deterministic=deterministic), expected(case), dtype)
