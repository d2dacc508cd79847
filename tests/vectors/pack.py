"""Gather reference vectors, one file each, into the archives that the repository keeps.

    python tests/vectors/pack.py FOLDER

FOLDER holds one subfolder per operator with `<system>__<case>.npz` files (README.md describes their content).
Written: tests/vectors/*.npz with all of them, and pydeform/data/vectors.npz, a few for `pydeform check`.
"""

import json
import sys
from pathlib import Path

import numpy as np

# The subfolders that go into one archive: operators whose vectors share inputs.
ARCHIVES = {
    "deform_conv2d": ("deform_conv2d",),
    "roi": (
        "roi_pool",
        "roi_align",
        "ps_roi_align",
        "psroi_pooling",
        "deform_roi_pool",
        "deformable_psroi_pooling",
    ),
}

# Small, and between them: every boundary rule, both versions, groups, offset groups, asymmetric arguments, kinks,
# far samples, an image of one row, forward-only producers.
BUNDLED = {
    "deform_conv2d": (
        "mmcv-cudasrc-v2__mix_small",
        "mxnet1.9.1-v1-cpu__mix_small_v1",
        "onnxruntime1.31__h1_row_image",
        "openvino2026.4-pad0__h1_row_image",
        "paddle2.6.2__mix_small_v1",
        "torchvision0.19csrc__half_offsets",
        "torchvision0.19csrc__mix_small",
    )
}


def read(path):
    """The arrays of one file; `args` and `meta` stay JSON strings."""
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def pack(source, root):
    bundled = {}
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
            for stem in BUNDLED.get(operator, ()):
                bundled.update({f"{operator}/{stem}/{name}": array for name, array in files[stem].items()})
        write(root / "tests" / "vectors" / f"{archive}.npz", every, count)
    write(root / "pydeform" / "data" / "vectors.npz", bundled, sum(map(len, BUNDLED.values())))


def write(path, arrays, files):
    """Systems that ran the same case share its inputs: each array is stored once, `same` names the other places."""
    first, kept, same = {}, {}, {}
    for name, array in arrays.items():
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
