"""Convolutions as layers, over any number of axes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from pydeform import _arrays, _checks
from pydeform._geometry import BOUNDARIES, SIZES
from pydeform.layers import _layer
from pydeform.layers.activation import sigmoid


class Convolution(_layer.Layer):
    """What all have: weight and bias, the number of axes, and their operator with its backward."""

    axes: ClassVar[int]
    forward: ClassVar[Callable[..., Any]]
    backward: ClassVar[Callable[..., Any]]

    def _make(self, rng: _layer.Seed, settings: dict[str, Any]) -> None:
        """`settings`: the arguments that make the layer, by name, of which each kind has its own."""
        counts = [name for name in settings if name.endswith(("_channels", "groups"))]
        settings.update(zip(counts, _layer.positive(self, **{name: settings[name] for name in counts}), strict=True))
        inputs, outputs, groups = (settings[name] for name in ("in_channels", "out_channels", "groups"))
        for name in ("offset_groups", "position_groups"):
            if inputs % settings.get(name, 1):
                raise ValueError(
                    f"{self.name}: in_channels must be a multiple of {name} = {settings[name]}, got {inputs}"
                )
        settings["bias"] = _layer.flag(self, "bias", settings["bias"])
        dtype = settings["dtype"] = _layer.float_dtype(self, settings["dtype"])
        weight = conv_weight(self, inputs, outputs, settings["kernel_size"], groups, rng, dtype)
        self.in_channels, self.kernel_size = inputs, weight.shape[2:]
        dilation = settings.get("dilation", 1)
        self.options = conv_options(self, self.kernel_size, settings["stride"], settings["padding"], dilation)
        params = {"weight": weight} | ({"bias": np.zeros(outputs, dtype)} if settings["bias"] else {})
        super().__init__(params | self._more_params(settings), settings=settings)

    def _more_params(self, _settings: dict[str, Any]) -> dict[str, Any]:
        return {}

    def input_axes(self) -> tuple[str, ...]:
        return ("N", "in_channels", *SIZES[self.axes].split(", "))


class PlainConvolution(Convolution):
    """The operator of x, some parameters in its order, and options."""

    arguments: ClassVar[tuple[str, ...]] = ("weight", "bias")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        rng: _layer.Seed = None,
        dtype: Any = np.float32,
    ) -> None:
        settings = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "kernel_size": kernel_size,
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
            "bias": bias,
            "dtype": dtype,
        }
        self._make(rng, settings)
        self.options["groups"] = settings["groups"]

    def __call__(self, x: Any, train: bool = True) -> tuple[Any, _layer.Backprop]:
        arguments = [self.params.get(name) for name in self.arguments]
        _layer.check_input(self, x, self.input_axes(), {"in_channels": self.in_channels}, self.params["weight"])
        y = self.forward(x, *arguments, **self.options)
        if not train:
            return y, _layer.nothing_kept(self)
        like = _layer.like(self, y)

        def backprop(grad_y: Any) -> Any:
            _layer.check_grad(self, grad_y, like)
            grads = self.backward(grad_y, x, *arguments, **self.options)
            _layer.add_grads(self, **{name: getattr(grads, name) for name in self.params})
            return grads.input

        return y, backprop


class DeformableConvolution(Convolution):
    """With the branch that learns the offsets, a plain convolution over the same axes."""

    plain: ClassVar[Callable[..., Any]]
    plain_backward: ClassVar[Callable[..., Any]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        offset_groups: int = 1,
        bias: bool = True,
        *,
        modulated: bool = False,
        mask_scale: float = 1,
        boundary: str = "torchvision",
        rng: _layer.Seed = None,
        dtype: Any = np.float32,
    ) -> None:
        self.modulated = _layer.flag(self, "modulated", modulated)
        self.mask_scale = _checks.number(self.name, "mask_scale", mask_scale, positive=True)
        _checks.check_choice(self.name, "boundary", boundary, BOUNDARIES)
        self.boundary = boundary
        settings = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "kernel_size": kernel_size,
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
            "offset_groups": offset_groups,
            "bias": bias,
            "modulated": self.modulated,
            "mask_scale": self.mask_scale,
            "boundary": boundary,
            "dtype": dtype,
        }
        self._make(rng, settings)

    def _more_params(self, settings: dict[str, Any]) -> dict[str, Any]:
        self.offset_channels = self.axes * settings["offset_groups"] * math.prod(self.kernel_size)
        branch, dtype = self.offset_channels // self.axes * (self.axes + self.modulated), settings["dtype"]
        weight = np.zeros((branch, self.in_channels, *self.kernel_size), dtype)
        return {"offset.weight": weight, "offset.bias": np.zeros(branch, dtype)}

    def offset_and_mask(self, x: Any) -> tuple[Any, Any]:
        """What the branch computes for x: (offset, mask or None), as the operator takes them."""
        sizes = {"in_channels": self.in_channels}
        xp = _layer.check_input(self, x, self.input_axes(), sizes, self.params["weight"])
        branch = self.plain(x, self.params["offset.weight"], self.params["offset.bias"], **self.options)
        if not self.modulated:
            return branch, None
        mask = sigmoid(xp, branch[:, self.offset_channels :])
        mask *= self.mask_scale
        return branch[:, : self.offset_channels], _arrays.rounded(mask, x.dtype)

    def __call__(self, x: Any, train: bool = True) -> tuple[Any, _layer.Backprop]:
        weight, bias = self.params["weight"], self.params.get("bias")
        offset, mask = self.offset_and_mask(x)
        options: dict[str, Any] = {**self.options, "boundary": self.boundary}
        y = self.forward(x, offset, weight, bias, mask=mask, **options)
        if not train:
            return y, _layer.nothing_kept(self)
        like = _layer.like(self, y)

        def backprop(grad_y: Any) -> Any:
            _layer.check_grad(self, grad_y, like)
            grads = self.backward(grad_y, x, offset, weight, bias, mask=mask, **options)
            grad_branch = grads.offset
            if mask is not None:
                grad_branch = like.xp.concatenate((grad_branch, self._grad_logit(mask, grads.mask)), axis=1)
            branch = self.plain_backward(
                grad_branch, x, self.params["offset.weight"], self.params["offset.bias"], **self.options
            )
            _layer.add_grads(self, **{name: getattr(grads, name) for name in ("weight", "bias") if name in self.params})
            _layer.add_grads(self, **{"offset.weight": branch.weight, "offset.bias": branch.bias})
            return _arrays.rounded(_arrays.wide(grads.input) + _arrays.wide(branch.input), like.dtype)

        return y, backprop

    def _grad_logit(self, mask: Any, grad_mask: Any) -> Any:
        """mask = s * sigmoid: its derivative is mask * (1 - mask / s)."""
        wide = _arrays.wide(mask)
        return _arrays.rounded(_arrays.wide(grad_mask) * (wide * (1 - wide / self.mask_scale)), mask.dtype)


def conv_weight(
    layer: Convolution,
    in_channels: int,
    out_channels: int,
    kernel_size: Any,
    groups: int,
    rng: _layer.Seed,
    dtype: Any,
) -> Any:
    """He normal weight (out_channels, in_channels/groups, *kernel)."""
    for argument, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
        if channels % groups:
            raise ValueError(f"{layer.name}: {argument} must be a multiple of groups = {groups}, got {channels}")
    kernel = _checks.per_axis(layer.name, "kernel_size", kernel_size, layer.axes, 1)
    shape = (out_channels, in_channels // groups, *kernel)
    return _layer.he_normal(layer, rng, shape, math.prod(shape[1:]), dtype)


def conv_options(layer: Convolution, kernel: Any, stride: Any, padding: Any, dilation: Any) -> dict[str, Any]:
    """Checked when the layer is made, not at its first call."""
    strides = _checks.per_axis(layer.name, "stride", stride, layer.axes, 1)
    dilations = _checks.per_axis(layer.name, "dilation", dilation, layer.axes, 1)
    pairs = _checks.padding_pairs(layer.name, padding, (1,) * layer.axes, kernel, strides, dilations)
    return {"stride": strides, "padding": padding if isinstance(padding, str) else pairs, "dilation": dilations}
