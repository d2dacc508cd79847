"""DCNv4: DCNv3 with offsets and masks in one tensor."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydeform import _checks, _gather_geometry, _interop
from pydeform._types import AnyArray, Array, Int, Needs, Number, Padding, Size
from pydeform.ops import _call, _gather
from pydeform.ops.dcnv3 import shape_of


class Dcnv4Grads(NamedTuple):
    """What `dcnv4_backward` returns.

    Examples
    --------
    >>> from pydeform import Dcnv4Grads
    >>> Dcnv4Grads._fields
    ('input', 'offset_mask')
    """

    input: Any
    offset_mask: Any


def dcnv4(
    input: Array,
    offset_mask: AnyArray,
    kernel_size: Size = 3,
    stride: Size = 1,
    padding: Padding = 1,
    dilation: Size = 1,
    groups: Int = 1,
    offset_scale: Number = 1.0,
    remove_center: bool = False,
) -> Array:
    """`dcnv3` with offsets and masks of a group side by side: P offsets (x, y), then P masks.

        offset[b, oy, ox, (g*P + p)*2 + (0, 1)] = offset_mask[b, oy, ox, g*3*P + p*2 + (0, 1)]
        mask[b, oy, ox, g*P + p] = offset_mask[b, oy, ox, g*3*P + 2*P + p]

    Parameters
    ----------
    input : array (N, H, W, C), float64, float32, float16 or bfloat16, as the other array
    offset_mask : array (N, out_h, out_w, ceil(groups*P*3 / 8)*8); what is left at the end of a row is not read
    kernel_size, stride, padding, dilation, groups, offset_scale, remove_center : as in `dcnv3`

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
    As `dcnv3`.

    Memory beyond the result: as there, whatever the size of the maps. Any number of channels in a group, any kernel and
    stride.

    References
    ----------
    arXiv:2401.06197 section 3; DCNv4_op.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import dcnv4
    >>> image, packed = np.arange(16.0).reshape(1, 4, 4, 1), np.zeros((1, 4, 4, 32))
    >>> packed[..., 18:27] = 1 / 9
    >>> dcnv4(image, packed)[0, 1, :, 0].round(9).tolist()
    [3.0, 5.0, 6.0, 4.333333333]
    """
    op = "dcnv4"
    arrays, back = _interop.to_native(op, {"input": input, "offset_mask": offset_mask})
    _call.check_arrays(op, arrays, "input", "offset_mask")
    g = _gather_geometry.dcn_geometry(
        op, arrays, _check, kernel_size, stride, padding, dilation, groups, offset_scale, remove_center, True
    )
    return _gather.forward(op, arrays, back, g, shape_of(g))


def dcnv4_backward(
    grad_output: AnyArray,
    input: AnyArray,
    offset_mask: AnyArray,
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
) -> Dcnv4Grads:
    """Gradients of `dcnv4`, computed from its arguments alone: d sum(grad_output * output) / d argument.

    Parameters
    ----------
    grad_output : array (N, out_h, out_w, C), the gradient of the forward's result
    input, offset_mask, kernel_size, stride, padding, dilation, groups, offset_scale, remove_center : exactly the
        forward's
    needs, deterministic : as in `ms_deform_attn_backward`

    Returns
    -------
    Dcnv4Grads
        Of the kind, device and dtype of `grad_output`.

    Raises
    ------
    ValueError
        A shape, option or name in `needs` does not fit.
    TypeError
        The kind, dtype or device of an array does not fit.

    Notes
    -----
    Kinks and NaN as in `ms_deform_attn_backward`.

    Memory beyond the gradients: as there, whatever the size of the maps. What is left at the end of a row has gradient
    0.

    References
    ----------
    Derived in docs/math/gather.md.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import dcnv4_backward
    >>> grads = dcnv4_backward(np.ones((1, 4, 4, 8)), np.ones((1, 4, 4, 8)), np.zeros((1, 4, 4, 56)), groups=2)
    >>> grads.offset_mask.shape, float(grads.offset_mask[0, 1, 1, 22])
    ((1, 4, 4, 56), 4.0)
    """
    op = "dcnv4_backward"
    arrays = {"grad_output": grad_output, "input": input, "offset_mask": offset_mask}
    arrays, back = _interop.to_native(op, arrays)
    _call.check_arrays(op, arrays, "input", "offset_mask")
    g = _gather_geometry.dcn_geometry(
        op, arrays, _check, kernel_size, stride, padding, dilation, groups, offset_scale, remove_center, True
    )
    return Dcnv4Grads(
        **_gather.backward(op, arrays, back, g, "(N, out_h, out_w, C)", shape_of(g), needs, deterministic)
    )


def _check(op: str, arrays: dict[str, Any], positions: tuple[int, ...], groups: int, points: int) -> None:
    formula = "(N, out_h, out_w, ceil(groups*P*3 / 8)*8)"
    expected = (*positions, _gather_geometry.packed_row(groups, points))
    _checks.check_shape(op, "offset_mask", arrays["offset_mask"].shape, formula, expected)
