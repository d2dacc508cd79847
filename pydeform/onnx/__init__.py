"""ONNX: run models with pydeform's operators, compare a runtime with them, write layers as models.

    pydeform.onnx.run(model, feed)              outputs of a model, a file or a node
    pydeform.onnx.check(model, feed)            the first node that a runtime computes otherwise
    pydeform.onnx.export(layer, shape, path)    a layer of `pydeform.layers` as a model
    pydeform.onnx.new_ops()                     for `onnx.reference.ReferenceEvaluator(model, new_ops=...)`

The nodes are DeformConv, RoiAlign, MaxRoiPool, GridSample and AffineGrid, in every version that ONNX has of them.
"""

from pydeform.onnx._check import Difference, check
from pydeform.onnx._export import export
from pydeform.onnx._nodes import new_ops, run

__all__ = ["Difference", "check", "export", "new_ops", "run"]
