"""Layers: gradients through whole networks, and what a call keeps, shares, saves and refuses."""

import ml_dtypes
import numpy as np
import pytest

import pydeform
from pydeform import layers
from pydeform.layers import (
    BatchNorm2d,
    Conv2d,
    DeformConv2d,
    Flatten,
    GlobalAvgPool2d,
    Linear,
    MaxPool2d,
    ReLU,
    Sequential,
    Sigmoid,
    Softmax,
)
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
        if name.endswith("offset.bias"):
            param[...] = rng.integers(-1, 2, param.shape) + rng.uniform(0.3, 0.7, param.shape)
    return layer


def deform(modulated=False, **options):
    return moved(DeformConv2d(4, 6, (3, 2), (2, 1), (1, 0), modulated=modulated, rng=0, dtype=F8, **options))


EACH = [
    (Conv2d(4, 6, (3, 2), (2, 1), (1, 0), (2, 1), groups=2, rng=0, dtype=F8), (2, 4, 7, 6)),
    (Conv2d(3, 2, 3, bias=False, padding="same", rng=0, dtype=F8), (2, 3, 5, 6)),
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


def test_max_pool_ties_padding_and_nan():
    y, backprop = MaxPool2d(2)(np.ones((1, 1, 2, 2)))
    np.testing.assert_array_equal(backprop(np.ones_like(y)), [[[[1, 0], [0, 0]]]])
    y, _ = MaxPool2d(3, 1, 1)(np.full((1, 1, 2, 2), -5.0))
    np.testing.assert_array_equal(y, np.full((1, 1, 2, 2), -5.0))
    y, _ = MaxPool2d(2)(np.array([[[[1.0, np.nan], [3.0, 2.0]]]]))
    assert np.isnan(y).all()


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


def network(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return Sequential(
        DeformConv2d(1, 3, 3, modulated=True, rng=rng, dtype=dtype),
        BatchNorm2d(3, dtype=dtype),
        GlobalAvgPool2d(),
        Linear(3, 2, rng=rng, dtype=dtype),
    )


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_save_and_load(tmp_path, suffix, dtype):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    a, b = network(1, dtype), network(2, dtype)
    a.state["1.running_mean"][...] = 3
    a.params["0.offset.weight"][...] = 0.5
    kept = b.params["0.weight"]
    layers.save(a, tmp_path / f"network{suffix}")
    layers.load(b, str(tmp_path / f"network{suffix}"))
    for name, array in {**a.params, **a.state}.items():
        np.testing.assert_array_equal({**b.params, **b.state}[name], array)
    assert b.params["0.weight"] is kept


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_load_refuses_another_network_and_changes_nothing(tmp_path, suffix):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    path = tmp_path / f"network{suffix}"
    layers.save(Linear(3, 2, rng=0), path)
    wider = Linear(4, 2, rng=1)
    before = wider.params["weight"].copy()
    with pytest.raises(ValueError, match=r"load: weight in .* must have shape \(2, 4\), got \(2, 3\)"):
        layers.load(wider, path)
    np.testing.assert_array_equal(wider.params["weight"], before)
    with pytest.raises(ValueError, match=r"must hold the arrays of Linear; missing: none; unknown: bias"):
        layers.load(Linear(3, 2, bias=False), path)
    with pytest.raises(ValueError, match=r"missing: running_mean, running_var; unknown: none"):
        layers.load(BatchNorm2d(2), path)
    with pytest.raises(ValueError, match=r"path must end in .npz or .safetensors, got 'network.pt'"):
        layers.save(wider, "network.pt")


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
