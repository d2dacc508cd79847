"""Every operator as a differentiable PyTorch function, of the same name, arguments and defaults.

They are custom operators: autograd, torch.func, torch.compile, torch.export and autocast know them. Tensors on the CPU
are read and returned without a copy, those on CUDA computed in PyTorch's current stream and memory. Beside them are
nn.Modules whose state dicts are those of torchvision, mmcv, Deformable-DETR, InternImage and DCNv4, and blocks in which
torchvision and transformers use our operators.

>>> import torch
>>> from pydeform.torch import deform_conv2d
>>> image, offset, weight = torch.ones(1, 4, 8, 8), torch.zeros(1, 18, 8, 8), torch.ones(6, 4, 3, 3, requires_grad=True)
>>> deform_conv2d(image, offset, weight, padding=1).sum().backward()
>>> weight.grad[0, 0].tolist()
[[49.0, 56.0, 49.0], [56.0, 64.0, 56.0], [49.0, 56.0, 49.0]]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydeform.torch import _functions
from pydeform.torch.modules import (
    DCNv3,
    DCNv4,
    DeformConv2d,
    DeformConv2dPack,
    ModulatedDeformConv2dPack,
    MSDeformAttn,
    PrRoIPool,
    PSRoIAlign,
    PSRoIPool,
    RoIAlign,
    RoIAlignRotated,
    RoIPool,
)
from pydeform.torch.patches import patch_torchvision, patch_transformers

_OPERATORS = _functions.functions()
globals().update(_OPERATORS)

__all__ = [
    "DCNv3",
    "DCNv4",
    "DeformConv2d",
    "DeformConv2dPack",
    "MSDeformAttn",
    "ModulatedDeformConv2dPack",
    "PSRoIAlign",
    "PSRoIPool",
    "PrRoIPool",
    "RoIAlign",
    "RoIAlignRotated",
    "RoIPool",
    "patch_torchvision",
    "patch_transformers",
    *_OPERATORS,
]

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...
