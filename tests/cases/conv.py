"""Problems of convolution over one, two or three axes, plain, deformable and active, on which the tests agree.

A problem has one name whatever its axes, so that one set of tests serves all. No two sizes alike where it allows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import pydeform
from tests.cases.deform_conv2d import dtype_of
from tests.reference import conv as plain
from tests.reference import deform_conv as deformable

Pads = tuple[tuple[int, int], ...]
AXES = {"conv1d": 1, "conv2d": 2, "conv3d": 3, "deform_conv1d": 1, "deform_conv2d": 2, "deform_conv3d": 3}
AXES |= {"active_conv2d": 2}
ARRAYS = {
    "conv": ("input", "weight", "bias"),
    "deform": ("input", "offset", "weight", "bias", "mask"),
    "active": ("input", "positions", "weight", "bias"),
}
GRADS = {"conv": "Conv{}dGrads", "deform": "DeformConv{}dGrads", "active": "ActiveConv{}dGrads"}


def kind_of(operator: str) -> str:
    """The key of ARRAYS."""
    return "conv" if operator.startswith("conv") else operator.partition("_")[0]


class Case(NamedTuple):
    """A convolution over len(kernel) axes."""

    batch: int
    in_channels: int
    in_size: tuple[int, ...]
    out_channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...] = ()  # empty: 1 along every axis, and 0 of padding
    padding: Pads = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    offset_groups: int = 1
    bias: bool = True
    mask: bool = True
    reach: int = 2  # offsets go this many whole pixels each way

    @property
    def axes(self) -> int:
        return len(self.kernel)

    def of(self, operator: str) -> Case:
        """The same for an operator with fewer options."""
        return self._replace(dilation=()) if kind_of(operator) == "active" else self

    def options(self, operator: str) -> dict[str, Any]:
        found = self.geometry
        if kind_of(operator) == "active":
            del found["dilation"]
        return found | ({"groups": self.groups} if kind_of(operator) == "conv" else {})

    @property
    def geometry(self) -> dict[str, Any]:
        ones = (1,) * self.axes
        padding = self.padding or ((0, 0),) * self.axes
        return {"stride": self.stride or ones, "padding": padding, "dilation": self.dilation or ones}

    @property
    def out_size(self) -> tuple[int, ...]:
        return deformable.output_size(self.in_size, self.kernel, **self.geometry)


# Every size is of three axes; fewer take the last of them.
CASES_OF_3 = {
    "every_option": Case(
        2, 12, (4, 6, 5), 4, (2, 3, 2), (1, 2, 1), ((0, 1), (1, 1), (2, 0)), (2, 1, 2), groups=2, offset_groups=3
    ),
    "version_1": Case(3, 4, (3, 5, 4), 7, (2, 1, 3), mask=False, bias=False),
    "depthwise": Case(2, 6, (3, 2, 5), 6, (1, 2, 3), padding=((0, 0), (1, 0), (1, 1)), groups=6, offset_groups=2),
    "groups_across_offset_groups": Case(1, 12, (2, 3, 6), 9, (1, 2, 2), groups=3, offset_groups=4),
    "offset_group_per_channel": Case(1, 5, (3, 4, 6), 3, (2, 1, 3), (1, 2, 2), ((1, 0), (0, 0), (2, 2)), (), 1, 5),
    "padding_asymmetric": Case(1, 3, (2, 4, 5), 4, (2, 2, 3), (1, 1, 2), ((0, 2), (0, 1), (4, 1))),
    "one_pixel": Case(4, 1, (1, 1, 1), 3, (1, 1, 1), reach=1),
    "mostly_outside": Case(2, 3, (2, 3, 6), 5, (1, 2, 2), padding=((1, 1), (1, 0), (2, 2)), reach=9),
    # Past any vector width or unrolling: 35 outputs, 17 channels, and a row of 43 pixels.
    "past_tiles": Case(2, 17, (2, 2, 43), 35, (1, 1, 2), padding=((0, 0), (0, 0), (1, 0))),
    # Several blocks of channels, whole vectors and a rest.
    "channel_blocks": Case(2, 150, (2, 1, 4), 5, (2, 1, 2), padding=((0, 0), (0, 0), (1, 0))),
    "depthwise_blocks": Case(1, 146, (2, 2, 3), 146, (1, 2, 2), groups=146, offset_groups=2),
    "many_outputs": Case(1, 32, (2, 2, 3), 150, (1, 1, 2)),
    "kernel_of_1": Case(2, 6, (2, 3, 4), 7, (1, 1, 1), offset_groups=3),
    "kernel_of_1_groups": Case(1, 36, (1, 2, 5), 6, (1, 1, 1), groups=3, offset_groups=4, mask=False),
    "channel_multiplier": Case(1, 5, (2, 2, 6), 15, (2, 2, 2), groups=5, mask=False),
    "batch_0": Case(0, 3, (3, 5, 6), 4, (2, 2, 3)),
}


def case_of(name: str, axes: int) -> Case:
    case = CASES_OF_3[name]
    lists = ("in_size", "kernel", "stride", "padding", "dilation")
    return case._replace(**{part: getattr(case, part)[-axes:] for part in lists})


def _values(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-128, 129, shape) / 64


def make(operator: str, case: Case, dtype: str = "float64", seed: int = 0) -> dict[str, Any]:
    """Arrays in the order of ARRAYS, every batch entry different. Offsets and positions keep 1/8 or more from integers,
    and all values are exact in each dtype, so that no rounding can move a sample across a kink."""
    rng = np.random.default_rng([seed, case.batch, case.in_channels, case.out_channels, *case.in_size])
    taps = case.offset_groups * math.prod(case.kernel)
    placed = {"offset": (case.batch, case.axes * taps, *case.out_size), "positions": (case.axes * taps,)}
    arrays: dict[str, Any] = {}
    for name in ARRAYS[kind_of(operator)]:
        if name == "input":
            arrays[name] = _values(rng, case.batch, case.in_channels, *case.in_size)
        elif name == "weight":
            arrays[name] = _values(rng, case.out_channels, case.in_channels // case.groups, *case.kernel)
        elif name == "bias":
            arrays[name] = _values(rng, case.out_channels) if case.bias else None
        elif name == "mask":
            arrays[name] = _values(rng, case.batch, taps, *case.out_size) if case.mask else None
        else:
            whole = rng.integers(-case.reach, case.reach, placed[name])
            arrays[name] = whole + rng.integers(1, 8, placed[name]) / 8
    return {name: None if array is None else array.astype(dtype_of(dtype)) for name, array in arrays.items()}


def make_grad_output(case: Case, dtype: str = "float64") -> np.ndarray:
    rng = np.random.default_rng(99)
    return (rng.integers(-64, 65, (case.batch, case.out_channels, *case.out_size)) / 32).astype(dtype_of(dtype))


def solve_oracle(
    operator: str, arrays: dict[str, Any], options: dict[str, Any], grad_output: Any
) -> tuple[np.ndarray, dict[str, Any]]:
    """Output and gradients."""
    forward, backward = {
        "conv": (plain.forward, plain.backward),
        "deform": (deformable.forward, deformable.backward),
        "active": (deformable.active_forward, deformable.active_backward),
    }[kind_of(operator)]
    arguments = {**arrays, **options}
    return forward(**arguments), backward(grad_output, **arguments)


@functools.cache
def expected(operator: str, name: str, boundary: str = "torchvision") -> tuple[np.ndarray, dict[str, Any]]:
    """The oracle's output and gradients of a named case (the same for every dtype, whose values are exact)."""
    case = case_of(name, AXES[operator]).of(operator)
    options = case.options(operator)
    if kind_of(operator) == "deform":
        options["boundary"] = boundary
    return solve_oracle(operator, make(operator, case), options, make_grad_output(case))


def run(backend: Any, operator: str, arrays: dict[str, Any], options: dict[str, Any]) -> np.ndarray:
    """Forward on a backend, NumPy to NumPy."""
    sent = {name: backend.array(a) for name, a in arrays.items()}
    return backend.numpy(getattr(pydeform, operator)(**sent, **options))


def run_backward(
    backend: Any, operator: str, grad_output: Any, arrays: dict[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    sent = {name: backend.array(a) for name, a in arrays.items()}
    grads = getattr(pydeform, f"{operator}_backward")(backend.array(grad_output), **sent, **options)
    assert isinstance(grads, getattr(pydeform, GRADS[kind_of(operator)].format(AXES[operator])))
    return {name: backend.numpy(grad) for name, grad in grads._asdict().items()}


def checked(backend: Any, operator: str, options: dict[str, Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward for gradcheck, which makes arrays in NumPy."""

    def forward(**arrays: Any) -> Any:
        return run(backend, operator, arrays, options)

    def backward(grad_output: Any, **arrays: Any) -> Any:
        return run_backward(backend, operator, grad_output, arrays, options)

    return forward, backward
