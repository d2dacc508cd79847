"""deform_conv2d and its backward against the oracle, against differences, and on awkward arrays."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest

import pydeform
from pydeform.testing import gradcheck, off_integers
from tests.cases.deform_conv2d import ARRAYS, CASES, Case, dtype_of, expected, make, make_grad_output
from tests.conftest import assert_close, assert_same_bits
from tests.onnx_cases import node_cases
from tests.reference import deform_conv2d as reference

BOUNDARIES = ("torchvision", "dcnv2", "dcnv1")
DTYPES = ("float64", "float32", "float16", "bfloat16")


def run(backend: Any, arrays: dict[str, Any], options: dict[str, Any]) -> Any:
    """Forward on a backend, NumPy to NumPy."""
    return backend.numpy(pydeform.deform_conv2d(**{name: backend.array(a) for name, a in arrays.items()}, **options))


def run_backward(backend: Any, grad_output: Any, arrays: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    sent = {name: backend.array(a) for name, a in arrays.items()}
    grads = pydeform.deform_conv2d_backward(backend.array(grad_output), **sent, **options)
    assert isinstance(grads, pydeform.DeformConv2dGrads)
    return {name: backend.numpy(grad) for name, grad in grads._asdict().items()}


class Guard:
    """Fails at the end of a `with` block if one of the arrays was written to."""

    def __init__(self, *arrays: Any) -> None:
        self.pairs = [(a, a.copy()) for a in arrays if a is not None]

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            for number, (array, copy) in enumerate(self.pairs):
                assert_same_bits(array, copy, f"array {number} was written to")


def assert_grads(got: dict[str, Any], want: dict[str, Any], dtype: str) -> None:
    assert tuple(got) == ARRAYS
    for name in ARRAYS:
        if want[name] is None:
            assert got[name] is None, name
        else:
            assert_close(got[name], want[name], dtype, f"grad of {name}")


# Against the oracle -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_forward(backend, name):
    arrays = make(CASES[name])
    with Guard(*arrays.values()):
        got = run(backend, arrays, CASES[name].options)
    assert_close(got, expected(name)[0], "float64")


@pytest.mark.parametrize("name", CASES)
def test_backward(backend, name):
    arrays, grad_output = make(CASES[name]), make_grad_output(CASES[name])
    with Guard(grad_output, *arrays.values()):
        got = run_backward(backend, grad_output, arrays, CASES[name].options)
    assert_grads(got, expected(name)[1], "float64")


@pytest.mark.parametrize("boundary", BOUNDARIES[1:])
@pytest.mark.parametrize("name", ["every_option", "padding_asymmetric", "mostly_outside", "row_image"])
def test_boundary(backend, name, boundary):
    case = CASES[name]
    options = {**case.options, "boundary": boundary}
    assert_close(run(backend, make(case), options), expected(name, boundary)[0], "float64")
    got = run_backward(backend, make_grad_output(case), make(case), options)
    assert_grads(got, expected(name, boundary)[1], "float64")


# The oracle takes seconds on past_tiles, so each rule is checked on the smaller case.
@pytest.mark.parametrize(
    ("name", "boundary"), [("past_tiles", "torchvision"), *(("every_option", b) for b in BOUNDARIES)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(backend, name, dtype, boundary):
    case = CASES[name]
    options = {**case.options, "boundary": boundary}
    arrays, grad_output = make(case, dtype), make_grad_output(case, dtype)
    with Guard(grad_output, *arrays.values()):
        output = run(backend, arrays, options)
        grads = run_backward(backend, grad_output, arrays, options)
    assert_close(output, expected(name, boundary)[0], dtype)
    assert_grads(grads, expected(name, boundary)[1], dtype)


def test_same_padding(backend):
    """Output size ceil(size / stride); an odd pixel of padding follows the image."""
    case = Case(1, 2, 7, 6, 3, (3, 2), (2, 1), ((1, 1), (0, 1)), (1, 1))
    arrays = make(case)
    options = {**case.options, "padding": "same"}
    want = reference.forward(*arrays.values(), **case.options)
    assert want.shape == (1, 3, 4, 6)
    assert_close(run(backend, arrays, options), want, "float64")


def test_ints_stand_for_both_axes(backend):
    case = Case(1, 2, 9, 8, 3, (3, 2), (2, 2), ((1, 1), (1, 1)), (2, 2))
    arrays = make(case)
    short = {"stride": 2, "padding": 1, "dilation": 2}
    pairs = {"stride": [2, 2], "padding": (1, 1), "dilation": np.array([2, 2])}
    want = run(backend, arrays, case.options)
    assert_same_bits(run(backend, arrays, short), want)
    assert_same_bits(run(backend, arrays, pairs), want)


def test_positional_order_is_torchvisions(backend):
    case = CASES["every_option"]
    a = {name: backend.array(array) for name, array in make(case).items()}
    got = pydeform.deform_conv2d(
        a["input"], a["offset"], a["weight"], a["bias"], case.stride, case.padding, case.dilation, a["mask"]
    )
    assert_close(backend.numpy(got), expected("every_option")[0], "float64")


# Points near the border ---------------------------------------------------------------------------------------------

# (y, x) on X = 1..16 as a 4x4 image under a 1x1 kernel: value, (d/dy, d/dx). Measured on other systems:
# torchvision itself, Paddle for dcnv2, MXNet's first DeformableConvolution for dcnv1.
MEASURED = {
    "torchvision": {
        (-0.5, 1): (1, 2, 0.5),
        (3.5, 1): (7, -14, 0.5),
        (3, 1): (14, -14, 1),
        (4, 1): (0, 0, 0),
        (-1, 1): (0, 2, 0),
        (1, 1): (6, 4, 1),
    },
    "dcnv2": {
        (-0.5, 1): (1, 2, 0.5),
        (3.5, 1): (7, -14, 0.5),
        (3, 1): (14, -14, 1),
        (4, 1): (0, 0, 0),
        (-1, 1): (0, 0, 0),
        (1, 1): (6, 4, 1),
    },
    "dcnv1": {
        (-0.5, 1): (0, 0, 0),
        (3.5, 1): (14, 0, 1),
        (3, 1): (14, 0, 1),
        (4, 1): (0, 0, 0),
        (-1, 1): (0, 0, 0),
        (1, 1): (6, 4, 1),
    },
}


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_measured_values_at_the_border(backend, dtype, boundary):
    points, want = zip(*MEASURED[boundary].items(), strict=True)
    arrays = one_point_each(points, np.arange(1.0, 17.0).reshape(4, 4), dtype)
    options = {"stride": 4, "boundary": boundary}
    value, dy, dx = np.array(want, float).T
    output = run(backend, arrays, options)
    assert_close(output.ravel(), value, dtype)
    grads = run_backward(backend, np.ones_like(output), arrays, options)
    assert_close(grads["offset"].reshape(-1, 2), np.stack([dy, dx], -1), dtype)


def one_point_each(points: Any, image: np.ndarray, dtype: str = "float64") -> dict[str, Any]:
    """One batch entry a point; with a stride of the image's size the 1x1 kernel has one output, from (0, 0)."""
    arrays = {
        "input": np.zeros((len(points), 1, *image.shape)) + image,
        "offset": np.array(points).reshape(-1, 2, 1, 1),
        "weight": np.ones((1, 1, 1, 1)),
    }
    return {**{name: a.astype(dtype_of(dtype)) for name, a in arrays.items()}, "bias": None, "mask": None}


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_every_lattice_and_half_point(backend, boundary):
    """Value and all gradients at every multiple of 1/2 from two pixels before the image to two past it."""
    rng = np.random.default_rng(5)
    points = list(itertools.product(np.arange(-2, 5.5, 0.5), np.arange(-2, 6.5, 0.5)))
    size = (15, 17)
    input, mask = rng.standard_normal((1, 2, 3, 4)), rng.standard_normal((1, 1, *size))
    offset = np.array(points).T.reshape(1, 2, *size) - np.mgrid[:15, :17]
    weight, grad_output = rng.standard_normal((3, 2, 1, 1)), rng.standard_normal((1, 3, *size))
    arrays = {"input": input, "offset": offset, "weight": weight, "bias": None, "mask": mask}
    padding = ((0, 12), (0, 13))
    options = {"stride": (1, 1), "padding": padding, "dilation": (1, 1), "boundary": boundary}
    assert_close(run(backend, arrays, options), reference.forward(*arrays.values(), **options), "float64")
    want = reference.backward(grad_output, *arrays.values(), **options)
    assert_grads(run_backward(backend, grad_output, arrays, options), want, "float64")


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_coordinates_that_are_not_finite(backend, dtype, boundary):
    """NaN reaches the outputs and gradients that use the sample and no other; infinity is outside the image."""
    case = CASES["every_option"]
    arrays, grad_output = make(case, dtype), make_grad_output(case, dtype)
    taps = arrays["offset"].reshape(2, 3, 3, 2, 2, 5, 6)
    taps[0, 0, 1, 0, 0, 2, 3] = np.nan  # y of one sample in the first offset group: only the first conv group sees it
    taps[0, 2, 2, 1, 1, 4, 0] = np.nan  # x, in the last group
    taps[1, 0, 0, 0, 0, 1, 1] = np.inf
    taps[1, 1, 0, 1, 1, 1, 2] = -np.inf
    taps[1, 2, 2, 0, :, 0, 0] = np.inf, -np.inf
    taps[1, 2, 1, 1, :, 3, 5] = np.nan, np.inf  # NaN wins
    taps[1, 0, 2, 0, 1, 2, 2] = np.finfo(arrays["offset"].dtype).max if dtype != "bfloat16" else 3e38
    options = {**case.options, "boundary": boundary}
    want = reference.forward(*arrays.values(), **options)
    assert 0 < np.isnan(want).sum() < want.size / 4
    want_grads = reference.backward(grad_output, *arrays.values(), **options)
    assert not np.isnan(want_grads["input"]).any()
    assert np.isnan(want_grads["offset"]).sum() == 2 * np.isnan(want_grads["mask"]).sum() == 6
    assert 0 < np.isnan(want_grads["weight"]).sum() < want_grads["weight"].size
    assert_close(run(backend, arrays, options), want, dtype)
    assert_grads(run_backward(backend, grad_output, arrays, options), want_grads, dtype)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the oracle's inf - inf
@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_bad_pixels_stay_where_they_are_used(backend, dtype, bad, boundary):
    """Corner pixels, where a clamped index would land: samples far outside must not multiply them by zero."""
    case = Case(2, 4, 6, 5, 3, (3, 2), padding=((2, 2), (1, 1)), groups=1, offset_groups=2, reach=9)
    arrays, grad_output = make(case, dtype), make_grad_output(case, dtype)
    arrays["input"][0, 1, 0, 0] = arrays["input"][0, 2, -1, -1] = arrays["input"][1, 3, 0, -1] = bad
    options = {**case.options, "boundary": boundary}
    want = reference.forward(*arrays.values(), **options)
    assert 0 < (~np.isfinite(want)).sum() < want.size / 2
    assert_close(run(backend, arrays, options), want, dtype)
    got = run_backward(backend, grad_output, arrays, options)
    assert_grads(got, reference.backward(grad_output, *arrays.values(), **options), dtype)
    assert np.isfinite(got["input"]).all()  # the input's gradient does not depend on the input


# Differences --------------------------------------------------------------------------------------------------------


def checked(backend, options):
    """Forward and backward for gradcheck, which makes arrays in NumPy."""

    def forward(**arrays):
        return backend.numpy(pydeform.deform_conv2d(**{n: backend.array(a) for n, a in arrays.items()}, **options))

    def backward(grad_output, **arrays):
        sent = {name: backend.array(a) for name, a in arrays.items()}
        grads = pydeform.deform_conv2d_backward(backend.array(grad_output), **sent, **options)
        return {name: backend.numpy(grad) for name, grad in grads._asdict().items()}

    return forward, backward


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_gradcheck(backend, boundary):
    rng = np.random.default_rng(3)
    case = Case(2, 4, 6, 5, 6, (3, 2), (1, 2), ((1, 0), (2, 1)), (2, 1), groups=2, offset_groups=2)
    arrays = {name: rng.normal(0, 1.5, a.shape) for name, a in make(case).items()}
    forward, backward = checked(backend, {**case.options, "boundary": boundary})
    report = gradcheck(forward, backward, arrays, wrt=ARRAYS, kinks={"offset": off_integers})
    assert {name: len(indices) for name, indices in report.checked.items()} == {
        **dict.fromkeys(ARRAYS, 24),
        "bias": 6,
    }
    assert not any(report.kinked.values())


def lattice(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Offsets that put one sample on every integer point from -2 to side + 1, and the map of these points."""
    points = np.stack(np.meshgrid(np.arange(-2.0, side + 2), np.arange(-2.0, side + 2), indexing="ij"))
    return (points - np.mgrid[: side + 4, : side + 4])[None], points


def kink_problem(backend, boundary, side=4):
    """deform_conv2d as a function of the offset alone, sampling an image of positive values at integer points."""
    rng = np.random.default_rng(11)
    offset, points = lattice(side)
    fixed = {
        "input": rng.uniform(1, 2, (1, 2, side, side)),
        "weight": rng.uniform(1, 2, (3, 2, 1, 1)),
        "mask": rng.uniform(1, 2, (1, 1, side + 4, side + 4)),
    }
    forward, backward = checked(backend, {"padding": ((0, 4), (0, 4)), "boundary": boundary})
    return (
        lambda offset: forward(offset=offset, **fixed),
        lambda grad_output, offset: {"offset": backward(grad_output, offset=offset, **fixed)["offset"]},
        offset,
        points,
    )


@pytest.mark.parametrize("boundary", ["torchvision", "dcnv1"])
def test_right_hand_derivative_on_every_kink(backend, boundary):
    """At -1, 0, H-1, H and each integer between, along both axes; dcnv1's value jumps at 0 and H, from the left."""
    forward, backward, offset, _ = kink_problem(backend, boundary)
    gradcheck(forward, backward, {"offset": offset}, wrt=("offset",), side="right", elements=offset.size)
    with pytest.raises(AssertionError, match="offset"):
        gradcheck(forward, backward, {"offset": offset}, side="left", elements=offset.size)


def test_dcnv2_slope_at_minus_one_is_zero(backend):
    """Zero is the derivative from the left there; at every other integer it is the one from the right."""
    forward, backward, offset, points = kink_problem(backend, "dcnv2")
    edge = (points == -1).any(axis=0)
    away = np.where(edge, offset + 0.5, offset)
    gradcheck(forward, backward, {"offset": away}, wrt=("offset",), side="right", elements=offset.size)
    only_edge = np.where(edge, offset, offset - 100)
    gradcheck(forward, backward, {"offset": only_edge}, wrt=("offset",), side="left", elements=offset.size)
    grad = backward(np.ones((1, 3, *points.shape[1:])), offset)["offset"]
    assert (grad[0][:, edge] == 0).all()
    assert (grad[0][:, ~edge] != 0).any()
    with pytest.raises(AssertionError, match="offset"):
        gradcheck(forward, backward, {"offset": offset}, side="right", elements=offset.size)


# needs, arrays in odd places ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["every_option", "version_1", "past_tiles"])
def test_needs(backend, name):
    """Each subset leaves the others None and changes no bit of what it computes."""
    case = CASES[name]
    arrays, grad_output = make(case, "float32"), make_grad_output(case, "float32")
    options = {**case.options, "deterministic": True}
    every = run_backward(backend, grad_output, arrays, options)
    present = [n for n in ARRAYS if arrays[n] is not None]
    subsets = [(n,) for n in present] + [present[:2], present[1:], ["input", "weight"], ()]
    for needs in subsets:
        got = run_backward(backend, grad_output, arrays, {**options, "needs": needs})
        for gradient in ARRAYS:
            if gradient in needs:
                assert_same_bits(got[gradient], every[gradient], f"{gradient} of needs={needs}")
            else:
                assert got[gradient] is None, f"{gradient} of needs={needs}"


def test_needs_of_absent_arguments_stays_none(backend):
    case = CASES["version_1"]
    got = run_backward(backend, make_grad_output(case), make(case), {**case.options, "needs": ("mask", "weight")})
    assert {name for name, grad in got.items() if grad is not None} == {"weight"}


def transposed(a):
    return np.ascontiguousarray(a.T).T


def every_second(a):
    wide = np.full([2 * n for n in a.shape], np.nan).astype(a.dtype)
    view = wide[tuple(slice(1, None, 2) for _ in a.shape)]
    view[...] = a
    return view


def reversed_axes(a):
    return a[(slice(None, None, -1),) * a.ndim].copy()[(slice(None, None, -1),) * a.ndim]


def unaligned(a):
    buffer = np.empty(a.nbytes + 1, np.uint8)
    view = buffer[1:].view(a.dtype).reshape(a.shape)
    view[...] = a
    return view


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def broadcast_batch(a):
    """Batch stride 0: only for arrays whose batch entries are equal, which the test arranges."""
    return np.broadcast_to(a[:1], a.shape)


LAYOUTS = (transposed, every_second, reversed_axes, unaligned, read_only, np.asfortranarray)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_layouts_give_the_bits_of_a_copy(backend, layout, dtype):
    if not backend.on_cpu and layout in (unaligned, read_only):
        pytest.skip("a NumPy matter: no such CuPy arrays exist")
    case = CASES["every_option"]
    arrays, grad_output = make(case, dtype), make_grad_output(case, dtype)
    output = run(backend, arrays, case.options)
    grads = run_backward(backend, grad_output, arrays, case.options)
    odd = {name: layout(a) for name, a in arrays.items()}
    odd_grad = layout(grad_output)
    with Guard(odd_grad, *odd.values()):
        assert_same_bits(run(backend, odd, case.options), output)
        odd_grads = run_backward(backend, odd_grad, odd, case.options)
    for name in ARRAYS:
        assert_same_bits(odd_grads[name], grads[name], name)


def test_zero_strides(backend):
    case = CASES["every_option"]
    arrays, grad_output = make(case), make_grad_output(case)
    for name in ("input", "offset", "mask"):
        arrays[name][1] = arrays[name][0]
    grad_output[1] = grad_output[0]
    flat = {name: broadcast_batch(a) if name in ("input", "offset", "mask") else a for name, a in arrays.items()}
    assert flat["input"].strides[0] == 0
    assert_same_bits(run(backend, flat, case.options), run(backend, arrays, case.options))
    want = run_backward(backend, grad_output, arrays, case.options)
    got = run_backward(backend, broadcast_batch(grad_output), flat, case.options)
    for name in ARRAYS:
        assert_same_bits(got[name], want[name], name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_0(backend, dtype):
    """Empty results of the right shape; weight and bias gradients are zeros, not absent."""
    case = CASES["batch_0"]
    arrays, grad_output = make(case, dtype), make_grad_output(case, dtype)
    output = run(backend, arrays, case.options)
    assert (output.shape, output.dtype.name) == ((0, 4, 4, 4), dtype)
    grads = run_backward(backend, grad_output, arrays, case.options)
    for name in ARRAYS:
        assert (grads[name].shape, grads[name].dtype.name) == (arrays[name].shape, dtype)
        assert not grads[name].any()


def test_results_are_fresh_and_contiguous(backend):
    """The caller may write to a result without touching an argument or the next result."""
    case = CASES["one_pixel"]
    arrays = {name: backend.array(a) for name, a in make(case).items()}
    one = pydeform.deform_conv2d(**arrays, **case.options)
    two = pydeform.deform_conv2d(**arrays, **case.options)
    grads = pydeform.deform_conv2d_backward(one, **arrays, **case.options)
    results = [one, two, *grads]
    assert all(r.flags.c_contiguous for r in results)
    if backend.on_cpu:
        assert all(r.flags.writeable for r in results)
        everything = [*results, *arrays.values()]
        assert not any(np.shares_memory(a, b) for a, b in itertools.combinations(everything, 2))


def test_repeated_runs_give_the_same_bits():
    """On the CPU always."""
    case = CASES["past_tiles"]
    arrays, grad_output = make(case, "float32"), make_grad_output(case, "float32")
    call = functools.partial(pydeform.deform_conv2d_backward, grad_output, **arrays, **case.options)
    first_output, first = pydeform.deform_conv2d(**arrays, **case.options), call()
    for _ in range(3):
        assert_same_bits(pydeform.deform_conv2d(**arrays, **case.options), first_output)
        for name, again, once in zip(ARRAYS, call(), first, strict=True):
            assert_same_bits(again, once, name)


def test_deterministic_is_accepted_and_changes_nothing_on_the_cpu():
    case = CASES["every_option"]
    arrays, grad_output = make(case), make_grad_output(case)
    plain = pydeform.deform_conv2d_backward(grad_output, **arrays, **case.options)
    asked = pydeform.deform_conv2d_backward(grad_output, **arrays, **case.options, deterministic=True)
    for name, a, b in zip(ARRAYS, asked, plain, strict=True):
        assert_same_bits(a, b, name)


# Peers ----------------------------------------------------------------------------------------------------------------


def onnx_cases(monkeypatch):
    found = node_cases(monkeypatch, "DeformConv")
    assert len(found) == 4, [case.name for case in found]
    return found


def onnx_options(node: Any) -> dict[str, Any]:
    import onnx

    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    top, left, bottom, right = attributes.get("pads", (0, 0, 0, 0))
    return {
        "stride": tuple(attributes.get("strides", (1, 1))),
        "padding": ((top, bottom), (left, right)),
        "dilation": tuple(attributes.get("dilations", (1, 1))),
    }


def test_onnx_node_cases(backend, monkeypatch):
    for case in onnx_cases(monkeypatch):
        ((inputs, (want,)),) = case.data_sets
        node = case.model.graph.node[0]
        # An input left out in the middle of the list has an empty name; ONNX's order is X, W, offset, B, mask.
        given = iter(inputs)
        x, weight, offset, bias, mask = [next(given) if name else None for name in [*node.input, "", "", ""][:5]]
        arrays = {"input": x, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
        got = run(backend, arrays, onnx_options(node))
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4, err_msg=case.name)


@pytest.mark.parametrize("name", ["every_option", "version_1", "mostly_outside", "padding_asymmetric"])
def test_onnxruntime(backend, name):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    case = CASES[name]
    arrays = make(case, "float32")
    given = {"X": arrays["input"], "W": arrays["weight"], "offset": arrays["offset"]}
    given |= {"B": arrays["bias"]} if case.bias else {}
    given |= {"mask": arrays["mask"]} if case.mask else {}
    (top, bottom), (left, right) = case.padding
    node = onnx.helper.make_node(
        "DeformConv",
        [n if n in given else "" for n in ("X", "W", "offset", "B", "mask")],
        ["Y"],
        kernel_shape=case.kernel,
        strides=case.stride,
        dilations=case.dilation,
        pads=(top, left, bottom, right),
        group=case.groups,
        offset_group=case.offset_groups,
    )
    value = functools.partial(onnx.helper.make_tensor_value_info, elem_type=onnx.TensorProto.FLOAT)
    graph = onnx.helper.make_graph(
        [node], "one", [value(n, shape=a.shape) for n, a in given.items()], [value("Y", shape=None)]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented:
        pytest.skip(f"onnxruntime {onnxruntime.__version__} has no DeformConv")
    (want,) = session.run(["Y"], given)
    assert_close(run(backend, arrays, case.options), want.astype(np.float64), "float32")
