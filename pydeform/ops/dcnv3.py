"""DCNv3, the operator of InternImage: a query at each output position sums weighted samples of a moved kernel."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydeform import _checks, _gather_geometry, _interop
from pydeform._types import AnyArray, Array, Int, Needs, Number, Padding, Size
from pydeform.ops import _call, _gather


class Dcnv3Grads(NamedTuple):
    """What `dcnv3_backward` returns.

    Examples
    --------
    >>> from pydeform import Dcnv3Grads
    >>> Dcnv3Grads._fields
    ('input', 'offset', 'mask')
    """

    input: Any
    offset: Any
    mask: Any


def dcnv3(
    input: Array,
    offset: AnyArray,
    mask: AnyArray,
    kernel_size: Size = 3,
    stride: Size = 1,
    padding: Padding = 1,
    dilation: Size = 1,
    groups: Int = 1,
    offset_scale: Number = 1.0,
    remove_center: bool = False,
) -> Array:
    """Sum weighted samples of a kernel whose points are moved by offsets, in channels last.

        output[b, oy, ox, c] = sum over p of mask[b, oy, ox, g*P + p] * input[b, c](y, x)
        y = oy*stride - pad + r + (p_y*dilation - r + dy) * offset_scale      x likewise      r = dilation*(k - 1) // 2

    where g is the group of channel c, (p_y, p_x) are the row and column of point p in the kernel,
    (dx, dy) = offset[b, oy, ox, (g*P + p)*2 + (0, 1)], and input(y, x) is bilinear between pixel centres, which lie at
    integers, with zeros outside. Points are counted column by column.

    Parameters
    ----------
    input : array (N, H, W, C), float64, float32, float16 or bfloat16, as every other array
    offset : array (N, out_h, out_w, groups*P*2) of (x, y), in input pixels; P = kernel_h*kernel_w points. Beside
        float16 or bfloat16 it may be float32
    mask : array (N, out_h, out_w, groups*P); used as given, without a softmax
    kernel_size, stride, dilation : int, or (vertical, horizontal)
    padding : int, (vertical, horizontal), a (before, after) pair for each, or "same"
    groups : of channels, which are consecutive and have offsets and masks of their own
    offset_scale : of the offsets, and of the kernel around its middle
    remove_center : the kernel, square and of odd size, has no middle point: P is one less

    Returns
    -------
    array (N, out_h, out_w, C)
        Of the kind, device and dtype of `input`.

    Raises
    ------
    ValueError
        A shape or option does not fit.
    TypeError
        The kind, dtype or device of an array does not fit.

    Notes
    -----
    NaN in an offset gives NaN; an infinite one is outside and gives 0. The same bits on every run and, on the CPU, for
    any number of threads.

    Memory beyond the result: as `ms_deform_attn`, whatever the size of the maps.

    References
    ----------
    arXiv:2211.05778 eq. 2; InternImage's ops_dcnv3.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import dcnv3
    >>> image, offset = np.arange(16.0).reshape(1, 4, 4, 1), np.zeros((1, 4, 4, 18))
    >>> dcnv3(image, offset, np.full((1, 4, 4, 9), 1 / 9))[0, 1, :, 0].round(9).tolist()
    [3.0, 5.0, 6.0, 4.333333333]
    """
    op = "dcnv3"
    arrays, back = _interop.to_native(op, {"input": input, "offset": offset, "mask": mask})
    _call.check_arrays(op, arrays, "input", "offset", "mask")
    g = _gather_geometry.dcn_geometry(
        op, arrays, _check, kernel_size, stride, padding, dilation, groups, offset_scale, remove_center, False
    )
    return _gather.forward(op, arrays, back, g, shape_of(g))


def dcnv3_backward(
    grad_output: AnyArray,
    input: AnyArray,
    offset: AnyArray,
    mask: AnyArray,
    kernel_size: Size = 3,
    stride: Size = 1,
    padding: Padding = 1,
    dilation: Size = 1,
    groups: Int = 1,
    offset_scale: Number = 1.0,
    remove_center: bool = False,
    *,
    needs: Needs = None,
    deterministic: bool = False,
) -> Dcnv3Grads:
    """Gradients of `dcnv3`, computed from its arguments alone: d sum(grad_output * output) / d argument.

    Parameters
    ----------
    grad_output : array (N, out_h, out_w, C), the gradient of the forward's result
    input, offset, mask, kernel_size, stride, padding, dilation, groups, offset_scale, remove_center : exactly the
        forward's
    needs, deterministic : as in `ms_deform_attn_backward`

    Returns
    -------
    Dcnv3Grads
        Of the kind, device and dtype of `grad_output`; that of offset has the dtype of `offset`.

    Raises
    ------
    ValueError
        A shape, option or name in `needs` does not fit.
    TypeError
        The kind, dtype or device of an array does not fit.

    Notes
    -----
    Kinks and NaN as in `ms_deform_attn_backward`.

    Memory beyond the gradients: as there, whatever the size of the maps.

    References
    ----------
    Derived in docs/math/gather.md.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import dcnv3_backward
    >>> image, offset, mask = np.ones((1, 4, 4, 8)), np.full((1, 4, 4, 36), 0.25), np.ones((1, 4, 4, 18))
    >>> grads = dcnv3_backward(np.ones((1, 4, 4, 8)), image, offset, mask, groups=2)
    >>> grads.offset.shape, float(grads.mask[0, 1, 1, 4])
    ((1, 4, 4, 36), 4.0)
    """
    op = "dcnv3_backward"
    arrays = {"grad_output": grad_output, "input": input, "offset": offset, "mask": mask}
    arrays, back = _interop.to_native(op, arrays)
    _call.check_arrays(op, arrays, "input", "offset", "mask")
    g = _gather_geometry.dcn_geometry(
        op, arrays, _check, kernel_size, stride, padding, dilation, groups, offset_scale, remove_center, False
    )
    return Dcnv3Grads(
        **_gather.backward(op, arrays, back, g, "(N, out_h, out_w, C)", shape_of(g), needs, deterministic)
    )


def shape_of(g: _gather_geometry.Gather) -> tuple[int, ...]:
    """That of the result."""
    n = g.numbers
    return n.batch, n.queries // n.out_w, n.out_w, n.groups * n.channels


def _check(op: str, arrays: dict[str, Any], positions: tuple[int, ...], groups: int, points: int) -> None:
    for name, each, formula in ("offset", 2, "groups*P*2"), ("mask", 1, "groups*P"):
        expected = (*positions, groups * points * each)
        _checks.check_shape(op, name, arrays[name].shape, f"(N, out_h, out_w, {formula})", expected)
