"""Plain convolution: what a deformable one computes at zero offset."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydeform._types import AnyArray, Array, Int, Needs, Padding, Size
from pydeform.ops import _conv


class Conv2dGrads(NamedTuple):
    """What `conv2d_backward` returns: each gradient under its argument's name and in its shape.

    None stands where the argument was absent, and where `needs` did not ask for the gradient.

    Examples
    --------
    >>> from pydeform import Conv2dGrads
    >>> Conv2dGrads._fields
    ('input', 'weight', 'bias')
    """

    input: Any
    weight: Any
    bias: Any


def conv2d(
    input: Array,
    weight: AnyArray,
    bias: AnyArray | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: Int = 1,
    *,
    allow_tf32: bool = False,
) -> Array:
    """Plain convolution, as networks mean it (a correlation): what `deform_conv2d` computes at zero offset.

        output[b, o, oy, ox] = bias[o] + sum over c, ky, kx of weight[o, c, ky, kx] * input[b, c, y, x]
        y = oy*stride_h - pad_h + ky*dilation_h        x = ox*stride_w - pad_w + kx*dilation_w

    Pixels outside the image are 0.

    Parameters
    ----------
    input : array (N, C, H, W), float64, float32, float16 or bfloat16, as every other array
    weight : array (O, C/groups, kernel_h, kernel_w)
    bias : array (O,), optional
    stride, dilation : int or one per axis
    padding : int, one per axis, a (before, after) pair per axis, or "same": out = ceil(in / stride)
    groups : int; output channel o sees only the C/groups input channels of its own group
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
    float16 and bfloat16 sum in float32. NaN and infinite pixels give what the sum gives; on CUDA, in float32, infinite
    ones may give NaN. Where the processor multiplies bfloat16 faster than float32 (AMX, or AVX512-BF16 of AMD) its
    subnormal numbers are zeros. The same bits on every run and, on the CPU, for any number of threads.

    Memory beyond the result: at most 64 numbers for each product that is summed and for each weight, and some MB for
    each thread, whatever the size of the image; on CUDA an input that is not contiguous is copied.

    References
    ----------
    The regular grid R of arXiv:1703.06211 eq. 1. Layout as torch.nn.functional.conv2d.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import conv2d
    >>> conv2d(np.ones((1, 4, 8, 8)), np.ones((6, 2, 3, 3)), padding="same", groups=2)[0, 0, 0].tolist()
    [8.0, 12.0, 12.0, 12.0, 12.0, 12.0, 12.0, 8.0]
    """
    arrays = {"input": input, "weight": weight, "bias": bias}
    return _conv.forward("conv2d", 2, arrays, stride, padding, dilation, groups=groups, allow_tf32=allow_tf32)


def conv2d_backward(
    grad_output: AnyArray,
    input: AnyArray,
    weight: AnyArray,
    bias: AnyArray | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: Int = 1,
    *,
    needs: Needs = None,
    deterministic: bool = False,
    allow_tf32: bool = False,
) -> Conv2dGrads:
    """Gradients of `conv2d`, computed from its arguments alone.

    Every field is d sum(grad_output * output) / d argument. The forward is linear in each, so they are exact.

    Parameters
    ----------
    grad_output : array (N, O, out_h, out_w), the gradient of the forward's result
    input, weight, bias, stride, padding, dilation, groups, allow_tf32 : exactly the forward's
    needs : names of the gradients to compute, say ("input", "weight"); None computes all
    deterministic : accepted as by the other backwards; this one has the same bits on every run, always

    Returns
    -------
    Conv2dGrads
        Of the kind, device and dtype of `grad_output`.

    Raises
    ------
    ValueError
        A shape, option or name in `needs` does not fit.
    TypeError
        The kind, dtype or device of an array does not fit.

    Notes
    -----
    Same bits for any number of threads on the CPU.

    Memory beyond the gradients: at most 64 numbers for each product that is summed, 256 for each weight, 16 MB (on CUDA
    64 MB), and for each thread some MB and 256 numbers for each output channel, whatever the size of the image; for
    that of input up to four times its own in float32; on CUDA an input that is not contiguous is copied.

    References
    ----------
    Derived in docs/math/deform_conv2d.md, with offset 0 and mask 1.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import conv2d_backward
    >>> grads = conv2d_backward(np.ones((1, 6, 6, 6)), np.ones((1, 4, 8, 8)), np.ones((6, 4, 3, 3)), needs=("weight",))
    >>> grads.weight.shape, grads.input
    ((6, 4, 3, 3), None)
    """
    arrays = {"grad_output": grad_output, "input": input, "weight": weight, "bias": bias}
    options: dict[str, Any] = {"groups": groups, "deterministic": deterministic, "allow_tf32": allow_tf32}
    return Conv2dGrads(**_conv.backward("conv2d_backward", 2, arrays, stride, padding, dilation, needs, **options))
