"""Types of the public functions' arguments, for type checkers and editors; what is passed is checked when it comes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal, Protocol, SupportsFloat, SupportsIndex, TypeVar


class AnyArray(Protocol):
    """An array of NumPy, CuPy, or any library with `__dlpack__`."""

    @property
    def shape(self) -> Any: ...

    @property
    def dtype(self) -> Any: ...


Array = TypeVar("Array", bound=AnyArray)  # of the first array, whose kind comes out

Int = SupportsIndex  # an int, NumPy's, or an array of one without axes
Number = SupportsFloat | SupportsIndex
Size = Int | Sequence[Int]  # of both axes, or one for each
Padding = Size | Sequence[Int | Sequence[Int]] | Literal["same"]  # also (before, after) for each axis

Boundary = Literal["torchvision", "dcnv2", "dcnv1"]
Mode = Literal["avg", "max"]
Convention = Literal["torchvision", "rfcn"]
Method = Literal["bilinear", "discrete"]
Interpolation = Literal["bilinear", "nearest", "bicubic"]
PaddingMode = Literal["zeros", "border", "reflection"]

SpatialShapes = AnyArray | Sequence[Any]  # rows (h, w) of ints, nested for cameras
Points = Sequence[Int] | None  # of each level

Needs = Collection[str] | None
