"""Sampling of images and volumes at the points of a grid (spatial transformer networks)."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydeform import _grid_geometry, _interop
from pydeform._types import AnyArray, Array, Interpolation, Needs, PaddingMode
from pydeform.ops import _call, _grid


class GridSampleGrads(NamedTuple):
    """What `grid_sample_backward` returns.

    Examples
    --------
    >>> from pydeform import GridSampleGrads
    >>> GridSampleGrads._fields
    ('input', 'grid')
    """

    input: Any
    grid: Any


def grid_sample(
    input: Array,
    grid: AnyArray,
    mode: Interpolation = "bilinear",
    padding_mode: PaddingMode = "zeros",
    align_corners: bool = False,
) -> Array:
    """Sample images, or volumes, at the points of a grid.

        output[b, c, p] = input[b, c](y, x)        (x, y) = grid[b, p]
        y = ((grid_y + 1) * H - 1) / 2             with `align_corners`  y = (grid_y + 1) / 2 * (H - 1)

    x likewise with W, and z with D; input(y, x) is interpolated between pixel centres, which lie at integers.

    Parameters
    ----------
    input : array (N, C, H, W) or (N, C, D, H, W), float64, float32, float16 or bfloat16, as every other array
    grid : array (N, out_h, out_w, 2) of (x, y), or (N, out_d, out_h, out_w, 3) of (x, y, z), from -1 to 1 within the
        image. Beside float16 or bfloat16 it may be float32
    mode : "bilinear", in a volume trilinear; "nearest", of two equally near pixels the even one; "bicubic", with cubic
        convolution of a = -3/4, of images alone
    padding_mode : what lies outside: "zeros"; "border", the nearest pixel; "reflection", the image mirrored at its
        outer edges, or with `align_corners` at the centres of its outer pixels. Bicubic applies it to each of its
        pixels, the others to the point
    align_corners : -1 and 1 are the centres of the first and last pixel; False: they are the outer edges of the image

    Returns
    -------
    array (N, C, out_h, out_w) or (N, C, out_d, out_h, out_w)
        Of the kind, device and dtype of `input`.

    Raises
    ------
    ValueError
        A shape or option does not fit.
    TypeError
        The kind, dtype or device of an array does not fit.

    Notes
    -----
    NaN in a coordinate gives NaN. An infinite one is outside: 0, or the border's pixel; nothing is its mirror image, so
    "reflection" gives 0 too (PyTorch gives other numbers there). The same bits on every run and, on the CPU, for any
    number of threads.

    Memory beyond the result: some 100 kB for each thread, whatever the size of the image; on the CPU arrays of half
    types, and everywhere those that are not contiguous, are copied.

    References
    ----------
    arXiv:1506.02025 eq. 3 to 5. As torch.nn.functional.grid_sample.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import grid_sample
    >>> image = np.arange(16.0).reshape(1, 1, 4, 4)
    >>> grid_sample(image, np.array([[[[0, 0], [-0.75, 0.5], [2, 0]]]])).tolist()  # the centre, between pixels, outside
    [[[[7.5, 10.0, 0.0]]]]
    """
    op = "grid_sample"
    arrays, back = _interop.to_native(op, {"input": input, "grid": grid})
    g = _geometry_of(op, arrays, mode, padding_mode, align_corners)
    return _grid.forward(op, arrays, back, g, _shape(arrays))


def grid_sample_backward(
    grad_output: AnyArray,
    input: AnyArray,
    grid: AnyArray,
    mode: Interpolation = "bilinear",
    padding_mode: PaddingMode = "zeros",
    align_corners: bool = False,
    *,
    needs: Needs = None,
    deterministic: bool = False,
) -> GridSampleGrads:
    """Gradients of `grid_sample`, computed from its arguments alone: d sum(grad_output * output) / d argument.

    Parameters
    ----------
    grad_output : array shaped like the forward's result, its gradient
    input, grid, mode, padding_mode, align_corners : exactly the forward's
    needs : names of the gradients to compute; None computes all
    deterministic : the same bits on every run, on CUDA too; the CPU always has them

    Returns
    -------
    GridSampleGrads
        Of the kind, device and dtype of `grad_output`; that of grid has the dtype of `grid`.

    Raises
    ------
    ValueError
        A shape, option or name in `needs` does not fit.
    TypeError
        The kind, dtype or device of an array does not fit.

    Notes
    -----
    As PyTorch's: at a kink, where a point lies on a row or column of pixels, the gradient of the grid is the derivative
    from the right; that along an axis is 0 where "border" or "reflection" holds the point at the first or last pixel,
    and everywhere for "nearest". NaN in a coordinate gives NaN in its point's gradient.

    Memory beyond the gradients: some 100 kB for each thread, whatever the size of the image, and the copies of the
    forward; on CUDA one of the input's gradient in float32 where its dtype is a half type and, if deterministic, some
    numbers for each pixel that a point reads.

    References
    ----------
    Derived in docs/math/grid.md.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import grid_sample_backward
    >>> image, grid = np.arange(16.0).reshape(1, 1, 4, 4), np.array([[[[0, 0]]]]) + 0.25
    >>> grads = grid_sample_backward(np.ones((1, 1, 1, 1)), image, grid)
    >>> grads.input[0, 0, 2].tolist(), grads.grid.tolist()
    ([0.0, 0.0, 1.0, 0.0], [[[[2.0, 8.0]]]])
    """
    op = "grid_sample_backward"
    arrays, back = _interop.to_native(op, {"grad_output": grad_output, "input": input, "grid": grid})
    g = _geometry_of(op, arrays, mode, padding_mode, align_corners)
    return GridSampleGrads(**_grid.backward(op, arrays, back, g, _shape(arrays), needs, deterministic))


def _geometry_of(
    op: str, arrays: dict[str, Any], mode: str, padding_mode: str, align_corners: bool
) -> _grid_geometry.GridGeometry:
    _call.check_arrays(op, arrays, "input", "grid")
    return _grid_geometry.grid_geometry(op, arrays["input"], arrays["grid"], mode, padding_mode, align_corners)


def _shape(arrays: dict[str, Any]) -> tuple[int, ...]:
    """That of the result."""
    return (*arrays["input"].shape[:2], *arrays["grid"].shape[1:-1])
