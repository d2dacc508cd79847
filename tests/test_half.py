"""float16 to float32 and back: the bits of NumPy's own conversions, whatever the value."""

import ml_dtypes
import numpy as np
import pytest

import pydeform
from pydeform import _arrays
from pydeform.cpu.core import half
from tests.conftest import assert_same_bits

EVERY_HALF = np.arange(1 << 16, dtype=np.uint16).view(np.float16)


def floats(low_bits):
    """Every sign, exponent and upper mantissa of a float32, with these lower 13 bits, which rounding drops."""
    return (np.arange(1 << 19, dtype=np.uint32) << 13 | low_bits).astype(np.uint32).view(np.float32)


def numpys_rounding(values):
    with np.errstate(over="ignore", under="ignore"):
        return values.astype(np.float16)


def test_every_half_widens_exactly():
    assert_same_bits(_arrays.wide(EVERY_HALF), EVERY_HALF.astype(np.float32))


@pytest.mark.parametrize("low_bits", [0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF])
def test_rounding_is_numpys(low_bits):
    """Also of NaN, and on both sides of the greatest half and of every tie."""
    values = floats(low_bits)
    assert_same_bits(_arrays.rounded(values, np.dtype(np.float16)), numpys_rounding(values))


def test_ties_of_subnormal_halves():
    """Between two subnormals, multiples of 2**-24, lie ties and their neighbours on both sides."""
    ties = np.arange(2200, dtype=np.float32) * np.float32(2.0**-25)
    values = np.concatenate([np.nextafter(ties, np.float32(-1)), ties, np.nextafter(ties, np.float32(1))])
    values = np.concatenate([values, -values])
    assert_same_bits(_arrays.rounded(values, np.dtype(np.float16)), numpys_rounding(values))


def test_any_layout():
    """Strided, unaligned, read-only, scalar and empty arrays."""
    values = np.arange(120, dtype=np.float32).reshape(4, 5, 6) / 7
    unaligned = np.frombuffer(b"x" + values.tobytes(), np.float32, offset=1).reshape(values.shape)
    read_only = values.copy()
    read_only.flags.writeable = False
    for array in (values[::-2, 1:, ::3], values.T, unaligned, read_only, values[0, 0, 0], values[:0]):
        half = _arrays.rounded(array, np.dtype(np.float16))
        assert_same_bits(half, np.asarray(array).astype(np.float16))
        assert_same_bits(_arrays.wide(half.T), half.T.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, ml_dtypes.bfloat16])
def test_other_dtypes_are_numpys_business(dtype):
    values = np.random.default_rng(0).standard_normal((3, 4)).astype(dtype)
    assert_same_bits(_arrays.rounded(_arrays.wide(values), np.dtype(dtype)), values)
    assert (_arrays.wide(values) is values) == (values.itemsize > 2)


def test_operators_convert_so(monkeypatch):
    """NumPy's conversion takes 50 to 200 times as long for each subnormal, which small gradients are."""
    calls = []

    def counted(name, convert):
        monkeypatch.setattr(half, name, lambda a, b: (calls.append((name, a.size)), convert(a, b)))

    counted("widen", half.widen)
    counted("round_to_half", half.round_to_half)
    x, weight = np.full((1, 2, 5, 6), 1e-4, np.float16), np.full((3, 2, 3, 3), 1e-3, np.float16)
    y = pydeform.conv2d(x, weight)
    assert calls == [("widen", x.size), ("widen", weight.size), ("round_to_half", y.size)]
    assert_same_bits(y, np.full(y.shape, np.float16(18 * float(x[0, 0, 0, 0]) * float(weight[0, 0, 0, 0]))))
