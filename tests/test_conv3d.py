"""conv3d and its backward against the oracle, differences and PyTorch."""

import pytest

from tests.cases.conv_tests import ConvTests


class TestConv3d(ConvTests):
    operator = "conv3d"

    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    def test_pytorch(self, backend, dtype):
        self.compare_with_pytorch(backend, dtype)
