"""What a type checker says of calls: right ones pass, wrong ones do not, and a result is of the first array's kind."""

from __future__ import annotations

import fnmatch
import typing
from pathlib import Path

import pytest

import pydeform
from pydeform import _geometry, _types
from pydeform.ops import ps_roi_pool, roi_align

START = """\
import numpy as np
from numpy.typing import NDArray
import pydeform as p

class Foreign:
    shape: tuple[int, ...]
    dtype: object

def calls(x: NDArray[np.float32], half: NDArray[np.float16], foreign: Foreign, two: tuple[int, int]) -> None:
"""
# One call of each line -> what the checker says: an error's text, the type of a result, or nothing.
CALLS = {
    'p.conv2d(x, x, stride="2")': 'Argument "stride" to "conv2d" has incompatible type "str"',
    "p.conv2d(x, x, stride=2.0)": 'Argument "stride" to "conv2d" has incompatible type "float"',
    "p.conv2d(x, x, stride={1, 2})": 'Argument "stride" to "conv2d" has incompatible type "set[int]"',
    'p.conv2d(x, x, padding="valid")': 'Argument "padding" to "conv2d" has incompatible type',
    "p.conv2d(x, x, None, 1, 0, 1, 2.5)": 'Argument 7 to "conv2d" has incompatible type "float"',
    "p.conv2d([[1.0]], x)": 'Value of type variable "Array" of "conv2d" cannot be',
    "p.conv2d(x, None)": 'Argument 2 to "conv2d" has incompatible type "None"',
    "p.conv2d(x)": 'Missing positional argument "weight" in call to "conv2d"',
    'p.deform_conv2d(x, x, x, boundary="zeros")': 'Argument "boundary" to "deform_conv2d" has incompatible type',
    'p.deform_conv2d_backward(x, x, x, x, boundary="zeros")': 'Argument "boundary" to "deform_conv2d_backward"',
    "p.deform_conv2d(x, None, x)": 'Argument 2 to "deform_conv2d" has incompatible type "None"',
    "p.conv2d_backward(x, x, x, needs=1)": 'Argument "needs" to "conv2d_backward" has incompatible type "int"',
    'p.roi_align(x, x, 7, mode="mean")': 'Argument "mode" to "roi_align" has incompatible type',
    'p.roi_align(x, x, 7, "1")': 'Argument 4 to "roi_align" has incompatible type "str"',
    'p.ps_roi_pool(x, x, 7, convention="mxnet")': 'Argument "convention" to "ps_roi_pool" has incompatible type',
    "p.deform_roi_pool(x, x, gamma=None)": 'Argument "gamma" to "deform_roi_pool" has incompatible type "None"',
    "p.deform_psroi_pool(x, x, output_dim=2)": 'Missing named argument "pooled_size"',
    "p.effective_dilation(x, None)": 'Argument 2 to "effective_dilation" has incompatible type "None"',
    # right ones
    'p.conv2d(x, x, None, np.int64(2), "same", [1, 2], np.array(1))': "",
    "p.conv2d(x, x, padding=((1, 2), (0, 1)), stride=np.array([2, 1]))": "",
    "p.conv2d(x, x, None, two, two, two)": "",
    'p.deform_conv2d(x, x, x, boundary="dcnv2", mask=None)': "",
    'p.roi_align(x, x, (7, 7), np.float32(1), 2, True, mode="max")': "",
    'p.ps_roi_pool(x, x, 7, convention="rfcn")': "",
    "p.deform_roi_pool(x, x, None, 7, 1, 0, np.array(0.1))": "",
    "p.deform_psroi_pool(x, x, output_dim=2, pooled_size=7, part_size=None)": "",
    'p.conv2d_backward(x, x, x, needs={"input"}).weight.shape': "",
    'p.roi_pool_backward(x, x, x, 7, needs=("input",))': "",
    # what comes out
    "reveal_type(p.conv2d(x, x))": "numpy.ndarray?*float*32*",
    "reveal_type(p.deform_conv2d(half, x, half, mask=half))": "numpy.ndarray?*float*16*",
    "reveal_type(p.roi_align(half, x, 7))": "numpy.ndarray?*float*16*",
    "reveal_type(p.deform_psroi_pool(foreign, x, output_dim=2, pooled_size=7))": "calls_of_pydeform.Foreign",
    "reveal_type(p.sampling_locations(x, 3))": "numpy.ndarray?*float*32*",
    "reveal_type(p.sampling_locations(foreign, 3))": "calls_of_pydeform.Foreign",
    "n, groups, taps, h, w, yx = p.sampling_locations(np.zeros((1, 18, 4, 4)), 3).shape": "",
    "reveal_type(p.effective_dilation(x, 3))": "numpy.ndarray?*float*32*",
}


def said(folder: Path) -> list[str]:
    """What mypy says of each call. It starts with nothing cached, so all are in one file."""
    api = pytest.importorskip("mypy.api")
    snippet = folder / "calls_of_pydeform.py"
    snippet.write_text(START + "".join(f"    {call}\n" for call in CALLS))
    options = [
        "--strict",
        "--follow-imports=silent",
        "--config-file=",
        "--no-pretty",
        f"--cache-dir={folder / 'cache'}",
    ]
    report, errors, _ = api.run([*options, str(snippet)])
    assert not errors
    lines = [""] * len(CALLS)
    for line in report.splitlines():
        number = line.partition(f"{snippet.name}:")[2].partition(":")[0]
        if number:
            lines[int(number) - 1 - START.count("\n")] += line
    return lines


def is_wanted(call: str, text: str, want: str) -> bool:
    if call.startswith("reveal_type"):
        revealed = text.partition('Revealed type is "')[2].rpartition('"')[0]
        return ": error:" not in text and fnmatch.fnmatchcase(revealed, want)
    return f": error: {want}" in text if want else not text


def test_calls(tmp_path, monkeypatch):
    monkeypatch.setenv("MYPYPATH", str(Path(pydeform.__file__).parents[1]))
    wrong = {
        call: text for call, text in zip(CALLS, said(tmp_path), strict=True) if not is_wanted(call, text, CALLS[call])
    }
    assert not wrong


def test_literals_are_the_choices():
    assert typing.get_args(_types.Boundary) == _geometry.BOUNDARIES
    assert typing.get_args(_types.Mode) == roi_align.MODES
    assert typing.get_args(_types.Convention) == ps_roi_pool.CONVENTIONS
