"""Products of tiles, as kernels are asked for them by name."""

from __future__ import annotations

from typing import NamedTuple

from pydeform.cuda.core.numbers import C_TYPES, ITEMSIZE


class Product(NamedTuple):
    """One policy of core/product.cuh, and the sizes that follow from its parameters."""

    kind: str
    dtype: str
    rows: int  # BM, pixels
    columns: int  # BN
    warp_rows: int
    warp_columns: int
    parts: int = 1  # tiles of a value split in two
    tf32: bool = False

    @property
    def expression(self) -> str:
        c = C_TYPES[self.dtype]
        if self.kind == "Wgmma":
            return f"Wgmma<{c}, {self.rows}, {self.columns}, {'true' if self.parts == 2 else 'false'}>"
        sizes = f"{c}, {self.rows}, {self.columns}, {self.warp_rows}, {self.warp_columns}"
        if "Mma" in self.kind and self.dtype == "float32" and not self.tf32:
            sizes += ", 3"
        return f"{self.kind}<{sizes}>"

    @property
    def threads(self) -> int:
        return self.rows // self.warp_rows * (self.columns // self.warp_columns) * 32

    @property
    def row_bytes(self) -> int:
        return 128 if self.kind == "Wgmma" else 64

    @property
    def depth(self) -> int:
        return self.row_bytes // ITEMSIZE[self.dtype]

    @property
    def stage_bytes(self) -> int:
        return self.parts * (self.rows + self.columns) * self.row_bytes

    @property
    def turned_depth(self) -> int:
        """Pixels in a tile of the weight's gradient."""
        return 64 if ITEMSIZE[self.dtype] == 2 else 32

    @property
    def turned_stage_bytes(self) -> int:
        return self.turned_depth * (self.rows + self.columns) * ITEMSIZE[self.dtype]
