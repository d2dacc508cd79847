"""Optimisers: `step()` changes the parameters of a layer, in place, by its gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from pydeform.layers import Layer


class SGD:
    """Stochastic gradient descent: v = momentum*v + grad + weight_decay*param; param -= lr*v.

    Parameters
    ----------
    layer : a layer or a whole network (`Sequential`)
    lr : learning rate; `step(lr=...)` overrides it for one step, which is all that a schedule needs
    lr_mult : {pattern: factor} on the parameter names, e.g. {"*offset.*": 0.1} for the offset branches of deformable
        layers as in the papers. Shell patterns; factors of several that match are multiplied; one that matches
        no parameter is a ValueError
    clip : when not None, all gradients are scaled down together so that their common norm is at most `clip`

    >>> import numpy as np
    >>> from pydeform.layers import Linear
    >>> layer = Linear(1, 1, rng=0)
    >>> layer.grads["bias"][...] = 2
    >>> SGD(layer, lr=0.5).step()
    >>> print(layer.params["bias"])
    [-1.]
    """

    def __init__(
        self,
        layer: Layer,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        lr_mult: Mapping[str, float] | None = None,
        clip: float | None = None,
    ) -> None:
        self.layer, self.lr, self.momentum, self.weight_decay, self.clip = layer, lr, momentum, weight_decay, clip
        self.factors = lr_factors("SGD", layer, lr_mult)
        self.velocity = {name: _accumulator(param) for name, param in layer.params.items()}

    def step(self, lr: float | None = None) -> None:
        lr = self.lr if lr is None else lr
        scale = clip_scale(self.layer.grads, self.clip)
        for name, param in self.layer.params.items():
            velocity = self.velocity[name]
            velocity *= self.momentum
            velocity += self.layer.grads[name] * scale
            if self.weight_decay:
                velocity += self.weight_decay * param
            param -= (lr * self.factors[name] * velocity).astype(param.dtype)


class AdamW:
    """Adam with decoupled weight decay (arXiv:1711.05101, algorithm 2, as in PyTorch).

    Parameters
    ----------
    layer, lr, lr_mult, clip : as in `SGD`
    betas : decay of the averages of the gradient and of its square
    eps : added to the root of the latter
    weight_decay : each step multiplies the parameters by 1 - lr*weight_decay

    >>> from pydeform.layers import Linear
    >>> layer = Linear(1, 1, rng=0)
    >>> layer.grads["bias"][...] = 2
    >>> AdamW(layer, lr=0.5).step()
    >>> print(layer.params["bias"])
    [-0.5]
    """

    def __init__(
        self,
        layer: Layer,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        lr_mult: Mapping[str, float] | None = None,
        clip: float | None = None,
    ) -> None:
        self.layer, self.lr, self.betas, self.eps = layer, lr, betas, eps
        self.weight_decay, self.clip = weight_decay, clip
        self.factors = lr_factors("AdamW", layer, lr_mult)
        self.steps = 0
        self.mean = {name: _accumulator(param) for name, param in layer.params.items()}
        self.square = {name: _accumulator(param) for name, param in layer.params.items()}

    def step(self, lr: float | None = None) -> None:
        lr = self.lr if lr is None else lr
        self.steps += 1
        beta1, beta2 = self.betas
        scale = clip_scale(self.layer.grads, self.clip)
        for name, param in self.layer.params.items():
            mean, square, rate = self.mean[name], self.square[name], lr * self.factors[name]
            grad = self.layer.grads[name].astype(mean.dtype) * scale
            mean += (1 - beta1) * (grad - mean)
            square += (1 - beta2) * (grad * grad - square)
            root = np.sqrt(square / (1 - beta2**self.steps)) + self.eps
            param *= 1 - rate * self.weight_decay
            param -= (rate / (1 - beta1**self.steps) * mean / root).astype(param.dtype)


def lr_factors(op: str, layer: Layer, lr_mult: Mapping[str, float] | None) -> dict[str, float]:
    """The factor of each parameter. A pattern for nothing is a mistake that would train the wrong thing quietly."""
    factors = dict.fromkeys(layer.params, 1.0)
    for pattern, factor in (lr_mult or {}).items():
        names = [name for name in factors if fnmatchcase(name, pattern)]
        if not names:
            raise ValueError(f"{op}: lr_mult must match parameters among {', '.join(factors)}, got {pattern!r}")
        for name in names:
            factors[name] *= factor
    return factors


def clip_scale(grads: Mapping[str, Any], clip: float | None) -> float:
    """What to multiply all gradients by so that their norm, taken over all of them, is at most `clip`."""
    if clip is None:
        return 1.0
    norm = math.sqrt(sum(float(np.square(g, dtype=_wide(g.dtype)).sum()) for g in grads.values()))
    return clip / norm if norm > clip else 1.0


def _accumulator(param: Any) -> Any:
    return np.zeros_like(param, dtype=_wide(param.dtype))


def _wide(dtype: Any) -> Any:
    """float32 for the half types: sums of squares overflow float16."""
    return np.result_type(dtype, np.float32)
