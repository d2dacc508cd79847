"""Deformable convolution over three axes."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydeform._types import AnyArray, Array, Boundary, Needs, Padding, Size
from pydeform.ops import _conv


class DeformConv3dGrads(NamedTuple):
    """What `deform_conv3d_backward` returns: as `DeformConv2dGrads`.

    Examples
    --------
    >>> from pydeform import DeformConv3dGrads
    >>> DeformConv3dGrads._fields
    ('input', 'offset', 'weight', 'bias', 'mask')
    """

    input: Any
    offset: Any
    weight: Any
    bias: Any
    mask: Any


def deform_conv3d(
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
    """Convolve volumes with taps moved by offsets: `deform_conv2d` over three axes.

        output[b, o, p] = bias[o] + sum over c, k of weight[o, c, k] * mask[b, og, k, p] * input[b, c](position)
        position[a] = p[a]*stride[a] - pad[a] + k[a]*dilation[a] + offset[b, 3*(og*K + k) + a, p]

    where p and k have an index for each axis a in the order d, h, w, og is the offset group of channel c, and
    input(position) is linear along each axis between pixel centres, which lie at integers.

    Parameters
    ----------
    input : array (N, C, D, H, W), float64, float32, float16 or bfloat16, as every other array
    offset : array (N, 3*offset_groups*K, out_d, out_h, out_w), in input pixels; C is a multiple of offset_groups.
        Beside float16 or bfloat16 it may be float32
    weight : array (O, C/groups, kernel_d, kernel_h, kernel_w); K taps, the last axis fastest
    mask : array (N, offset_groups*K, out_d, out_h, out_w), optional; used as given, without a sigmoid
    bias, stride, padding, dilation, boundary, allow_tf32 : as in `deform_conv2d`, with one stride, dilation and padding
        per axis, and each rule of `boundary` along each axis

    Returns
    -------
    array (N, O, out_d, out_h, out_w)
        Of the kind, device and dtype of `input`.

    Raises
    ------
    ValueError
        A shape or option does not fit.
    TypeError
        The kind, dtype or device of an array does not fit.

    Notes
    -----
    As `deform_conv2d`: NaN and infinite coordinates, roundings; the same bits on every run and, on the CPU, for any
    number of threads.

    Memory beyond the result: as there, whatever the size of the image.

    References
    ----------
    arXiv:1703.06211 eq. 2, arXiv:1811.11168 eq. 1; D3Dnet (arXiv:2004.02803).

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import deform_conv3d
    >>> image, offset = np.ones((1, 4, 3, 8, 8)), np.full((1, 81, 3, 8, 8), 0.25)
    >>> deform_conv3d(image, offset, np.ones((6, 4, 3, 3, 3)), padding=1).shape
    (1, 6, 3, 8, 8)
    """
    arrays = {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
    options: dict[str, Any] = {"boundary": boundary, "allow_tf32": allow_tf32}
    return _conv.forward("deform_conv3d", 3, arrays, stride, padding, dilation, **options)


def deform_conv3d_backward(
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
) -> DeformConv3dGrads:
    """Gradients of `deform_conv3d`, computed from its arguments alone: d sum(grad_output * output) / d argument.

    Parameters
    ----------
    grad_output : array (N, O, out_d, out_h, out_w), the gradient of the forward's result
    input, offset, weight, bias, stride, padding, dilation, mask, boundary, allow_tf32 : exactly the forward's
    needs, deterministic : as in `deform_conv2d_backward`

    Returns
    -------
    DeformConv3dGrads
        Of the kind, device and dtype of `grad_output`; that of offset has the dtype of `offset`.

    Raises
    ------
    ValueError
        A shape, option or name in `needs` does not fit.
    TypeError
        The kind, dtype or device of an array does not fit.

    Notes
    -----
    As `deform_conv2d_backward`: kinks, where the offset's gradient is the derivative from the right, NaN, bits.

    Memory beyond the gradients: as there, whatever the size of the image.

    References
    ----------
    Derived in docs/math/deform_conv.md.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import deform_conv3d_backward
    >>> image, offset = np.ones((1, 4, 3, 5, 4)), np.full((1, 81, 1, 3, 2), 0.25)
    >>> grads = deform_conv3d_backward(np.ones((1, 6, 1, 3, 2)), image, offset, np.ones((6, 4, 3, 3, 3)))
    >>> grads.offset.shape, grads.mask
    ((1, 81, 1, 3, 2), None)
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
    grads = _conv.backward("deform_conv3d_backward", 3, arrays, stride, padding, dilation, needs, **options)
    return DeformConv3dGrads(**grads)
