"""Grids of affine maps, for `grid_sample` (spatial transformer networks)."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

from pydeform import _arrays, _checks, _interop
from pydeform._geometry import SIZES
from pydeform._grid_geometry import GRIDS
from pydeform._types import AnyArray, Array, Int, Needs
from pydeform.ops import _call


class AffineGridGrads(NamedTuple):
    """What `affine_grid_backward` returns.

    Examples
    --------
    >>> from pydeform import AffineGridGrads
    >>> AffineGridGrads._fields
    ('theta',)
    """

    theta: Any


def affine_grid(theta: Array, size: Sequence[Int], align_corners: bool = False) -> Array:
    """Points of a regular grid, moved by an affine map for each image: what `grid_sample` takes.

        grid[b, y, x] = theta[b] @ (x', y', 1)        x' = (2*x + 1) / W - 1, with `align_corners` 2*x / (W - 1) - 1

    y' likewise with H; in a volume grid[b, z, y, x] = theta[b] @ (x', y', z', 1).

    Parameters
    ----------
    theta : array (N, 2, 3) or (N, 3, 4), float64, float32, float16 or bfloat16; rows give x, y (and z)
    size : (N, C, H, W) or (N, C, D, H, W), the shape of what `grid_sample` will return
    align_corners : as will be given to `grid_sample`. An axis of length 1 lies in the middle either way

    Returns
    -------
    array (N, H, W, 2) or (N, D, H, W, 3)
        Of the kind, device and dtype of `theta`.

    Raises
    ------
    ValueError
        A shape does not fit.
    TypeError
        The kind or dtype of an array does not fit.

    Notes
    -----
    float16 and bfloat16 are computed in float32 and rounded at the end. The same bits on every run.

    References
    ----------
    arXiv:1506.02025 eq. 1. As torch.nn.functional.affine_grid.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import affine_grid
    >>> quarter_turn = np.array([[[0, -1, 0], [1, 0, 0.0]]])
    >>> affine_grid(quarter_turn, (1, 1, 2, 2)).tolist()
    [[[[0.5, -0.5], [0.5, 0.5]], [[-0.5, -0.5], [-0.5, 0.5]]]]
    """
    op = "affine_grid"
    arrays, back = _interop.to_native(op, {"theta": theta})
    sizes, align_corners = _sizes_of(op, arrays, size), _checks.flag(op, "align_corners", align_corners)
    with back:
        wide = _arrays.wide(arrays["theta"])
        xp = _arrays.namespace(op, "theta", wide)
        rows = wide.reshape(wide.shape[0], *(1,) * len(sizes), *wide.shape[1:])
        grid = rows[..., -1] + xp.zeros((*sizes, 1), wide.dtype)
        for column, along in enumerate(_coordinates(xp, sizes, wide.dtype, align_corners)):
            grid += rows[..., column] * along[..., None]
        return back(_arrays.rounded(grid, arrays["theta"].dtype))


def affine_grid_backward(
    grad_output: AnyArray, theta: AnyArray, size: Sequence[Int], align_corners: bool = False, *, needs: Needs = None
) -> AffineGridGrads:
    """Gradient of `affine_grid`: d sum(grad_output * output) / d theta.

    Parameters
    ----------
    grad_output : array shaped like the forward's result, its gradient
    theta, size, align_corners : exactly the forward's
    needs : ("theta",), or () for none; None computes it

    Returns
    -------
    AffineGridGrads
        Of the kind and device of `grad_output` and the dtype of `theta`.

    Raises
    ------
    ValueError
        A shape or name in `needs` does not fit.
    TypeError
        The kind, dtype or device of an array does not fit.

    Notes
    -----
    The same bits on every run.

    References
    ----------
    Derived in docs/math/grid.md.

    Examples
    --------
    >>> import numpy as np
    >>> from pydeform import affine_grid_backward
    >>> affine_grid_backward(np.ones((1, 2, 2, 2)), np.zeros((1, 2, 3)), (1, 1, 2, 2)).theta.tolist()
    [[[0.0, 0.0, 4.0], [0.0, 0.0, 4.0]]]
    """
    op = "affine_grid_backward"
    arrays, back = _interop.to_native(op, {"grad_output": grad_output, "theta": theta})
    sizes, align_corners = _sizes_of(op, arrays, size), _checks.flag(op, "align_corners", align_corners)
    given, grad, axes = arrays["theta"], arrays["grad_output"], len(sizes)
    _checks.check_shape(op, "grad_output", grad.shape, GRIDS[axes], (given.shape[0], *sizes, axes))
    if not _checks.needed(op, needs, {"theta": given}):
        return AffineGridGrads(None)
    with back:
        wide = _arrays.wide(grad).copy(order="C")  # sums follow the layout
        xp = _arrays.namespace(op, "grad_output", wide)
        points = tuple(range(1, axes + 1))
        columns = [wide * along[..., None] for along in _coordinates(xp, sizes, wide.dtype, align_corners)]
        gradient = xp.concatenate([part.sum(axis=points)[..., None] for part in (*columns, wide)], axis=-1)
        return AffineGridGrads(back(_arrays.rounded(gradient, given.dtype)))


def _sizes_of(op: str, arrays: dict[str, Any], size: Any) -> tuple[int, ...]:
    """The sizes of the grid's axes."""
    _call.check_arrays(op, arrays, "theta")
    theta = arrays["theta"]
    expected = "(N, C, H, W) or (N, C, D, H, W)"
    numbers = _checks.items_of(size, 5)
    if numbers is None:
        raise TypeError(f"{op}: size must be {expected}, got {_checks.shown(size)}")
    if len(numbers) not in (4, 5):
        raise ValueError(f"{op}: size must be {expected}, got {_checks.shown(size)}")
    batch, _, *sizes = (_checks.as_int(op, "size", number, 0, f"{expected}, ints >= 0", size) for number in numbers)
    axes = len(sizes)
    if min(sizes) < 1:
        raise ValueError(f"{op}: size must have {SIZES[axes]} >= 1, got {_checks.shown(size)}")
    formula = f"(N, {axes}, {axes + 1})"
    _checks.check_shape(op, "theta", theta.shape, formula, (batch, axes, axes + 1))
    _checks.check_result(op, GRIDS[axes], (batch, *sizes, axes), theta.dtype.itemsize)
    return tuple(sizes)


def _coordinates(xp: ModuleType, sizes: tuple[int, ...], dtype: Any, align_corners: bool) -> list[Any]:
    """Of the grid's points, from -1 to 1, of the last axis first; each along its own axis."""
    found = []
    for axis in reversed(range(len(sizes))):
        count = sizes[axis]
        steps = 2 * xp.arange(count, dtype="int64") + (1 - count)  # exact, and symmetric
        along = steps.astype(dtype) / max(count - align_corners, 1)
        found.append(along.reshape(-1, *(1,) * (len(sizes) - 1 - axis)))
    return found
