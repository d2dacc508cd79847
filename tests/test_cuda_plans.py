"""How CUDA convolutions are cut up: slices, ranges of images, bounds of memory, index types, devices; and each digit.

What a change of the kernels or of their launches could break while every sum still looks right on small problems.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import pydeform
from tests.cases.deform_conv2d import Case, make, make_grad_output
from tests.conftest import assert_same_bits, needs_emulation
from tests.test_cuda_convolution import (
    CAPABILITIES,
    CASES,
    EMULATED,
    SCHEDULES,
    assert_near,
    backward,
    both,
    expected,
    on,
    send,
)

pytestmark = needs_emulation


SLICED = Case(2, 128, 24, 26, 16, (3, 3), padding=((1, 1), (1, 1)))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_slices_of_every_sum(emulated, capability):
    """Long enough sums, few enough tiles: forward and the weight's gradient are cut, and the bias is added once."""
    from tests.cuda_emulation.launch import Function

    slices: dict[str, int] = {}
    call = Function.__call__

    def record(self: Any, grid: Any, *args: Any, **kwargs: Any) -> Any:
        slices[self.name.partition("<")[0]] = (*grid, 1)[1]
        return call(self, grid, *args, **kwargs)

    arrays, grad_output = make(SLICED, "float16"), make_grad_output(SLICED, "float16")
    results = []
    for schedule in SCHEDULES:
        settings = {
            "processors": 64,
            "capability": capability,
            "schedule": schedule,
            "check": schedule == SCHEDULES[-1],
        }
        with on(**settings), pytest.MonkeyPatch.context() as patch:
            patch.setattr(Function, "__call__", record)
            results.append(both(arrays, grad_output, SLICED.options, deterministic=True))
    got = results[0]
    for other in results[1:]:
        for key in got:
            assert_same_bits(other[key], got[key], key)
    assert slices["forward"] > 1
    assert slices["backward_weight"] > 1
    assert "sum_slices" in slices
    wide = make(SLICED)
    grads = pydeform.deform_conv2d_backward(make_grad_output(SLICED), **wide, **SLICED.options)._asdict()
    assert_near(got, {"output": pydeform.deform_conv2d(**wide, **SLICED.options), **grads}, "float16")


@pytest.mark.parametrize("name", ["wide", "narrow"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_float32_keeps_the_digits_of_every_factor(emulated, capability, name):
    """Weights and gradients of CASES fit into tf32; these do not, so each rest of a split value counts."""
    case = CASES[name]
    rng = np.random.default_rng(1)
    arrays = make(case, "float32")
    for key in ("input", "weight"):
        arrays[key] = rng.normal(0, 1, arrays[key].shape).astype(np.float32)
    grad_output = rng.normal(0, 1, make_grad_output(case).shape).astype(np.float32)
    wide = {key: None if array is None else array.astype(float) for key, array in arrays.items()}
    grads = pydeform.deform_conv2d_backward(grad_output.astype(float), **wide, **case.options)._asdict()
    want = {"output": pydeform.deform_conv2d(**wide, **case.options)}
    want |= {key: grad for key, grad in grads.items() if grad is not None}
    with on(capability=capability):
        got = both(arrays, grad_output, case.options)
    assert_near(got, want, "float32")


def test_ranges_of_images(monkeypatch, emulated):
    """As many as fit, one at least, and what is left."""
    from pydeform.cuda.conv import forward_tiles

    g = CASES["narrow"]
    monkeypatch.setattr(forward_tiles, "COPIES", 100)
    for image_bytes, batch, ends in ((50, 5, [2, 4, 5]), (51, 3, [1, 2, 3]), (101, 2, [1, 2]), (1, 3, [3])):
        parts = forward_tiles.images_at_a_time(g._replace(batch=batch), image_bytes)
        assert [part.stop for part in parts] == ends
        assert [part.start for part in parts] == [0, *ends[:-1]]


def test_images_at_a_time_with_slices(emulated, monkeypatch):
    """The weight's gradient has the slices of the whole batch, more than one image has steps: the rest add zero."""
    from pydeform.cuda.conv import forward_tiles

    case = Case(41, 8, 4, 5, 8, (1, 1))
    arrays, grad_output = make(case), make_grad_output(case)
    with on(processors=64):
        whole = both(arrays, grad_output, case.options, deterministic=True)
        monkeypatch.setattr(forward_tiles, "COPIES", 1)
        got = both(arrays, grad_output, case.options, deterministic=True)
    assert_near(got, whole, "float64")


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_shared_memory_without_bank_conflicts_in_backward(emulated, capability, dtype):
    case = Case(1, 64, 8, 16, 64, (1, 1))
    arrays, grad_output = make(case, dtype), make_grad_output(case, dtype)
    with on(capability=capability, profile=True, check=True) as run:
        backward(grad_output, arrays, case.options)
    product = [(k, n) for k, n in run.counters().items() if k[2] == "shared" and k[0].startswith("core/product.cuh")]
    assert product
    for key, count in product:
        assert count.wavefronts <= 1.05 * count.least_wavefronts, f"{key}: {count}"


def geometry_of(case: Case) -> Any:
    from pydeform import _geometry

    return _geometry.ConvGeometry(
        *(case.batch, case.in_channels, case.out_channels, case.groups, case.offset_groups, 0),
        *((case.in_h, case.in_w), case.out_size, case.kernel, case.stride),
        tuple(before for before, _ in case.padding),
        case.dilation,
    )


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that would be compiled; nothing is launched."""
    from pydeform.cuda.conv import backward_tiles, forward_tiles

    found: list[str] = []
    for module in (forward_tiles, backward_tiles):
        monkeypatch.setattr(module, "Launch", lambda code, expression, *rest, **more: found.append(expression))
    return found


# Each has one array of more than 2^31 elements, and none of the others.
LARGE = {
    "image": Case(1, 256, 4096, 4096, 8, (1, 1)),
    "padded image": Case(1, 9, 12000, 12000, 8, (1, 1), stride=(8, 8), mask=False),  # 9 channels lie in 16
    "gradient": Case(1, 8, 4096, 4096, 200, (1, 1)),
    "offset": Case(1, 8, 5000, 5000, 8, (7, 7), padding=((3, 3), (3, 3)), mask=False),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_arrays_have_long_indices(emulated, planned, name):
    from pydeform.cuda.conv import backward_tiles, forward_tiles
    from pydeform.cuda.core.launch import Device
    from pydeform.cuda.core.source import Code

    g = geometry_of(LARGE[name])
    on = Device(0, 80, 108, 166_912)
    forward_tiles.Tiles(Code("conv"), 1, g, "float16", on, False)
    plan = backward_tiles.Plan(g, Code("conv"), 1, "float16", on, False)
    plan._weight(False, 1)
    plan._samples(False, 0, 1, 0, 1)
    assert plan.index == "long long"
    kernels = [expression for expression in planned if expression.startswith(("forward<", "backward_"))]
    assert len(kernels) == 3
    for expression in kernels:
        assert ", long long," in expression, expression


@pytest.mark.parametrize("which", ["every", "input", "weight", "bias", "mask", "offset", "grad_output"])
def test_devices_of_arrays_that_are_not_contiguous(emulated, which):
    """Their copies are made where they lie, not on the current device."""
    import cupy

    case = CASES["narrow"]

    def apart(a: Any) -> Any:
        return cupy.asarray(np.repeat(a, 2, axis=0))[::2]

    with on(devices=2):
        with cupy.cuda.Device(1):
            arrays = {
                name: None if a is None else apart(a) if which in ("every", name) else cupy.asarray(a)
                for name, a in make(case).items()
            }
            grad = make_grad_output(case)
            grad_output = apart(grad) if which in ("every", "grad_output") else cupy.asarray(grad)
        output = pydeform.deform_conv2d(**arrays, **case.options)
        grads = pydeform.deform_conv2d_backward(grad_output, **arrays, **case.options)
        assert {array.device.id for array in (output, *grads)} == {1}


def test_launches_go_to_the_current_stream(emulated, monkeypatch):
    import cupy

    from tests.cuda_emulation.launch import Function

    seen: set[int] = set()
    call = Function.__call__

    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.add(cupy.cuda.get_current_stream().ptr)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(Function, "__call__", record)
    case = CASES["narrow"]
    with on(), cupy.cuda.Stream(non_blocking=True) as stream:
        both(make(case), make_grad_output(case), case.options, deterministic=True)
    assert seen == {stream.ptr}


def test_one_problem_on_two_devices(emulated):
    """Each device is asked for the shared memory that it must allow; plans of one are not taken for the other."""
    import cupy

    case = CASES["wide"]
    arrays, grad_output = make(case, "float16"), make_grad_output(case, "float16")
    with on(devices=2, capability="90"):
        for number in (0, 1):
            with cupy.cuda.Device(number):
                got = both(arrays, grad_output, case.options)
            assert_near(got, expected("wide"), "float16")


@pytest.mark.parametrize("units", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_long_indices_fit_into_shared_memory(emulated, planned, capability, dtype, units):
    from pydeform.cuda.conv import backward_tiles, forward_tiles
    from pydeform.cuda.core.launch import Device
    from pydeform.cuda.core.source import Code
    from tests.cuda_emulation import streams

    on = Device(0, int(capability), 100, streams.SHARED_KIB[capability] * 1024)
    g = geometry_of(Case(1, 64, 5, 6, 300, (2, 2), offset_groups=units))
    tiles = forward_tiles.Tiles(Code("conv"), 1, g, dtype, on, False)
    assert tiles._shared(tiles.channels.slots(tiles.product.depth), "long long") <= on.shared
    plan = backward_tiles.Plan(g, Code("conv"), 1, dtype, on, False)
    assert plan._shared_data(plan.slots, "long long") <= on.shared
    assert plan._shared_weight(plan.slots, "long long") <= on.shared


def test_sums_of_the_weights_gradient_fit_into_the_workspace(emulated, monkeypatch):
    """As many slices as there is room for, one at least."""
    from pydeform.cuda.conv import backward_tiles
    from pydeform.cuda.core.launch import Device
    from pydeform.cuda.core.source import Code

    g, on = geometry_of(SLICED), Device(0, 80, 1000, 166_912)
    bytes_of_a_slice = 9 * 16 * 128 * 4
    for room, slices in ((1 << 26, 2), (2 * bytes_of_a_slice, 2), (2 * bytes_of_a_slice - 1, 1), (1, 1)):
        monkeypatch.setattr(backward_tiles, "WORKSPACE", room)
        assert backward_tiles.Plan(g, Code("conv"), 1, "float16", on, False).slices == slices


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_many_steps_of_the_weights_gradient(emulated, capability, dtype):
    """CASES have at most two tiles of pixels; here the three places for taps are used again and again."""
    case = Case(2, 24, 12, 15, 20, (1, 2), padding=((0, 0), (1, 0)), offset_groups=3)
    wide, grad_wide = make(case), make_grad_output(case)
    want = pydeform.deform_conv2d_backward(grad_wide, **wide, **case.options).weight
    for schedule in SCHEDULES:
        with on(capability=capability, check=True, schedule=schedule):
            got = backward(make_grad_output(case, dtype), make(case, dtype), {**case.options, "needs": ("weight",)})
        assert_near(got, {"weight": want}, dtype)


@pytest.mark.parametrize("stride", [(2, 3), (3, 2)])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_conv2d_input_gradient_with_strides_on_both_axes(emulated, capability, stride):
    """A pixel between two strides belongs to no tap."""
    case = Case(2, 16, 9, 10, 12, (3, 2), stride, ((1, 0), (0, 1)))
    arrays = {name: make(case)[name] for name in ("input", "weight", "bias")}
    want = pydeform.conv2d_backward(make_grad_output(case), **arrays, **case.options).input
    with on(capability=capability, check=True):
        grads = pydeform.conv2d_backward(EMULATED.array(make_grad_output(case)), **send(arrays), **case.options)
    assert_near({"input": EMULATED.numpy(grads.input)}, {"input": want}, "float64")


def test_what_launches_depend_on(emulated):
    """The shared memory is what a block can have on request, not what it has without."""
    from pydeform.cuda.core import launch

    with on(capability="80", processors=7):
        assert launch.device() == (0, 80, 7, 163 * 1024)


def test_a_grid_without_blocks_is_not_launched(emulated):
    """CuPy would make it one block."""
    from pydeform.cuda.core import launch

    launch.launch(None, (3, 0), 32, ())
    with pytest.raises(TypeError):
        launch.launch(None, (3, 1), 32, ())
