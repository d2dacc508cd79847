"""What onnxruntime's own tests of its DeformConv expect.

Numbers from its repository, onnxruntime/test/providers/cpu/nn/deform_conv_op_test.cc, commit 12b19c8a: the 22 tests
there that expect numbers; 2 more expect errors. One number stands for an array full of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

Numbers = float | list[float]
IMAGE = [1.0, 2.0, 3.0, 4.0]


class Published(NamedTuple):
    """The name of their test, sizes, attributes and numbers."""

    name: str
    x: tuple[int, ...]
    weight: tuple[int, ...]
    out: tuple[int, int]
    numbers: tuple[Numbers, Numbers, Numbers, Numbers, Numbers | None]  # of X, W, offset, B, mask
    expected: Numbers
    offset_group: int = 1
    attributes: dict[str, Any] | None = None
    dtype: Any = np.float32
    opset: int = 19
    tolerance: float = 1e-5

    def arrays(self) -> dict[str, np.ndarray]:
        batch, (outputs, _, *kernel) = self.x[0], self.weight
        taps = self.offset_group * int(np.prod(kernel))
        shapes = (self.x, self.weight, (batch, 2 * taps, *self.out), (outputs,), (batch, taps, *self.out))
        names = "X", "W", "offset", "B", "mask"
        return {
            n: filled(v, s, self.dtype) for n, v, s in zip(names, self.numbers, shapes, strict=True) if v is not None
        }

    def want(self) -> np.ndarray:
        return filled(self.expected, (self.x[0], self.weight[0], *self.out), self.dtype)


def filled(numbers: Numbers, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    values = np.array(numbers, np.float64)
    return (values.reshape(shape) if values.ndim else np.full(shape, values)).astype(dtype)


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split()]


X = numbers(
    "0.296112 0.516562 0.251671 0.688557 0.073972 0.866522 0.136580 0.102479 0.184056 0.726447 "
    "0.315254 0.687107 0.075635 0.196638 0.316412 0.401740 0.118568 0.827395 0.382084 0.660494 "
    "0.853572 0.593153 0.636725 0.982629 0.274495 0.658376 0.277542 0.857325 0.899328 0.039014 "
    "0.926823 0.738757 0.717884 0.705837 0.915650 0.433980"
)
W = numbers(
    "-1.182045 -0.287745 -0.604301 0.600237 -1.420473 -0.223828 0.430555 -0.898857 -0.017858 0.426403 "
    "-0.765741 -0.054514 -0.732053 1.234742 1.186221 -0.220099"
)
OFFSET = numbers(
    "-0.388483 -0.934346 -0.499144 -1.086653 0.962421 0.249208 -0.484502 -2.092915 0.098284 -0.093507 "
    "0.266215 -0.585035 -0.343038 -0.682148 -0.988689 -1.701830 -1.220290 1.313853 1.053300 0.138805 "
    "-0.204445 -2.268529 -0.913328 -0.420363 -0.659559 -0.797928 0.183831 0.229347 0.617743 -0.287578 "
    "0.821824 0.151178 -0.044382 1.623557 -2.322871 1.087831 -0.063545 -0.448641 -1.278470 -1.144004 "
    "-0.152640 0.116741 0.440260 -1.446546 -0.558082 -0.051696 -0.908273 0.350683 -0.394809 0.489227 "
    "-0.216815 -1.747165 1.722842 0.773806 0.404630 -1.646126 -0.595084 -0.711218 0.622965 -1.372881 "
    "-0.128065 -1.283835 -0.290120 1.276741"
)
MASK = numbers(
    "-0.031861 -0.478956 0.766809 0.027468 0.047470 -0.923866 -1.060737 -2.324446 -2.062818 0.006375 "
    "-0.989555 0.701609 -0.982238 0.277031 0.645495 -0.895681 0.492753 -0.014078 -0.274663 -0.764091 "
    "-0.587157 1.195165 -1.209575 -0.556008 -0.077105 1.277377 -1.459629 -2.159528 -0.706709 -0.922245 "
    "3.895372 -0.602697"
)

MINIMAL = Published(
    "MinimalBilinear",
    (1, 1, 2, 2),
    (1, 1, 1, 1),
    (2, 2),
    (IMAGE, 1.0, [0.5, 0, 0, 0, 0.5, -1, 0, 0], 0.0, 1.0),
    [2.5, 1, 3, 4],
)
MASK_AND_BIAS = Published(
    "ForwardWithMaskAndBias",
    (2, 4, 3, 3),
    (2, 2, 2, 2),
    (2, 2),
    (0.1, 0.1, 0.0, [0.5, -0.5], 1.0),
    [0.58] * 4 + [-0.42] * 4 + [0.58] * 4 + [-0.42] * 4,
    2,
    {"group": 2},
    tolerance=1e-4,
)
PLAIN = (0.1, 0.1, 0.0, 0.0, 1.0)
PUBLISHED = [
    MINIMAL,
    MINIMAL._replace(name="MinimalBilinearFP16", dtype=np.float16, tolerance=1e-2),
    MINIMAL._replace(name="MinimalBilinearBFloat16", dtype=ml_dtypes.bfloat16, opset=22, tolerance=1e-2),
    MINIMAL._replace(name="MinimalBilinearDouble", dtype=np.float64, tolerance=1e-8),
    MASK_AND_BIAS._replace(name="ForwardWithMaskAndBiasFP16", dtype=np.float16, tolerance=1e-2),
    MASK_AND_BIAS,
    Published("ForwardNoMask", (1, 2, 3, 3), (2, 2, 2, 2), (2, 2), (0.1, 0.1, 0.0, 0.0, None), 0.08, tolerance=1e-4),
    Published("EmptyBatch", (0, 2, 3, 3), (2, 2, 2, 2), (2, 2), (0.1, 0.1, 0.0, 0.0, None), 0.0),
    Published(
        "Opset22",
        (1, 1, 2, 2),
        (1, 1, 1, 1),
        (2, 2),
        (IMAGE, 1.0, [0.5, 0, 0, 0, 0.5, 0, 0, 0], 0.0, 1.0),
        [2.5, 2, 3, 4],
        opset=22,
    ),
    Published("NonSquareKernel", (1, 1, 4, 5), (1, 1, 2, 3), (3, 3), PLAIN, 0.06),
    Published("AsymmetricStride", (1, 1, 5, 4), (1, 1, 2, 2), (2, 3), PLAIN, 0.04, 1, {"strides": [2, 1]}),
    Published(
        "GroupsWithNonZeroOffset",
        (1, 4, 3, 3),
        (2, 2, 2, 2),
        (2, 2),
        (X, W, OFFSET, [0.983955, 0.204512], MASK),
        [0.971546, 1.139858, 0.452817, 1.863882, -0.565266, 1.423187, -2.462833, -0.104923],
        2,
        {"group": 2},
        tolerance=1e-4,
    ),
    Published("OutOfBoundsSampling", (1, 1, 2, 2), (1, 1, 1, 1), (2, 2), (IMAGE, 1.0, -5.0, 0.0, 1.0), 0.0),
    Published("DilationGt1", (1, 1, 5, 5), (1, 1, 2, 2), (3, 3), PLAIN, 0.04, 1, {"dilations": [2, 2]}),
    Published("DecoupledGroups", (1, 4, 3, 3), (2, 2, 2, 2), (2, 2), PLAIN, 0.08, 1, {"group": 2}),
    Published(
        "AsymmetricPadding",
        (1, 1, 3, 3),
        (1, 1, 2, 2),
        (3, 3),
        PLAIN,
        [0.02, 0.02, 0.01, 0.04, 0.04, 0.02, 0.04, 0.04, 0.02],
        1,
        {"pads": [1, 0, 0, 1]},
    ),
    Published("TinyOffset", (1, 1, 1, 1), (1, 1, 1, 1), (1, 1), (1.0, 1.0, 1e-6, 0.0, 1.0), 1.0, tolerance=1e-4),
    Published("OffsetAtPixelCenters", (1, 1, 2, 2), (1, 1, 2, 2), (1, 1), (IMAGE, 0.25, 0.5, 0.0, 1.0), 1.6875),
    Published("LargeBatchSize", (64, 1, 3, 3), (1, 1, 2, 2), (2, 2), PLAIN, 0.04),
    Published("Group1OffsetGroup2", (1, 4, 3, 3), (2, 4, 2, 2), (2, 2), PLAIN, 0.16, 2),
    Published("MaskWithZeros", (1, 1, 3, 3), (1, 1, 2, 2), (2, 2), (0.1, 0.1, 0.0, 0.0, 0.0), 0.0),
    Published("ExtremeAspectRatio", (1, 1, 1, 100), (1, 1, 1, 3), (1, 98), PLAIN, 0.03),
]
