"""Active convolution: taps at positions that all pixels share."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydeform._types import AnyArray, Array, Needs, Padding, Size
from pydeform.ops import _conv


class ActiveConv2dGrads(NamedTuple):
    """What `active_conv2d_backward` returns: as `DeformConv2dGrads`.

    Examples
    --------
    >>> from pydeform import ActiveConv2dGrads
    >>> ActiveConv2dGrads._fields
    ('input', 'positions', 'weight', 'bias')
    """

    input: Any
    positions: Any
    weight: Any
    bias: Any


def active_conv2d(
    input: Array,
    positions: AnyArray,
    weight: AnyArray,
    bias: AnyArray | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    *,
    allow_tf32: bool = False,
) -> Array:
    """Convolve with taps moved by offsets that are the same at every output pixel of every image.

    It is `deform_conv2d`, without dilation and mask, with

        offset[b, 2*(og*K + k) + a, oy, ox] = positions[2*(og*K + k) + a]        a = 0 for y, 1 for x

    of which nothing as large as the image is made. At zero it is the plain convolution.

    Parameters
    ----------
    input : array (N, C, H, W), float64, float32, float16 or bfloat16, as every other array
    positions : array (2*groups_of_positions*K,), in input pixels, from each tap's place in the regular grid; C is a
        multiple of groups_of_positions. Beside float16 or bfloat16 it may be float32
    weight, bias, stride, padding, allow_tf32 : as in `deform_conv2d`

    Returns
    -------
    array (N, O, out_h, out_w)
        Of the kind, device and dtype of `input`.

    Raises
    ------
    ValueError
        A shape or option does not fit.
    TypeError
        The kind, dtype or device of an array does not fit.

    Notes
    -----
    As `deform_conv2d` with boundary "torchvision": outside the image, NaN, bits.

    Memory beyond the result: as there, whatever the size of the image.

    References
    ----------
    arXiv:1703.09076 eq. 3, whose positions are counted from the kernel's middle: those are tap k's place in the kernel,
    less its middle, plus these.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import active_conv2d
    >>> image, positions = np.arange(12.0).reshape(1, 1, 3, 4), np.array([0.5, 0.25])
    >>> active_conv2d(image, positions, np.ones((1, 1, 1, 1)))[0, 0, 0].tolist()
    [2.25, 3.25, 4.25, 3.75]
    """
    arrays = {"input": input, "positions": positions, "weight": weight, "bias": bias}
    return _conv.forward("active_conv2d", 2, arrays, stride, padding, 1, allow_tf32=allow_tf32)


def active_conv2d_backward(
    grad_output: AnyArray,
    input: AnyArray,
    positions: AnyArray,
    weight: AnyArray,
    bias: AnyArray | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    *,
    needs: Needs = None,
    deterministic: bool = False,
    allow_tf32: bool = False,
) -> ActiveConv2dGrads:
    """Gradients of `active_conv2d`, computed from its arguments alone: d sum(grad_output * output) / d argument.

    That of positions is the sum, over images and pixels, of those of the offsets that they stand for, in an order that
    depends on sizes alone.

    Parameters
    ----------
    grad_output : array (N, O, out_h, out_w), the gradient of the forward's result
    input, positions, weight, bias, stride, padding, allow_tf32 : exactly the forward's
    needs, deterministic : as in `deform_conv2d_backward`

    Returns
    -------
    ActiveConv2dGrads
        Of the kind, device and dtype of `grad_output`; that of positions has their dtype.

    Raises
    ------
    ValueError
        A shape, option or name in `needs` does not fit.
    TypeError
        The kind, dtype or device of an array does not fit.

    Notes
    -----
    As `deform_conv2d_backward`: kinks, NaN, bits.

    Memory beyond the gradients: as there, and two numbers for each block of positions and tap, whatever the size of the
    image.

    References
    ----------
    Docs/math/deform_conv.md; arXiv:1703.09076 eq. 5 to 8.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import active_conv2d_backward
    >>> image, positions, weight = np.ones((1, 4, 8, 8)), np.zeros(18), np.ones((6, 4, 3, 3))
    >>> grads = active_conv2d_backward(np.ones((1, 6, 6, 6)), image, positions, weight)
    >>> grads.positions.shape, grads.bias
    ((18,), None)
    """
    arrays = {"grad_output": grad_output, "input": input, "positions": positions, "weight": weight, "bias": bias}
    options: dict[str, Any] = {"deterministic": deterministic, "allow_tf32": allow_tf32}
    return ActiveConv2dGrads(
        **_conv.backward("active_conv2d_backward", 2, arrays, stride, padding, 1, needs, **options)
    )
