"""Compare an analytic gradient with finite differences, for any pair of forward and backward functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from pydeform.testing._calls import Calls, Repeated, gradients, names_to_check
from pydeform.testing._comparison import Comparison

__all__ = ["GradcheckReport", "gradcheck", "off_integers"]

SIDES = ("both", "right", "left")


class GradcheckReport(NamedTuple):
    """What `gradcheck` compared, by the name of the argument."""

    checked: dict[str, list[tuple[int, ...]]]
    """Indices of the elements compared one by one."""
    kinked: dict[str, list[tuple[int, ...]]]
    """Indices of elements found to lie on a kink, where any value between the two slopes passed."""
    unchecked: dict[str, int]
    """How many elements neither a difference of their own nor one along a direction has compared."""


def off_integers(array: np.ndarray, margin: float) -> np.ndarray:
    """A copy of `array` in which no element is closer than `margin` to an integer (they move to that distance).

    Examples
    --------
    >>> off_integers(np.array([0.5, 2.001, -0.999, 3.0]), 0.01).tolist()
    [0.5, 2.01, -0.99, 3.01]
    """
    nearest = np.round(array)
    moved = nearest + np.where(array >= nearest, margin, -margin)
    return np.where(np.abs(array - nearest) < margin, moved, array)


def gradcheck(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    arguments: Mapping[str, Any],
    *,
    wrt: Iterable[str] | None = None,
    side: str = "both",
    kinks: Mapping[str, Callable[[np.ndarray, float], np.ndarray]] | None = None,
    kink_margin: float = 0.01,
    rtol: float = 1e-6,
    elements: int = 24,
    directions: int = 2,
    rng: np.random.Generator | int = 0,
) -> GradcheckReport:
    """Check `backward` against differences of `forward`, element by element and along random directions.

    Parameters
    ----------
    forward : callable
        Called as ``forward(**arguments)``; returns a float64 array, or a tuple of them.
    backward : callable
        Called as ``backward(grad_output, **arguments)``, where `grad_output` is shaped as forward's result; returns a
        NamedTuple or a mapping, argument name -> gradient, None where there is none.
    arguments : mapping
        Name -> float64 NumPy array. Anything else is passed on as it is.
    wrt : iterable of str, optional
        Names to check, which declares that the others have no gradient worth a look. Default: every floating-point
        array among the arguments, each of which then must have a gradient.
    side : {"both", "right", "left"}
        The one-sided derivative that the gradient must equal. Use it to state what happens exactly on a kink.
    kinks : mapping, optional
        Name -> function(array, margin) that moves elements off the places where the derivative jumps, such as
        `off_integers` for sampling offsets. Applied before anything is computed.
    kink_margin : float
        The margin given to those functions; also the largest displacement of an element of these arguments.
    rtol : float
        Error allowed, relative to the element's own gradient, besides the rounding that was measured. Differences that
        cannot tell as much of the argument's largest gradient raise an error.
    elements : int
        Elements compared one by one in each argument; a larger array is sampled at random.
    directions : int
        Random directions compared in each argument; they cover all of its elements at once.
    rng : numpy.random.Generator or int
        Generator, or its seed, of the upstream gradient, the directions and the sample of elements.

    Returns
    -------
    GradcheckReport
        Elements compared one by one, those found on a kink, and how many elements no comparison covers.

    Raises
    ------
    AssertionError
        Naming argument, index, analytic and numeric value, or what else is wrong: `backward` writes to an array that it
        was given, returns memory that is not its own, differs between two calls or between memory layouts, is not
        linear in `grad_output`, lacks a gradient, or gives one of another shape, dtype or kind, or not finite where the
        outputs are. Also if the differences are too inexact to verify anything ("cannot verify").
    ValueError
        For unusable arguments.

    Notes
    -----
    Differences over 8, 4, 2 and 1 steps are extrapolated. Steps are relative to each element; where the rounding of the
    outputs and the disagreement of the extrapolation are too large for `rtol`, smaller and larger ones are tried.

    On a kink (``side="both"``) any value between the two one-sided derivatives passes; a jump of the value fails.
    Directions point to the right: if some of their elements lie on kinks, the gradient must be the derivative to one
    side, or the mean of both, along the direction or along parts of it, down to single elements. What the search leaves
    open is counted as unchecked.

    Outputs that are infinite or NaN are left out; only elements that meet them may have a gradient that is not finite.

    Examples
    --------
    >>> gradcheck(lambda x: x**3, lambda g, x: {"x": 3 * g * x**2}, {"x": np.array([1.0, 2.0])}).checked
    {'x': [(0,), (1,)]}
    >>> gradcheck(
    ...     lambda x: x**3, lambda g, x: {"x": 3 * g * x}, {"x": np.array([1.0, 2.0])}
    ... )  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    AssertionError: gradcheck: x[1]: analytic -0.7926..., numeric -1.585..., allowed error 1.6e-06
    """
    _validate(side, kink_margin, rtol, elements, directions)
    rng = np.random.default_rng(rng)
    kinks = kinks or {}
    arguments = _moved(arguments, kinks, kink_margin)
    names = names_to_check(arguments, wrt)
    calls = Calls(forward, backward, arguments, rng)
    grads = gradients(calls, names, complete=wrt is None)
    repeated = Repeated(calls, grads, rtol)
    repeated.look_at_memory(rng)
    report = GradcheckReport({}, {}, {})
    scales = {}
    for name, grad in repeated.first.items():
        largest = kink_margin if name in kinks else np.inf
        comparison = Comparison(calls, name, grad, largest, side, rtol)
        chosen = np.sort(rng.permutation(comparison.array.size)[:elements])
        report.checked[name] = [comparison.index(int(i)) for i in chosen]
        comparison.compare_elements(chosen)
        for _ in range(directions):
            comparison.compare_direction(rng)
        scales[name] = comparison.scale
        report.kinked[name] = [comparison.index(int(i)) for i in np.flatnonzero(comparison.kinked)]
        report.unchecked[name] = int(np.count_nonzero(~comparison.covered))
        if comparison.array.size and not comparison.covered.any():
            raise AssertionError(f"gradcheck: cannot verify {name}: none of its elements could be compared")
    repeated.look_at_rules(scales, rng)
    return report


def _validate(side: str, kink_margin: float, rtol: float, elements: int, directions: int) -> None:
    if side not in SIDES:
        raise ValueError(f"gradcheck: side must be one of {', '.join(map(repr, SIDES))}, got {side!r}")
    if not 0 < kink_margin < np.inf:
        raise ValueError(f"gradcheck: kink_margin must be above 0 and finite, got {kink_margin!r}")
    if not 0 < rtol < 1:
        raise ValueError(f"gradcheck: rtol must be above 0 and below 1, got {rtol!r}")
    if elements < 0 or directions < 0:
        raise ValueError(f"gradcheck: elements and directions must be at least 0, got {elements!r} and {directions!r}")


def _moved(arguments: Mapping[str, Any], kinks: Mapping[str, Any], margin: float) -> dict[str, Any]:
    for name in kinks:
        if arguments.get(name) is None:
            raise ValueError(f"gradcheck: kinks must name arguments among {', '.join(arguments)}, got {name!r}")
    return {name: kinks[name](value, margin) if name in kinks else value for name, value in arguments.items()}
