"""Convolution over any number of axes as its equation says it, one index at a time, in float64.

    output[b, o, p] = bias[o] + sum over c, k of weight[o, c, k] * input[b, c, pixel]
    pixel[a] = p[a]*stride[a] - before[a] + k[a]*dilation[a]        nothing is added where that is not a pixel

p is an output pixel and k a tap, both with one index an axis a; padding comes as one (before, after) an axis.
"""

import numpy as np


def _terms(input, weight, stride, padding, dilation, groups):
    """Index of the output, of the weight and of the input of every product in the sum."""
    batch, _, *in_size = input.shape
    out_channels, group_channels, *kernel = weight.shape
    out_size = output_size(input, weight, stride, padding, dilation)
    for b, o, *p in np.ndindex(batch, out_channels, *out_size):
        group = o // (out_channels // groups)
        for c, *k in np.ndindex(group_channels, *kernel):
            pixel = [p[a] * stride[a] - padding[a][0] + k[a] * dilation[a] for a in range(len(k))]
            if all(0 <= i < size for i, size in zip(pixel, in_size, strict=True)):
                yield (b, o, *p), (o, c, *k), (b, group * group_channels + c, *pixel)


def output_size(input, weight, stride, padding, dilation):
    return tuple(
        (input.shape[2 + axis] + sum(padding[axis]) - (dilation[axis] * (weight.shape[2 + axis] - 1) + 1))
        // stride[axis]
        + 1
        for axis in range(input.ndim - 2)
    )


def forward(input, weight, bias, stride, padding, dilation, groups):
    input, weight = input.astype(np.float64), weight.astype(np.float64)
    out_size = output_size(input, weight, stride, padding, dilation)
    output = np.zeros((len(input), len(weight), *out_size))
    if bias is not None:
        output += bias.astype(np.float64).reshape(-1, *[1] * len(out_size))
    for out, tap, pixel in _terms(input, weight, stride, padding, dilation, groups):
        output[out] += weight[tap] * input[pixel]
    return output


def backward(grad_output, input, weight, bias, stride, padding, dilation, groups):
    """Gradients of sum(grad_output * forward(...)), as a dict under the arguments' names."""
    grad_output, input, weight = (a.astype(np.float64) for a in (grad_output, input, weight))
    grad_input, grad_weight = np.zeros_like(input), np.zeros_like(weight)
    for out, tap, pixel in _terms(input, weight, stride, padding, dilation, groups):
        grad_input[pixel] += grad_output[out] * weight[tap]
        grad_weight[tap] += grad_output[out] * input[pixel]
    grad_bias = None if bias is None else grad_output.sum(axis=(0, *range(2, input.ndim)))
    return {"input": grad_input, "weight": grad_weight, "bias": grad_bias}
