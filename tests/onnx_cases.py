"""The test cases that the ONNX project publishes for its operators."""

from __future__ import annotations

import importlib
from typing import Any

import pytest


def node_cases(monkeypatch: pytest.MonkeyPatch, operator: str) -> list[Any]:
    """Those of one operator. Only its module is read: making the cases of all operators takes seconds.

    They are collected without a filter: the package applies one to whatever is read while it is set, so that a later
    call with another would find nothing.
    """
    node = pytest.importorskip("onnx.backend.test.case.node", reason="onnx is not installed")
    module = f"onnx.backend.test.case.node.{operator.lower()}"
    monkeypatch.setattr(node, "import_recursive", lambda package: importlib.import_module(module))
    return [case for case in node.collect_testcases() if case.model.graph.node[0].op_type == operator]
