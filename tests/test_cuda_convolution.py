"""What is CUDA's own in a convolution: every kind of product, how problems are cut up, index types, memory, order.

Runs on the emulated device, whose capability and number of processors a test can choose. The rest of what a
convolution must do is in test_deform_conv2d.py and test_conv2d.py, which run there too.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import pydeform
from tests.cases.deform_conv2d import Case, make, make_grad_output
from tests.conftest import TOLERANCE_OF_TILES, Backend, assert_same_bits, needs_emulation

pytestmark = needs_emulation
EMULATED = Backend("emulated")
CAPABILITIES = ("75", "80", "90")
SCHEDULES = (0, 1, 5)  # ascending, descending, random

# Between them: one tile and several along each axis, rows and channels that fill no tile, units longer than the depth
# of a tile, shorter (several offset groups in a tile), and spread over convolution groups.
CASES = {
    "narrow": Case(2, 20, 5, 7, 9, (2, 3), padding=((1, 0), (0, 1)), offset_groups=5),
    "one_unit": Case(1, 40, 9, 8, 100, (2, 1), dilation=(2, 1)),
    "wide": Case(2, 72, 6, 7, 150, (1, 2), stride=(1, 2), offset_groups=3, bias=False),
    "groups": Case(1, 48, 7, 6, 34, (2, 2), groups=2, offset_groups=1, mask=False),
    "long_units": Case(1, 140, 5, 6, 70, (1, 1), offset_groups=2),
    "units_across_groups": Case(1, 48, 5, 4, 8, (2, 1), groups=4, offset_groups=3),
}


@contextmanager
def on(**settings: Any) -> Iterator[Any]:
    """The emulated device with these settings."""
    from pydeform.cuda.core import launch
    from tests.cuda_emulation import device

    launch._device.cache_clear()
    with device.settings(**settings) as run:
        yield run
    launch._device.cache_clear()


def send(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: EMULATED.array(array) for name, array in arrays.items()}


def forward(arrays: dict[str, Any], options: dict[str, Any]) -> Any:
    return EMULATED.numpy(pydeform.deform_conv2d(**send(arrays), **options))


def backward(grad_output: Any, arrays: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    grads = pydeform.deform_conv2d_backward(EMULATED.array(grad_output), **send(arrays), **options)
    return {name: EMULATED.numpy(grad) for name, grad in grads._asdict().items() if grad is not None}


def both(arrays: dict[str, Any], grad_output: Any, options: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Output and gradients."""
    how = {name: more[name] for name in ("allow_tf32",) if name in more}
    return {
        "output": forward(arrays, {**options, **how}),
        **backward(grad_output, arrays, {**options, **more}),
    }


@functools.cache
def expected(name: str) -> dict[str, np.ndarray]:
    """In float64 on the CPU, which test_deform_conv2d.py compares with the oracle."""
    case = CASES[name]
    arrays, grad_output = make(case), make_grad_output(case)
    grads = pydeform.deform_conv2d_backward(grad_output, **arrays, **case.options)._asdict()
    return {
        "output": pydeform.deform_conv2d(**arrays, **case.options),
        **{key: grad for key, grad in grads.items() if grad is not None},
    }


def assert_near(got: dict[str, Any], want: dict[str, np.ndarray], dtype: str, loss: float = 0) -> None:
    """Within the dtype's tolerance, or `loss` of the largest value where that is more."""
    assert set(got) == set(want)
    for key, array in want.items():
        tolerance = TOLERANCE_OF_TILES[dtype]
        atol = max(tolerance.of_largest, loss) * np.abs(array).max()
        np.testing.assert_allclose(got[key].astype(float), array, rtol=tolerance.relative, atol=atol, err_msg=key)


# Every product ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kind_of_product(emulated, capability, dtype, name):
    """In the build that checks each access, on a schedule of its own."""
    case = CASES[name]
    arrays, grad_output = make(case, dtype), make_grad_output(case, dtype)
    with on(capability=capability, check=True, schedule=2 + list(CASES).index(name)):
        got = both(arrays, grad_output, case.options)
    assert_near(got, expected(name), dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_layers_that_share_a_kernel_take_turns(emulated, dtype):
    """More offset groups take more shared memory, whose limit the driver keeps for the one kernel of both layers."""
    layers = [Case(1, 64, 4, 5, 64, (1, 2), offset_groups=groups) for groups in (8, 1)]
    with on(capability="90"):
        first, second = (
            [
                both(make(case, dtype), make_grad_output(case, dtype), case.options, deterministic=True)
                for case in layers
            ]
            for _ in range(2)
        )
    for case, got, again in zip(layers, first, second, strict=True):
        arrays, grad_output = make(case), make_grad_output(case)
        grads = pydeform.deform_conv2d_backward(grad_output, **arrays, **case.options)._asdict()
        assert_near(got, {"output": pydeform.deform_conv2d(**arrays, **case.options), **grads}, dtype)
        for key in got:
            assert_same_bits(again[key], got[key], key)


@pytest.mark.parametrize("sign", ["any", "positive"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_long_sums_in_float32_are_as_exact_as_float32(emulated, capability, sign):
    """2,304 terms forward and for grad.input, 2,100 for grad.weight: tensor cores drop digits at each step."""
    rng = np.random.default_rng(4)

    def values(*shape: int) -> Any:
        drawn = rng.standard_normal(shape)
        return np.abs(drawn) if sign == "positive" else drawn

    arrays = {
        "input": values(1, 256, 4, 3),
        "offset": rng.uniform(-1, 1, (1, 18, 4, 3)),
        "weight": values(256, 256, 3, 3),
        "bias": None,
        "mask": None,
    }
    tall = {
        **arrays,
        "input": values(1, 16, 60, 35),
        "offset": rng.uniform(-1, 1, (1, 18, 60, 35)),
        "weight": values(24, 16, 3, 3),
    }
    for given, names in ((arrays, ("output", "input", "offset")), (tall, ("weight",))):
        given = {name: None if a is None else a.astype(np.float32) for name, a in given.items()}
        wide = {name: None if a is None else a.astype(np.float64) for name, a in given.items()}
        grad_output = values(1, len(given["weight"]), *given["input"].shape[2:]).astype(np.float32)
        options = {"padding": 1}
        grads = pydeform.deform_conv2d_backward(grad_output.astype(np.float64), **wide, **options)._asdict()
        want = {"output": pydeform.deform_conv2d(**wide, **options), **grads}
        with on(capability=capability):
            got = both(given, grad_output, options)
        for name in names:
            error = np.abs(got[name] - want[name]).max() / np.abs(want[name]).max()
            assert error < 4e-6, f"{name}: {error:.1e}"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_tf32_only_when_allowed(emulated, capability):
    case = CASES["wide"]
    arrays, grad_output = make(case, "float32"), make_grad_output(case, "float32")
    with on(capability=capability, check=True):
        fine = both(arrays, grad_output, case.options)
        coarse = both(arrays, grad_output, case.options, allow_tf32=True)
    assert_near(fine, expected("wide"), "float32")
    assert_near(coarse, expected("wide"), "float32", loss=2**-10)
    for key in ("output", "weight"):  # products of samples, which have more digits than tf32 keeps
        error = np.abs(coarse[key] - expected("wide")[key]).max() / np.abs(expected("wide")[key]).max()
        assert error > 2**-15 if capability != "75" else error < 1e-6, f"{key}: {error:.1e}"


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_tf32_changes_nothing_for_other_dtypes(emulated, dtype):
    case = CASES["narrow"]
    arrays, grad_output = make(case, dtype), make_grad_output(case, dtype)
    with on(capability="90"):
        plain = both(arrays, grad_output, case.options, deterministic=True)
        allowed = both(arrays, grad_output, case.options, deterministic=True, allow_tf32=True)
    for key in plain:
        assert_same_bits(allowed[key], plain[key], key)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_conv2d(emulated, capability, dtype):
    """Without offsets; its gradient of the input needs no atomics: the same bits on every schedule."""
    case = Case(2, 48, 6, 7, 70, (3, 2), (2, 1), ((1, 1), (0, 1)), (1, 2), groups=2)
    arrays, grad_output = make(case, dtype), make_grad_output(case, dtype)
    arrays = {name: arrays[name] for name in ("input", "weight", "bias")}
    options = {**case.options, "groups": 2}
    wide = {name: array.astype(float) for name, array in arrays.items()}
    want = {
        "output": pydeform.conv2d(**wide, **options),
        **pydeform.conv2d_backward(grad_output.astype(float), **wide, **options)._asdict(),
    }
    results = []
    for schedule in SCHEDULES:
        with on(capability=capability, check=schedule == 5, schedule=schedule):
            output = EMULATED.numpy(pydeform.conv2d(**send(arrays), **options))
            grads = pydeform.conv2d_backward(EMULATED.array(grad_output), **send(arrays), **options)
        results.append({"output": output} | {n: EMULATED.numpy(grad) for n, grad in grads._asdict().items()})
    assert_near(results[0], want, dtype)
    for other in results[1:]:
        for key in want:
            assert_same_bits(other[key], results[0][key], key)


# Order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_same_bits_on_every_schedule(emulated, dtype):
    """Forward always, backward where asked."""
    case = CASES["wide"]
    arrays, grad_output = make(case, dtype), make_grad_output(case, dtype)
    results = []
    for schedule in SCHEDULES:
        with on(schedule=schedule):
            results.append(both(arrays, grad_output, case.options, deterministic=True))
    assert_near(results[0], expected("wide"), dtype)
    for other in results[1:]:
        for key in other:
            assert_same_bits(other[key], results[0][key], key)


def test_only_the_gradient_of_the_input_depends_on_the_schedule(emulated):
    case = CASES["narrow"]
    rng = np.random.default_rng(0)
    arrays = {n: None if a is None else rng.normal(0, 1, a.shape).astype("float32") for n, a in make(case).items()}
    grad_output = rng.normal(0, 1, make_grad_output(case).shape).astype("float32")
    results = []
    for schedule in SCHEDULES:
        with on(schedule=schedule):
            results.append(both(arrays, grad_output, case.options))
    different = {key for other in results[1:] for key in other if other[key].tobytes() != results[0][key].tobytes()}
    assert different == {"input"}


# How a problem is cut up ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_images_at_a_time(emulated, monkeypatch, dtype, deterministic):
    """With room for the copies of one image only."""
    from pydeform.cuda.conv import forward_tiles

    case = CASES["wide"]._replace(batch=3)
    arrays, grad_output = make(case, dtype), make_grad_output(case, dtype)
    with on():
        whole = both(arrays, grad_output, case.options, deterministic=True)
        monkeypatch.setattr(forward_tiles, "COPIES", 1)
        got = both(arrays, grad_output, case.options, deterministic=deterministic)
    assert_same_bits(got["output"], whole["output"])
    assert_near(got, {key: array.astype(float) for key, array in whole.items()}, dtype)


@pytest.mark.parametrize("workspace", [1, 40_000])
def test_the_workspace_of_a_deterministic_backward_is_bounded(emulated, monkeypatch, workspace):
    """Columns of a pixel and a tap at a time at least; the numbers stay."""
    from pydeform.cuda.conv import backward_tiles

    case = CASES["narrow"]
    arrays, grad_output = make(case), make_grad_output(case)
    with on(check=True):
        monkeypatch.setattr(backward_tiles, "WORKSPACE", workspace)
        got = both(arrays, grad_output, case.options, deterministic=True)
    assert_near(got, expected("narrow"), "float64")


def test_memory(emulated, monkeypatch):
    """Beyond copies and results: sums of the input's gradient, the packed weight, and bounded workspaces."""
    import cupy

    from pydeform.cuda.conv import backward_tiles

    taken: list[int] = []
    for name in ("empty", "zeros", "empty_like"):
        make_array = getattr(cupy, name)

        def record(*args: Any, make_array: Any = make_array, **kwargs: Any) -> Any:
            array = make_array(*args, **kwargs)
            taken.append(array.nbytes)
            return array

        monkeypatch.setattr(cupy, name, record)
    case = Case(2, 32, 24, 23, 16, (3, 3), padding=((1, 1), (1, 1)))
    columns = 2 * 32 * 9 * 24 * 23 * 4
    packed = 64 * 32 * 9 * 4 * 2  # the 16 outputs fill a quarter of a tile; values are split in two
    monkeypatch.setattr(backward_tiles, "WORKSPACE", 1 << 16)
    arrays, grad_output = make(case, "float32"), make_grad_output(case, "float32")
    with on(processors=64):
        both(arrays, grad_output, case.options, deterministic=True)
    assert max(taken) <= max(1 << 16, packed, arrays["input"].nbytes + 128) < columns / 8, max(taken)


@pytest.mark.parametrize(("dtype", "capability"), [("float64", "75"), ("float32", "80"), ("float16", "90")])
def test_long_indices(emulated, monkeypatch, dtype, capability):
    """What arrays of more than 2^31 elements would use gives the same bits."""
    from pydeform.cuda.conv import backward_tiles, forward_tiles
    from pydeform.cuda.core import copies, numbers

    arrays = {name: make(CASES[name], dtype) for name in CASES}
    with on(capability=capability, check=True):
        short, long = [], []
        for results, limit in ((short, numbers.INT32_ELEMENTS), (long, 0)):
            monkeypatch.setattr(numbers, "INT32_ELEMENTS", limit)
            for cache in (forward_tiles.tiles_of, copies._turn, backward_tiles.plan_of):
                cache.cache_clear()
            for name in ("narrow", "wide"):
                case = CASES[name]
                grad_output = make_grad_output(case, dtype)
                results.append(both(arrays[name], grad_output, case.options, deterministic=True))
    for cache in (forward_tiles.tiles_of, copies._turn, backward_tiles.plan_of):
        cache.cache_clear()
    for a, b in zip(short, long, strict=True):
        for key in a:
            assert_same_bits(b[key], a[key], key)


def test_index_type_follows_the_largest_array():
    """On paper: 46,341 x 46,341 pixels are the first square image with more than an int can count."""
    from pydeform.cuda.core.numbers import index_type

    assert index_type(10, 2**30) == "int"
    assert index_type(10, 46_341**2) == "long long"


def test_images_that_an_int_cannot_count_are_refused(emulated, monkeypatch):
    from pydeform.cuda.core import sizes

    monkeypatch.setattr(sizes, "MOST_CELLS", 47)
    case = CASES["narrow"]
    assert (case.in_h + 1) * (case.in_w + 1) == 48
    arrays, grad_output = make(case), make_grad_output(case)
    with on(), pytest.raises(ValueError, match=r"^deform_conv2d: an image of the input must have .* <= 47 on CUDA"):
        forward(arrays, case.options)
    with on(), pytest.raises(ValueError, match=r"^deform_conv2d_backward: an image of the input .* got 6 \* 8 = 48$"):
        backward(grad_output, arrays, case.options)


@pytest.mark.parametrize("channels", [7, 8])
def test_both_sides_of_few_channels(emulated, channels):
    """With fewer than 8 channels in a group no tile is launched, with 8 tiles only."""
    from tests.cuda_emulation.launch import Function

    launched: set[str] = set()
    call = Function.__call__

    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        launched.add(self.name.partition("<")[0])
        return call(self, *args, **kwargs)

    case = Case(1, 2 * channels, 5, 4, 6, (2, 2), groups=2)
    arrays, grad_output = make(case), make_grad_output(case)
    with on(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Function, "__call__", record)
        got = both(arrays, grad_output, case.options)
    want = {
        "output": pydeform.deform_conv2d(**arrays, **case.options),
        **pydeform.deform_conv2d_backward(grad_output, **arrays, **case.options)._asdict(),
    }
    assert_near(got, want, "float64")
    direct = {"forward_direct", "backward_data_direct", "weight_direct"}
    tiles = {"forward", "backward_data", "backward_weight"}
    assert launched & (direct | tiles) == (direct if channels < 8 else tiles)


# Memory traffic ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_shared_memory_without_bank_conflicts(emulated, capability):
    """ldmatrix and the stores of samples reach all banks; corners are read whole lines at a time."""
    case = Case(1, 64, 8, 16, 64, (1, 1))
    arrays = make(case, "float16")
    with on(capability=capability, profile=True, check=True) as run:
        forward(arrays, case.options)
    counters = run.counters()
    product = [
        (key, count) for key, count in counters.items() if key[2] == "shared" and key[0].startswith("core/product.cuh")
    ]
    assert product
    for key, count in product:
        assert count.wavefronts <= 1.05 * count.least_wavefronts, f"{key}: {count}"


# Devices, threads ----------------------------------------------------------------------------------------


def test_old_devices_are_refused(emulated):
    arrays = make(CASES["narrow"])
    from tests.cuda_emulation import streams

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(streams.SHARED_KIB, "70", 96)
        with on(capability="70"), pytest.raises(RuntimeError, match=r"compute capability 7\.5 or newer, got 7\.0"):
            forward(arrays, CASES["narrow"].options)


def test_threads(emulated):
    """Several Python threads at once, on problems of their own."""
    from concurrent.futures import ThreadPoolExecutor

    def solve(name: str) -> dict[str, Any]:
        case = CASES[name]
        return both(make(case, "float32"), make_grad_output(case, "float32"), case.options)

    with on(), ThreadPoolExecutor(8) as pool:
        names = list(CASES) * 2
        for name, got in zip(names, pool.map(solve, names), strict=True):
            assert_near(got, expected(name), "float32")


def test_arrays_on_two_devices_are_refused(emulated):
    import cupy

    case = CASES["narrow"]
    with on(devices=2):
        arrays = send(make(case))
        with cupy.cuda.Device(1):
            arrays["weight"] = cupy.asarray(make(case)["weight"])
        with pytest.raises(TypeError, match=r"one device, got input is on cuda:0, .*weight is on cuda:1"):
            pydeform.deform_conv2d(**arrays, **case.options)


def test_devices(emulated):
    """Work is done on the device that holds the arrays, whichever is current."""
    import cupy

    case = CASES["narrow"]
    with on(devices=2):
        with cupy.cuda.Device(1):
            arrays, grad_output = send(make(case)), cupy.asarray(make_grad_output(case))
        output = pydeform.deform_conv2d(**arrays, **case.options)
        grads = pydeform.deform_conv2d_backward(grad_output, **arrays, **case.options)
        assert cupy.cuda.Device().id == 0
        assert {array.device.id for array in (output, *grads)} == {1}
