"""Optimisers against plain formulas and, where installed, PyTorch's."""

import numpy as np
import pytest

from pydeform.layers import Conv2d, DeformConv2d, Linear, Sequential
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
