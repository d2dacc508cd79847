"""Convolutions over one and three axes, and active ones, on the emulated device: each way that a problem can take.

What two axes share with them is in test_cuda_convolution.py, test_cuda_direct.py and test_cuda_gather.py.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numpy as np
import pytest

from pydeform._geometry import BOUNDARIES, ConvArrays
from tests.cases.axes import GRADS, Case, expected, make, oracle
from tests.conftest import assert_same_bits, needs_emulation, sizes_taken
from tests.test_cuda_convolution import EMULATED, assert_near
from tests.test_cuda_convolution import on as emulated_device

pytestmark = needs_emulation
SCHEDULES = (0, 1, 5)

LINE = Case(2, 20, (23,), 9, (3,), (2,), ((1, 2),), (2,), offset_groups=5)
VOLUME = Case(2, 16, (3, 4, 5), 10, (2, 1, 2), (1, 2, 1), ((1, 0), (0, 1), (1, 1)), (1, 1, 2), 2, 4, boundary="dcnv1")
ACTIVE = Case(2, 24, (5, 6), 7, (2, 3), (1, 2), ((1, 0), (1, 1)), (1, 1), offset_groups=3, kind="active")
PLAIN_LINE = LINE._replace(kind="plain", groups=1, offset_groups=1)
PLAIN_VOLUME = VOLUME._replace(kind="plain", offset_groups=1, stride=(2, 1, 3), padding=((1, 1), (0, 1), (2, 1)))
# One unit across several tiles of channels: an offset group that is summed when the next begins.
LONG = Case(1, 160, (4, 5), 6, (1, 2), (1, 1), ((0, 0), (1, 0)), (1, 1), offset_groups=2, kind="active")


# All in the build that checks each access: a second one would take longer to compile than it saves.
on = functools.partial(emulated_device, check=True)


@pytest.fixture(params=["tiles", "direct"])
def way(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    choose(monkeypatch, request.param)
    return str(request.param)


def choose(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    from pydeform.cuda.core import sizes

    monkeypatch.setattr(sizes, "DIRECT_CHANNELS", {"tiles": 1, "direct": 1 << 30}[way])


def solve(case: Case, arrays: dict[str, Any], needs: Any = GRADS, **how: Any) -> dict[str, Any]:
    """The output and every gradient."""
    from pydeform.cuda import conv

    sent = {name: EMULATED.array(a) for name, a in arrays.items()}
    given, g = ConvArrays(*(sent[name] for name in GRADS)), case.geometry
    output = conv.forward(given, g)
    grads = conv.backward(sent["grad_output"], given, g, frozenset(needs), **how)
    found = {"output": output, **grads}
    return {name: EMULATED.numpy(a) for name, a in found.items() if a is not None}


def named(value: Any) -> str | None:
    return f"{value.kind}{len(value.kernel)}" if isinstance(value, Case) else None


def assert_nearly(got: dict[str, Any], want: dict[str, np.ndarray]) -> None:
    """As `assert_near` of float16, where some numbers are not finite."""
    where = {name: np.isfinite(array) for name, array in want.items()}
    for name, finite in where.items():
        np.testing.assert_array_equal(got[name][~finite].astype(float), want[name][~finite], err_msg=name)
    got = {name: np.where(where[name], array, 0) for name, array in got.items()}
    assert_near(got, {name: np.where(where[name], array, 0) for name, array in want.items()}, "float16")


def float32_offsets(arrays: dict[str, Any]) -> dict[str, Any]:
    return {**arrays, "offset": arrays["offset"].astype(np.float32)}


# Every way ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "capability", "dtype"),
    [
        (LINE, "80", "bfloat16"),
        (VOLUME, "90", "float16"),
        (VOLUME, "80", "float32"),
        (VOLUME, "75", "float64"),
        (ACTIVE, "90", "float16"),
        (ACTIVE, "75", "float64"),
        (LONG, "90", "float16"),
        (PLAIN_LINE, "90", "float16"),
        (PLAIN_VOLUME, "90", "float16"),
    ],
    ids=named,
)
def test_by_tiles(emulated, monkeypatch, case, capability, dtype):
    choose(monkeypatch, "tiles")
    arrays = make(case, dtype)
    if (case, dtype) == (VOLUME, "float16"):
        arrays = float32_offsets(arrays)
    with on(capability=capability, schedule=5):
        for deterministic in (False, True):
            assert_near(solve(case, arrays, deterministic=deterministic), expected(case), dtype)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (LINE, "float16"),
        (LINE, "float64"),
        (VOLUME, "float64"),
        (VOLUME, "float16"),
        (ACTIVE, "float64"),
        (ACTIVE, "float16"),
        (PLAIN_LINE, "float16"),
        (PLAIN_VOLUME, "float64"),
    ],
    ids=named,
)
def test_by_single_threads(emulated, monkeypatch, case, dtype):
    choose(monkeypatch, "direct")
    arrays = make(case, dtype)
    if (case.kind, dtype) == ("deform", "float16"):
        arrays = float32_offsets(arrays)
    with on(schedule=5):
        for deterministic in (False, True):
            assert_near(solve(case, arrays, deterministic=deterministic), expected(case), dtype)


# Where samples lie ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("axes", [1, 3])
def test_samples_on_every_border(emulated, way, axes, boundary):
    """Every multiple of 1/2 from two pixels before the image to two past it, in the corners of a volume too."""
    size = (5, 2, 3)[:axes]
    ranges = [np.arange(-2, length + 2, 0.5) for length in size]
    points = np.array(list(itertools.product(*ranges)))
    out = (len(points), *(1,) * (axes - 1))
    ones, none = (1,) * axes, ((0, 0),) * axes
    case = Case(1, 4, size, 3, ones, ones, none, ones, boundary=boundary)
    case = case._replace(padding=((0, out[0] - size[0]), *((0, 1 - length) for length in size[1:])))
    assert case.geometry.out_size == out
    arrays = make(case)
    regular = np.zeros((len(points), axes))
    regular[:, 0] = np.arange(len(points))
    arrays["offset"] = (points - regular).T.reshape(1, axes, *out)
    want = oracle(case, arrays)
    with on(capability="75"):
        for deterministic in (False, True):
            assert_near(solve(case, arrays, deterministic=deterministic), want, "float64")


NOWHERE = (np.nan, np.inf, -np.inf, 3e4, -3e4)


@pytest.mark.parametrize("case", [LINE, VOLUME._replace(boundary="torchvision")], ids=named)
def test_samples_that_are_nowhere(emulated, way, case):
    """A NaN along one axis is one for the gradients along all, and no pixel is read or given to."""
    arrays, rng = make(case, "float16"), np.random.default_rng(1)
    flat = arrays["offset"].reshape(-1)
    chosen = rng.permutation(flat.size)[:60]
    flat[chosen] = np.tile(NOWHERE, 12)
    with np.errstate(invalid="ignore"):
        want = oracle(case, arrays)
    assert np.isnan(want["offset"]).any() and np.isfinite(want["input"]).all()
    with on():
        for deterministic in (False, True):
            assert_nearly(solve(case, arrays, deterministic=deterministic), want)


def test_positions_that_are_nowhere(emulated, way):
    """Of an active convolution: all pixels read the same nothing; the other taps' gradients stay numbers."""
    arrays = make(ACTIVE, "float16")
    arrays["offset"][[3, 8, 14, 20, 27]] = NOWHERE
    with np.errstate(invalid="ignore"):
        want = oracle(ACTIVE, arrays)
    broken = np.isnan(want["offset"])
    assert list(np.flatnonzero(broken)) == [2, 3]
    with on():
        for deterministic in (False, True):
            assert_nearly(solve(ACTIVE, arrays, deterministic=deterministic), want)


@pytest.mark.parametrize("case", [LINE, VOLUME], ids=named)
def test_an_infinite_mask(emulated, way, case):
    """Multiplies the sample, not the weights of its corners."""
    arrays = make(case, "float16")
    arrays["mask"].reshape(-1)[::97] = np.inf
    with np.errstate(invalid="ignore"):
        want = oracle(case, arrays)
    assert np.isinf(want["output"]).any() and np.isinf(want["input"]).any()
    with on():
        assert_nearly(solve(case, arrays), want)


# Order, index types, needs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [LINE, VOLUME, ACTIVE], ids=named)
def test_the_same_bits_on_every_schedule(emulated, way, case):
    """Of all where asked; of an active convolution's offset always."""
    arrays = make(case, "float16")
    rng = np.random.default_rng(2)
    arrays["grad_output"] = rng.standard_normal(arrays["grad_output"].shape).astype(np.float16)
    results, asked = [], []
    for schedule in SCHEDULES:
        with on(schedule=schedule):
            results.append(solve(case, arrays))
            asked.append(solve(case, arrays, deterministic=True))
    for other, sorted in zip(results, asked, strict=True):
        for name in sorted:
            assert_same_bits(sorted[name], asked[0][name], name)
            if name != "input":
                assert_same_bits(other[name], results[0][name], name)


@pytest.mark.parametrize("case", [VOLUME, ACTIVE], ids=named)
def test_needs_change_no_bit(emulated, way, case, monkeypatch):
    """Also where the deterministic gradient of the input, and only that, would be computed in many parts."""
    from pydeform.cuda.conv import backward_tiles, direct

    monkeypatch.setattr(direct if way == "direct" else backward_tiles, "WORKSPACE", 6_000)
    arrays = make(case, "float16")
    with on():
        for deterministic in (False, True):
            every = solve(case, arrays, deterministic=deterministic)
            for needs in (("offset",), ("offset", "weight"), ("input",)):
                got = solve(case, arrays, needs, deterministic=deterministic)
                assert set(got) == {"output", *needs}
                for name in got:
                    if name != "input" or deterministic:
                        assert_same_bits(got[name], every[name], name)


@pytest.mark.parametrize(("case", "way"), [(VOLUME, "tiles"), (ACTIVE, "direct")], ids=named)
def test_long_indices_change_no_bit(emulated, monkeypatch, case, way):
    from pydeform.cuda.core import numbers

    choose(monkeypatch, way)
    arrays = make(case, "float16")
    results = []
    for limit in (numbers.INT32_ELEMENTS, 0):
        monkeypatch.setattr(numbers, "INT32_ELEMENTS", limit)
        forget_plans()
        with on():
            results.append(solve(case, arrays, deterministic=True))
    forget_plans()
    for name, array in results[0].items():
        assert_same_bits(results[1][name], array, name)


def forget_plans() -> None:
    from pydeform.cuda.conv import backward_tiles, forward_tiles
    from pydeform.cuda.core import copies

    for cache in (forward_tiles.tiles_of, copies._turn, backward_tiles.plan_of):
        cache.cache_clear()


# The offset of an active convolution ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_positions_are_those_of_a_deformable_convolution(emulated, way, dtype):
    """The output has its bits."""
    arrays, g = make(ACTIVE, dtype), ACTIVE.geometry
    spread = np.broadcast_to(arrays["offset"].reshape(1, -1, 1, 1), (g.batch, len(arrays["offset"]), *g.out_size))
    with on():
        active = solve(ACTIVE, arrays, ())
        deformed = solve(ACTIVE._replace(kind="deform"), {**arrays, "offset": np.ascontiguousarray(spread)}, ())
    assert_same_bits(active["output"], deformed["output"])


@pytest.mark.parametrize("copies", [1, 1 << 28])
def test_images_at_a_time_add_up(emulated, monkeypatch, copies):
    """Each range of images adds its own to the gradient of the offset that all have."""
    from pydeform.cuda.conv import forward_tiles

    choose(monkeypatch, "tiles")
    monkeypatch.setattr(forward_tiles, "COPIES", copies)
    case = ACTIVE._replace(batch=3)
    with on(capability="75"):
        for deterministic in (False, True):
            assert_near(solve(case, make(case), deterministic=deterministic), expected(case), "float64")


def test_nothing_has_the_size_of_all_offsets(emulated, way, monkeypatch):
    """A number for each block of pixels is the most that is made for the gradient of the positions."""
    taken = sizes_taken(monkeypatch)
    case = ACTIVE._replace(in_channels=3, in_size=(20, 30), out_channels=1, stride=(1, 1), offset_groups=1)
    arrays = make(case)
    pixels, offsets = case.batch * math.prod(case.geometry.out_size), arrays["offset"].size
    with on(capability="75"):
        solve(case, arrays, ("offset",))
    assert pixels in taken  # the output
    assert max(taken) < pixels * offsets  # of which a deformable convolution has so many
    assert -(-pixels // {"tiles": 64, "direct": 256}[way]) * offsets in taken


def test_no_images(emulated, way):
    for case in (LINE, VOLUME, ACTIVE, PLAIN_LINE):
        case = case._replace(batch=0)
        with on():
            got = solve(case, make(case))
        assert all(not a.any() for a in got.values())
        assert got["output"].shape == (0, case.out_channels, *case.geometry.out_size)


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "text"),
    [
        (LINE, r"deform_conv1d: an image of the input must have \(length \+ 1\) <= 9 on CUDA, got 24 = 24"),
        (PLAIN_VOLUME, r"conv3d: .* \(depth \+ 1\) \* \(height \+ 1\) \* \(width \+ 1\) <= 9 .* got 4 \* 5 \* 6 = 120"),
        (ACTIVE, r"active_conv2d: .* \(height \+ 1\) \* \(width \+ 1\) <= 9 on CUDA, got 6 \* 7 = 42"),
    ],
    ids=named,
)
def test_images_that_an_int_cannot_count_are_refused(emulated, monkeypatch, case, text):
    from pydeform.cuda import conv
    from pydeform.cuda.core import sizes

    monkeypatch.setattr(sizes, "MOST_CELLS", 9)
    arrays = make(case)
    with on():
        sent = ConvArrays(*(EMULATED.array(arrays[name]) for name in GRADS))
        with pytest.raises(ValueError, match=f"^{text}$"):
            conv.forward(sent, case.geometry)
        with pytest.raises(ValueError, match=f"^{text.replace(':', '_backward:', 1)}$"):
            conv.backward(EMULATED.array(arrays["grad_output"]), sent, case.geometry, frozenset(GRADS))
