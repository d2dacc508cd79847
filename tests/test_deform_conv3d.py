"""deform_conv3d and its backward against the oracle, against differences, and on awkward arrays."""

from tests.cases.conv_tests import DeformTests


class TestDeformConv3d(DeformTests):
    operator = "deform_conv3d"
