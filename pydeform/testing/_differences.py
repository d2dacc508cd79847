"""The slope of a loss by finite differences that measure their own error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

MULTIPLES = (8, 4, 2, 1)
FIRST = 2.0**-7  # the largest displacement of the first trial, relative to the argument
DOWN = [8.0**-k for k in range(1, 9)]
UP = [16.0**k for k in range(1, 4)]


class Change(NamedTuple):
    """What a displacement did to the loss, and the rounding in it."""

    value: float  # NaN where an output left or entered the finite numbers
    rounding: float  # of the outputs that changed
    hidden: float  # of all outputs: one that did not change may have changed by less than this
    moved: bool  # whether any output changed


class Slope(NamedTuple):
    """Slopes to both sides (the same one twice, away from a kink), per `step`."""

    step: np.ndarray
    left: float
    right: float
    error: float  # of extrapolation and rounding, as measured; infinite where the differences do not settle
    rounding: float
    hidden: float
    kinked: bool
    moved: bool

    @property
    def largest(self) -> float:
        return max(abs(self.left), abs(self.right))

    @property
    def largest_step(self) -> float:
        return float(self.step.max())


def extrapolate(values: Sequence[float], orders: Sequence[int]) -> tuple[float, float, float]:
    """The limit of values at steps that halve, whose error is a series of these powers of the step.

    Returns the limit, how much the last two levels of the extrapolation disagree, and the factor by which it amplifies
    rounding.

    Examples
    --------
    >>> extrapolate([h + h**2 for h in (4, 2, 1)], (1, 2))
    (0.0, 8.0, 5.0)
    """
    levels = [list(values)]
    amplified = 1.0
    for order in orders:
        power = 2.0**order
        coarse = levels[-1]
        levels.append([(power * b - a) / (power - 1) for a, b in pairwise(coarse)])
        amplified *= (power + 1) / (power - 1)
    limit, before = levels[-1][-1], levels[-2]
    return limit, max(abs(limit - value) for value in before), amplified


def slope(change: Callable[[int], Change], step: np.ndarray, side: str, rtol: float) -> Slope:
    """Slopes from displacements of 8, 4, 2 and 1 steps to the sides asked for.

    The mean of both sides has an error of even powers of the step, their difference one of odd powers: extrapolated,
    the first is the derivative and the second the jump of the derivative, 0 away from a kink. A kink or a jump of the
    value elsewhere within the steps makes either of them disagree with itself.
    """
    signs = {"both": (-1, 1), "right": (1,), "left": (-1,)}[side]
    changes = {sign * k: change(sign * k) for sign in signs for k in MULTIPLES}
    rounding = max(c.rounding / abs(k) for k, c in changes.items())
    before, after = ([changes[sign * k].value / (sign * k) for k in MULTIPLES] for sign in (signs[0], signs[-1]))
    jump = unsettled = 0.0
    if side == "both":
        middle, error, amplified = extrapolate([(a + b) / 2 for a, b in zip(before, after, strict=True)], (2, 4, 6))
        jump, unsettled, more = extrapolate([b - a for a, b in zip(before, after, strict=True)], (1, 3, 5))
        unsettled = 4 * unsettled + 2 * more * rounding
    else:
        middle, error, amplified = extrapolate(after, (1, 2, 3))
    error = max(4 * error + amplified * rounding, unsettled)
    if not np.isfinite(middle) or not np.isfinite(error):
        error = np.inf
    kinked = bool(error < np.inf and abs(jump) > unsettled + rtol * (abs(middle) + abs(jump) / 2))
    half = jump / 2 if kinked else 0.0
    hidden = max(c.hidden for c in changes.values())
    moved = any(c.moved for c in changes.values())
    return Slope(step, middle - half, middle + half, error, rounding, hidden, kinked, moved)


def typical_sizes(array: np.ndarray) -> np.ndarray:
    """For each element the size that its steps are relative to: its own, where that is not next to nothing."""
    sizes = np.abs(array)
    sizes[~np.isfinite(sizes)] = 1
    common = float(np.median(sizes[sizes > 0])) if sizes.any() else 1.0
    return np.where(sizes > 0, np.maximum(sizes, 1e-6 * common), min(common, 1.0))


def settle(
    trial: Callable[[np.ndarray], Slope | None],
    sizes: np.ndarray,
    largest: float,
    good: Callable[[Slope], bool],
    agrees: Callable[[Slope], bool],
) -> Slope | None:
    """The slope at the first of many step sizes that is good and agrees with the gradient; two that are good and
    disagree end the search. Else the best there is, None where no step is possible."""
    kept: list[Slope] = []
    disagreeing: list[Slope] = []
    for step in _steps(sizes, largest, kept):
        found = trial(step)
        if found is None:
            continue
        kept.append(found)
        if not good(found) or (found.kinked and found.largest_step > kept[0].largest_step):
            continue  # a kink seen from afar may be next to the element instead of on it
        if agrees(found) and found.moved == any(s.moved for s in kept):
            return found
        if found.moved:
            disagreeing.append(found)
            # Of a fast wave long steps see little; beside the gradients of other elements that can look like a zero.
            if sum(s.error < s.largest / 1000 for s in disagreeing) == 2:
                return found
    # Nothing moved at small steps what moved at larger ones: a maximum of others, if no larger step said otherwise.
    still = [s for s in kept if not s.moved and good(s)]
    return min(disagreeing or still or kept, key=lambda s: s.error / s.largest_step, default=None)


def _steps(sizes: np.ndarray, largest: float, found: list[Slope]) -> Iterator[np.ndarray]:
    """Smallest displacements, of trials from the likeliest to the last resort; `found` holds the slopes so far."""

    def displaced(factor: float, sizes: np.ndarray = sizes) -> np.ndarray:
        return np.minimum(FIRST * factor * sizes, largest) / MULTIPLES[0]

    yield displaced(1)
    curved = bool(found) and found[0].error > 100 * found[0].rounding
    for factors in (DOWN, UP) if curved or not found else (UP, DOWN):
        yield from map(displaced, factors)
    yield displaced(1, np.where(sizes > 0, np.maximum(sizes, 1), 0))
