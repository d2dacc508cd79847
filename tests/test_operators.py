"""The table of operators that bridges are made from: it agrees with what the operators do."""

import inspect

import numpy as np
import pytest

import pydeform
from pydeform import _selfcheck
from pydeform._operators import operators

TABLE = operators()


def test_every_operator_is_in_the_table():
    assert list(TABLE) == _selfcheck.operators()


@pytest.mark.parametrize("name", TABLE)
def test_problems_bind_and_have_the_shape_that_comes_out(name):
    operator = TABLE[name]
    for problem in _selfcheck.problems(name):
        arrays, options = operator.bind((), {**problem.arrays, **problem.options})
        assert operator.result_shape(arrays, options) == operator.forward(**arrays, **options).shape


@pytest.mark.parametrize("padding", ["same", 2, (1, 0), ((0, 1), (2, 0))], ids=str)
def test_shape_of_a_convolution_with_any_padding(padding):
    operator = TABLE["deform_conv2d"]
    input, weight = np.ones((2, 2, 9, 10)), np.ones((3, 2, 3, 2))
    options = {"stride": (1, 2), "padding": padding, "dilation": (1, 2)}
    _, _, *out = operator.result_shape(*operator.bind((input, None, weight), options))
    offset = np.zeros((2, 12, *out))
    assert pydeform.deform_conv2d(input, offset, weight, **options).shape == (2, 3, *out)


@pytest.mark.parametrize("name", TABLE)
def test_a_call_without_a_batch_has_the_other_sizes(name):
    operator = TABLE[name]
    for problem in _selfcheck.problems(name):
        whole = {"grad_output": problem.grad_output, **problem.arrays}
        nothing, options = operator.without_batch(name, whole, problem.options)
        grads = operator.backward(**nothing, **options)._asdict()
        del nothing["grad_output"]
        assert operator.forward(**nothing, **options).shape == (0, *problem.grad_output.shape[1:])
        for key, grad in grads.items():
            if grad is not None:
                assert grad.shape[1:] == problem.arrays[key].shape[1:]
    with pytest.raises(ValueError, match=r"here: .* must have the first axis of .*, \d, got shape"):
        operator.without_batch("here", {**whole, "grad_output": problem.grad_output[1:]}, problem.options)


@pytest.mark.parametrize("name", TABLE)
def test_gradients_that_there_are(name):
    """Fixed: never, on request: only when asked for; all others always, and those of what is absent never."""
    operator = TABLE[name]
    for problem in _selfcheck.problems(name):
        grads = operator.backward(problem.grad_output, **problem.arrays, **problem.options)
        present = {key for key, grad in grads._asdict().items() if grad is not None}
        given = {key for key, array in problem.arrays.items() if array is not None}
        if problem.options.get("method") == "discrete":  # samples are pixels: places have no slope
            given -= {"sampling_locations", "sampling_offsets", "reference_points"}
        assert present == given - operator.fixed - operator.on_request
    if operator.on_request:
        needs = tuple(operator.on_request)
        grads = operator.backward(problem.grad_output, **problem.arrays, **problem.options, needs=needs)
        assert all(getattr(grads, key) is not None for key in needs)


@pytest.mark.parametrize("name", TABLE)
def test_arguments_of_backward_are_those_of_forward(name):
    operator = TABLE[name]
    first, *others = inspect.signature(operator.backward).parameters
    assert first == "grad_output"
    assert tuple(key for key in others if key not in ("needs", "deterministic")) == operator.arguments
    assert {*operator.arrays, *operator.options} == set(operator.arguments)


@pytest.mark.parametrize("name", TABLE)
def test_results_are_computed_apart(name):
    """A part of the results comes from that part of all arrays but the shared ones."""
    operator = TABLE[name]
    problem = _selfcheck.problem(name)
    whole = operator.forward(**problem.arrays, **problem.options)
    part = {key: a if key in operator.shared else a[1:] for key, a in problem.arrays.items()}
    options = dict(problem.options)
    if name == "affine_grid":
        options["size"] = (options["size"][0] - 1, *options["size"][1:])
    np.testing.assert_array_equal(operator.forward(**part, **options), whole[1:])
