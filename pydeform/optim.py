"""Optimisers: `step()` changes the parameters of a layer, in place, by its gradients.

It leaves the gradients as they are, and `backprop` adds to them: `layer.zero_grads()` comes before each backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any

import numpy as np

from pydeform import _arrays
from pydeform.layers import Layer, _layer

LEAST_NORM = 1e-15  # below, squares of float32 may vanish


class Optimiser:
    """What the optimisers share: checks, factors of the learning rate, clipping, master weights, and their state.

    Parameters of half types have a copy in float32, the master, which is what a step changes: the sum of many steps,
    each too small for the half type, is not lost. The parameter is the master rounded. Where somebody else has changed
    the parameter since, the master takes over the new value.
    """

    slots: tuple[str, ...] = ()  # attributes that hold, for each parameter, an array like it

    def __init__(
        self, layer: Layer, lr: float, weight_decay: float, lr_mult: Mapping[str, float] | None, clip: float | None
    ) -> None:
        self.name = type(self).__name__
        if not isinstance(layer, Layer):
            raise TypeError(f"{self.name}: layer must be a pydeform.layers.Layer, got {type(layer).__qualname__}")
        if not layer.params:
            raise ValueError(f"{self.name}: layer must have parameters, got {layer!r}")
        self.layer = layer
        self.lr = self._rate(lr)
        self.weight_decay = _layer.number(self.name, "weight_decay", weight_decay, 0)
        self.clip = None if clip is None else _layer.number(self.name, "clip", clip, 0)
        if self.clip == 0:
            raise ValueError(f"{self.name}: clip must be None or a finite number > 0, got {clip!r}")
        names = {id(param): name for name, param in reversed(layer.params.items())}
        self.names = [name for name in layer.params if name in names.values()]  # a shared array is stepped once
        self.factors = lr_factors(self.name, self.names, lr_mult)
        self.steps = 0
        self.masters: dict[str, Any] = {}
        for name in self.names:
            param = layer.params[name]
            _arrays.check_floats(self.name, f"parameter {name}", param)
            if param.dtype.itemsize == 2:
                self.masters[name] = _arrays.wide(param)

    def _rate(self, lr: Any) -> Any:
        found = _layer.number(self.name, "lr", lr, 0)
        # A number as it came: NumPy's float64 computes a step in float64, Python's float in the parameter's dtype.
        return lr if isinstance(lr, int | float | np.floating) else found

    def step(self, lr: float | None = None) -> None:
        """Change the parameters; `lr` instead of the optimiser's for this step. Gradients stay as they are."""
        raise NotImplementedError

    def _zeros(self) -> dict[str, Any]:
        params = self.layer.params
        return {name: _arrays.zeros_like(params[name], _arrays.wide_dtype(params[name].dtype)) for name in self.names}

    def _begin(self, lr: Any) -> tuple[Any, ModuleType, dict[str, Any]]:
        """Of a step: its rate, the module that computes, and gradients, scaled by `clip`; float32 for half types."""
        lr = self.lr if lr is None else self._rate(lr)
        params, grads = self.layer.params, self.layer.grads
        xp: ModuleType = np
        arrays_like_params = self._held().values()
        for name in self.names:
            xp = self._check(name, params[name], grads[name])
            device = _arrays.device_of(params[name])
            for held in arrays_like_params:
                if name in held:  # the layer may have been moved to another device
                    held[name] = _arrays.to_device(self.name, held[name], device)
        wide = {name: _arrays.wide(grads[name]) for name in self.names}
        self.steps += 1
        return lr, xp, wide if self.clip is None else clipped(xp, wide, self.clip)

    def _check(self, name: str, param: Any, grad: Any) -> ModuleType:
        if type(param) is type(grad) is np.ndarray and param.dtype == grad.dtype and param.shape == grad.shape:
            return np
        like = _arrays.like(self.name, f"parameter {name}", param)
        xp = _arrays.check_like(self.name, f"gradient of {name}", grad, "the parameter", like)
        if tuple(grad.shape) != like.shape:
            raise ValueError(
                f"{self.name}: gradient of {name} must have the shape of the parameter, {like.shape}, "
                f"got {tuple(grad.shape)}"
            )
        return xp

    def _weights(self, xp: ModuleType, name: str) -> Any:
        """The array that a step changes: the parameter itself, or its master."""
        param = self.layer.params[name]
        if name not in self.masters:
            return param
        master, current = self.masters[name], _arrays.wide(param)
        kept = _arrays.wide(_arrays.rounded(master, param.dtype)) == current
        master[...] = xp.where(kept, master, current)
        return master

    def _publish(self, name: str) -> None:
        if name in self.masters:
            param = self.layer.params[name]
            param[...] = _arrays.rounded(self.masters[name], param.dtype)

    def _held(self) -> dict[str, dict[str, Any]]:
        return {"master": self.masters, **{slot: getattr(self, slot) for slot in self.slots}}

    def state(self) -> dict[str, Any]:
        """A copy of all that later steps depend on besides parameters, gradients and options: names to arrays."""
        return {name: array.copy() for name, array in self._targets().items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned, for the same optimiser of a layer of the same structure.

        Values are converted to the dtype and device of this one. A missing or unknown name, another shape or a value
        that does not fit is a ValueError, and then nothing has been changed.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"{self.name}: state must be a dict of arrays, got {type(state).__qualname__}")
        targets = self._targets()
        found = _layer.fitting(self.name, "state", self.name, targets, state)
        steps = int(found["steps"])
        if steps < 0:
            raise ValueError(f"{self.name}: steps in state must be >= 0, got {steps}")
        for name, array in found.items():
            targets[name][...] = array
        self.steps = steps

    def _targets(self) -> dict[str, Any]:
        held = self._held().items()
        arrays = {f"{slot}.{name}": array for slot, arrays in held for name, array in arrays.items()}
        return {**arrays, "steps": np.array(self.steps)}


class SGD(Optimiser):
    """Stochastic gradient descent: v = momentum*v + grad + weight_decay*param; param -= lr*v.

    Parameters
    ----------
    layer : a layer or a whole network (`Sequential`)
    lr : learning rate; `step(lr=...)` overrides it for one step, which is all that a schedule needs
    momentum : from 0 to 1
    weight_decay : at least 0
    lr_mult : {pattern: factor} on the parameter names, e.g. {"*offset.*": 0.1} for the offset branches of deformable
        layers as in the papers. Shell patterns; factors of several that match are multiplied; one that matches
        no parameter is a ValueError
    clip : when not None, all gradients are scaled down together so that their common norm is at most `clip`

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform.layers import Linear
    >>> layer = Linear(1, 1, rng=0)
    >>> layer.grads["bias"][...] = 2
    >>> SGD(layer, lr=0.5).step()
    >>> print(layer.params["bias"])
    [-1.]
    """

    slots = ("velocity",)

    def __init__(
        self,
        layer: Layer,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        lr_mult: Mapping[str, float] | None = None,
        clip: float | None = None,
    ) -> None:
        super().__init__(layer, lr, weight_decay, lr_mult, clip)
        self.momentum = _layer.number(self.name, "momentum", momentum, 0, 1)
        self.velocity = self._zeros()

    def step(self, lr: float | None = None) -> None:
        lr, xp, grads = self._begin(lr)
        for name in self.names:
            weights, velocity = self._weights(xp, name), self.velocity[name]
            velocity *= self.momentum
            velocity += grads[name]
            if self.weight_decay:
                velocity += self.weight_decay * weights
            weights -= (lr * self.factors[name] * velocity).astype(weights.dtype)
            self._publish(name)


class AdamW(Optimiser):
    """Adam with decoupled weight decay (arXiv:1711.05101, algorithm 2, as in PyTorch).

    Parameters
    ----------
    layer, lr, lr_mult, clip : as in `SGD`
    betas : decay of the averages of the gradient and of its square, each at least 0 and below 1
    eps : added to the root of the latter, at least 0
    weight_decay : each step multiplies the parameters by 1 - lr*weight_decay

    Notes
    -----
    A gradient whose square is infinite makes its parameter NaN, where a division by that would keep it from training.

    Examples
    --------
    >>> from pydeform.layers import Linear
    >>> layer = Linear(1, 1, rng=0)
    >>> layer.grads["bias"][...] = 2
    >>> AdamW(layer, lr=0.5).step()
    >>> print(layer.params["bias"])
    [-0.5]
    """

    slots = ("mean", "square")

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
        super().__init__(layer, lr, weight_decay, lr_mult, clip)
        self.betas = _betas(self.name, betas)
        self.eps = _layer.number(self.name, "eps", eps, 0)
        self.mean, self.square = self._zeros(), self._zeros()

    def step(self, lr: float | None = None) -> None:
        lr, xp, grads = self._begin(lr)
        beta1, beta2 = self.betas
        for name in self.names:
            weights, grad, rate = self._weights(xp, name), grads[name], lr * self.factors[name]
            mean, square = self.mean[name], self.square[name]
            mean += (1 - beta1) * (grad - mean)
            square += (1 - beta2) * (grad * grad - square)
            root = xp.sqrt(square / (1 - beta2**self.steps)) + self.eps
            if not _arrays.surely_finite(square):
                root = xp.where(square < xp.inf, root, xp.nan)
            weights *= 1 - rate * self.weight_decay
            weights -= (rate / (1 - beta1**self.steps) * mean / root).astype(weights.dtype)
            self._publish(name)


def _betas(op: str, betas: Any) -> tuple[float, float]:
    try:
        first, second = betas
    except (TypeError, ValueError):
        raise TypeError(f"{op}: betas must be two numbers, got {betas!r}") from None
    found = _layer.number(op, "betas", first, 0, 1), _layer.number(op, "betas", second, 0, 1)
    if 1 in found:
        raise ValueError(f"{op}: betas must be below 1, got {betas!r}")
    return found


def lr_factors(op: str, names: list[str], lr_mult: Mapping[str, float] | None) -> dict[str, float]:
    """The factor of each parameter. A pattern for nothing is a mistake that would train the wrong thing quietly."""
    factors = dict.fromkeys(names, 1.0)
    if lr_mult is not None and not isinstance(lr_mult, Mapping):
        raise TypeError(f"{op}: lr_mult must be a dict of patterns and factors, got {lr_mult!r}")
    for pattern, factor in (lr_mult or {}).items():
        if not isinstance(pattern, str):
            raise TypeError(f"{op}: lr_mult must have patterns for keys, got {pattern!r}")
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            raise ValueError(f"{op}: lr_mult must match parameters among {', '.join(names)}, got {pattern!r}")
        for name in matching:
            factors[name] *= _layer.number(op, f"lr_mult[{pattern!r}]", factor, 0)
    return factors


def clipped(xp: ModuleType, grads: dict[str, Any], clip: float) -> dict[str, Any]:
    """All gradients, scaled down together so that the norm over all of them is at most `clip`.

    If one of them is not finite there is no such norm, and all are NaN.
    """
    if xp is np:
        with np.errstate(over="ignore"):
            norm = math.sqrt(sum(float(np.square(grad).sum()) for grad in grads.values()))
        if LEAST_NORM < norm < math.inf:
            scale = clip / norm if norm > clip else 1.0
            return {name: grad * scale for name, grad in grads.items()}
    with np.errstate(divide="ignore", invalid="ignore"):
        return _clipped_by_parts(xp, grads, clip)


def _clipped_by_parts(xp: ModuleType, grads: dict[str, Any], clip: float) -> dict[str, Any]:
    """By parts of the largest gradient: squares of those neither overflow nor vanish. No wait for a device."""
    largest = xp.zeros((), np.float64)
    for grad in grads.values():
        if grad.size:
            largest = xp.maximum(largest, abs(grad).max())
    largest = xp.where(largest == 0, 1.0, largest)
    root = xp.zeros((), np.float64)
    for grad in grads.values():
        root = root + xp.square(grad / largest.astype(grad.dtype)).sum(dtype=np.float64)
    root = xp.sqrt(root)
    within = root * largest <= clip
    return {
        name: xp.where(within, grad, grad / largest.astype(grad.dtype) * (clip / root).astype(grad.dtype))
        for name, grad in grads.items()
    }
