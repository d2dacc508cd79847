"""Layers one after the other."""

from __future__ import annotations

import inspect
from typing import Any

from pydeform.layers import _layer


class Sequential(_layer.Layer):
    """Layers one after the other, itself a layer.

    `params`, `grads` and `state` hold the very arrays of the layers under dotted names: "0.weight", "3.offset.bias".
    A layer that stands at two places, here or in a Sequential inside, is listed once, under the first; its gradients
    of both places add up.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform.layers import Conv2d, GlobalAvgPool2d, Linear, ReLU
    >>> network = Sequential(Conv2d(1, 4, 3, rng=0), ReLU(), GlobalAvgPool2d(), Linear(4, 2, rng=1))
    >>> y, backprop = network(np.ones((5, 1, 8, 8), np.float32))
    >>> y.shape, backprop(y).shape, list(network.grads)
    ((5, 2), (5, 1, 8, 8), ['0.weight', '0.bias', '3.weight', '3.bias'])
    """

    def __init__(self, *layers: _layer.Layer) -> None:
        super().__init__()
        self.layers = layers
        for place, layer in enumerate(layers):
            if not isinstance(layer, _layer.Layer):
                raise TypeError(f"{self.name}: layer {place} must be a Layer, got {layer!r}")
            try:
                inspect.signature(layer).bind(None, train=True)
            except TypeError:
                raise TypeError(
                    f"{self.name}: layer {place} must be one that is called with x and train alone, got {layer!r}"
                ) from None
            _layer.hold(self, str(place), layer)

    def __call__(self, x: Any, train: bool = True) -> tuple[Any, _layer.Backprop]:
        backprops = []
        for layer in self.layers:
            x, backprop = layer(x, train=train)
            backprops.append(backprop)
        if not train:
            return x, _layer.nothing_kept(self)

        def backprop_all(grad_y: Any) -> Any:
            for backprop in reversed(backprops):
                grad_y = backprop(grad_y)
            return grad_y

        return x, backprop_all

    def __repr__(self) -> str:
        lines = [f"{place}: {layer!r}" for place, layer in enumerate(self.layers)]
        inner = "".join(f"\n  {line}" for text in lines for line in text.splitlines())
        return f"{self.name}({inner}\n){_layer.counted(self)}" if lines else f"{self.name}()"
