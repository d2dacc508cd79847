"""Call forward and backward, and look at what they return and at what they do to the arrays that they are given."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from pydeform.testing._differences import Change

EPS = float(np.finfo(float).eps)
ROUNDING = 2.0**-38  # of the largest gradient, allowed to every element: the rounding of sums in backward


def at(name: str, index: Iterable[Any]) -> str:
    """`name` with an index, as an error names an element; nothing to index in an array of no axes."""
    listed = ", ".join(map(str, index))
    return f"{name}[{listed}]" if listed else name


def norm(array: np.ndarray) -> float:
    """The Euclidean norm, of numbers whose squares may overflow."""
    largest = float(np.abs(array).max(initial=0))
    return largest * float(np.linalg.norm(array / largest)) if 0 < largest < np.inf else largest


class Calls:
    """forward and backward at one point, with outputs, grad_outputs and changes of the loss sum(output * grad_output).

    Outputs that are not finite take no part in the loss: their grad_output is 0.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        backward: Callable[..., Any],
        arguments: dict[str, Any],
        rng: np.random.Generator,
    ) -> None:
        self._forward, self._backward, self.arguments = forward, backward, arguments
        returned = _guarded("forward", forward, (), arguments)
        self.several = isinstance(returned, tuple)
        self.outputs = tuple(array.copy() for array in _outputs(returned))  # forward may reuse its memory
        self.finite = tuple(np.isfinite(array) for array in self.outputs)
        self.all_finite = all(finite.all() for finite in self.finite)
        self.grad_outputs = self.random_grad_outputs(rng)
        self.largest_grad_output = max((float(np.abs(g).max(initial=0)) for g in self.grad_outputs), default=0.0)

        terms = [np.where(f, o, 0) * g for o, f, g in zip(self.outputs, self.finite, self.grad_outputs, strict=True)]
        self.size = math.hypot(*(norm(term) for term in terms))  # of the loss, had its terms one sign

    def random_grad_outputs(self, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        return tuple(np.where(finite, rng.standard_normal(finite.shape), 0) for finite in self.finite)

    def forward(self, arguments: dict[str, Any]) -> tuple[np.ndarray, ...]:
        outputs = _outputs(_guarded("forward", self._forward, (), arguments))
        shapes, expected = [array.shape for array in outputs], [array.shape for array in self.outputs]
        if shapes != expected:
            raise AssertionError(f"gradcheck: forward gave shapes {expected} at first, then {shapes}")
        return outputs

    def backward(self, grad_outputs: tuple[np.ndarray, ...], arguments: dict[str, Any]) -> dict[str, Any]:
        given = grad_outputs if self.several else grad_outputs[0]
        returned = _guarded("backward", self._backward, (given,), arguments)
        if not isinstance(returned, Mapping) and not hasattr(returned, "_asdict"):
            raise AssertionError(
                f"gradcheck: backward must return a NamedTuple or a mapping, got {type(returned).__name__}"
            )
        return dict(returned) if isinstance(returned, Mapping) else returned._asdict()

    def change(self, name: str, displacement: np.ndarray) -> Change:
        """What the loss does if `displacement` is added to an argument."""
        with np.errstate(all="ignore"):  # of displacements that leave the function's domain
            news = self.forward({**self.arguments, name: self.arguments[name] + displacement})
            value = rounding = hidden = 0.0
            moved = False
            for new, old, finite, grad in zip(news, self.outputs, self.finite, self.grad_outputs, strict=True):
                changed = (new != old) & ~(np.isnan(new) & np.isnan(old))
                if (changed & ~finite).any():
                    value = np.nan
                value += float(np.sum((new - old) * grad, where=finite))
                sizes = np.where(finite, np.abs(grad * old), 0)
                rounding = math.hypot(rounding, EPS * norm(sizes[changed & finite]))
                hidden = math.hypot(hidden, EPS * norm(sizes))
                moved = moved or bool(changed.any())
        return Change(value, rounding, hidden, moved)


def _outputs(returned: Any) -> tuple[np.ndarray, ...]:
    outputs = returned if isinstance(returned, tuple) else (returned,)
    for number, output in enumerate(outputs):
        if not isinstance(output, (np.ndarray, float)) or np.asarray(output).dtype != np.float64:
            where = f"output {number}" if isinstance(returned, tuple) else "the output"
            raise AssertionError(f"gradcheck: {where} must be a float64 NumPy array, got {_kind(output)}")
    return tuple(map(np.asarray, outputs))


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"{name} of {value.dtype}" if hasattr(value, "dtype") and hasattr(value, "shape") else name


def _parts(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The arrays in a value, whatever holds them, and the lists and dicts that could be written to themselves."""
    if isinstance(value, np.ndarray):
        yield name, value
    elif isinstance(value, (list, dict)):
        yield name, value
    if isinstance(value, (list, tuple)):
        for number, part in enumerate(value):
            yield from _parts(f"{name}[{number}]", part)
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _parts(f"{name}[{key!r}]", part)


def _state(value: Any) -> Any:
    """All that a call could change of a value, of an array in the order of memory and with what lies around it."""
    if not isinstance(value, np.ndarray):
        return repr(value)
    root = value
    while isinstance(root.base, np.ndarray):
        root = root.base
    around = root.tobytes("A") if root.nbytes <= 64 * value.nbytes else b""  # of a part of something large, not all
    return value.shape, value.strides, value.dtype, value.flags.writeable, value.tobytes(), around


def _guarded(which: str, function: Callable[..., Any], given: tuple[Any, ...], arguments: dict[str, Any]) -> Any:
    """Call a function, and see that it leaves everything alone that it is given."""
    every = [part for value in given for part in _parts("grad_output", value)]
    every += [part for name, value in arguments.items() for part in _parts(name, value)]
    before = [_state(value) for _, value in every]
    returned = function(*given, **arguments)
    for (name, value), state in zip(every, before, strict=True):
        if _state(value) != state:
            raise AssertionError(f"gradcheck: {which} wrote to {name}, which it must leave as it is")
    return returned


def names_to_check(arguments: Mapping[str, Any], wrt: Iterable[str] | None) -> list[str]:
    """The arguments that need a gradient: those of `wrt`, or every array of floats (bfloat16 is of NumPy's kind V)."""
    names = list(arguments if wrt is None else wrt)
    if wrt is None:
        names = [n for n in names if isinstance(arguments[n], np.ndarray) and arguments[n].dtype.kind in "fcV"]
    for name in names:
        value = arguments.get(name)
        if not isinstance(value, np.ndarray) or value.dtype != np.float64:
            got = _kind(value) if name in arguments else "no such name"
            hint = "; wrt lists the arguments to check" if wrt is None else ""
            raise ValueError(f"gradcheck: {name} must be a float64 NumPy array among the arguments, got {got}{hint}")
    if not names:
        raise ValueError(f"gradcheck: nothing to check; no array of floats among {', '.join(arguments) or 'nothing'}")
    return names


def gradients(calls: Calls, names: list[str], complete: bool) -> dict[str, np.ndarray]:
    """What backward returns for each argument to check, and for no other one if these are the `complete` list."""
    grads = calls.backward(calls.grad_outputs, calls.arguments)
    hint = "; wrt lists the arguments that have one" if complete else ""
    for name in names:
        if grads.get(name) is None:
            raise AssertionError(f"gradcheck: backward gave no gradient for {name}{hint}")
        look_at_kind(name, grads[name], calls.arguments[name])
    for name in grads if complete else ():
        if name not in names and grads[name] is not None:
            raise AssertionError(
                f"gradcheck: backward gave a gradient for {name}, which is no array of floats among the arguments{hint}"
            )
    found = {name: grads[name] for name in names}
    _look_at_finite(calls, found)
    return found


def look_at_kind(name: str, grad: Any, argument: np.ndarray) -> None:
    if type(grad) is not np.ndarray and not (type(grad) is np.float64 and not argument.ndim):
        raise AssertionError(f"gradcheck: gradient of {name} must be a NumPy array, got {_kind(grad)}")
    if grad.shape != argument.shape:
        raise AssertionError(f"gradcheck: gradient of {name} must have shape {argument.shape}, got {grad.shape}")
    if grad.dtype != argument.dtype:
        raise AssertionError(f"gradcheck: gradient of {name} must be float64, got {grad.dtype}")


def _look_at_finite(calls: Calls, grads: dict[str, np.ndarray]) -> None:
    """An output that is not finite must show in a gradient (the reverse needs differences)."""
    if calls.all_finite or not all(np.isfinite(grad).all() for grad in grads.values()):
        return
    for output, finite in zip(calls.outputs, calls.finite, strict=True):
        for index in np.argwhere(~finite)[:1]:
            raise AssertionError(
                f"gradcheck: cannot verify: {at('output', index)} is {output[tuple(index)]}, every gradient is finite"
            )


class Repeated:
    """Calls of backward after the first one, whose results must follow from the first one's."""

    def __init__(self, calls: Calls, grads: dict[str, np.ndarray], rtol: float) -> None:
        self.calls, self.grads, self.rtol = calls, grads, rtol
        self.first = {name: np.array(grad) for name, grad in grads.items()}
        self.again: dict[str, np.ndarray] = {}

    def look_at_memory(self, rng: np.random.Generator) -> None:
        """No gradient may be memory that the caller, another gradient or another call uses for something else."""
        given: Any = self.calls.grad_outputs if self.calls.several else self.calls.grad_outputs[0]
        parts = list(_parts("grad_output", given))
        parts += [part for name, value in self.calls.arguments.items() for part in _parts(name, value)]
        others = [(name, array) for name, array in parts if isinstance(array, np.ndarray)]
        for name, grad in self.grads.items():
            for other, array in others:
                if np.shares_memory(grad, array):
                    raise AssertionError(f"gradcheck: gradient of {name} shares memory with {other}")
            repeats = any(s == 0 and n > 1 for s, n in zip(grad.strides, grad.shape, strict=True))
            if grad.size and grad.flags.writeable and repeats:
                raise AssertionError(f"gradcheck: elements of the gradient of {name} share memory with each other")
            others.append((f"the gradient of {name}", grad))
        arguments = self.calls.arguments
        self._look_at_precision(rng)  # and displaces what a backward may keep of its last forward
        again = self.calls.backward(self.calls.grad_outputs, arguments)
        for name, grad in self.grads.items():
            look_at_kind(name, again.get(name), arguments[name])
            if np.shares_memory(grad, again[name]):
                raise AssertionError(f"gradcheck: gradient of {name} is the same memory in two calls of backward")
            self.again[name] = np.asarray(again[name])

    def _look_at_precision(self, rng: np.random.Generator) -> None:
        arguments = self.calls.arguments
        displaced = {
            name: arguments[name] * (1 + rng.uniform(0.5, 1, arguments[name].shape) / 128) for name in self.grads
        }
        with np.errstate(all="ignore"):
            for new, old in zip(self.calls.forward({**arguments, **displaced}), self.calls.outputs, strict=True):
                moved = new[(new != old) & np.isfinite(new)]
                if np.unique(moved).size > 2 and (moved == moved.astype(np.float32)).all():
                    raise AssertionError("gradcheck: cannot verify: the outputs are no more precise than float32")

    def look_at_rules(self, scales: Mapping[str, float], rng: np.random.Generator) -> None:
        """backward is linear in grad_output, and neither function depends on strides or on earlier calls.

        `scales`: the largest gradient that differences measured, beside which errors count as small.
        """
        self.scales = scales
        calls, given = self.calls, self.calls.grad_outputs
        for name, grad in self.again.items():
            why = "backward, called again with the same arguments,"
            _same(name, why, grad, self.first[name], ROUNDING * scales[name])
        for factor in (-(2.0**20), 2.0**-20, 0.0):
            why = f"backward is not linear in grad_output, {factor:.9g} of which"
            scaled = {name: grad * factor for name, grad in self.first.items()}
            self._expect(why, tuple(g * factor for g in given), scaled, size=abs(factor))
        more = calls.random_grad_outputs(rng)
        other = calls.backward(more, calls.arguments)
        total = tuple(a + b for a, b in zip(given, more, strict=True))
        why = "backward is not linear in grad_output, a sum of which"
        self._expect(why, total, {name: grad + other[name] for name, grad in self.first.items()})
        scattered = {name: _scattered(calls.arguments[name]) for name in self.grads}
        self._expect("backward, for other strides of grad_output,", tuple(map(_scattered, given)), self.first)
        self._expect("backward, for other strides of its arguments,", given, self.first, changed=scattered)
        for arguments, exact, why in (({}, 0, "called again"), (scattered, 1, "for other strides of its arguments")):
            for new, old in zip(calls.forward({**calls.arguments, **arguments}), calls.outputs, strict=True):
                _same("output", f"forward, {why},", new, old, exact * ROUNDING * _largest(old))
        for name, grad in self.grads.items():
            _same(name, "backward, called again, wrote to what it had returned, which", grad, self.first[name], 0)

    def _expect(
        self,
        why: str,
        given: tuple[np.ndarray, ...],
        expected: dict[str, np.ndarray],
        *,
        size: float = 1.0,
        changed: Mapping[str, np.ndarray] = MappingProxyType({}),
    ) -> None:
        found = self.calls.backward(given, {**self.calls.arguments, **changed})
        for name, want in expected.items():
            look_at_kind(name, found.get(name), want)
            tolerance = np.maximum(self.rtol * np.abs(want), ROUNDING * size * self.scales[name])
            _same(name, why, np.asarray(found[name]), want, tolerance)


def _largest(array: np.ndarray) -> float:
    return float(np.abs(array).max(initial=0, where=np.isfinite(array)))


def _same(name: str, why: str, got: np.ndarray, want: np.ndarray, tolerance: Any) -> None:
    with np.errstate(invalid="ignore"):
        same = (np.abs(got - want) <= tolerance) | (got == want) | (np.isnan(got) & np.isnan(want))
    for index in np.argwhere(~same)[:1]:
        values = f"{float(got[tuple(index)]):.9g} where {float(want[tuple(index)]):.9g}"
        raise AssertionError(f"gradcheck: {at(name, index)}: {why} gives {values} was expected")


def _scattered(array: np.ndarray) -> np.ndarray:
    """The same values with axes in the other order in memory, backwards, and NaN between them."""
    memory = np.full([2 * length + 1 for length in reversed(array.shape)], np.nan)
    view = memory.T[(Ellipsis,) + (slice(-2, None, -2),) * array.ndim]
    view[...] = array
    return view
