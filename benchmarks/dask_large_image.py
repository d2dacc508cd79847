"""A large image through a deformable layer, from a Zarr store into another: time, and most memory that the process had.

The layer is a plain convolution that gives offsets, held to 4 pixels, and the deformable one, 3x3 each, of 3 channels.
The image and the result lie in a folder, which is removed. Progress goes to stderr.

    python benchmarks/dask_large_image.py --size 20000 --tile 1000
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import zarr
from dask.diagnostics import ProgressBar

import pydeform
import pydeform.dask
from pydeform._progress import progress

CHANNELS, FAR = 3, 4.0


def peak_mb() -> float:
    """Of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_image(path: Path, size: int, tile: int) -> None:
    image = zarr.open(
        str(path), mode="w", shape=(1, CHANNELS, size, size), chunks=(1, CHANNELS, tile, tile), dtype="float32"
    )
    rng = np.random.default_rng(0)
    for y in progress(range(0, size, tile), "image, rows of tiles"):
        for x in range(0, size, tile):
            height, width = min(tile, size - y), min(tile, size - x)
            image[:, :, y : y + tile, x : x + tile] = rng.random((1, CHANNELS, height, width), np.float32)


def layer(ops: Any, clip: Any, image: Any, **options: Any) -> Any:
    rng = np.random.default_rng(1)
    to_offset = rng.standard_normal((18, CHANNELS, 3, 3), np.float32)
    weight = rng.standard_normal((CHANNELS, CHANNELS, 3, 3), np.float32)
    offset = clip(ops.conv2d(image, to_offset, padding=1), -FAR, FAR)
    return ops.deform_conv2d(image, offset, weight, padding=1, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=20_000)
    parser.add_argument("--tile", type=int, default=1_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", default=None, help="where the stores go; twice 12 bytes a pixel")
    asked = parser.parse_args()
    size, tile = asked.size, asked.tile
    pydeform.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        write_image(Path(folder, "image"), size, tile)
        before, start = peak_mb(), time.perf_counter()
        image = da.from_zarr(str(Path(folder, "image")))
        y = layer(pydeform.dask, da.clip, image, max_offset=FAR)
        target = zarr.open(str(Path(folder, "result")), mode="w", shape=y.shape, chunks=y.chunksize, dtype=y.dtype)
        graph = time.perf_counter() - start
        with dask.config.set(scheduler="threads", num_workers=asked.workers), ProgressBar(out=sys.stderr, dt=5):
            da.store(y, target, lock=False)
        seconds, peak = time.perf_counter() - start, peak_mb()
        corner = image[:, :, :300, :300].compute()
        near = layer(pydeform, np.clip, corner)[:, :, :280, :280]
        difference = np.abs(target[:, :, :280, :280] - near).max() / np.abs(near).max()
    whole = 4e-6 * size * size * (2 * CHANNELS + 18)
    print(f"{size} x {size}, tiles of {tile}, {asked.workers} tasks at a time: {seconds:.0f} s,")
    print(f"{graph:.1f} of them before the first task; most memory {peak:.0f} MB ({before:.0f} before),")
    print(f"where image, offset and result have {whole:.0f} MB; the first 280 x 280 differ from what the")
    print(f"operator gives by {difference:.1g} of their largest")


if __name__ == "__main__":
    main()
