"""Layers with hand-written gradients: `y, backprop = layer(x)`, then `grad_x = backprop(grad_y)`.

`backprop` adds into `layer.grads` (a dict with the keys of `layer.params`) and returns the gradient of the input. What
it needs belongs to the call, so a layer may be used twice in one graph. `layer(x, train=False)` keeps nothing.
Parameters are changed in place; run `backprop` before changing them.

Layers take NumPy arrays and, after `layer.to("cuda")`, CuPy arrays, of the dtype they were made with. Arrays of any
other kind are a TypeError: what is added to their gradients in place would be lost without a word. Of half types,
everything between the operators is computed in float32 and rounded once.
"""

from pydeform.layers._files import load, save
from pydeform.layers._layer import Layer
from pydeform.layers.activation import ReLU, Sigmoid, Softmax
from pydeform.layers.active_conv2d import ActiveConv2d
from pydeform.layers.conv1d import Conv1d
from pydeform.layers.conv2d import Conv2d
from pydeform.layers.conv3d import Conv3d
from pydeform.layers.dcn import DCNv3, DCNv4
from pydeform.layers.deform_conv1d import DeformConv1d
from pydeform.layers.deform_conv2d import DeformConv2d
from pydeform.layers.deform_conv3d import DeformConv3d
from pydeform.layers.linear import Flatten, Linear
from pydeform.layers.ms_deform_attn import MSDeformAttn
from pydeform.layers.norm import BatchNorm2d
from pydeform.layers.pooling import GlobalAvgPool2d, MaxPool2d
from pydeform.layers.roi import DeformPSRoIPool, DeformRoIPool, RoIAlign
from pydeform.layers.sequential import Sequential
from pydeform.layers.spatial_transformer import SpatialTransformer

__all__ = [
    "ActiveConv2d",
    "BatchNorm2d",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "DCNv3",
    "DCNv4",
    "DeformConv1d",
    "DeformConv2d",
    "DeformConv3d",
    "DeformPSRoIPool",
    "DeformRoIPool",
    "Flatten",
    "GlobalAvgPool2d",
    "Layer",
    "Linear",
    "MSDeformAttn",
    "MaxPool2d",
    "ReLU",
    "RoIAlign",
    "Sequential",
    "Sigmoid",
    "Softmax",
    "SpatialTransformer",
    "load",
    "save",
]
