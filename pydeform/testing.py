"""Compare an analytic gradient with finite differences, for any pair of forward and backward functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

__all__ = ["GradcheckReport", "gradcheck", "off_integers"]

SIDES = ("both", "right", "left")
_MIN_STEP = 1e-5  # below, rounding of the difference would come near a relative error of 1e-6


class GradcheckReport(NamedTuple):
    """What `gradcheck` compared: argument name -> indices of its elements, and those of them that lie on a kink."""

    checked: dict[str, list[tuple[int, ...]]]
    kinked: dict[str, list[tuple[int, ...]]]


class _End(NamedTuple):
    """A slope to one side, whether steps of four sizes tell the same of it, and a bound of its rounding."""

    slope: float
    settled: bool
    noise: float


class _Slope(NamedTuple):
    """Slopes of the loss to both sides (the same one twice, where only one was asked for)."""

    left: float
    right: float
    settled: bool
    kinked: bool
    noise: float


def off_integers(array: np.ndarray, margin: float) -> np.ndarray:
    """A copy of `array` in which no element is closer than `margin` to an integer (they move to that distance).

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
    forward : called as forward(**arguments); returns an array or a tuple of arrays
    backward : called as backward(grad_output, **arguments), grad_output shaped as forward's result;
        returns a NamedTuple or a mapping, argument name -> gradient (None: no gradient)
    arguments : name -> float64 array; anything else is passed on as it is
    wrt : names to check. Default: every float64 argument whose gradient is not None. A name given here whose
        gradient is None is an error, which is how a forgotten gradient is found.
    side : "both", or the one-sided derivative that the gradient must equal: "right" or "left".
        Use it to state what happens exactly on a kink. Random directions then point to that side only.
    kinks : name -> function(array, margin) that moves elements off the places where the derivative jumps,
        such as `off_integers` for sampling offsets. Applied before anything is computed.
    kink_margin : the margin given to those functions; also the largest step of a difference.
    rtol : error allowed, relative to the largest gradient of the argument (plus the rounding of the difference)
    elements : elements compared one by one in each argument; a larger array is sampled at random
    directions : random directions compared in each argument; they cover all of its elements at once
    rng : generator, or seed, of the upstream gradient, the directions and the sample of elements

    Returns   GradcheckReport(checked, kinked): the elements compared one by one, and those that lie on a kink
    Raises    AssertionError naming argument, index, analytic and numeric value; ValueError for unusable arguments
    Notes     Four halved steps are extrapolated; where they disagree, a kink is near and the steps shrink.
              On a kink (side="both") any value between the two one-sided derivatives passes; a jump of the value fails.
    Example
    >>> gradcheck(lambda x: x**3, lambda g, x: {"x": 3 * g * x**2}, {"x": np.array([1.0, 2.0])}).checked
    {'x': [(0,), (1,)]}
    """
    if side not in SIDES:
        raise ValueError(f"gradcheck: side must be one of {', '.join(map(repr, SIDES))}, got {side!r}")
    if not kink_margin > 0:
        raise ValueError(f"gradcheck: kink_margin must be above 0, got {kink_margin!r}")
    rng = np.random.default_rng(rng)
    arguments = _moved(arguments, kinks or {}, kink_margin)
    output = forward(**arguments)
    several = isinstance(output, tuple)
    outputs = tuple(np.array(array) for array in (output if several else (output,)))  # copies: forward may reuse them
    grad_outputs = tuple(rng.standard_normal(array.shape) for array in outputs)
    returned = backward(grad_outputs if several else grad_outputs[0], **arguments)
    grads = dict(returned) if isinstance(returned, Mapping) else returned._asdict()

    def change(name: str, moved: np.ndarray) -> tuple[float, float]:
        """Change of the loss, the sum of output * grad_output, and a bound of the rounding in it."""
        new = forward(**{**arguments, name: moved})
        news = new if several else (new,)
        terms = [(np.asarray(n) - o) * g for n, o, g in zip(news, outputs, grad_outputs, strict=True)]
        sizes = [np.abs(o * g).sum() + np.abs(t).sum() for o, g, t in zip(outputs, grad_outputs, terms, strict=True)]
        return float(sum(t.sum() for t in terms)), float(sum(sizes)) * np.finfo(float).eps

    report = GradcheckReport({}, {})
    for name in _names(arguments, grads, wrt):
        array, grad = arguments[name], np.asarray(grads[name])
        if grad.shape != array.shape:
            raise AssertionError(f"gradcheck: gradient of {name} must have shape {array.shape}, got {grad.shape}")
        largest = float(np.abs(grad).max(initial=0))
        slope_along = partial(_slope, partial(change, name), array, step=min(1e-3, kink_margin), side=side)
        chosen = np.sort(rng.permutation(array.size)[:elements])
        report.checked[name] = [tuple(map(int, np.unravel_index(i, array.shape))) for i in chosen]
        report.kinked[name] = []
        for index in report.checked[name]:
            direction = np.zeros(array.shape)
            direction[index] = 1.0
            slope = slope_along(direction)
            _compare(f"{name}[{', '.join(map(str, index))}]", float(grad[index]), slope, rtol * largest)
            if slope.kinked:
                report.kinked[name].append(index)
        for number in range(directions if array.size else 0):
            direction = rng.standard_normal(array.shape)
            if side != "both":
                direction = np.abs(direction)
            direction /= np.abs(direction).max()
            slope = slope_along(direction)
            if slope.kinked:
                continue  # elements on their kinks move to both sides here, and no single value is right
            allowed = rtol * largest * float(np.abs(direction).sum())
            _compare(f"{name} along random direction {number}", float((grad * direction).sum()), slope, allowed)
    return report


def _moved(arguments: Mapping[str, Any], kinks: Mapping[str, Any], margin: float) -> dict[str, Any]:
    for name in kinks:
        if arguments.get(name) is None:
            raise ValueError(f"gradcheck: kinks must name arguments among {', '.join(arguments)}, got {name!r}")
    return {name: kinks[name](value, margin) if name in kinks else value for name, value in arguments.items()}


def _names(arguments: dict[str, Any], grads: dict[str, Any], wrt: Iterable[str] | None) -> list[str]:
    """The arguments to check, each with a gradient and of the only dtype in which a difference is exact enough."""
    floats = [n for n, a in arguments.items() if isinstance(a, np.ndarray) and a.dtype == np.float64]
    names = [n for n in floats if grads.get(n) is not None] if wrt is None else list(wrt)
    for name in names:
        if name not in floats:
            raise ValueError(f"gradcheck: {name} must be a float64 NumPy array among the arguments")
        if grads.get(name) is None:
            raise AssertionError(f"gradcheck: backward gave no gradient for {name}")
    if not names:
        raise ValueError(f"gradcheck: nothing to check; no float64 array among {', '.join(arguments)} has a gradient")
    return names


def _slope(change: Callable[..., Any], array: np.ndarray, direction: np.ndarray, step: float, side: str) -> _Slope:
    """Slopes along `direction`, with the step shrunk until no kink lies within it, except at its very start."""
    signs = {"both": (-1, 1), "right": (1,), "left": (-1,)}[side]
    while True:
        ends = [_one_sided(change, array, direction, sign * step) for sign in signs]
        settled = all(end.settled for end in ends)
        if settled or step < 10 * _MIN_STEP:
            break
        step /= 10
    left, right = ends[0].slope, ends[-1].slope
    noise = max(end.noise for end in ends)
    kinked = settled and abs(right - left) > 1e-6 * max(abs(right), abs(left)) + noise
    return _Slope(left, right, settled, kinked, noise)


def _one_sided(change: Callable[..., Any], array: np.ndarray, direction: np.ndarray, step: float) -> _End:
    """The slope on one side by four steps, each half of the one before; the sign of `step` says which side."""
    slopes, noise = [], 0.0
    for h in (step, step / 2, step / 4, step / 8):
        difference, rounding = change(array + h * direction)
        slopes.append(difference / h)
        noise = 16 * rounding / abs(h)
    # Romberg: each level removes one more power of the step. What a smooth loss leaves within the first level is of
    # second order in the step; a kink or a jump leaves much more, in one of the two gaps wherever it lies.
    first = [2 * b - a for a, b in pairwise(slopes)]
    allowed = 1e-3 * abs(step) * max(1.0, *map(abs, slopes)) + noise
    settled = all(abs(b - a) <= allowed for a, b in pairwise(first))
    second = [(4 * b - a) / 3 for a, b in pairwise(first)]
    return _End((8 * second[1] - second[0]) / 7, settled, noise)


def _compare(where: str, analytic: float, slope: _Slope, allowed: float) -> None:
    allowed += slope.noise
    low, high = min(slope.left, slope.right), max(slope.left, slope.right)
    if slope.settled and low - allowed <= analytic <= high + allowed:
        return
    numeric = f"{slope.left:.9g} left and {slope.right:.9g} right" if slope.kinked else f"{slope.right:.9g}"
    reason = "" if slope.settled else "; differences do not settle, the value jumps here or is not finite"
    raise AssertionError(
        f"gradcheck: {where}: analytic {analytic:.9g}, numeric {numeric}, allowed error {allowed:.2g}{reason}"
    )
