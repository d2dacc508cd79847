"""Convolution as its equation says it, one index at a time, in float64.

    output[b, o, oy, ox] = bias[o] + sum over c, ky, kx of weight[o, c, ky, kx] * input[b, c, y, x]
    y = oy*stride_h - pad_h + ky*dilation_h        x likewise; nothing is added where (y, x) is not a pixel

Padding comes as ((top, bottom), (left, right)).
"""

import numpy as np


def _terms(input, weight, stride, padding, dilation, groups):
    """(b, o, oy, ox, channel of the weight, ky, kx, channel of the input, y, x) of every product in the sum."""
    batch, _, in_h, in_w = input.shape
    out_channels, group_channels, kernel_h, kernel_w = weight.shape
    out_h, out_w = output_size(input, weight, stride, padding, dilation)
    for b, o, oy, ox in np.ndindex(batch, out_channels, out_h, out_w):
        group = o // (out_channels // groups)
        for c, ky, kx in np.ndindex(group_channels, kernel_h, kernel_w):
            y = oy * stride[0] - padding[0][0] + ky * dilation[0]
            x = ox * stride[1] - padding[1][0] + kx * dilation[1]
            if 0 <= y < in_h and 0 <= x < in_w:
                yield b, o, oy, ox, c, ky, kx, group * group_channels + c, y, x


def output_size(input, weight, stride, padding, dilation):
    return tuple(
        (input.shape[2 + axis] + sum(padding[axis]) - (dilation[axis] * (weight.shape[2 + axis] - 1) + 1))
        // stride[axis]
        + 1
        for axis in (0, 1)
    )


def forward(input, weight, bias, stride, padding, dilation, groups):
    input, weight = input.astype(np.float64), weight.astype(np.float64)
    out_h, out_w = output_size(input, weight, stride, padding, dilation)
    output = np.zeros((len(input), len(weight), out_h, out_w))
    if bias is not None:
        output += bias.astype(np.float64)[:, None, None]
    for b, o, oy, ox, cw, ky, kx, c, y, x in _terms(input, weight, stride, padding, dilation, groups):
        output[b, o, oy, ox] += weight[o, cw, ky, kx] * input[b, c, y, x]
    return output


def backward(grad_output, input, weight, bias, stride, padding, dilation, groups):
    """Gradients of sum(grad_output * forward(...)), as a dict under the arguments' names."""
    grad_output, input, weight = (a.astype(np.float64) for a in (grad_output, input, weight))
    grad_input, grad_weight = np.zeros_like(input), np.zeros_like(weight)
    for b, o, oy, ox, cw, ky, kx, c, y, x in _terms(input, weight, stride, padding, dilation, groups):
        grad_input[b, c, y, x] += grad_output[b, o, oy, ox] * weight[o, cw, ky, kx]
        grad_weight[o, cw, ky, kx] += grad_output[b, o, oy, ox] * input[b, c, y, x]
    grad_bias = None if bias is None else grad_output.sum(axis=(0, 2, 3))
    return {"input": grad_input, "weight": grad_weight, "bias": grad_bias}
