"""Compare the gradient of one argument with differences."""

from __future__ import annotations

import numpy as np

from pydeform.testing._calls import EPS, ROUNDING, Calls, at
from pydeform.testing._differences import Slope, settle, slope, typical_sizes

PROBES = 48  # groups of elements compared along one direction, once the whole of it does not agree


class Comparison:
    """What differences say of the gradient of one argument, and which elements they have said it of."""

    def __init__(self, calls: Calls, name: str, grad: np.ndarray, largest: float, side: str, rtol: float) -> None:
        self.calls, self.name, self.largest, self.side, self.rtol = calls, name, largest, side, rtol
        self.array: np.ndarray = calls.arguments[name]
        self.grad = np.asarray(grad).ravel()
        self.sizes = typical_sizes(self.array.ravel())
        self.finite = np.isfinite(self.array).ravel()
        self.usable = np.isfinite(self.grad) & self.finite
        self.covered = np.zeros(self.array.size, bool)
        self.kinked = np.zeros(self.array.size, bool)
        # The slope beside which errors count as small. Until slopes are measured the claimed ones guide the search.
        self.scale = self._or_one(float(np.abs(self.grad[self.usable]).max(initial=0)))

    def index(self, i: int) -> tuple[int, ...]:
        return tuple(map(int, np.unravel_index(i, self.array.shape)))

    def compare_elements(self, chosen: np.ndarray) -> None:
        self._look_at_strange(max(1, chosen.size))
        slopes = {int(i): self._slope(np.array([i]), np.ones(1)) for i in chosen[self.usable[chosen]]}
        measured = [s.largest / s.largest_step for s in slopes.values() if s and s.error < s.largest / 8]
        if slopes:  # from here on measured, not claimed: a wrong gradient may be of any size
            self.scale = self._or_one(max(measured, default=0.0))
        for i, found in slopes.items():
            sure = found is None or self._certain(found)
            self._judge_element(i, found if sure else self._slope(np.array([i]), np.ones(1)))

    def compare_direction(self, rng: np.random.Generator) -> None:
        """Compare along a direction to the right, and along parts of it where the whole does not agree.

        Elements on kinks may each follow a rule of their own, so there only a single element can be called wrong.
        """
        weights = rng.uniform(0.25, 1, self.array.size) * self._leveled()
        open_groups: list[tuple[np.ndarray, Slope | None]] = []
        whole = np.flatnonzero(self.usable & ~self.kinked)
        if whole.size:
            open_groups.append((rng.permutation(whole), None))
        for _ in range(PROBES):
            if not open_groups:
                return
            group, _parent = open_groups.pop()
            found = self._slope(group, weights[group])
            if found is not None and self._certain(found) and self._agrees(found):
                self.covered[group] = True
            elif group.size == 1:
                self._judge_element(int(group[0]), found)
            else:
                open_groups += [(half, found) for half in np.array_split(group, 2)]
        for _, parent in open_groups:
            if parent is not None and not (parent.kinked and self._certain(parent)):
                self._fail(f"{self.name} along a random direction", parent, 1.0)

    def _leveled(self) -> np.ndarray:
        """Smaller steps for elements of large gradients, whose allowed errors would cover those of the others."""
        terms = np.where(self.usable, np.abs(self.grad), 0) * self.sizes
        common = float(np.median(terms[terms > 0])) if terms.any() else 1.0
        return np.maximum(common / np.maximum(terms, common), 2.0**-20)

    def _look_at_strange(self, count: int) -> None:
        """A gradient may be infinite or NaN only where an output is, and that output must be of this element."""
        unknown = any(np.isnan(output).any() for output in self.calls.outputs)  # NaN stays NaN, whatever moves
        for i in np.flatnonzero(~np.isfinite(self.grad))[:count]:
            if self.calls.all_finite or not (unknown or not self.finite[i]):
                found = self._slope(np.array([i]), np.ones(1)) if self.finite[i] else None
                if found is None or found.error < np.inf or self.calls.all_finite:
                    numeric = "unknown" if found is None else f"{found.right / found.largest_step:.9g}"
                    raise AssertionError(
                        f"gradcheck: {at(self.name, self.index(i))}: analytic {self.grad[i]}, numeric {numeric}; "
                        "no output that is not finite depends on it"
                    )

    def _or_one(self, slope: float) -> float:
        """Where no output depends on the argument, gradients are rounding: no derivative of 1 must hide then."""
        outputs = self.calls.size
        rounding = 64 * EPS * outputs / float(np.median(self.sizes)) if self.sizes.size else 0.0
        return slope if slope > rounding else self.calls.largest_grad_output

    def _judge_element(self, i: int, found: Slope | None) -> None:
        if found is None:  # no step of any size is a number
            return
        if not self._certain(found) or not self._agrees(found):
            self._fail(at(self.name, self.index(i)), found, found.largest_step)
        self.covered[i] = True
        self.kinked[i] = found.kinked

    def _slope(self, group: np.ndarray, weights: np.ndarray) -> Slope | None:
        sizes = np.zeros(self.array.size)
        sizes[group] = weights * self.sizes[group]

        def trial(wanted: np.ndarray) -> Slope | None:
            start = self.array.ravel()[group]
            with np.errstate(all="ignore"):
                exact = (start + wanted[group]) - start  # what can be added without rounding
            if not np.isfinite(exact * 8).all() or not exact.all():
                return None
            step = np.zeros(self.array.size)
            step[group] = exact
            shaped = step.reshape(self.array.shape)
            return slope(lambda k: self.calls.change(self.name, k * shaped), step, self.side, self.rtol)

        return settle(trial, sizes, self.largest, lambda s: self._certain(s, self.rtol / 4), self._agrees)

    def _size(self, found: Slope) -> float:
        """What an error along these steps is relative to."""
        return max(found.largest, self._claimed(found), self.scale * float(found.step.sum()))

    def _claimed(self, found: Slope) -> float:
        """Along several elements their slopes may cancel. A single one is measured, and its claim does not count."""
        return float(np.abs(self._terms(found)).sum()) if np.count_nonzero(found.step) > 1 else 0.0

    def _terms(self, found: Slope) -> np.ndarray:
        return np.where(found.step > 0, self.grad, 0) * found.step

    def _certain(self, found: Slope, rtol: float | None = None) -> bool:
        return max(found.error, found.hidden) <= (self.rtol if rtol is None else rtol) * self._size(found)

    def _allowed(self, found: Slope) -> float:
        own = self.rtol * max(found.largest, self._claimed(found))
        return max(own, ROUNDING * self.scale * float(found.step.sum())) + found.error

    def _agrees(self, found: Slope) -> bool:
        analytic, allowed = float(self._terms(found).sum()), self._allowed(found)
        if np.count_nonzero(found.step) == 1:
            low, high = sorted((found.left, found.right))
            return low - allowed <= analytic <= high + allowed
        rules = (found.left, found.right, (found.left + found.right) / 2)
        return any(abs(analytic - value) <= allowed for value in rules)

    def _fail(self, where: str, found: Slope, unit: float) -> None:
        analytic, allowed = float(self._terms(found).sum()) / unit, self._allowed(found) / unit
        left, right = found.left / unit, found.right / unit
        numeric = f"{left:.9g} left and {right:.9g} right" if found.kinked else f"{right:.9g}"
        values = f"{where}: analytic {analytic:.9g}, numeric {numeric}"
        if self._certain(found):
            raise AssertionError(f"gradcheck: {values}, allowed error {allowed:.2g}")
        limit = self.rtol * self._size(found)
        if max(found.hidden, found.rounding) > limit:
            size = max(found.hidden, found.rounding) / unit
            reason = f"rounding of the outputs hides {size:.2g}"
        elif found.error < np.inf:
            reason = f"differences do not settle, by {found.error / unit:.2g}"
        else:
            reason = "differences do not settle, the value jumps here or is not finite"
        raise AssertionError(f"gradcheck: cannot verify {values}; {reason} where {limit / unit:.2g} is allowed")
