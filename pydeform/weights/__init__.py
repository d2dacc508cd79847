"""Weights that people have: state dicts of other systems, read without running what is in them, and put into layers.

    weights = read("deformable_detr.pth")
    load(layer, weights, "model.transformer.encoder.layers.0.self_attn.")

`pydeform.layers.save` and `pydeform.layers.load` keep what was trained here.
"""

from pydeform.weights._load import load
from pydeform.weights._read import read

__all__ = ["load", "read"]
