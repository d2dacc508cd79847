"""The operators as nn.Modules with the constructors, calls and parameter names of the modules that people have.

State dicts load from and into those modules. What starts at zero or in a pattern there starts so here.
"""

from __future__ import annotations

import inspect
import math
import sys
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pydeform import _checks, _gather_geometry
from pydeform._operators import signature_of

ours: Any = sys.modules["pydeform.torch"]  # which imports this module first, and has the operators when they are called


class DeformConv2d(nn.Module):
    """torchvision.ops.DeformConv2d. `boundary` is that of `pydeform.deform_conv2d`.

    Examples
    --------
    >>> import torch
    >>> layer = DeformConv2d(4, 6, 3, padding=1)
    >>> layer(torch.ones(1, 4, 8, 8), torch.zeros(1, 18, 8, 8)).shape, list(layer.state_dict())
    (torch.Size([1, 6, 8, 8]), ['weight', 'bias'])
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
        bias: bool = True,
        *,
        boundary: str = "torchvision",
    ) -> None:
        super().__init__()
        name = type(self).__name__
        for argument, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise ValueError(f"{name}: {argument} must be a multiple of groups = {groups}, got {channels}")
        self.kernel_size = _checks.per_axis(name, "kernel_size", kernel_size, 2, 1)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.stride, self.padding, self.dilation, self.boundary = stride, padding, dilation, boundary
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in nn.Conv2d."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            limit = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -limit, limit)

    def forward(self, input: Any, offset: Any, mask: Any = None) -> Any:
        options = self.stride, self.padding, self.dilation
        return ours.deform_conv2d(input, offset, self.weight, self.bias, *options, mask, boundary=self.boundary)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}"
        )


class _Pack(DeformConv2d):
    """With the convolution that computes the offsets, and a mask where it has a third number for each tap."""

    def __init__(self, numbers: int, deform_groups: int, *arguments: Any) -> None:
        super().__init__(*arguments, boundary="dcnv2")
        self.deform_groups, self._taps = deform_groups, deform_groups * math.prod(self.kernel_size)
        options = self.kernel_size, self.stride, self.padding, self.dilation
        self.conv_offset = nn.Conv2d(self.in_channels, numbers * self._taps, *options)
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, input: Any) -> Any:  # type: ignore[override]
        branch = self.conv_offset(input)
        offset, logits = branch[:, : 2 * self._taps], branch[:, 2 * self._taps :]
        return super().forward(input, offset, logits.sigmoid() if logits.shape[1] else None)


class DeformConv2dPack(_Pack):
    """mmcv.ops.DeformConv2dPack, its parameters "weight", "conv_offset.weight" and "conv_offset.bias".

    Of any batch size: im2col_step, which mmcv has too, does not exist here.
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
        deform_groups: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__(
            2, deform_groups, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        )


class ModulatedDeformConv2dPack(_Pack):
    """mmcv.ops.ModulatedDeformConv2dPack: with masks between 0 and 1, at first 0.5; and CharlesShang's DCN."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(
            3, deform_groups, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        )


class MSDeformAttn(nn.Module):
    """Deformable-DETR's module, and mmcv's without what is around it: no dropout, no residual, batch first."""

    def __init__(self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"MSDeformAttn: d_model must be a multiple of n_heads = {n_heads}, got {d_model}")
        self.d_model, self.n_levels, self.n_heads, self.n_points = d_model, n_levels, n_heads, n_points
        points = n_heads * n_levels * n_points
        self.sampling_offsets = nn.Linear(d_model, 2 * points)
        self.attention_weights = nn.Linear(d_model, points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        _start(self, ("value_proj", "output_proj"), ("sampling_offsets", "attention_weights"))
        angle = 2 * math.pi / n_heads * torch.arange(n_heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction /= direction.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, n_points + 1).repeat(n_levels)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_((direction[:, None] * steps[:, None]).flatten())

    def forward(
        self,
        query: Any,
        reference_points: Any,
        input_flatten: Any,
        input_spatial_shapes: Any,
        input_level_start_index: Any = None,  # noqa: ARG002
        input_padding_mask: Any = None,
    ) -> Any:
        """Where `input_padding_mask` is true there is nothing to see. `input_level_start_index` is not needed."""
        value = self.value_proj(input_flatten)
        if input_padding_mask is not None:
            value = value.masked_fill(input_padding_mask[..., None], 0)
        points = self.n_heads, self.n_levels, self.n_points
        offsets = self.sampling_offsets(query).unflatten(-1, (*points, 2))
        logits = self.attention_weights(query).unflatten(-1, points)
        value = value.unflatten(-1, (self.n_heads, -1))
        return self.output_proj(
            ours.ms_deform_attn_fused(value, input_spatial_shapes, reference_points, offsets, logits)
        )


class _Dcn(nn.Module):
    """What DCNv3 and DCNv4 share: their operator's options, and the scale of a pixel's own features."""

    def __init__(self, channels: int, group: int, options: dict[str, Any], center_feature_scale: bool) -> None:
        super().__init__()
        if channels % group:
            raise ValueError(f"{type(self).__name__}: channels must be a multiple of group = {group}, got {channels}")
        self.channels, self.group, self.options = channels, group, {**options, "groups": group}
        self.points = options["kernel_size"] ** 2 - options["remove_center"]
        self.center_feature_scale = center_feature_scale
        if center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(torch.zeros(group, channels))
            self.center_feature_scale_proj_bias = nn.Parameter(torch.zeros(group))

    def _scaled(self, y: Any, value: Any, features: Any) -> Any:
        """`y`, and a share of `value`, which `features` decide."""
        if not self.center_feature_scale:
            return y
        logits = F.linear(features, self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias)
        share = logits.sigmoid().repeat_interleave(self.channels // self.group, -1)
        return y * (1 - share) + value * share

    def extra_repr(self) -> str:
        return f"{self.channels}, " + ", ".join(f"{name}={value}" for name, value in self.options.items())


class _ChannelsLast(nn.Module):
    def forward(self, x: Any) -> Any:
        return x.permute(0, 2, 3, 1)


class DCNv3(_Dcn):
    """InternImage's module with its norm_layer "LN" and act_layer "GELU", of x (N, H, W, channels)."""

    def __init__(
        self,
        channels: int = 64,
        kernel_size: int = 3,
        dw_kernel_size: int | None = None,
        stride: int = 1,
        pad: int = 1,
        dilation: int = 1,
        group: int = 4,
        offset_scale: float = 1.0,
        center_feature_scale: bool = False,
        remove_center: bool = False,
    ) -> None:
        options: dict[str, Any] = {"kernel_size": kernel_size, "stride": stride, "padding": pad, "dilation": dilation}
        options |= {"offset_scale": offset_scale, "remove_center": remove_center}
        super().__init__(channels, group, options, center_feature_scale)
        wide = kernel_size if dw_kernel_size is None else dw_kernel_size
        norm = nn.Sequential(_ChannelsLast(), nn.LayerNorm(channels, eps=1e-6))
        around = (wide - 1) // 2
        self.dw_conv = nn.Sequential(
            nn.Conv2d(channels, channels, wide, stride, around, groups=channels), norm, nn.GELU()
        )
        self.offset = nn.Linear(channels, group * self.points * 2)
        self.mask = nn.Linear(channels, group * self.points)
        self.input_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        _start(self, ("input_proj", "output_proj"), ("offset", "mask"))

    def forward(self, input: Any) -> Any:
        value = self.input_proj(input)
        features = self.dw_conv(input.permute(0, 3, 1, 2))
        mask = self.mask(features).unflatten(-1, (self.group, self.points)).softmax(-1).flatten(-2)
        y = ours.dcnv3(value, self.offset(features), mask, **self.options)
        return self.output_proj(self._scaled(y, value, features))


class DCNv4(_Dcn):
    """The authors' module, of x (N, H*W, channels); without `shape` (H, W) the image is square."""

    def __init__(
        self,
        channels: int = 64,
        kernel_size: int = 3,
        stride: int = 1,
        pad: int = 1,
        dilation: int = 1,
        group: int = 4,
        offset_scale: float = 1.0,
        dw_kernel_size: int | None = None,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        output_bias: bool = True,
        without_pointwise: bool = False,
    ) -> None:
        options: dict[str, Any] = {"kernel_size": kernel_size, "stride": stride, "padding": pad, "dilation": dilation}
        options |= {"offset_scale": offset_scale, "remove_center": remove_center}
        super().__init__(channels, group, options, center_feature_scale)
        if stride != 1:
            raise ValueError(f"DCNv4: stride must be 1, as x has no other places for its offsets, got {stride}")
        self.dw_kernel_size, self.without_pointwise = dw_kernel_size, without_pointwise
        if dw_kernel_size is not None:
            around = (dw_kernel_size - 1) // 2
            self.offset_mask_dw = nn.Conv2d(channels, channels, dw_kernel_size, 1, around, groups=channels)
        self.offset_mask = nn.Linear(channels, _gather_geometry.packed_row(group, self.points))
        projections = () if without_pointwise else ("value_proj", "output_proj")
        for name in projections:
            setattr(self, name, nn.Linear(channels, channels, bias=output_bias or name == "value_proj"))
        _start(self, projections, ("offset_mask",))

    def forward(self, input: Any, shape: Any = None) -> Any:
        height, width = (math.isqrt(input.shape[1]),) * 2 if shape is None else shape
        expected = input.shape[0], height * width, self.channels
        _checks.check_shape("DCNv4", "input", input.shape, "(N, H*W, channels)", expected)
        x = input.unflatten(1, (height, width))
        value = x if self.without_pointwise else self.value_proj(x)
        features = x
        if self.dw_kernel_size is not None:
            features = self.offset_mask_dw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = ours.dcnv4(value, self.offset_mask(features), **self.options)
        y = self._scaled(y, value, y).flatten(1, 2)
        return y if self.without_pointwise else self.output_proj(y)


def _start(module: nn.Module, projections: tuple[str, ...], zeros: tuple[str, ...]) -> None:
    for name in (*projections, *zeros):
        linear = getattr(module, name)
        (nn.init.xavier_uniform_ if name in projections else nn.init.zeros_)(linear.weight)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)


class _OfBoxes(nn.Module):
    """An operator of input and boxes, which is made with all the others of its arguments."""

    operator: str

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__()
        bound = self.__signature__.bind(*arguments, **keywords)  # type: ignore[attr-defined]
        bound.apply_defaults()
        self.options = dict(bound.arguments)

    def forward(self, input: Any, rois: Any) -> Any:
        return getattr(ours, self.operator)(input, rois, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


def _of_boxes(name: str, operator: str) -> type[_OfBoxes]:
    parameters = [p for p in signature_of(operator).parameters.values() if p.name not in ("input", "boxes")]
    signature = inspect.Signature(parameters)
    documentation = f"`{operator}{signature}` of (input, rois), rois as one tensor or one for each image."
    attributes = {"operator": operator, "__signature__": signature, "__doc__": documentation, "__module__": __name__}
    return type(name, (_OfBoxes,), attributes)


RoIAlign = _of_boxes("RoIAlign", "roi_align")
RoIPool = _of_boxes("RoIPool", "roi_pool")
PSRoIAlign = _of_boxes("PSRoIAlign", "ps_roi_align")
PSRoIPool = _of_boxes("PSRoIPool", "ps_roi_pool")
RoIAlignRotated = _of_boxes("RoIAlignRotated", "roi_align_rotated")
PrRoIPool = _of_boxes("PrRoIPool", "prroi_pool")
