"""dcnv4 and its backward against the oracle, against differences, and on awkward arrays."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.cases.gather import DCN, make
from tests.cases.gather_tests import GatherTests, assert_same_results, both, each_dtype
from tests.conftest import assert_same_bits
from tests.reference import gather as reference
from tests.test_dcnv3 import ARGUMENTS

OPERATOR = "dcnv4"


class TestDcnv4(GatherTests):
    operator = OPERATOR
    arguments = f"input, offset_mask, {ARGUMENTS}"

    def places(self, problem):
        return self.parts(problem)[0]

    def factors(self, problem):
        return self.parts(problem)[1]

    def parts(self, problem):
        """Which numbers are offsets, which are masks."""
        options = {name: problem.options[name] for name in ("kernel_size", "groups", "remove_center")}
        offset, mask = map(np.ones_like, reference.unpack(problem.arrays["offset_mask"], **options))
        pairs = (offset, 0 * mask), (0 * offset, mask)
        return [reference.pack(*pair, options["groups"]).astype(bool) for pair in pairs]


@pytest.mark.parametrize("name", ["kernel_3", "kernel_5", "scale_2", "one_pixel"])
@each_dtype
def test_the_rest_of_a_row_is_not_read(backend, name, dtype):
    """Whatever it is; its gradient is 0."""
    problem = make(OPERATOR, name, dtype)
    case, want = DCN[name], both(backend, problem, deterministic=True)
    used = case.groups * case.points * 3
    packed = problem.arrays["offset_mask"].copy()
    assert used < packed.shape[-1] == -(-used // 8) * 8
    for number in (math.nan, math.inf, 0):
        packed[..., used:] = number
        got = both(backend, problem.replaced(offset_mask=packed), deterministic=True)
        assert_same_results(got, want)
        assert not got[1]["offset_mask"][..., used:].any()


@pytest.mark.parametrize("name", [name for name in DCN if name != "batch_0"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bits_of_dcnv3(backend, name, dtype):
    """The same numbers in another order."""
    problem = make(OPERATOR, name, dtype)
    options = {key: problem.options[key] for key in ("kernel_size", "groups", "remove_center")}
    offset, mask = reference.unpack(problem.arrays["offset_mask"], **options)
    apart = problem._replace(
        operator="dcnv3", arrays={"input": problem.arrays["input"], "offset": offset, "mask": mask}
    )
    output, grads = both(backend, problem, deterministic=True)
    want, want_grads = both(backend, apart, deterministic=True)
    assert_same_bits(output, want)
    assert_same_bits(grads["input"], want_grads["input"])
    packed = reference.pack(want_grads["offset"], want_grads["mask"], options["groups"])
    assert_same_bits(grads["offset_mask"], packed)
