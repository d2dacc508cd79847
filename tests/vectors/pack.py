"""Gather reference vectors, one file each, into the archives that the repository keeps.

    python tests/vectors/pack.py FOLDER

FOLDER holds one subfolder per operator with `<system>__<case>.npz` files (README.md describes their content).
Written: tests/vectors/*.npz.
"""

import json
import sys
from pathlib import Path

import numpy as np

# The subfolders that go into one archive: operators whose vectors share inputs.
ARCHIVES = {
    "deform_conv2d": ("deform_conv2d",),
    "deform_conv": ("deform_conv1d", "deform_conv3d"),
    "roi": (
        "roi_pool",
        "roi_align",
        "ps_roi_align",
        "psroi_pooling",
        "deform_roi_pool",
        "deformable_psroi_pooling",
        "prroi_pool",
        "roi_align_rotated",
    ),
    "gather": ("dcnv3", "dcnv4", "ms_deform_attn", "ms_deform_attn_fused", "deform_aggregation"),
    "grid": ("grid_sample", "affine_grid", "spatial_transformer"),
}


def read(path):
    """The arrays of one file; `args` and `meta` stay JSON strings."""
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def pack(source, root):
    for archive, operators in ARCHIVES.items():
        every, count = {}, 0
        for operator in operators:
            paths = sorted((source / operator).glob("*.npz"))
            if not paths:
                raise SystemExit(f"{source / operator}: no .npz files")
            files = {path.stem: read(path) for path in paths}
            count += len(files)
            place = "" if len(operators) == 1 else f"{operator}/"
            every.update({f"{place}{stem}/{name}": a for stem, arrays in files.items() for name, a in arrays.items()})
        write(root / "tests" / "vectors" / f"{archive}.npz", every, count)


def write(path, arrays, files):
    """Systems that ran the same case share its inputs: each array is stored once, `same` names the other places."""
    first, kept, same = {}, {}, {}
    for name, array in ((name, np.asarray(entry)) for name, entry in arrays.items()):
        place = first.setdefault((array.dtype.str, array.shape, array.tobytes()), name)
        if place == name:
            kept[name] = array
        else:
            same[name] = place
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(path, same=json.dumps(same), **kept)
    print(f"{path.name}: {files} files, {len(arrays)} arrays, {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    pack(Path(sys.argv[1]), Path(__file__).parents[2])
