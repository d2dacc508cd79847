"""Deformable convolution with the branch that learns its offsets."""

from __future__ import annotations

from typing import Any

import numpy as np

from pydeform import _arrays, _checks
from pydeform._geometry import BOUNDARIES
from pydeform.layers import _layer
from pydeform.layers.activation import sigmoid
from pydeform.layers.conv2d import conv_options, conv_weight
from pydeform.ops.conv2d import conv2d, conv2d_backward
from pydeform.ops.deform_conv2d import deform_conv2d, deform_conv2d_backward


class DeformConv2d(_layer.Layer):
    """Deformable convolution whose offsets (and mask) a second convolution computes from the same input.

    The offset branch has the kernel, stride, padding and dilation of the layer and starts at zero: at first the layer
    is the plain convolution of its weight (times mask_scale / 2 when modulated). With K = kernel_h * kernel_w its
    output channels are, for offset group og and tap k (row-major), offset (og*K + k)*2 + (0 for y, 1 for x) in input
    pixels; then, when modulated, mask logits 2*offset_groups*K + og*K + k; mask = mask_scale * sigmoid(logit).
    That is the order of mmcv and of the authors' code, so their weights fit.

    Parameters
    ----------
    in_channels ... bias : as in `Conv2d`; `bias` is that of the main convolution, the offset branch always has one
    offset_groups : how many groups of channels move independently
    modulated : version 2, with a mask
    mask_scale : 1 as in the paper (mask starts at 1/2), or 2 as in its code (starts at 1)
    boundary : "torchvision" | "dcnv2" | "dcnv1", as in `pydeform.deform_conv2d`

    Call      x (N, in_channels, H, W) -> y (N, out_channels, out_h, out_w)
    params    "weight", "bias"; "offset.weight" (2K or 3K * offset_groups, in_channels, kernel_h, kernel_w),
              "offset.bias". The papers train the last two at 0.1 times the learning rate: `lr_mult={"*offset.*": 0.1}`.
    Source    arXiv:1703.06211 sections 2.1, 4.1; arXiv:1811.11168 eq. 1

    >>> import numpy as np
    >>> layer = DeformConv2d(3, 8, 3, padding=1, modulated=True, rng=0)
    >>> y, backprop = layer(np.ones((2, 3, 6, 5), np.float32))
    >>> y.shape, backprop(y).shape, layer.params["offset.weight"].shape
    ((2, 8, 6, 5), (2, 3, 6, 5), (27, 3, 3, 3))
    """

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
        inputs, outputs, groups, offset_groups = _layer.positive(
            self, in_channels=in_channels, out_channels=out_channels, groups=groups, offset_groups=offset_groups
        )
        if inputs % offset_groups:
            raise ValueError(
                f"{self.name}: in_channels must be a multiple of offset_groups = {offset_groups}, got {inputs}"
            )
        bias, dtype = _layer.flag(self, "bias", bias), _layer.float_dtype(self, dtype)
        self.in_channels, self.modulated = inputs, _layer.flag(self, "modulated", modulated)
        self.mask_scale = _checks.number(self.name, "mask_scale", mask_scale, positive=True)
        _checks.check_choice(self.name, "boundary", boundary, BOUNDARIES)
        self.boundary = boundary
        weight = conv_weight(self, inputs, outputs, kernel_size, groups, rng, dtype)
        self.kernel_size = weight.shape[2:]
        self.options = conv_options(self, self.kernel_size, stride, padding, dilation)
        self.offset_channels = 2 * offset_groups * self.kernel_size[0] * self.kernel_size[1]
        branch = self.offset_channels * 3 // 2 if self.modulated else self.offset_channels
        params = {"weight": weight} | ({"bias": np.zeros(outputs, dtype)} if bias else {})
        params["offset.weight"] = np.zeros((branch, inputs, *self.kernel_size), dtype)
        params["offset.bias"] = np.zeros(branch, dtype)
        settings = {
            "in_channels": inputs,
            "out_channels": outputs,
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
        super().__init__(params, settings=settings)

    def offset_and_mask(self, x: Any) -> tuple[Any, Any]:
        """What the branch computes for x: (offset, mask or None), as `pydeform.deform_conv2d` takes them."""
        sizes = {"in_channels": self.in_channels}
        xp = _layer.check_input(self, x, ("N", "in_channels", "H", "W"), sizes, self.params["weight"])
        branch = conv2d(x, self.params["offset.weight"], self.params["offset.bias"], **self.options)
        if not self.modulated:
            return branch, None
        mask = sigmoid(xp, branch[:, self.offset_channels :])
        mask *= self.mask_scale
        return branch[:, : self.offset_channels], _arrays.rounded(mask, x.dtype)

    def __call__(self, x: Any, train: bool = True) -> tuple[Any, _layer.Backprop]:
        weight, bias = self.params["weight"], self.params.get("bias")
        offset, mask = self.offset_and_mask(x)
        options: dict[str, Any] = {**self.options, "boundary": self.boundary}
        y = deform_conv2d(x, offset, weight, bias, mask=mask, **options)
        if not train:
            return y, _layer.nothing_kept(self)
        like = _layer.like(self, y)

        def backprop(grad_y: Any) -> Any:
            _layer.check_grad(self, grad_y, like)
            grads = deform_conv2d_backward(grad_y, x, offset, weight, bias, mask=mask, **options)
            grad_branch = grads.offset
            if mask is not None:
                grad_branch = like.xp.concatenate((grad_branch, self._grad_logit(mask, grads.mask)), axis=1)
            branch = conv2d_backward(
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
