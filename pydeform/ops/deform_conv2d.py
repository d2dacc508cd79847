"""Deformable convolution, versions 1 and 2."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydeform._types import AnyArray, Array, Boundary, Needs, Padding, Size
from pydeform.ops import _conv


class DeformConv2dGrads(NamedTuple):
    """What `deform_conv2d_backward` returns: each gradient under its argument's name and in its shape.

    None stands where the argument was absent, and where `needs` did not ask for the gradient.

    Examples
    --------
    >>> from pydeform import DeformConv2dGrads
    >>> DeformConv2dGrads._fields
    ('input', 'offset', 'weight', 'bias', 'mask')
    """

    input: Any
    offset: Any
    weight: Any
    bias: Any
    mask: Any


def deform_conv2d(
    input: Array,
    offset: AnyArray,
    weight: AnyArray,
    bias: AnyArray | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    mask: AnyArray | None = None,
    *,
    boundary: Boundary = "torchvision",
    allow_tf32: bool = False,
) -> Array:
    """Convolve with taps moved by offsets (deformable convolution v1; v2 when `mask` is given).

        output[b, o, oy, ox] = bias[o] + sum over c, k of weight[o, c, k] * mask[b, og, k, oy, ox] * input[b, c](y, x)
        y = oy*stride_h - pad_h + ky*dilation_h + offset[b, 2*(og*K + k), oy, ox]
        x = ox*stride_w - pad_w + kx*dilation_w + offset[b, 2*(og*K + k) + 1, oy, ox]

    where tap k = ky*kernel_w + kx of K = kernel_h*kernel_w, og is the offset group of channel c, and input(y, x) is
    bilinear between pixel centres, which lie at integers.

    Parameters
    ----------
    input : array (N, C, H, W), float64, float32, float16 or bfloat16, as every other array
    offset : array (N, 2*offset_groups*K, out_h, out_w), in input pixels; C is a multiple of offset_groups.
        Beside float16 or bfloat16 it may be float32
    weight : array (O, C/groups, kernel_h, kernel_w); both groups and offset_groups follow from the shapes
    bias : array (O,), optional
    stride, dilation : int or one per axis
    padding : int, one per axis, a (before, after) pair per axis, or "same": out = ceil(in / stride)
        Without its offset no tap may be further than 2**24 pixels from pixel (0, 0): float32 is exact so far
    mask : array (N, offset_groups*K, out_h, out_w), optional; used as given, without a sigmoid
    boundary : where a sample counts, and what it reads beyond the pixels
        "torchvision": strictly inside (-1, H) x (-1, W), zeros; right-hand derivative at exactly -1
        "dcnv2": the same values, derivative 0 at exactly -1 (mmcv, Paddle)
        "dcnv1": on [0, H) x [0, W), last row and column repeated (the first paper's code, MXNet)
    allow_tf32 : on CUDA, float32 products may keep 10 bits of a factor's mantissa; elsewhere nothing changes

    Returns
    -------
    array (N, O, out_h, out_w)
        Of the kind, device and dtype of `input`; out = (in + before + after - dilation*(kernel - 1) - 1)//stride + 1.

    Raises
    ------
    ValueError
        A shape or option does not fit.
    TypeError
        The kind, dtype or device of an array does not fit.

    Notes
    -----
    A NaN coordinate gives NaN wherever its sample is used, an infinite one is outside. float16 and bfloat16 sum in
    float32. A sample is rounded to them before it is multiplied, on CUDA to both, on the CPU to bfloat16 alone and
    where the processor multiplies that faster (AMX, or AVX512-BF16 of AMD; subnormal numbers then are zeros). On CUDA
    an infinite pixel or weight in float32 may give NaN. The same bits on every run and, on the CPU, for any number of
    threads.

    Memory beyond the result: at most 64 numbers for each product that is summed and for each weight, and some MB for
    each thread, whatever the size of the image; on CUDA an input that is not contiguous is copied.

    References
    ----------
    arXiv:1703.06211 eq. 2; arXiv:1811.11168 eq. 1. Layout as torchvision.ops.deform_conv2d.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import deform_conv2d
    >>> image, offset = np.ones((1, 4, 8, 8)), np.full((1, 18, 8, 8), 0.25)
    >>> deform_conv2d(image, offset, np.ones((6, 4, 3, 3)), padding=1).shape
    (1, 6, 8, 8)
    """
    arrays = {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
    options: dict[str, Any] = {"boundary": boundary, "allow_tf32": allow_tf32}
    return _conv.forward("deform_conv2d", 2, arrays, stride, padding, dilation, **options)


def deform_conv2d_backward(
    grad_output: AnyArray,
    input: AnyArray,
    offset: AnyArray,
    weight: AnyArray,
    bias: AnyArray | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    mask: AnyArray | None = None,
    *,
    boundary: Boundary = "torchvision",
    needs: Needs = None,
    deterministic: bool = False,
    allow_tf32: bool = False,
) -> DeformConv2dGrads:
    """Gradients of `deform_conv2d`, computed from its arguments alone.

    Every field is d sum(grad_output * output) / d argument.

    Parameters
    ----------
    grad_output : array (N, O, out_h, out_w), the gradient of the forward's result
    input, offset, weight, bias, stride, padding, dilation, mask, boundary, allow_tf32 : exactly the forward's
    needs : names of the gradients to compute, say ("input", "weight"); None computes all
    deterministic : on CUDA, the same bits of grad.input on every run, without float atomics; all else has them always,
        and on the CPU everything

    Returns
    -------
    DeformConv2dGrads
        Of the kind, device and dtype of `grad_output`; that of offset has the dtype of `offset`.

    Raises
    ------
    ValueError
        A shape, option or name in `needs` does not fit.
    TypeError
        The kind, dtype or device of an array does not fit.

    Notes
    -----
    Where an offset puts a sample on a row or column of pixels the image has a kink: the offset's gradient is the
    derivative from the right (towards larger coordinates), at exactly -1 what `boundary` says. A NaN coordinate gives
    NaN in its own gradients; a sample outside gives zeros. The input's gradient is exact. Nothing there waits for the
    device; the first call compiles. The same bits for any number of threads on the CPU.

    Memory beyond the gradients: at most 64 numbers for each product that is summed, 256 for each weight, 16 MB (on CUDA
    64 MB), and for each thread some MB and 256 numbers for each output channel, whatever the size of the image; for
    that of input up to four times its own in float32; beside bfloat16 up to twice `grad_output` in float32; on CUDA an
    input that is not contiguous is copied.

    References
    ----------
    arXiv:1703.06211 appendix A; arXiv:1811.11168.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import deform_conv2d_backward
    >>> image, offset, weight = np.ones((1, 4, 8, 8)), np.full((1, 18, 8, 8), 0.25), np.ones((6, 4, 3, 3))
    >>> grads = deform_conv2d_backward(np.ones((1, 6, 8, 8)), image, offset, weight, padding=1, needs=("offset",))
    >>> grads.offset.shape, grads.weight
    ((1, 18, 8, 8), None)
    """
    arrays = {
        "grad_output": grad_output,
        "input": input,
        "offset": offset,
        "weight": weight,
        "bias": bias,
        "mask": mask,
    }
    options: dict[str, Any] = {"boundary": boundary, "deterministic": deterministic, "allow_tf32": allow_tf32}
    grads = _conv.backward("deform_conv2d_backward", 2, arrays, stride, padding, dilation, needs, **options)
    return DeformConv2dGrads(**grads)
