"""Layers one after the other."""

from __future__ import annotations

from typing import Any

from pydeform.layers import _layer


class Sequential(_layer.Layer):
    """Layers one after the other, itself a layer.

    `params`, `grads` and `state` hold the very arrays of the layers under dotted names: "0.weight", "3.offset.bias".
    A layer that stands at two places is listed once, under the first; its gradients of both places add up.

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
        seen: set[int] = set()
        for place, layer in enumerate(layers):
            if id(layer) in seen:
                continue
            seen.add(id(layer))
            self.params |= {f"{place}.{name}": array for name, array in layer.params.items()}
            self.grads |= {f"{place}.{name}": array for name, array in layer.grads.items()}
            self.state |= {f"{place}.{name}": array for name, array in layer.state.items()}

    def __call__(self, x: Any, train: bool = True) -> tuple[Any, _layer.Backprop]:
        backprops = []
        for layer in self.layers:
            x, backprop = layer(x, train)
            backprops.append(backprop)
        if not train:
            return x, _layer.nothing_kept(self)

        def backprop_all(grad_y: Any) -> Any:
            for backprop in reversed(backprops):
                grad_y = backprop(grad_y)
            return grad_y

        return x, backprop_all
