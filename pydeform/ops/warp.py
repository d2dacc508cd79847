"""Images moved by a field of displacements, as optical flow and registration do."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydeform import _grid_geometry, _interop
from pydeform._types import AnyArray, Array, Interpolation, Needs, PaddingMode
from pydeform.ops import _call, _grid


class WarpGrads(NamedTuple):
    """What `warp_backward` returns.

    Examples
    --------
    >>> from pydeform import WarpGrads
    >>> WarpGrads._fields
    ('input', 'displacement')
    """

    input: Any
    displacement: Any


def warp(
    input: Array,
    displacement: AnyArray,
    mode: Interpolation = "bilinear",
    padding_mode: PaddingMode = "zeros",
) -> Array:
    """Move images, or volumes, by a displacement of each pixel.

        output[b, c, y, x] = input[b, c](y + displacement[b, 0, y, x], x + displacement[b, 1, y, x])

    input(y, x) is interpolated between pixel centres, which lie at integers. It is `grid_sample` with `align_corners`,
    without the way through numbers from -1 to 1 and its rounding.

    Parameters
    ----------
    input : array (N, C, H, W) or (N, C, D, H, W), float64, float32, float16 or bfloat16, as every other array
    displacement : array (N, 2, H, W) of (y, x), or (N, 3, D, H, W) of (z, y, x), in pixels, in the order of the axes,
        as in `scipy.ndimage.map_coordinates`. Beside float16 or bfloat16 it may be float32
    mode, padding_mode : as of `grid_sample`. "bilinear" is SciPy's order 1; "zeros", "border" and "reflection" are its
        modes "grid-constant", "nearest" and "mirror"

    Returns
    -------
    array shaped like `input`
        Of its kind, device and dtype.

    Raises
    ------
    ValueError
        A shape or option does not fit.
    TypeError
        The kind, dtype or device of an array does not fit.

    Notes
    -----
    What is not finite, and determinism, as of `grid_sample`.

    Memory beyond the result: some 100 kB for each thread, whatever the size of the image; on the CPU arrays of half
    types, and everywhere those that are not contiguous, are copied.

    References
    ----------
    arXiv:1506.02025 eq. 3 to 5.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import warp
    >>> image, right = np.arange(8.0).reshape(1, 1, 2, 4), np.zeros((1, 2, 2, 4))
    >>> right[:, 1] = 1.5
    >>> warp(image, right).tolist()
    [[[[1.5, 2.5, 1.5, 0.0], [5.5, 6.5, 3.5, 0.0]]]]
    """
    op = "warp"
    arrays, back = _interop.to_native(op, {"input": input, "displacement": displacement})
    g = _geometry_of(op, arrays, mode, padding_mode)
    return _grid.forward(op, arrays, back, g, tuple(arrays["input"].shape))


def warp_backward(
    grad_output: AnyArray,
    input: AnyArray,
    displacement: AnyArray,
    mode: Interpolation = "bilinear",
    padding_mode: PaddingMode = "zeros",
    *,
    needs: Needs = None,
    deterministic: bool = False,
) -> WarpGrads:
    """Gradients of `warp`, computed from its arguments alone: d sum(grad_output * output) / d argument.

    Parameters
    ----------
    grad_output : array shaped like `input`, the gradient of the forward's result
    input, displacement, mode, padding_mode : exactly the forward's
    needs : names of the gradients to compute; None computes all
    deterministic : the same bits on every run, on CUDA too; the CPU always has them

    Returns
    -------
    WarpGrads
        Of the kind, device and dtype of `grad_output`; that of displacement has the dtype of `displacement`.

    Raises
    ------
    ValueError
        A shape, option or name in `needs` does not fit.
    TypeError
        The kind, dtype or device of an array does not fit.

    Notes
    -----
    Kinks, and what is not finite, as of `grid_sample_backward`.

    Memory beyond the gradients: some 100 kB for each thread, whatever the size of the image, and the copies of the
    forward; on CUDA as of `grid_sample_backward`.

    References
    ----------
    Derived in docs/math/grid.md.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import warp_backward
    >>> image = np.arange(8.0).reshape(1, 1, 2, 4)
    >>> grads = warp_backward(np.ones_like(image), image, np.full((1, 2, 2, 4), 0.25), padding_mode="border")
    >>> grads.displacement[0, 1, 0].tolist()  # of the last column, which the border holds: 0
    [1.0, 1.0, 1.0, 0.0]
    """
    op = "warp_backward"
    arrays = {"grad_output": grad_output, "input": input, "displacement": displacement}
    arrays, back = _interop.to_native(op, arrays)
    g = _geometry_of(op, arrays, mode, padding_mode)
    return WarpGrads(**_grid.backward(op, arrays, back, g, tuple(arrays["input"].shape), needs, deterministic))


def _geometry_of(op: str, arrays: dict[str, Any], mode: str, padding_mode: str) -> _grid_geometry.GridGeometry:
    _call.check_arrays(op, arrays, "input", "displacement")
    return _grid_geometry.displaced_geometry(op, arrays["input"], arrays["displacement"], mode, padding_mode)
