"""Operators tile by tile: what they give is what the whole gives, and no tile reads more than it needs."""

import itertools

import ml_dtypes
import numpy as np
import pytest

import pydeform
from pydeform import _selfcheck, tiling
from pydeform._operators import operators
from tests.conftest import assert_close, assert_same_bits

FAR = 4  # no problem moves samples further
NAMES = sorted(tiling.TILED)


def moved(name, far=FAR):
    return {"max_offset": far} if tiling.moved_by(operators()[name]) else {}


def test_all_convolutions_and_warp_are_tiled():
    assert {name for name in operators() if "conv" in name} | {"warp"} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_tiles_equal_the_whole(name):
    """Problems are exact in float64 up to sums: no rounding of coordinates."""
    for problem, tile_size in itertools.product(_selfcheck.problems(name), (2, 5)):
        given = {**problem.arrays, **problem.options}
        more = {**moved(name), "tile_size": tile_size}
        whole = getattr(pydeform, name)(**given)
        assert_close(getattr(tiling, name)(**given, **more), whole, "float64")
        grads = getattr(pydeform, f"{name}_backward")(problem.grad_output, **given)
        tiled = getattr(tiling, f"{name}_backward")(problem.grad_output, **given, **more)
        assert type(tiled) is type(grads)
        for key, want in grads._asdict().items():
            assert_close(getattr(tiled, key), want, "float64", key)
