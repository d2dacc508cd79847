"""Optimisers against plain formulas and, where installed, PyTorch's."""

import ml_dtypes
import numpy as np
import pytest

from pydeform.layers import Conv2d, DeformConv2d, Linear, ReLU, Sequential
from pydeform.optim import SGD, AdamW

SETTINGS = [
    (SGD, {"lr": 0.1}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    (AdamW, {"lr": 0.1, "weight_decay": 0.0}),
    (AdamW, {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}),
]


def linear(dtype=np.float64):
    layer = Linear(3, 2, rng=0, dtype=dtype)
    layer.params["bias"][...] = [1, -2]
    return layer


def gradients(step):
    rng = np.random.default_rng(step)
    return {"weight": rng.standard_normal((2, 3)), "bias": rng.standard_normal(2)}


def plain_formula(optimiser, param, grads, *, lr, momentum=0, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8):
    v = m = s = 0.0
    for t, g in enumerate(grads, start=1):
        if optimiser is SGD:
            v = momentum * v + g + weight_decay * param
            param = param - lr * v
        else:
            m = betas[0] * m + (1 - betas[0]) * g
            s = betas[1] * s + (1 - betas[1]) * g**2
            param = param - lr * weight_decay * param
            param = param - lr * (m / (1 - betas[0] ** t)) / (np.sqrt(s / (1 - betas[1] ** t)) + eps)
    return param


@pytest.mark.parametrize(("optimiser", "settings"), SETTINGS)
def test_against_the_plain_formula(optimiser, settings):
    layer = linear()
    start = {name: param.copy() for name, param in layer.params.items()}
    kept = dict(layer.params)
    opt = optimiser(layer, **settings)
    for step in range(5):
        for name, grad in gradients(step).items():
            layer.grads[name][...] = grad
        opt.step()
    for name, param in layer.params.items():
        expected = plain_formula(optimiser, start[name], [gradients(step)[name] for step in range(5)], **settings)
        np.testing.assert_allclose(param, expected, rtol=1e-12)
        assert param is kept[name]


@pytest.mark.parametrize(("optimiser", "settings"), SETTINGS)
def test_against_torch(optimiser, settings):
    torch = pytest.importorskip("torch")
    layer = linear()
    theirs = {name: torch.tensor(param.copy(), requires_grad=True) for name, param in layer.params.items()}
    opt = optimiser(layer, clip=1.0, **settings)
    reference = getattr(torch.optim, optimiser.__name__)(list(theirs.values()), **settings)
    for step in range(4):
        lr = settings["lr"] / (1 + step)
        for name, grad in gradients(step).items():
            layer.grads[name][...] = grad
            theirs[name].grad = torch.tensor(grad)
        torch.nn.utils.clip_grad_norm_(list(theirs.values()), 1.0)
        reference.param_groups[0]["lr"] = lr
        opt.step(lr)
        reference.step()
    for name, param in layer.params.items():
        # torch adds 1e-6 to the norm it divides by
        np.testing.assert_allclose(param, theirs[name].detach().numpy(), rtol=1e-5)


@pytest.mark.parametrize("optimiser", [SGD, AdamW])
def test_lr_mult_by_name(optimiser):
    def stepped(lr_mult):
        network = Sequential(Conv2d(1, 2, 3, rng=0), DeformConv2d(2, 3, 3, rng=1))
        before = {name: param.copy() for name, param in network.params.items()}
        for grad in network.grads.values():
            grad[...] = 1
        optimiser(network, lr=0.5, weight_decay=0, lr_mult=lr_mult).step()
        return {name: float((before[name] - param).mean()) for name, param in network.params.items()}

    expected = {
        "0.weight": 0.5,
        "0.bias": 1.0,
        "1.weight": 0.5,
        "1.bias": 1.0,
        "1.offset.weight": 0.05,
        "1.offset.bias": 0.1,
    }
    assert stepped({"*offset.*": 0.1, "*.bias": 2}) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match=rf"{optimiser.__name__}: lr_mult must match parameters among .*offsets"):
        stepped({"*.offsets.*": 0.1})


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_clip_by_the_norm_over_all_gradients(dtype):
    layer = linear(dtype)
    before = {name: param.copy() for name, param in layer.params.items()}
    for grad in layer.grads.values():
        grad[...] = 300  # its square overflows float16
    SGD(layer, lr=1, clip=0.5).step()
    moves = np.concatenate([(before[name] - param).ravel() for name, param in layer.params.items()]).astype(float)
    np.testing.assert_allclose(moves, 0.5 / np.sqrt(8), rtol=1e-2)
    assert all((grad == 300).all() for grad in layer.grads.values())


def test_small_gradients_are_not_clipped():
    layer = linear()
    before = layer.params["bias"].copy()
    layer.grads["bias"][...] = [0.3, 0.4]
    SGD(layer, lr=1, clip=1).step()
    np.testing.assert_allclose(before - layer.params["bias"], [0.3, 0.4])


# Half types ----------------------------------------------------------------------------------------------------------
HALVES = [np.float16, ml_dtypes.bfloat16]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("settings", [{}, {"momentum": 0.5}, {"clip": 1e3}])
def test_small_steps_of_half_types_are_not_lost(dtype, settings):
    """1,000 of 1e-4, each too small to change a weight of 1.0."""
    layer = linear(dtype)
    layer.params["weight"][...] = 1
    optimiser = SGD(layer, lr=1e-4 * (1 - settings.get("momentum", 0)), **settings)
    for _ in range(1000):
        layer.grads["weight"][...] = 1
        optimiser.step()
    np.testing.assert_allclose(layer.params["weight"].astype(float), 0.9, atol=2.0**-8)
    assert layer.params["weight"].dtype == dtype


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("optimiser", "settings"), SETTINGS)
def test_half_types_step_as_float32_does(dtype, optimiser, settings):
    """The parameter is a float32 one rounded, whatever the optimiser's options."""
    half, single = linear(dtype), linear(np.float32)
    for name, param in half.params.items():
        single.params[name][...] = param
    trainers = [optimiser(layer, clip=2.0, **settings) for layer in (half, single)]
    for step in range(20):
        for name, grad in gradients(step).items():
            half.grads[name][...] = grad
            single.grads[name][...] = half.grads[name]
        for trainer in trainers:
            trainer.step()
    for name, param in half.params.items():
        np.testing.assert_array_equal(param, single.params[name].astype(dtype))
    assert all(array.dtype == np.float32 for name, array in trainers[0].state().items() if name != "steps")


@pytest.mark.parametrize("dtype", [np.float32, *HALVES])
def test_parameters_that_somebody_else_changes(dtype):
    """The next step starts from where they were set, not from the master of before."""
    layer = linear(dtype)
    optimiser = SGD(layer, lr=0.25)
    for name, values in (("bias", [5, -3]), ("bias", [1, 8])):
        layer.grads["weight"][...] = layer.grads["bias"][...] = 1
        optimiser.step()
        layer.params[name][...] = values
        optimiser.step()
        np.testing.assert_array_equal(layer.params[name].astype(float), np.array(values) - 0.25)
    layer.params["bias"][...] = np.nan
    optimiser.step()
    assert np.isnan(layer.params["bias"].astype(float)).all()


# What diverges -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1.0, 1e18, 1e30])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, ml_dtypes.bfloat16])
def test_clipping_of_gradients_of_any_size(backend, dtype, scale):
    """Their squares overflow, or vanish: the direction stays, and the norm is `clip`."""
    grads = [np.array([[3, 0, 0], [0, 4, 0]]), np.array([12, 0])]  # of norm 13
    clip = 2.6 * min(scale, 1.0)
    layer = linear(dtype)
    for param in layer.params.values():
        param[...] = 0
    if not backend.on_cpu:
        layer.to("cuda")
    for grad, values in zip(layer.grads.values(), grads, strict=True):
        grad[...] = backend.array((scale * values).astype(dtype))
    SGD(layer, lr=1.0 / clip, clip=clip).step()
    for param, values in zip(layer.params.values(), grads, strict=True):
        np.testing.assert_allclose(backend.numpy(param).astype(float), -values / 13, 2.0**-7, 1e-30)
    for grad in layer.grads.values():  # within the clip they stay as they are
        grad[...] = 0
    before = {name: backend.numpy(param).copy() for name, param in layer.params.items()}
    SGD(layer, lr=1.0, clip=clip).step()
    for name, param in layer.params.items():
        np.testing.assert_array_equal(backend.numpy(param), before[name])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_clipping_without_a_norm_is_loud(backend, value):
    """One infinite gradient, and `clip / norm` is 0 for all the others: they would stop training in silence."""
    layer = linear(np.float32)
    if not backend.on_cpu:
        layer.to("cuda")
    layer.grads["bias"][...] = backend.array(np.array([value, 1], np.float32))
    SGD(layer, lr=1.0, clip=1.0).step()
    assert all(np.isnan(backend.numpy(param)).all() for param in layer.params.values())


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_adam_does_not_hide_a_square_that_overflows(dtype):
    """mean / sqrt(inf) is 0: this parameter would never train again."""
    layer = linear(dtype)
    optimiser = AdamW(layer, lr=0.1)
    layer.grads["bias"][...] = [1e25, 1]
    with np.errstate(over="ignore"):
        optimiser.step()
    assert np.isnan(layer.params["bias"].astype(float)).tolist() == [True, False]


# Options -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("optimiser", [SGD, AdamW])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -0.1}, ValueError, "lr must be a finite number >= 0, got -0.1"),
        ({"lr": np.nan}, ValueError, "lr must be a finite number, got nan"),
        ({"lr": "0.1"}, TypeError, "lr must be a finite number, got '0.1'"),
        ({"lr": None}, TypeError, "lr must be a finite number, got None"),
        ({"lr": True}, TypeError, "lr must be a finite number, got True"),
        ({"weight_decay": -1}, ValueError, "weight_decay must be a finite number >= 0, got -1"),
        ({"weight_decay": np.inf}, ValueError, "weight_decay must be a finite number, got inf"),
        ({"clip": 0}, ValueError, "clip must be None or a finite number > 0, got 0"),
        ({"clip": -1}, ValueError, "clip must be a finite number >= 0, got -1"),
        ({"clip": np.nan}, ValueError, "clip must be a finite number, got nan"),
        ({"clip": "1"}, TypeError, "clip must be a finite number, got '1'"),
        ({"lr_mult": 0.1}, TypeError, "lr_mult must be a dict of patterns and factors, got 0.1"),
        ({"lr_mult": {"bias": -1}}, ValueError, r"lr_mult\['bias'\] must be a finite number >= 0, got -1"),
        ({"lr_mult": {"bias": np.inf}}, ValueError, r"lr_mult\['bias'\] must be a finite number, got inf"),
        ({"lr_mult": {"bias": "x"}}, TypeError, r"lr_mult\['bias'\] must be a finite number, got 'x'"),
        ({"lr_mult": {"scale": 1}}, ValueError, "lr_mult must match parameters among weight, bias, got 'scale'"),
    ],
)
def test_bad_options_of_both(optimiser, options, error, message):
    with pytest.raises(error, match=f"^{optimiser.__name__}: {message}"):
        optimiser(linear(), **{"lr": 0.1, **options})
    trainer = optimiser(linear(), lr=0.1)
    if "lr" in options and options["lr"] is not None:
        with pytest.raises(error, match=f"^{optimiser.__name__}: {message}"):
            trainer.step(options["lr"])
        assert trainer.steps == 0


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: SGD(linear(), 0.1, momentum=1.5), ValueError, "SGD: momentum must be a number from 0 to 1, got 1.5"),
        (lambda: SGD(linear(), 0.1, momentum=-0.5), ValueError, "SGD: momentum must be a number from 0 to 1, got -0.5"),
        (lambda: SGD(linear(), 0.1, momentum=None), TypeError, "SGD: momentum must be a finite number, got None"),
        (lambda: AdamW(linear(), betas=(0.9, 1)), ValueError, r"AdamW: betas must be below 1, got \(0.9, 1\)"),
        (lambda: AdamW(linear(), betas=(-0.1, 0.9)), ValueError, "AdamW: betas must be a number from 0 to 1, got -0.1"),
        (lambda: AdamW(linear(), betas=0.9), TypeError, "AdamW: betas must be two numbers, got 0.9"),
        (lambda: AdamW(linear(), betas=(0.9,)), TypeError, r"AdamW: betas must be two numbers, got \(0.9,\)"),
        (lambda: AdamW(linear(), betas=("a", 0.9)), TypeError, "AdamW: betas must be a finite number, got 'a'"),
        (lambda: AdamW(linear(), eps=-1e-8), ValueError, "AdamW: eps must be a finite number >= 0, got -1e-08"),
        (lambda: AdamW(linear(), eps=None), TypeError, "AdamW: eps must be a finite number, got None"),
        (lambda: SGD(ReLU(), 0.1), ValueError, r"SGD: layer must have parameters, got ReLU\(\)"),
        (lambda: SGD([linear()], 0.1), TypeError, r"SGD: layer must be a pydeform.layers.Layer, got list"),
    ],
)
def test_bad_options_of_one(build, error, message):
    with pytest.raises(error, match=f"^{message}"):
        build()


def test_patterns_are_texts():
    with pytest.raises(TypeError, match=r"SGD: lr_mult must have patterns for keys, got 1"):
        SGD(Linear(1, 1, rng=0), 0.1, lr_mult={1: 1})
