"""deform_conv1d and its backward against the oracle, against differences, and on awkward arrays."""

from tests.cases.conv_tests import DeformTests


class TestDeformConv1d(DeformTests):
    operator = "deform_conv1d"
