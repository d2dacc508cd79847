"""What every operator that gathers must do: a test module makes a class of these for its operator."""

from __future__ import annotations

import inspect
import itertools
import math
from typing import Any

import numpy as np
import pytest

import pydeform
from pydeform.testing import gradcheck
from tests.cases.deform_conv2d import dtype_of
from tests.cases.gather import (
    CASES,
    DTYPES,
    EMPTY,
    FEW,
    PLACES,
    Problem,
    checked,
    expected,
    halves,
    make,
    run,
    run_backward,
    sent,
    solve_oracle,
)
from tests.conftest import Backend, assert_close, assert_same_bits, poison
from tests.test_deform_conv2d import LAYOUTS, Guard, read_only, unaligned

CPU = Backend("cpu")
NOT_FINITE = (math.nan, math.inf, -math.inf)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def both(backend: Any, problem: Problem, **of_backward: Any) -> tuple[Any, dict[str, Any]]:
    """Output and gradients, and nothing that was given is written to."""
    with Guard(problem.grad_output, *problem.numbers.values()):
        return run(backend, problem), run_backward(backend, problem, **of_backward)


def assert_results(problem: Problem, results: Any, want: Any, dtype: str) -> None:
    """Each gradient has the dtype of its own argument."""
    (output, grads), (want_output, want_grads) = results, want
    assert_close(output, want_output, dtype, "output")
    for name, array in problem.numbers.items():
        if want_grads[name] is None:
            assert grads[name] is None, name
        elif array.dtype.name == dtype:
            assert_close(grads[name], want_grads[name], dtype, f"grad of {name}")
        else:  # places in float32, whose gradient is made of products with halves and itself is not rounded to one
            assert_close(grads[name], want_grads[name], "float32", f"grad of {name}")


def assert_same_results(got: Any, want: Any, what: str = "") -> None:
    assert_same_bits(got[0], want[0], f"output {what}")
    for name, grad in want[1].items():
        if grad is None:
            assert got[1][name] is None, name
        else:
            assert_same_bits(got[1][name], grad, f"grad of {name} {what}")


def stay(array: np.ndarray, margin: float) -> np.ndarray:
    """Places are off the kinks already, and must not be moved by more than the margin."""
    return array


def signature(function: Any) -> str:
    parameters = inspect.signature(function).parameters.values()
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return str(inspect.Signature(bare)).strip("()")


class GatherTests:
    """`operator` is what the class that inherits tests, `arguments` the contract: names in this order, defaults."""

    operator: str
    arguments: str

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """`name` is every case that the operator has, `chosen` some, `first` one; `empty` those without results."""
        groups = {"name": CASES[self.operator], "chosen": FEW[self.operator], "first": FEW[self.operator][:1]}
        groups["empty"] = [name for name in EMPTY if name in CASES[self.operator]]
        for argument, names in groups.items():
            if argument in metafunc.fixturenames:
                metafunc.parametrize(argument, list(names))

    def make(self, name: str, *args: Any, **options: Any) -> Problem:
        return make(self.operator, name, *args, **options)

    # Against the oracle

    def test_against_the_oracle(self, backend, name):
        problem = self.make(name)
        assert_results(problem, both(backend, problem), expected(self.operator, name), "float64")

    @pytest.mark.parametrize("dtype", DTYPES[1:])
    def test_dtypes(self, backend, chosen, dtype):
        problem = self.make(chosen, dtype)
        assert_results(problem, both(backend, problem), expected(self.operator, chosen, dtype), dtype)

    @each_dtype
    def test_on_pixels_and_on_the_border(self, backend, first, dtype):
        """Where slopes jump, and at exactly -1 and the length: on maps whose sizes are powers of two all is exact."""
        problem = self.make(first, dtype, halves)
        want = expected(self.operator, first, dtype, halves)
        assert_results(problem, both(backend, problem), want, dtype)

    def test_all_cases_in_float32(self, backend, name):
        problem = self.make(name, "float32")
        assert_results(problem, both(backend, problem), expected(self.operator, name, "float32"), "float32")

    # Arguments

    def test_signature(self):
        forward, backward = getattr(pydeform, self.operator), getattr(pydeform, f"{self.operator}_backward")
        assert signature(forward) == self.arguments
        only_backward = ("" if "*" in self.arguments else ", *") + ", needs=None, deterministic=False"
        assert signature(backward) == f"grad_output, {self.arguments}{only_backward}"

    def test_arguments_by_position(self, backend, chosen):
        problem = self.make(chosen)
        forward, backward = getattr(pydeform, self.operator), getattr(pydeform, f"{self.operator}_backward")
        by_name = {**sent(backend, problem), **problem.options}
        positional = [
            by_name.pop(parameter.name, parameter.default)
            for parameter in inspect.signature(forward).parameters.values()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        got = backend.numpy(forward(*positional, **by_name))
        grads = backward(backend.array(problem.grad_output), *positional, **by_name)
        got_grads = {n: backend.numpy(grad) for n, grad in grads._asdict().items()}
        assert_same_results((got, got_grads), both(backend, problem))

    def test_needs(self, backend, chosen):
        """Each subset leaves the others None and changes no bit of what it computes."""
        problem = self.make(chosen, "float32")
        every = run_backward(backend, problem, deterministic=True)
        names = tuple(every)
        for needs in itertools.chain.from_iterable(itertools.combinations(names, k) for k in range(len(names) + 1)):
            got = run_backward(backend, problem, deterministic=True, needs=needs)
            for name, grad in every.items():
                if name in needs and grad is not None:
                    assert_same_bits(got[name], grad, f"{name} of needs={needs}")
                else:
                    assert got[name] is None, f"{name} of needs={needs}"

    def test_deterministic_changes_nothing_on_the_cpu(self, chosen):
        problem = self.make(chosen, "float32")
        assert_same_results(both(CPU, problem, deterministic=True), both(CPU, problem))

    # Arrays in odd places

    @pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
    def test_layouts_give_the_bits_of_a_copy(self, backend, chosen, dtype):
        problem = self.make(chosen, dtype)
        want = both(backend, problem, deterministic=True)
        for layout in LAYOUTS if backend.on_cpu else [f for f in LAYOUTS if f not in (unaligned, read_only)]:
            odd = problem.replaced(**{name: layout(a) for name, a in problem.numbers.items()})
            odd = odd._replace(grad_output=layout(problem.grad_output))
            assert_same_results(both(backend, odd, deterministic=True), want, layout.__name__)

    def test_zero_strides(self, backend, chosen):
        """All queries are the same, and all images."""
        problem = self.make(chosen, "float32")

        def flattened(name: str, a: np.ndarray) -> np.ndarray:
            return np.broadcast_to(a[:1, :1] if name not in (problem.data,) else a[:1], a.shape)

        odd = problem.replaced(**{name: flattened(name, a) for name, a in problem.numbers.items()})
        odd = odd._replace(grad_output=flattened("", problem.grad_output))
        assert 0 in odd.grad_output.strides
        flat = odd.replaced(**{name: a.copy() for name, a in odd.numbers.items()})
        flat = flat._replace(grad_output=odd.grad_output.copy())
        assert_same_results(both(backend, odd, deterministic=True), both(backend, flat, deterministic=True))

    @each_dtype
    def test_without_images_or_queries(self, backend, empty, dtype):
        """Empty results of the right shape; gradients of what there is are zeros, not absent."""
        problem = self.make(empty, dtype)
        output, grads = both(backend, problem)
        assert (output.shape, output.dtype.name) == (problem.grad_output.shape, dtype)
        assert 0 in output.shape
        for name, array in problem.numbers.items():
            assert (grads[name].shape, grads[name].dtype) == (array.shape, array.dtype), name
            assert not grads[name].any()

    def test_results_are_fresh_and_contiguous(self, backend, first):
        """The caller may write to a result without touching an argument or the next result."""
        problem = self.make(first)
        forward, backward = getattr(pydeform, self.operator), getattr(pydeform, f"{self.operator}_backward")
        arguments = {**sent(backend, problem), **problem.options}
        results = [forward(**arguments), forward(**arguments)]
        results += backward(backend.array(problem.grad_output), **arguments)
        assert all(r.flags.c_contiguous for r in results)
        if backend.on_cpu:
            assert all(r.flags.writeable for r in results)
            everything = [*results, *problem.numbers.values()]
            assert not any(np.shares_memory(a, b) for a, b in itertools.combinations(everything, 2))

    @each_dtype
    def test_tensors_give_the_numbers_of_arrays(self, first, dtype):
        torch = pytest.importorskip("torch", reason="torch is not installed")
        problem = self.make(first, dtype)

        def tensor(a: Any) -> Any:
            if a.dtype.kind == "f":
                return torch.from_numpy(a)
            return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)

        def same(got: Any, want: Any) -> None:
            assert type(got) is torch.Tensor and str(got.dtype) == f"torch.{dtype}"
            numbers = got.view(torch.int16).numpy().view(want.dtype) if got.dtype is torch.bfloat16 else got.numpy()
            assert_same_bits(numbers, want)

        forward, backward = getattr(pydeform, self.operator), getattr(pydeform, f"{self.operator}_backward")
        rest = problem.options | {n: a for n, a in problem.arrays.items() if n == "spatial_shapes"}
        theirs = {name: tensor(a) for name, a in problem.numbers.items()} | rest
        ours = {**problem.arrays, **problem.options}
        same(forward(**theirs), forward(**ours))
        grads = backward(tensor(problem.grad_output), **theirs)
        for got, want in zip(grads, backward(problem.grad_output, **ours), strict=True):
            same(got, want)

    # The same bits

    @pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
    def test_the_number_of_threads_changes_no_bit(self, threads, dtype):
        for name in CASES[self.operator]:
            if name not in EMPTY:
                problem = self.make(name, dtype)
                threads(1)
                want = both(CPU, problem)
                for count in (2, 3, 4):
                    threads(count)
                    assert_same_results(both(CPU, problem), want, f"of {name} on {count} threads")

    @pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
    def test_an_image_has_the_same_bits_in_any_batch(self, backend, chosen, dtype):
        problem = self.make(chosen, dtype)
        output, grads = both(backend, problem, deterministic=True)
        for b in range(len(output)):
            own = {name: None if grad is None else grad[b : b + 1] for name, grad in grads.items()}
            alone = both(backend, problem.of_image(b), deterministic=True)
            if backend.on_cpu:
                assert_same_results(alone, (output[b : b + 1], own), f"of image {b}")
            else:
                assert_same_bits(alone[0], output[b : b + 1])

    def test_results_do_not_depend_on_old_memory(self, monkeypatch, chosen):
        problem = self.make(chosen, "float32")
        want = both(CPU, problem)
        poison(monkeypatch)
        assert_same_results(both(CPU, problem), want)

    # What is not finite

    def places(self, problem: Problem) -> np.ndarray:
        """A mask of what says where samples are, in its argument."""
        return np.ones(problem.arrays[problem.place].shape, bool)

    def factors(self, problem: Problem) -> np.ndarray:
        """A mask of what samples are multiplied by, in the last argument."""
        return np.ones(list(problem.numbers.values())[-1].shape, bool)

    @each_dtype
    def test_places_that_are_not_finite(self, backend, chosen, dtype):
        """NaN gives NaN, and to both of its sample's coordinates; infinity and what no map reaches are outside."""
        problem = self.make(chosen, dtype)
        place, rng = problem.arrays[problem.place].copy(), np.random.default_rng(5)
        spots = np.flatnonzero(self.places(problem))
        values = [*NOT_FINITE, 65504.0, -65504.0]
        if dtype in ("float64", "float32"):
            values += [float(np.finfo(dtype).max), -1e30, 2.0**31, 2.0**63]
        chosen_spots = rng.choice(spots, min(len(spots) // 3, 2 * len(values)), replace=False)
        place.flat[chosen_spots] = np.resize(values, len(chosen_spots))
        problem = problem.replaced(**{problem.place: place})
        output, grads = want = solve_oracle(problem)
        assert 0 < np.isnan(output).sum() < output.size
        assert np.isfinite(grads[problem.data]).all()
        if grads[problem.place] is not None:
            assert 0 < np.isnan(grads[problem.place]).sum() < place.size
        assert_results(problem, both(backend, problem), want, dtype)

    def test_a_bad_pixel_stays_where_it_is_used(self, backend, chosen):
        """The first and last, where a clamped index would land, too: what is outside must not multiply them by 0."""
        problem = self.make(chosen)
        data = problem.arrays[problem.data].copy()
        problem.pixels(data)[[0, 3, -1], ..., ::2] = math.nan
        assert np.isnan(data).any()
        problem = problem.replaced(**{problem.data: data})
        output, grads = want = solve_oracle(problem)
        assert 0 < np.isnan(output).sum() < output.size
        results = both(backend, problem)
        assert_results(problem, results, want, "float64")
        assert np.isfinite(results[1][problem.data]).all()  # does not depend on the data
        assert np.isfinite(grads[problem.data]).all()

    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
    @pytest.mark.parametrize("value", NOT_FINITE, ids=str)
    @pytest.mark.parametrize("argument", ["data", "factor", "grad_output"])
    def test_one_number_that_is_not_finite(self, backend, chosen, argument, value):
        """It reaches what the equations say and no more; off the map a weight multiplies a sample of 0."""
        problem = self.make(chosen)
        for part in (0.1, 0.5, 0.9):
            if argument == "grad_output":
                spoilt = problem._replace(grad_output=problem.grad_output.copy())
                array, spots = spoilt.grad_output, np.arange(spoilt.grad_output.size)
            else:
                name = problem.data if argument == "data" else tuple(problem.numbers)[-1]
                spoilt = problem.replaced(**{name: problem.arrays[name].copy()})
                array = spoilt.arrays[name]
                spots = np.arange(array.size) if argument == "data" else np.flatnonzero(self.factors(problem))
            array.flat[spots[int(part * len(spots))]] = value
            output, grads = both(backend, spoilt)
            want, want_grads = solve_oracle(spoilt)
            for name, expect in {"output": want, **want_grads}.items():
                if expect is not None:  # a sum of infinite terms may be NaN where they are added up in another order
                    got, finite = output if name == "output" else grads[name], np.isfinite(expect)
                    np.testing.assert_array_equal(np.isfinite(got), finite, err_msg=name)
                    assert_close(np.where(finite, got, 0), np.where(finite, expect, 0), "float64", name)

    # Differences

    def test_gradcheck(self, backend, chosen):
        """Of all that has a gradient."""
        problem = self.make(chosen)
        forward, backward, arguments = checked(backend, problem)
        wrt = [name for name, grad in expected(self.operator, chosen)[1].items() if grad is not None]
        options: dict[str, Any] = {"kinks": {name: stay for name in wrt if name in (*PLACES, "offset_mask")}}
        report = gradcheck(
            forward, backward, arguments, wrt=wrt, kink_margin=0.002, elements=8, directions=1, **options
        )
        assert list(report.checked) == wrt
        assert not any(report.kinked.values())


class PlacedTests(GatherTests):
    """Of those whose places are arrays of their own."""

    @pytest.mark.parametrize("half", ["float16", "bfloat16"])
    def test_places_in_float32_beside_halves(self, backend, chosen, half):
        """Places that no half type tells apart; their gradient is float32 as well."""
        problem = self.make(chosen, half)
        rng = np.random.default_rng(4)
        moved = {
            name: self.make(chosen).arrays[name] + rng.integers(1, 4, problem.arrays[name].shape) * 2.0**-12
            for name in PLACES
            if name in problem.arrays
        }
        problem = problem.replaced(**{name: a.astype(np.float32) for name, a in moved.items()})
        want = solve_oracle(problem)
        rounded = {name: a.astype(dtype_of(half)) for name, a in moved.items()}
        if problem.options.get("method") != "discrete" and problem.options.get("mode") != "nearest":
            assert (solve_oracle(problem.replaced(**rounded))[0] != want[0]).any()
        assert_results(problem, both(backend, problem), want, half)
