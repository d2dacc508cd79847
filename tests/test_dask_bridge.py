"""Every operator on dask arrays: what comes out is what the operator gives for NumPy's."""

import itertools

import numpy as np
import pytest

import pydeform
from pydeform import _selfcheck, tiling
from pydeform._operators import operators
from tests.conftest import assert_close, assert_same_bits

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")
bridge = pytest.importorskip("pydeform.dask")

TABLE = operators()


@pytest.fixture(autouse=True)
def one_thread():
    with dask.config.set(scheduler="synchronous"):
        yield


def chunked(operator, arrays, queries=2):
    """One image or box in each chunk, two queries; arrays that all need are NumPy's."""

    def chunks(key, array):
        return (1, *([queries] if "query" in bridge._apart(operator, key) else []), *array.shape[2:])[: array.ndim]

    return {
        key: array
        if array is None or key in operator.shared
        else da.from_array(array, (*chunks(key, array), *array.shape[len(chunks(key, array)) :]))
        for key, array in arrays.items()
    }


def test_every_operator_is_there():
    for name in TABLE:
        assert callable(getattr(bridge, name)) and callable(getattr(bridge, f"{name}_backward"))


@pytest.mark.parametrize("name", TABLE)
def test_chunks_equal_the_whole(name):
    operator, problem = TABLE[name], _selfcheck.problem(name)
    lazy = chunked(operator, {"grad_output": problem.grad_output, **problem.arrays})
    grad_output = lazy.pop("grad_output")
    y = getattr(bridge, name)(**lazy, **problem.options)
    assert isinstance(y, da.Array) and len(y.chunks[0]) == len(problem.grad_output)
    assert_same_bits(y.compute(), operator.forward(**problem.arrays, **problem.options))
    grads = getattr(bridge, f"{name}_backward")(grad_output, **lazy, **problem.options)
    want = operator.backward(problem.grad_output, **problem.arrays, **problem.options)
    assert type(grads) is type(want)
    got = dask.compute(grads)[0]
    for key, grad in want._asdict().items():
        if grad is None:
            assert getattr(got, key) is None
        else:
            assert getattr(grads, key).shape == grad.shape and getattr(grads, key).dtype == grad.dtype
            assert_close(getattr(got, key), grad, "float64", key)
