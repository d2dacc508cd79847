"""Layers: gradients through whole networks, and what a call keeps, shares, saves and refuses."""

import ml_dtypes
import numpy as np
import pytest

import pydeform
from pydeform import layers
from pydeform.layers import (
    ActiveConv2d,
    BatchNorm2d,
    Conv1d,
    Conv2d,
    Conv3d,
    DeformConv1d,
    DeformConv2d,
    DeformConv3d,
    Flatten,
    GlobalAvgPool2d,
    Linear,
    MaxPool2d,
    ReLU,
    Sequential,
    Sigmoid,
    Softmax,
)
from pydeform.optim import SGD, AdamW
from pydeform.testing import gradcheck

F8 = np.float64


def normal(*shape, seed=0, dtype=F8):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def check_gradients(layer, x, **options):
    """gradcheck of a layer by its input and by every parameter."""

    def run(x, values):
        for name, value in values.items():
            layer.params[name][...] = value
        return layer(x)

    def forward(x, **values):
        return run(x, values)[0]

    def backward(grad_y, x, **values):
        layer.zero_grads()
        grad_x = run(x, values)[1](grad_y).copy()  # Flatten's is a view of grad_y
        return {"x": grad_x, **{name: grad.copy() for name, grad in layer.grads.items()}}

    arguments = {"x": x, **{name: param.copy() for name, param in layer.params.items()}}
    gradcheck(forward, backward, arguments, elements=8, directions=1, **options)


def moved(layer, seed=0):
    """Offsets of all sizes and no sample on a kink: the branch starts at zero, where every sample lies on one."""
    rng = np.random.default_rng(seed)
    for name, param in layer.params.items():
        if name.endswith("offset.weight"):
            param[...] = 0.05 * rng.standard_normal(param.shape)
        if name.endswith(("offset.bias", "positions")):
            param[...] = rng.integers(-1, 2, param.shape) + rng.uniform(0.3, 0.7, param.shape)
    return layer


def deform(modulated=False, **options):
    return moved(DeformConv2d(4, 6, (3, 2), (2, 1), (1, 0), modulated=modulated, rng=0, dtype=F8, **options))


EACH = [
    (Conv2d(4, 6, (3, 2), (2, 1), (1, 0), (2, 1), groups=2, rng=0, dtype=F8), (2, 4, 7, 6)),
    (Conv2d(3, 2, 3, bias=False, padding="same", rng=0, dtype=F8), (2, 3, 5, 6)),
    (Conv1d(4, 6, 3, 2, (1,), 2, groups=2, rng=0, dtype=F8), (2, 4, 9)),
    (Conv3d(2, 3, (2, 3, 1), (1, 2, 1), 1, rng=0, dtype=F8), (1, 2, 3, 4, 3)),
    (moved(DeformConv1d(4, 6, 3, 2, 1, groups=2, offset_groups=2, modulated=True, rng=0, dtype=F8)), (2, 4, 9)),
    (moved(DeformConv3d(2, 3, (2, 1, 2), (1, 2, 1), (1, 0, 1), modulated=True, rng=0, dtype=F8)), (1, 2, 3, 4, 3)),
    (moved(ActiveConv2d(4, 6, (3, 2), (2, 1), (1, 0), groups=2, position_groups=2, rng=0, dtype=F8)), (2, 4, 7, 6)),
    (deform(), (2, 4, 7, 6)),
    (deform(bias=False, offset_groups=2, groups=2), (2, 4, 7, 6)),
    (deform(modulated=True), (2, 4, 7, 6)),
    (deform(modulated=True, mask_scale=2, offset_groups=2, boundary="dcnv2"), (2, 4, 7, 6)),
    (Linear(5, 3, rng=0, dtype=F8), (4, 5)),
    (Linear(5, 3, bias=False, rng=0, dtype=F8), (4, 5)),
    (ReLU(), (3, 4)),
    (Sigmoid(), (3, 4)),
    (Softmax(), (3, 4)),
    (Softmax(axis=1), (2, 3, 4, 5)),
    (GlobalAvgPool2d(), (2, 3, 4, 5)),
    (MaxPool2d((3, 2), (2, 1), (1, 0)), (2, 3, 6, 5)),
    (MaxPool2d(2), (2, 3, 5, 4)),
    (BatchNorm2d(3, dtype=F8), (2, 3, 4, 5)),
    (Flatten(), (2, 3, 4, 5)),
]


@pytest.mark.parametrize(("layer", "shape"), EACH, ids=lambda value: getattr(value, "name", None))
def test_gradients_of_each_layer(layer, shape):
    check_gradients(layer, normal(*shape, seed=1))


def test_gradients_through_a_whole_network():
    rng = np.random.default_rng(0)
    network = Sequential(
        Conv2d(1, 3, 3, 2, 1, rng=rng, dtype=F8),
        BatchNorm2d(3, dtype=F8),
        ReLU(),
        DeformConv2d(3, 4, 3, 1, 1, rng=rng, dtype=F8),
        Sequential(MaxPool2d(2), DeformConv2d(4, 3, 3, 1, 1, modulated=True, mask_scale=2, rng=rng, dtype=F8)),
        Sigmoid(),
        GlobalAvgPool2d(),
        Linear(3, 5, rng=rng, dtype=F8),
        Softmax(),
    )
    check_gradients(moved(network), normal(2, 1, 9, 10, seed=2))


def test_a_layer_used_twice_in_one_graph():
    layer = moved(DeformConv2d(3, 3, 3, 1, 1, modulated=True, rng=0, dtype=F8))
    twice = Sequential(layer, Sigmoid(), layer)
    assert list(twice.params) == [f"0.{name}" for name in layer.params]
    check_gradients(twice, normal(2, 3, 5, 4))


@pytest.mark.parametrize("optimiser", [SGD, AdamW])
def test_a_layer_shared_through_nested_sequentials_is_stepped_once(optimiser):
    """It has one name, and one step moves it as far as it moves where it stands once."""

    def step(network, layer):
        x = normal(4, 3, seed=1)
        y, backprop = network(x)
        before = layer.params["weight"].copy()
        backprop(np.ones_like(y))
        layer.grads["weight"][...] = 0.5  # whatever the graph
        layer.grads["bias"][...] = 0
        optimiser(network, lr=0.1, weight_decay=0.0, clip=0.25).step()
        return before - layer.params["weight"]

    alone, shared, norm = Linear(3, 3, rng=0, dtype=F8), Linear(3, 3, rng=0, dtype=F8), BatchNorm2d(3, dtype=F8)
    nested = Sequential(Sequential(shared), Sequential(ReLU(), Sequential(shared), Sigmoid()), shared)
    assert list(nested.params) == list(nested.grads) == ["0.0.weight", "0.0.bias"]
    assert repr(nested).endswith(": 12 parameters")
    np.testing.assert_array_equal(step(nested, shared), step(Sequential(alone), alone))
    assert list(Sequential(Sequential(norm), norm).state) == ["0.0.running_mean", "0.0.running_var"]

    class Twice(layers.Layer):  # as somebody might write it
        def __init__(self):
            super().__init__()
            self.layer = Linear(3, 3, rng=0, dtype=F8)
            for place in "ab":
                self.params |= {f"{place}.{name}": array for name, array in self.layer.params.items()}
                self.grads |= {f"{place}.{name}": array for name, array in self.layer.grads.items()}

        def __call__(self, x, train=True):
            return self.layer(x, train)

    twice, once = Twice(), Linear(3, 3, rng=0, dtype=F8)
    np.testing.assert_array_equal(step(twice, twice.layer), step(once, once))


def test_calls_keep_their_own_arrays_and_grads_add_up():
    layer = Linear(3, 2, rng=0, dtype=F8)
    a, b, g = normal(4, 3, seed=1), normal(4, 3, seed=2), normal(4, 2, seed=3)
    _, back_a = layer(a)
    _, back_b = layer(b)
    back_a(g)
    back_b(g)
    np.testing.assert_allclose(layer.grads["weight"], g.T @ (a + b))
    layer.zero_grads()
    assert not any(grad.any() for grad in layer.grads.values())


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("mask_scale", [1, 2])
def test_deform_conv2d_starts_as_conv2d(modulated, mask_scale):
    options = {"stride": 2, "padding": 1, "dilation": 2, "groups": 2}
    layer = DeformConv2d(4, 6, 3, **options, modulated=modulated, mask_scale=mask_scale, rng=0, dtype=F8)
    layer.params["bias"][...] = normal(6)
    plain = Conv2d(4, 6, 3, **options, rng=0, dtype=F8)
    np.testing.assert_array_equal(layer.params["weight"], plain.params["weight"])
    x = normal(2, 4, 9, 8)
    factor = mask_scale / 2 if modulated else 1
    expected = factor * plain(x)[0] + layer.params["bias"][:, None, None]
    np.testing.assert_allclose(layer(x)[0], expected, rtol=0, atol=1e-12)


def test_deform_conv2d_branch_is_laid_out_as_the_operator_reads_it():
    layer = DeformConv2d(2, 3, 3, padding=1, offset_groups=2, modulated=True, mask_scale=2, rng=0, dtype=F8)
    moved(layer)
    x = normal(2, 2, 5, 6)
    offset, mask = layer.offset_and_mask(x)
    branch = pydeform.conv2d(x, layer.params["offset.weight"], layer.params["offset.bias"], padding=1)
    np.testing.assert_array_equal(offset, branch[:, :36])
    np.testing.assert_allclose(mask, 2 / (1 + np.exp(-branch[:, 36:])), rtol=1e-14)
    expected = pydeform.deform_conv2d(x, offset, layer.params["weight"], layer.params["bias"], 1, 1, 1, mask)
    np.testing.assert_array_equal(layer(x)[0], expected)


@pytest.mark.parametrize(("layer", "shape"), EACH, ids=lambda value: getattr(value, "name", None))
def test_without_train_the_same_numbers_and_nothing_kept(layer, shape):
    x = normal(*shape)
    before = x.copy()
    y, backprop = layer(x, train=False)
    if not isinstance(layer, BatchNorm2d):
        np.testing.assert_array_equal(y, layer(x)[0])
    np.testing.assert_array_equal(x, before)
    with pytest.raises(RuntimeError, match=f"{layer.name}: nothing was kept for backprop"):
        backprop(y)
    assert {type(cell.cell_contents) for cell in backprop.__closure__} == {str}


def test_batch_norm_normalises_and_remembers():
    layer = BatchNorm2d(3, momentum=0.25, dtype=F8)
    x = 3 + 2 * normal(4, 3, 5, 6)
    y, _ = layer(x)
    np.testing.assert_allclose(y.mean(axis=(0, 2, 3)), 0, atol=1e-12)
    np.testing.assert_allclose(y.std(axis=(0, 2, 3)), 1, atol=1e-4)
    mean, var = x.mean(axis=(0, 2, 3)), x.var(axis=(0, 2, 3), ddof=1)
    np.testing.assert_allclose(layer.state["running_mean"], 0.25 * mean)
    np.testing.assert_allclose(layer.state["running_var"], 0.75 + 0.25 * var)
    still = {name: array.copy() for name, array in layer.state.items()}
    y, _ = layer(x, train=False)
    expected = (x - still["running_mean"][:, None, None]) / np.sqrt(still["running_var"] + layer.eps)[:, None, None]
    np.testing.assert_allclose(y, expected, atol=1e-12)
    assert all((layer.state[name] == still[name]).all() for name in still)


HALVES = [np.float16, ml_dtypes.bfloat16]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1000.0, 30000.0])
def test_batch_norm_of_half_types(dtype, size):
    """Computed in float32: the square of 300 overflows float16, and 4,096 values are more than bfloat16 can count."""
    layer, exact = BatchNorm2d(2, dtype=dtype), BatchNorm2d(2, dtype=F8)
    for name in ("weight", "bias"):
        layer.params[name][...] = exact.params[name][...] = [0.5, 2]
    x = (size * (0.25 * normal(4, 2, 32, 32) + 0.5)).astype(dtype)
    grad = normal(*x.shape, seed=1).astype(dtype)
    y, backprop = layer(x)
    want, exact_backprop = exact(x.astype(F8))
    grad_x, want_x = backprop(grad), exact_backprop(grad.astype(F8))
    unit = {np.float16: 2.0**-11, ml_dtypes.bfloat16: 2.0**-8}[dtype]
    for got, expected in ((y, want), (grad_x, want_x), (layer(x, train=False)[0], exact(x.astype(F8), train=False)[0])):
        assert got.dtype == dtype and got.any()
        np.testing.assert_allclose(got.astype(F8), expected, 1.1 * unit, 1e-5 * abs(expected).max() + 2.0**-25)
    for name in ("weight", "bias"):
        np.testing.assert_allclose(layer.grads[name].astype(F8), exact.grads[name], 1.1 * unit, 1e-3)
    for name, statistic in layer.state.items():
        assert statistic.dtype == np.float32
        np.testing.assert_allclose(statistic, exact.state[name], 1e-5, 1e-5)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_batch_norm_does_not_hide_a_variance_that_overflows(dtype):
    """1 / sqrt(inf) is 0: the channel would look like one that has died. The other channel is as it was."""
    layer, x = BatchNorm2d(2, dtype=dtype), normal(2, 2, 3, 4).astype(dtype)
    x[:, 1] *= 1e25
    with np.errstate(over="ignore", invalid="ignore"):
        y, backprop = layer(x)
        grad_x = backprop(np.ones_like(y))
        y_later = layer(x, train=False)[0]
    for found in (y, grad_x, y_later):
        assert np.isfinite(found[:, 0].astype(F8)).all() and np.isnan(found[:, 1].astype(F8)).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda dtype: Linear(512, 3, rng=0, dtype=dtype), (40, 512)),
        (lambda dtype: Sigmoid(), (50, 60)),
        (lambda dtype: Softmax(), (50, 300)),
        (lambda dtype: GlobalAvgPool2d(), (3, 4, 40, 50)),
        (lambda dtype: MaxPool2d(5, 1, 2), (2, 3, 20, 21)),
    ],
)
def test_half_types_are_rounded_once(dtype, build, shape):
    """Sums and products in float32: results are those of float64, rounded."""
    layer, exact = build(dtype), build(np.float64)
    for name, param in layer.params.items():
        exact.params[name][...] = param
    x, grad_of = (2 + normal(*shape)).astype(dtype), lambda y: normal(*y.shape, seed=1).astype(dtype)
    y, backprop = layer(x)
    want, exact_backprop = exact(x.astype(F8))
    grad_x, want_x = backprop(grad_of(y)), exact_backprop(grad_of(y).astype(F8))
    unit = {np.float16: 2.0**-11, ml_dtypes.bfloat16: 2.0**-8}[dtype]
    pairs = [(y, want), (grad_x, want_x), *((layer.grads[name], exact.grads[name]) for name in layer.params)]
    for got, expected in pairs:
        np.testing.assert_allclose(got.astype(F8), expected, 1.02 * unit, 3e-7 * abs(expected).max() + 2.0**-25)


def test_max_pool_ties_padding_and_nan():
    y, backprop = MaxPool2d(2)(np.ones((1, 1, 2, 2)))
    np.testing.assert_array_equal(backprop(np.ones_like(y)), [[[[1, 0], [0, 0]]]])
    y, _ = MaxPool2d(3, 1, 1)(np.full((1, 1, 2, 2), -5.0))
    np.testing.assert_array_equal(y, np.full((1, 1, 2, 2), -5.0))
    y, _ = MaxPool2d(2)(np.array([[[[1.0, np.nan], [3.0, 2.0]]]]))
    assert np.isnan(y).all()


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_relu_at_zero_and_beyond(dtype):
    """The gradient is 0 at 0, of both signs, and wherever x is negative, also of an infinite gradient."""
    x = np.array([-np.inf, -1, -0.0, 0.0, 2.0**-14, 3, np.inf, np.nan], dtype)
    y, backprop = ReLU()(x)
    np.testing.assert_array_equal(y.astype(float), [0, 0, 0, 0, 2.0**-14, 3, np.inf, np.nan])
    np.testing.assert_array_equal(backprop(np.full(8, 5, dtype)).astype(float), [0, 0, 0, 0, 5, 5, 5, 0])
    np.testing.assert_array_equal(backprop(np.full(8, -np.inf, dtype)).astype(float), [0] * 4 + [-np.inf] * 3 + [0])


@pytest.mark.parametrize("padding", [0, 1])
def test_max_pool_of_infinite_values_and_gradients(padding):
    """Padding, which is -inf inside, never wins, and an infinite gradient does not reach the pixels that lost."""
    x = np.full((1, 1, 3, 3), -np.inf)
    y, backprop = MaxPool2d(2, 1, padding)(x)
    assert (y == -np.inf).all()
    grad = backprop(np.ones_like(y))
    assert grad.sum() == y.size  # each window gives its gradient to the first of its pixels
    if padding:
        np.testing.assert_array_equal(grad[0, 0], [[4, 2, 2], [2, 1, 1], [2, 1, 1]])
    x = np.arange(9.0).reshape(1, 1, 3, 3)
    y, backprop = MaxPool2d(2, 1)(x)
    np.testing.assert_array_equal(
        backprop(np.full_like(y, np.inf))[0, 0], [[0, 0, 0], [0, *[np.inf] * 2], [0, *[np.inf] * 2]]
    )


def test_activations_far_out():
    x = np.array([[-1000.0, 0.0, 1000.0]])
    np.testing.assert_array_equal(Sigmoid()(x)[0], [[0, 0.5, 1]])
    np.testing.assert_array_equal(Softmax()(x)[0], [[0, 0, 1]])


def test_sequential_holds_the_same_arrays():
    inner = Linear(3, 2, rng=0)
    network = Sequential(Flatten(), Sequential(inner, ReLU()), BatchNorm2d(2))
    assert network.params["1.0.weight"] is inner.params["weight"]
    assert network.grads["1.0.bias"] is inner.grads["bias"]
    assert network.state["2.running_var"] is network.layers[2].state["running_var"]
    inner.params["bias"] += 7
    assert (network.params["1.0.bias"] == 7).all()
    inner(normal(4, 3, dtype=np.float32))[1](np.ones((4, 2), np.float32))
    assert (network.grads["1.0.bias"] == 4).all()
    network.zero_grads()
    assert not inner.grads["bias"].any()


def test_rng_decides_the_weights():
    for build in (lambda rng: Linear(4, 3, rng=rng), lambda rng: DeformConv2d(4, 3, 3, rng=rng)):
        a, b, c = build(1), build(np.random.default_rng(1)), build(2)
        np.testing.assert_array_equal(a.params["weight"], b.params["weight"])
        assert (a.params["weight"] != c.params["weight"]).any()
        assert a.params["weight"].dtype == np.float32
    weight = Conv2d(64, 64, 3, rng=0).params["weight"]
    assert abs(weight.std() * np.sqrt(64 * 9 / 2) - 1) < 0.02


REFUSED = [
    (lambda: Conv2d(3, 4, 3)(normal(2, 4, 5, 6, dtype=np.float32)), ValueError,
     r"Conv2d: x must have shape \(N, in_channels, H, W\) = \(N, 3, H, W\), got \(2, 4, 5, 6\)"),
    (lambda: DeformConv2d(3, 4, 3)(normal(3, 5, 6, dtype=np.float32)), ValueError,
     r"DeformConv2d: x must have shape \(N, in_channels, H, W\) = \(N, 3, H, W\), got \(3, 5, 6\)"),
    (lambda: Linear(3, 4)(normal(2, 5, dtype=np.float32)), ValueError,
     r"Linear: x must have shape \(N, in_features\) = \(N, 3\), got \(2, 5\)"),
    (lambda: Linear(3, 4)(normal(2, 3)), TypeError,
     r"Linear: x must have the dtype of the parameters, float32, got float64"),
    (lambda: BatchNorm2d(3)(normal(2, 4, 5, 6, dtype=np.float32)), ValueError,
     r"BatchNorm2d: x must have shape \(N, channels, H, W\) = \(N, 3, H, W\), got \(2, 4, 5, 6\)"),
    (lambda: BatchNorm2d(3)(normal(1, 3, 1, 1, dtype=np.float32)), ValueError,
     r"BatchNorm2d: x must have at least 2 values per channel when train=True, got shape \(1, 3, 1, 1\)"),
    (lambda: GlobalAvgPool2d()(normal(2, 3)), ValueError,
     r"GlobalAvgPool2d: x must have shape \(N, C, H, W\), got \(2, 3\)"),
    (lambda: MaxPool2d(3)(normal(2, 3, 2, 5)), ValueError,
     r"MaxPool2d: x must be at least as large as kernel_size = \(3, 3\) .* got \(H, W\) = \(2, 5\)"),
    (lambda: MaxPool2d(3, padding=2), ValueError, r"MaxPool2d: padding must be at most half of kernel_size"),
    (lambda: MaxPool2d(0), ValueError, r"MaxPool2d: kernel_size must be an int >= 1 or 2 of them, got 0"),
    (lambda: ReLU()(normal(2, 3))[1](normal(3, 2)), ValueError,
     r"ReLU: grad_y must have the shape of y, \(2, 3\), got \(3, 2\)"),
    (lambda: Conv2d(3, 4, 3, groups=2), ValueError, r"Conv2d: in_channels must be a multiple of groups = 2, got 3"),
    (lambda: DeformConv2d(3, 4, 3, offset_groups=2), ValueError,
     r"DeformConv2d: in_channels must be a multiple of offset_groups = 2, got 3"),
    (lambda: DeformConv2d(3, 4, (3, 3, 3)), ValueError, r"DeformConv2d: kernel_size must be an int >= 1 or 2 of them"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_errors_name_layer_argument_expected_and_got(call, error, message):
    with pytest.raises(error, match=message):
        call()


# Options that a layer is made with: refused there, not at its first call.
def conv(**options):
    return lambda: Conv2d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, **options})


def deformable(**options):
    return lambda: DeformConv2d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, **options})


FLAGS = ["yes", 1, None]
BAD = [
    *((build(**{argument: value}), error, rf"{argument} must be an int >= 1")
      for build in (conv, deformable) for argument in ("in_channels", "out_channels", "groups")
      for value, error in ((0, ValueError), (-4, ValueError), (2.0, TypeError), ("4", TypeError), (None, TypeError))),
    *((build(**{argument: value}), error, rf"{argument} must be an int >= {least} or 2 of them")
      for build in (conv, deformable) for argument, least in (("kernel_size", 1), ("stride", 1), ("dilation", 1))
      for value, error in ((0, ValueError), ((1, -1), ValueError), ((1, 2, 3), ValueError), (1.5, TypeError))),
    *((build(padding=value), error, "padding must be an int >= 0, 2 of them, 2 .* pairs, or 'same'")
      for build in (conv, deformable)
      for value, error in ((-1, ValueError), ("valid", ValueError), ((1, (0, -1)), ValueError), (0.5, TypeError))),
    *((build(bias=value), TypeError, "bias must be True or False") for build in (conv, deformable) for value in FLAGS),
    *((build(dtype=value), TypeError, "dtype must be float64, float32, float16, bfloat16, got")
      for build in (conv, deformable) for value in (int, "complex64", ">f4", "no dtype", None)),
    *((build(rng=value), error, "rng must be a numpy.random.Generator or what seeds one, got")
      for build in (conv, deformable) for value, error in (("seed", TypeError), (-1, ValueError), (1.5, TypeError))),
    (deformable(offset_groups=0), ValueError, "offset_groups must be an int >= 1, got 0"),
    (deformable(modulated="no"), TypeError, "modulated must be True or False, got 'no'"),
    *((deformable(mask_scale=value), error, "mask_scale must be a finite number > 0")
      for value, error in ((0, ValueError), (-1, ValueError), (np.nan, ValueError), ("2", TypeError))),
    (deformable(boundary="zeros"), ValueError, "boundary must be one of 'torchvision', 'dcnv2', 'dcnv1', got 'zeros'"),
    *((lambda value=value: Linear(*value), error, f"{name} must be an int >= 1")
      for value, error, name in (((0, 3), ValueError, "in_features"), ((3, 2.5), TypeError, "out_features"))),
    *((lambda value=value: Linear(3, 2, value), TypeError, "bias must be True or False") for value in FLAGS),
    (lambda: Linear(3, 2, dtype="int8"), TypeError, "dtype must be"),
    (lambda: Linear(3, 2, rng="x"), TypeError, "rng must be"),
    (lambda: BatchNorm2d(0), ValueError, "channels must be an int >= 1, got 0"),
    *((lambda value=value: BatchNorm2d(3, value), error, "eps must be a finite number")
      for value, error in ((-1e-5, ValueError), (np.inf, ValueError), (None, TypeError))),
    *((lambda value=value: BatchNorm2d(3, momentum=value), error, "momentum must be a (finite )?number")
      for value, error in ((-0.1, ValueError), (1.5, ValueError), (np.nan, ValueError), (None, TypeError))),
    (lambda: BatchNorm2d(3, dtype=np.int32), TypeError, "dtype must be"),
    *((lambda value=value: Softmax(value), TypeError, "axis must be an int, got") for value in (1.0, True, None, "0")),
    *((lambda value=value: MaxPool2d(2, **value), error, rf"{next(iter(value))} must be an int")
      for value, error in (({"stride": 0}, ValueError), ({"stride": (1, 1, 1)}, ValueError),
                           ({"stride": 1.5}, TypeError), ({"padding": -1}, ValueError),
                           ({"padding": "same"}, TypeError))),
    (lambda: Sequential([Linear(3, 2)]), TypeError, r"layer 0 must be a Layer, got \[Linear"),
    (lambda: Sequential(ReLU(), ReLU), TypeError, "layer 1 must be a Layer, got <class"),
    (lambda: Sequential(ReLU(), layers.RoIAlign(2)), TypeError,
     r"layer 1 must be one that is called with x and train alone, got RoIAlign\(output_size=\(2, 2\)\)"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "error", "message"), BAD)
def test_bad_options_are_refused_when_the_layer_is_made(build, error, message):
    with pytest.raises(
        error, match=r"^(Conv2d|DeformConv2d|Linear|BatchNorm2d|Softmax|MaxPool2d|Sequential): " + message
    ):
        build()


def test_options_of_numpys_integers():
    n = np.int64(4)
    layer = Conv2d(n, np.uint8(2), n - 1, stride=np.int16(2), padding=np.int64(1), groups=np.int8(2), rng=0)
    same = Conv2d(4, 2, 3, 2, 1, groups=2, rng=0)
    assert repr(layer) == repr(same)
    x = normal(1, 4, 5, 6, dtype=np.float32)
    np.testing.assert_array_equal(layer(x)[0], same(x)[0])
    assert Softmax(np.array(1)).axis == 1  # what operator.index takes


def test_softmax_needs_values_along_its_axis():
    for layer, shape in ((Softmax(2), (3, 4)), (Softmax(-3), (3, 4)), (Softmax(), (3, 0)), (Softmax(), ())):
        with pytest.raises(ValueError, match=r"Softmax: x must have values along axis = -?\d, got shape"):
            layer(np.zeros(shape))
    assert Softmax()(np.zeros((0, 3)))[0].shape == (0, 3)


REPRS = [
    (Conv2d(3, 8, 3, padding=1), "Conv2d(in_channels=3, out_channels=8, kernel_size=3, padding=1): 224 parameters"),
    (Conv2d(4, 8, (3, 2), 2, "same", groups=2, bias=False, dtype=np.float16),
     "Conv2d(in_channels=4, out_channels=8, kernel_size=(3, 2), stride=2, padding=same, groups=2, bias=False, "
     "dtype=float16): 96 parameters"),
    (DeformConv2d(3, 4, 3, offset_groups=3, modulated=True, mask_scale=2, boundary="dcnv2"),
     "DeformConv2d(in_channels=3, out_channels=4, kernel_size=3, offset_groups=3, modulated=True, mask_scale=2.0, "
     "boundary=dcnv2): 2,380 parameters"),
    (Linear(1000, 10), "Linear(in_features=1000, out_features=10): 10,010 parameters"),
    (BatchNorm2d(5, momentum=0.25), "BatchNorm2d(channels=5, momentum=0.25): 10 parameters"),
    (ReLU(), "ReLU()"),
    (Softmax(1), "Softmax(axis=1)"),
    (MaxPool2d(3, 2, 1), "MaxPool2d(kernel_size=3, stride=2, padding=1)"),
    (layers.RoIAlign(7, 1 / 16, aligned=True), "RoIAlign(output_size=(7, 7), spatial_scale=0.0625, aligned=True)"),
    (layers.DeformRoIPool(2, 3, hidden=4, modulated=True),
     "DeformRoIPool(output_size=(2, 2), in_channels=3, hidden=4, modulated=True): 184 parameters"),
    (layers.DeformPSRoIPool(4, 2, hidden=5, dtype=np.float64),
     "DeformPSRoIPool(output_dim=4, pooled_size=2, hidden=5, dtype=float64): 163 parameters"),
    (Sequential(ReLU(), Sequential(Linear(3, 2), Sigmoid()), Linear(2, 1)),
     "Sequential(\n  0: ReLU()\n  1: Sequential(\n    0: Linear(in_features=3, out_features=2): 8 parameters\n"
     "    1: Sigmoid()\n  ): 8 parameters\n  2: Linear(in_features=2, out_features=1): 3 parameters\n): 11 parameters"),
    (Sequential(), "Sequential()"),
]  # fmt: skip


@pytest.mark.parametrize(("layer", "text"), REPRS)
def test_repr_tells_sizes_and_counts(layer, text):
    assert repr(layer) == text
