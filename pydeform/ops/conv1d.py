"""Plain convolution over one axis."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydeform._types import AnyArray, Array, Int, Needs, Padding, Size
from pydeform.ops import _conv


class Conv1dGrads(NamedTuple):
    """What `conv1d_backward` returns: as `Conv2dGrads`.

    Examples
    --------
    >>> from pydeform import Conv1dGrads
    >>> Conv1dGrads._fields
    ('input', 'weight', 'bias')
    """

    input: Any
    weight: Any
    bias: Any


def conv1d(
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
    """Plain convolution of a signal: what `deform_conv1d` computes at zero offset, and `conv2d` over one axis.

        output[b, o, p] = bias[o] + sum over c, k of weight[o, c, k] * input[b, c, p*stride - pad + k*dilation]

    where p and k have an index for each axis. Pixels outside are 0.

    Parameters
    ----------
    input : array (N, C, L), float64, float32, float16 or bfloat16, as every other array
    weight : array (O, C/groups, kernel)
    bias, stride, padding, dilation, groups, allow_tf32 : as in `conv2d`, one stride, dilation and padding per axis

    Returns
    -------
    array (N, O, out)
        Of the kind, device and dtype of `input`.

    Raises
    ------
    ValueError
        A shape or option does not fit.
    TypeError
        The kind, dtype or device of an array does not fit.

    Notes
    -----
    As `conv2d`: sums, NaN, the same bits on every run and any number of threads.

    Memory beyond the result: at most 64 numbers for each product that is summed and for each weight, and some MB for
    each thread, whatever the size of the image; on CUDA an input that is not contiguous is copied.

    References
    ----------
    Layout as torch.nn.functional.conv1d.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import conv1d
    >>> conv1d(np.ones((1, 4, 8)), np.ones((6, 2, 3)), padding="same", groups=2)[0, 0].tolist()
    [4.0, 6.0, 6.0, 6.0, 6.0, 6.0, 6.0, 4.0]
    """
    arrays = {"input": input, "weight": weight, "bias": bias}
    return _conv.forward("conv1d", 1, arrays, stride, padding, dilation, groups=groups, allow_tf32=allow_tf32)


def conv1d_backward(
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
) -> Conv1dGrads:
    """Gradients of `conv1d`, computed from its arguments alone: d sum(grad_output * output) / d argument.

    Parameters
    ----------
    grad_output : array (N, O, out), the gradient of the forward's result
    input, weight, bias, stride, padding, dilation, groups, allow_tf32 : exactly the forward's
    needs, deterministic : as in `conv2d_backward`

    Returns
    -------
    Conv1dGrads
        Of the kind, device and dtype of `grad_output`.

    Raises
    ------
    ValueError
        A shape, option or name in `needs` does not fit.
    TypeError
        The kind, dtype or device of an array does not fit.

    Notes
    -----
    As `conv2d_backward`. The forward is linear in each argument, so the gradients are exact.

    Memory beyond the gradients: as there, whatever the size of the image.

    References
    ----------
    Derived in docs/math/deform_conv.md, with offset 0 and mask 1.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import conv1d_backward
    >>> grads = conv1d_backward(np.ones((1, 6, 6)), np.ones((1, 4, 8)), np.ones((6, 4, 3)))
    >>> grads.input.shape, grads.weight.shape, grads.bias
    ((1, 4, 8), (6, 4, 3), None)
    """
    arrays = {"grad_output": grad_output, "input": input, "weight": weight, "bias": bias}
    options: dict[str, Any] = {"groups": groups, "deterministic": deterministic, "allow_tf32": allow_tf32}
    return Conv1dGrads(**_conv.backward("conv1d_backward", 1, arrays, stride, padding, dilation, needs, **options))
