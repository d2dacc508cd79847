"""Which node of a model a runtime computes otherwise than pydeform and ONNX's reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx

from pydeform import _checks
from pydeform.onnx import _nodes

Runtime = Callable[[Mapping[str, Any]], Mapping[str, Any]]


class Difference(NamedTuple):
    """What `check` found at one output of one node.

    Examples
    --------
    >>> from pydeform.onnx import Difference
    >>> print(Difference("sample", "GridSample", "y", "differs by 0.5 at [0, 0, 1, 2], where 2 is expected"))
    node sample (GridSample), output y: differs by 0.5 at [0, 0, 1, 2], where 2 is expected
    """

    node: str  # its name, or its number in the graph
    op_type: str
    output: str
    what: str

    def __str__(self) -> str:
        return f"node {self.node} ({self.op_type}), output {self.output}: {self.what}"


def check(
    model: Any,
    feed: Mapping[str, Any],
    runtime: Runtime | None = None,
    *,
    tolerance: float = 1e-4,
    providers: Sequence[Any] = ("CPUExecutionProvider",),
) -> Difference | None:
    """Find the first node that a runtime computes otherwise than we do.

    Each node is computed from the numbers that the runtime itself has at its inputs, by `pydeform.onnx.new_ops` and
    ONNX's reference. So what is found is the node that is wrong, not one that follows it.

    Parameters
    ----------
    model : onnx.ModelProto or the path of one
    feed : NumPy array for the name of each input; one with an initialiser may be left out
    runtime : function of `feed` that returns arrays by name, of as many results in the graph as it can tell; the nodes
        of others are passed over. None: onnxruntime, asked for all of them
    tolerance : how much of the largest value of an output, or of 1e-3 if that is more, its elements may differ by. Half
        types have 4 times their own precision at least. Integers, bools and strings have to be equal
    providers : of onnxruntime, in its terms

    Returns
    -------
    Difference or None
        None where nothing differs.

    Raises
    ------
    ValueError
        An input is missing or unknown; `runtime` tells no result of any node.
    TypeError
        The kind of an array does not fit.

    Notes
    -----
    Nodes that the reference has no code for are taken to be right, and random ones differ. A runtime that is asked for
    all results may fuse fewer nodes than it does otherwise. Graphs inside If, Loop and Scan count as one node.

    Examples
    --------
    >>> import numpy as np
    >>> from onnx import parser
    >>> from pydeform.onnx import check
    >>> model = parser.parse_model(
    ...     '<ir_version: 9, opset_import: ["" : 20]> g (float[1, 1, 3, 3] x, float[1, 2, 2, 2] grid) => (float[n] y)'
    ...     "{ s = GridSample (x, grid)  y = Flatten <axis = 0> (s) }"
    ... )
    >>> x, grid = np.ones((1, 1, 3, 3), np.float32), np.zeros((1, 2, 2, 2), np.float32)
    >>> print(check(model, {"x": x, "grid": grid}, runtime=lambda feed: {"s": np.full((1, 1, 2, 2), 0.5, np.float32)}))
    node 0 (GridSample), output s: differs by 0.5 at [0, 0, 0, 0], where 1 is expected
    """
    tolerance = _checks.number("check", "tolerance", tolerance)
    model = _nodes.loaded("check", model)
    _nodes.check_feed("check", model, feed)
    told = dict(_onnxruntime(model, feed, providers) if runtime is None else runtime(feed))
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer} | dict(feed)
    results = {name for node in model.graph.node for name in node.output if name}
    unknown = sorted(told.keys() - results - values.keys())
    if unknown:
        raise ValueError(f"check: runtime must tell results of nodes by name, got {', '.join(unknown)}")
    compared = 0
    for number, node in enumerate(model.graph.node):
        names = [name for name in node.output if name]
        want = _evaluated(model, node, names, values)
        if want is None:
            missing = [name for name in names if name not in told]
            if missing:
                raise ValueError(
                    f"check: the reference has no {node.op_type}, so runtime must tell {', '.join(missing)}"
                )
        for name in names:
            if name in told and want is not None:
                compared += 1
                what = _difference(told[name], want[name], tolerance)
                if what:
                    return Difference(node.name or str(number), node.op_type, name, what)
            values[name] = told[name] if want is None or name in told else want[name]
    if not compared:
        raise ValueError(f"check: runtime must tell results that can be compared, got {', '.join(told) or 'nothing'}")
    return None


def _evaluated(model: Any, node: Any, names: list[str], values: Mapping[str, Any]) -> dict[str, Any] | None:
    """None: there is no code for it."""
    alone = _nodes.model_of(node, model.opset_import, values)
    try:
        return _nodes.evaluate(alone, names, values)
    except NotImplementedError:
        return None


def _difference(got: Any, want: Any, tolerance: float) -> str:
    """Empty: there is none."""
    if not isinstance(want, np.ndarray):  # sequences and what is absent
        return "" if type(got) is type(want) else f"is a {type(got).__name__}, expected a {type(want).__name__}"
    got = np.asarray(got)
    if (got.shape, got.dtype) != (want.shape, want.dtype):
        return f"has shape {got.shape} and dtype {got.dtype}, expected {want.shape} and {want.dtype}"
    if want.dtype.name not in _checks.FLOAT_DTYPES:
        wrong = got != want
        return f"differs at {wrong.sum()} of {wrong.size} elements" if wrong.any() else ""
    if want.dtype.itemsize == 2:
        tolerance = max(tolerance, 4 * float(np.finfo(np.float16).eps if want.dtype == np.float16 else 2.0**-7))
    a, b = got.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(b)
    with np.errstate(invalid="ignore"):
        apart = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0, np.abs(a - b))
    apart[np.isnan(apart)] = np.inf
    if not (apart > tolerance * np.abs(b[finite]).max(initial=1e-3)).any():
        return ""
    at = np.unravel_index(apart.argmax(), apart.shape)
    return f"differs by {apart[at]:.6g} at {list(map(int, at))}, where {b[at]:.6g} is expected"


def _onnxruntime(model: Any, feed: Mapping[str, Any], providers: Sequence[Any]) -> dict[str, Any]:
    """All results of onnxruntime, outputs or not."""
    import onnxruntime

    asked = onnx.ModelProto()
    asked.CopyFrom(model)
    outputs = {value.name for value in model.graph.output}
    more = [name for node in model.graph.node for name in node.output if name and name not in outputs]
    asked.graph.output.extend(onnx.ValueInfoProto(name=name) for name in more)
    session = onnxruntime.InferenceSession(asked.SerializeToString(), providers=list(providers))
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feed)), strict=True))
