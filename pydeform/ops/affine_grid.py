"""Grids of affine maps, for `grid_sample` (spatial transformer networks)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pydeform import _checks, _interop
from pydeform._grid_geometry import GRIDS
from pydeform._types import AnyArray, Array, Int, Needs
from pydeform.ops import _call

