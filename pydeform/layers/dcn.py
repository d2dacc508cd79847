"""DCNv3 and DCNv4 with the projections around them and the branches of their offsets and masks, in channels last."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np

from pydeform import _arrays, _checks, _gather_geometry
from pydeform.layers import _layer
from pydeform.layers.activation import Softmax
from pydeform.layers.conv2d import Conv2d
from pydeform.layers.ms_deform_attn import along_last, linear, plus
from pydeform.ops.dcnv3 import dcnv3, dcnv3_backward
from pydeform.ops.dcnv4 import dcnv4, dcnv4_backward


class _Dcn(_layer.Layer):
    """What both have: the options of their operator, and a branch with an output at each middle of its kernel."""

    def _make(self, settings: dict[str, Any]) -> None:
        """`settings`: the arguments that make the layer, by name."""
        channels, groups = _layer.positive(self, channels=settings["channels"], groups=settings["groups"])
        if channels % groups:
            raise ValueError(f"{self.name}: channels must be a multiple of groups = {groups}, got {channels}")
        kernel, stride, dilation = (
            _layer.pair(self, name, settings[name]) for name in ("kernel_size", "stride", "dilation")
        )
        padding = _checks.padding_pairs(self.name, settings["padding"], (1, 1), kernel, stride, dilation)
        reach = tuple(d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        if padding != tuple((r / 2, r / 2) for r in reach):
            expected = ", ".join(f"{r / 2:g}" for r in reach)
            raise ValueError(
                f"{self.name}: padding must be dilation*(kernel_size - 1)/2 = ({expected}), which puts the middle of "
                f"the kernel on pixels, got {settings['padding']}"
            )
        remove_center = _layer.flag(self, "remove_center", settings["remove_center"])
        self.points = math.prod(kernel) - remove_center
        if remove_center and not (kernel[0] == kernel[1] > 1 and kernel[0] % 2):
            raise ValueError(
                f"{self.name}: remove_center needs a square kernel of odd size > 1, got kernel_size {kernel}"
            )
        dtype = settings["dtype"] = _layer.float_dtype(self, settings["dtype"])
        scale = _checks.number(self.name, "offset_scale", settings["offset_scale"], dtype=dtype)
        self.channels, self.groups = channels, groups
        self.options: dict[str, Any] = {
            "kernel_size": kernel,
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
            "offset_scale": scale,
            "remove_center": remove_center,
        }
        super().__init__(settings={**settings, "channels": channels, "groups": groups, "offset_scale": scale})

    def _depthwise(self, kernel_size: Any, rng: _layer.Seed) -> Conv2d:
        kernel = _layer.pair(self, "dw_kernel_size", kernel_size)
        if not kernel[0] % 2 == kernel[1] % 2 == 1:
            raise ValueError(f"{self.name}: dw_kernel_size must be odd, got {kernel_size}")
        around = kernel[0] // 2, kernel[1] // 2
        stride, groups = self.options["stride"], self.channels
        return Conv2d(groups, groups, kernel, stride, around, groups=groups, rng=rng, dtype=self.settings["dtype"])

    def _check(self, x: Any) -> None:
        param = next(iter(self.params.values()))
        _layer.check_input(self, x, ("N", "H", "W", "channels"), {"channels": self.channels}, param)


class DCNv3(_Dcn):
    """InternImage's operator as it stands in a network.

        features = gelu(layer_norm(depthwise convolution of x))
        y = output_proj(dcnv3(input_proj(x), offset = linear(features), mask = softmax(linear(features))))

    The last two linear layers start at zero: at first y is the projected mean over the kernel. Names, shapes and layout
    of the parameters are those of InternImage's module, so its weights fit: `for name, param in layer.params.items():
    param[...] = weights[name]`. Left out: its center_feature_scale, and other norms and activations.

    Parameters
    ----------
    channels : of x and y, a multiple of groups
    kernel_size, stride, padding, dilation, groups, offset_scale, remove_center : as in `pydeform.dcnv3`; padding has to
        be dilation*(kernel_size - 1)/2, or "same". The depthwise convolution has the stride too; InternImage's has not,
        and works with stride 1 alone
    dw_kernel_size : of the depthwise convolution, odd; None: kernel_size
    rng : numpy.random.Generator or seed: of the projections uniform, variance 1 / channels (Glorot), of the depthwise
        convolution He normal; biases start at 0
    dtype : of the parameters, and of the input it takes

    Attributes
    ----------
    params : dict of arrays
        "dw_conv.0.weight" (channels, 1, dw_kernel_h, dw_kernel_w), "dw_conv.0.bias", "dw_conv.1.1.weight" and
        "dw_conv.1.1.bias" (channels,) of the norm, "offset.weight" (groups*P*2, channels), "offset.bias", "mask.weight"
        (groups*P, channels), "mask.bias", "input_proj.weight", "input_proj.bias", "output_proj.weight",
        "output_proj.bias"; P points of the kernel.

    Methods
    -------
    __call__(x, train=True)
        x (N, H, W, channels) -> y (N, out_h, out_w, channels).

    References
    ----------
    arXiv:2211.05778 section 3.1; InternImage's ops_dcnv3.

    Examples
    --------
    >>> import numpy as np
    >>> layer = DCNv3(8, groups=2, rng=0)
    >>> y, backprop = layer(np.ones((2, 5, 6, 8), np.float32))
    >>> y.shape, backprop(y).shape, layer.params["offset.weight"].shape
    ((2, 5, 6, 8), (2, 5, 6, 8), (36, 8))
    """

    def __init__(
        self,
        channels: int = 64,
        kernel_size: Any = 3,
        stride: Any = 1,
        padding: Any = 1,
        dilation: Any = 1,
        groups: int = 4,
        offset_scale: float = 1.0,
        remove_center: bool = False,
        *,
        dw_kernel_size: Any = None,
        rng: _layer.Seed = None,
        dtype: Any = np.float32,
    ) -> None:
        self._make(
            {
                "channels": channels,
                "kernel_size": kernel_size,
                "stride": stride,
                "padding": padding,
                "dilation": dilation,
                "groups": groups,
                "offset_scale": offset_scale,
                "remove_center": remove_center,
                "dw_kernel_size": dw_kernel_size,
                "dtype": dtype,
            }
        )
        channels, samples, dtype = self.channels, self.groups * self.points, self.settings["dtype"]
        rng = _layer.generator(self, rng)
        self.dw_conv = self._depthwise(kernel_size if dw_kernel_size is None else dw_kernel_size, rng)
        self.norm_gelu, self.softmax = _NormGelu(channels, dtype), Softmax()
        self.offset, self.mask = (linear(channels, n * samples, None, dtype) for n in (2, 1))
        self.input_proj, self.output_proj = (linear(channels, channels, rng, dtype) for _ in range(2))
        _layer.hold(self, "dw_conv.0", self.dw_conv)
        _layer.hold(self, "dw_conv.1.1", self.norm_gelu)
        for name in ("offset", "mask", "input_proj", "output_proj"):
            _layer.hold(self, name, getattr(self, name))

    def __call__(self, x: Any, train: bool = True) -> tuple[Any, _layer.Backprop]:
        self._check(x)
        value, back_value = along_last(self.input_proj, x, train)
        maps, back_maps = self.dw_conv(_channels_first(x), train)
        features, back_features = self.norm_gelu(_channels_last(maps), train)
        offset, back_offset = along_last(self.offset, features, train)
        logits, back_logits = along_last(self.mask, features, train)
        per_point, back_mask = self.softmax(logits.reshape(*logits.shape[:3], self.groups, self.points), train)
        arrays = value, offset, per_point.reshape(logits.shape)
        y, back_y = along_last(self.output_proj, dcnv3(*arrays, **self.options), train)
        if not train:
            return y, _layer.nothing_kept(self)
        like, shape = _layer.like(self, y), per_point.shape

        def backprop(grad_y: Any) -> Any:
            _layer.check_grad(self, grad_y, like)
            grads = dcnv3_backward(back_y(grad_y), *arrays, **self.options)
            grad_features = plus(back_offset(grads.offset), back_logits(back_mask(grads.mask.reshape(shape))))
            grad_maps = back_maps(_channels_first(back_features(grad_features)))
            return plus(back_value(grads.input), _channels_last(grad_maps))

        return y, backprop


class DCNv4(_Dcn):
    """`DCNv3` without softmax, norm and activation, and as a rule without the depthwise convolution.

        y = output_proj(dcnv4(value_proj(x), offset_mask = linear(x or a depthwise convolution of x)))

    The linear layer starts at zero, masks included: at first y is the bias of output_proj. Names, shapes and layout of
    the parameters are those of the authors' module, so its weights fit, as in `DCNv3`. Left out: its
    center_feature_scale. It takes x as (N, H*W, channels).

    Parameters
    ----------
    channels, kernel_size, stride, padding, dilation, groups, offset_scale, remove_center, rng, dtype : as in `DCNv3`
    dw_kernel_size : of the depthwise convolution, odd; None: there is none
    output_bias : whether output_proj has a bias
    projections : False leaves out value_proj and output_proj (the authors' without_pointwise)

    Attributes
    ----------
    params : dict of arrays
        "offset_mask.weight" (ceil(groups*P*3 / 8)*8, channels), "offset_mask.bias", "value_proj.weight",
        "value_proj.bias", "output_proj.weight", "output_proj.bias"; with dw_kernel_size "offset_mask_dw.weight"
        (channels, 1, dw_kernel_h, dw_kernel_w), "offset_mask_dw.bias".

    Methods
    -------
    __call__(x, train=True)
        x (N, H, W, channels) -> y (N, out_h, out_w, channels).

    References
    ----------
    arXiv:2401.06197 section 3; DCNv4_op.

    Examples
    --------
    >>> import numpy as np
    >>> layer = DCNv4(8, groups=2, rng=0)
    >>> y, backprop = layer(np.ones((2, 5, 6, 8), np.float32))
    >>> y.shape, backprop(y).shape, layer.params["offset_mask.weight"].shape
    ((2, 5, 6, 8), (2, 5, 6, 8), (56, 8))
    """

    def __init__(
        self,
        channels: int = 64,
        kernel_size: Any = 3,
        stride: Any = 1,
        padding: Any = 1,
        dilation: Any = 1,
        groups: int = 4,
        offset_scale: float = 1.0,
        remove_center: bool = False,
        *,
        dw_kernel_size: Any = None,
        output_bias: bool = True,
        projections: bool = True,
        rng: _layer.Seed = None,
        dtype: Any = np.float32,
    ) -> None:
        output_bias = _layer.flag(self, "output_bias", output_bias)
        projections = _layer.flag(self, "projections", projections)
        self._make(
            {
                "channels": channels,
                "kernel_size": kernel_size,
                "stride": stride,
                "padding": padding,
                "dilation": dilation,
                "groups": groups,
                "offset_scale": offset_scale,
                "remove_center": remove_center,
                "dw_kernel_size": dw_kernel_size,
                "output_bias": output_bias,
                "projections": projections,
                "dtype": dtype,
            }
        )
        channels, dtype, rng = self.channels, self.settings["dtype"], _layer.generator(self, rng)
        self.offset_mask_dw = None if dw_kernel_size is None else self._depthwise(dw_kernel_size, rng)
        self.offset_mask = linear(channels, _gather_geometry.packed_row(self.groups, self.points), None, dtype)
        self.value_proj = linear(channels, channels, rng, dtype) if projections else None
        self.output_proj = linear(channels, channels, rng, dtype, output_bias) if projections else None
        for name in ("offset_mask_dw", "offset_mask", "value_proj", "output_proj"):
            if getattr(self, name) is not None:
                _layer.hold(self, name, getattr(self, name))

    def __call__(self, x: Any, train: bool = True) -> tuple[Any, _layer.Backprop]:
        self._check(x)
        value, back_value = along_last(self.value_proj, x, train)
        features, back_features = self._features(x, train)
        offset_mask, back_offset_mask = along_last(self.offset_mask, features, train)
        y, back_y = along_last(self.output_proj, dcnv4(value, offset_mask, **self.options), train)
        if not train:
            return y, _layer.nothing_kept(self)
        like = _layer.like(self, y)

        def backprop(grad_y: Any) -> Any:
            _layer.check_grad(self, grad_y, like)
            grads = dcnv4_backward(back_y(grad_y), value, offset_mask, **self.options)
            return plus(back_value(grads.input), back_features(back_offset_mask(grads.offset_mask)))

        return y, backprop

    def _features(self, x: Any, train: bool) -> tuple[Any, _layer.Backprop]:
        """What offset_mask is computed from, at each output."""
        if self.offset_mask_dw is not None:
            maps, back_maps = self.offset_mask_dw(_channels_first(x), train)
            return _channels_last(maps), lambda grad: _channels_last(back_maps(_channels_first(grad)))
        down, right = self.options["stride"]
        like = _layer.like(self, x)

        def backprop(grad: Any) -> Any:
            grad_x = like.xp.zeros(like.shape, like.dtype)
            grad_x[:, ::down, ::right] = grad
            return grad_x

        return x[:, ::down, ::right], backprop


class _NormGelu(_layer.Layer):
    """gelu(weight * (x - mean) / sqrt(variance + 1e-6) + bias) over the last axis."""

    def __init__(self, channels: int, dtype: Any) -> None:
        super().__init__({"weight": np.ones(channels, dtype), "bias": np.zeros(channels, dtype)})

    def __call__(self, x: Any, train: bool = True) -> tuple[Any, _layer.Backprop]:
        xp, like = _arrays.namespace(self.name, "x", x), _layer.like(self, x)
        weight, wide = _arrays.wide(self.params["weight"]), _arrays.wide(x)
        centred = wide - wide.mean(axis=-1, keepdims=True)
        inverse = 1 / xp.sqrt((centred * centred).mean(axis=-1, keepdims=True) + 1e-6)
        normal = centred * inverse
        z = normal * weight + _arrays.wide(self.params["bias"])
        below = _normal_cdf(xp, z)
        y = _arrays.rounded(z * below, x.dtype)
        if not train:
            return y, _layer.nothing_kept(self)

        def backprop(grad_y: Any) -> Any:
            grad = _arrays.wide(grad_y) * (below + z * _normal_density(xp, z))
            rows = tuple(range(grad.ndim - 1))
            _layer.add_grads(self, weight=(grad * normal).sum(axis=rows), bias=grad.sum(axis=rows))
            grad = grad * weight
            # mean and variance depend on x too: take out of grad its mean and its part along `normal`
            along = normal * (grad * normal).mean(axis=-1, keepdims=True)
            return _arrays.rounded((grad - grad.mean(axis=-1, keepdims=True) - along) * inverse, like.dtype)

        return y, backprop


_NODES, _FARTHEST = 32, 8  # nodes to a unit, and the last one: beyond it less than 1e-15 is missing
_CDF = np.array([math.erfc(-n / _NODES / math.sqrt(2)) / 2 for n in range(-_FARTHEST * _NODES, _FARTHEST * _NODES + 1)])


def _normal_cdf(xp: ModuleType, x: Any) -> Any:
    """To 1e-12: Taylor's series around the nearest node. NumPy has no erf."""
    near = xp.minimum(xp.maximum(xp.where(x == x, x, 0), -_FARTHEST), _FARTHEST)  # of NaN some number: an index
    node = (near * _NODES + (_FARTHEST * _NODES + 0.5)).astype(np.int64)
    c = node.astype(x.dtype) / _NODES - _FARTHEST
    d, square = near - c, c * c
    # the n-th derivative of the density is itself times a Hermite polynomial
    series = (square - 6) * square + 3
    series = c * (3 - square) / 24 + d / 120 * series
    series = d * (1 + d * (-c / 2 + d * ((square - 1) / 6 + d * series)))
    at_node = xp.asarray(_CDF.astype(x.dtype))[node]
    return at_node + _normal_density(xp, c) * series


def _normal_density(xp: ModuleType, x: Any) -> Any:
    return xp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))


def _channels_first(x: Any) -> Any:
    return x.transpose(0, 3, 1, 2)


def _channels_last(x: Any) -> Any:
    return x.transpose(0, 2, 3, 1)
