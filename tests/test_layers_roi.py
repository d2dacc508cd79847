"""RoI layers: gradients through both passes, what they start as, and that they are the operators they are made of."""

import ml_dtypes
import numpy as np
import pytest

import pydeform
from pydeform import layers
from pydeform.layers import Conv2d, DeformPSRoIPool, DeformRoIPool, Layer, RoIAlign
from pydeform.optim import SGD
from pydeform.testing import gradcheck

F8 = np.float64
# In two images of 9 x 10; of no bin does a point lie on a pixel, and only the last box leaves the image.
BOXES = np.array([[0, 1.13, 0.87, 7.41, 6.29], [1, 2.21, 1.37, 8.17, 7.53], [0, -1.37, 3.41, 4.19, 9.77]])


def normal(*shape, seed=0, dtype=F8):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def moved(layer, seed=0):
    """Offsets of all sizes, different for each bin; the mask not one half. The branches' last layers start at zero."""
    rng = np.random.default_rng(seed)
    for name, param in layer.params.items():
        if not param.any():
            param[...] = rng.uniform(0.1, 0.4, param.shape) if name.endswith("bias") else 0.02 * normal(*param.shape)
    return layer


def roi(**options):
    return moved(DeformRoIPool((3, 2), 3, sampling_ratio=2, hidden=7, rng=0, dtype=F8, **options))


def psroi(output_dim=4, pooled_size=3, **options):
    options = {"sample_per_part": 2, "trans_std": 0.3, "rng": 0, "dtype": F8, **options}
    return moved(DeformPSRoIPool(output_dim, pooled_size, **options))


# layer -> channels of x and of features
DEFORMABLE = [
    pytest.param(roi(), 3, None, id="roi"),
    pytest.param(roi(modulated=True, spatial_scale=0.8, gamma=0.3), 3, None, id="roi-modulated"),
    pytest.param(psroi(), 4, None, id="psroi-linear"),
    pytest.param(psroi(part_size=2, classes=2, group_size=2), 16, None, id="psroi-linear-classes-groups-parts"),
    pytest.param(psroi(hidden=6, modulated=True), 4, None, id="psroi-hidden-modulated"),
    pytest.param(psroi(classes=2, group_size=3, feature_channels=5), 36, 5, id="psroi-conv"),
    pytest.param(psroi(pooled_size=4, part_size=2, group_size=2, feature_channels=5), 16, 5, id="psroi-conv-parts"),
    pytest.param(psroi(modulated=True, classes=4, feature_channels=5), 4, 5, id="psroi-conv-modulated"),
]


def inputs(channels, features=None, dtype=F8):
    maps = {"x": normal(2, channels, 9, 10, seed=1, dtype=dtype)}
    return maps if features is None else {**maps, "features": normal(2, features, 9, 10, seed=2, dtype=dtype)}


def as_dict(maps, grads):
    return dict(zip(maps, grads if isinstance(grads, tuple) else (grads,), strict=True))


def check_gradients(layer, maps, call):
    """gradcheck of call(layer, **maps) -> (y, backprop) by its maps and by every parameter of `layer`."""

    def run(arguments):
        for name in layer.params:
            layer.params[name][...] = arguments[name]
        return call(layer, **{name: arguments[name] for name in maps})

    def forward(**arguments):
        return run(arguments)[0]

    def backward(grad_y, **arguments):
        layer.zero_grads()
        grads = as_dict(maps, run(arguments)[1](grad_y))
        return {**grads, **{name: grad.copy() for name, grad in layer.grads.items()}}

    kept = {name: param.copy() for name, param in layer.params.items()}
    report = gradcheck(forward, backward, {**maps, **kept}, elements=8, directions=1)
    for name, param in kept.items():
        layer.params[name][...] = param
    return report


@pytest.mark.parametrize("options", [{}, {"aligned": True, "sampling_ratio": 2}, {"mode": "max", "spatial_scale": 0.7}])
def test_roi_align_is_the_operator_and_its_gradient(options):
    layer = RoIAlign((3, 2), **options)
    assert not layer.params and not layer.state
    x = normal(2, 3, 9, 10)
    np.testing.assert_array_equal(layer(x, BOXES)[0], pydeform.roi_align(x, BOXES, (3, 2), **options))
    check_gradients(layer, {"x": x}, lambda layer, x: layer(x, BOXES))


@pytest.mark.parametrize(("layer", "channels", "features"), DEFORMABLE)
def test_gradients_through_both_passes(layer, channels, features):
    maps = inputs(channels, features)
    report = check_gradients(layer, maps, lambda layer, **maps: layer(boxes=BOXES, **maps))
    assert set(report.checked) == {*maps, *layer.params}
    assert all(grad.any() for grad in layer.grads.values())


def test_each_pass_has_its_part_of_the_gradient():
    """Without the first pass' part the gradient of x would be the operator's, with the offsets held."""
    layer, x = roi(modulated=True), normal(2, 3, 9, 10)
    offset, mask = layer.offset_and_mask(x, BOXES)
    y, backprop = layer(x, BOXES)
    second = pydeform.deform_roi_pool_backward(y, x, BOXES, offset, mask=mask, **layer.options).input
    first = backprop(y) - second
    assert np.abs(first).max() > 0.01 * np.abs(second).max()


@pytest.mark.parametrize(("layer", "channels", "features"), DEFORMABLE)
def test_used_twice_in_one_graph(layer, channels, features):
    """Two calls before the first backprop: each keeps its own arrays, and the gradients add up."""

    def twice(layer, **maps):
        y, backprop = layer(boxes=BOXES, **maps)
        z, backprop_z = layer(boxes=BOXES[::-1] + np.array([0, 0.11, 0, 0.07, 0]), **maps)

        def both(grad):
            grads = as_dict(maps, backprop(grad)), as_dict(maps, backprop_z(grad))
            summed = tuple(grads[0][name] + grads[1][name] for name in maps)
            return summed if len(summed) > 1 else summed[0]

        return y + z, both

    check_gradients(layer, inputs(channels, features), twice)


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("options", [{}, {"sampling_ratio": 3, "spatial_scale": 0.5, "gamma": 0.2}])
def test_deform_roi_pool_starts_as_the_plain_pooling(modulated, options):
    layer = DeformRoIPool((3, 2), 3, hidden=8, modulated=modulated, rng=0, dtype=F8, **options)
    x = normal(2, 3, 9, 10)
    plain = pydeform.deform_roi_pool(x, BOXES, None, (3, 2), **options)
    np.testing.assert_array_equal(layer(x, BOXES)[0], plain / 2 if modulated else plain)


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("branch", [{}, {"hidden": 8}, {"feature_channels": 5}])
def test_deform_psroi_pool_starts_as_the_plain_pooling(modulated, branch):
    layer = DeformPSRoIPool(4, 3, group_size=2, classes=2, modulated=modulated, **branch, rng=0, dtype=F8)
    maps = inputs(16, branch.get("feature_channels"))
    options = {"output_dim": 4, "pooled_size": 3, "group_size": 2, "sample_per_part": 4}
    plain = pydeform.deform_psroi_pool(maps["x"], BOXES, **options)
    expected = plain / 2 if modulated else plain  # channels are summed in other groups when there are more classes
    np.testing.assert_allclose(layer(boxes=BOXES, **maps)[0], expected, rtol=0, atol=1e-13)


def test_deform_roi_pool_is_mmcvs_pack():
    """DeformRoIPoolPack and ModulatedDeformRoIPoolPack, written out; the parameters have their numbers and shapes."""
    layer, x = roi(modulated=True), normal(2, 3, 9, 10)
    fc = layer.params
    assert fc["offset.0.weight"].shape == (7, 18) and fc["offset.4.weight"].shape == (12, 7)
    assert list(fc) == [f"offset.{n}.{p}" for n in (0, 2, 4) for p in ("weight", "bias")] + [
        f"mask.{n}.{p}" for n in (0, 2) for p in ("weight", "bias")
    ]
    options = {"output_size": (3, 2), "sampling_ratio": 2, "gamma": 0.1}

    def linear(rows, name):
        return rows @ fc[f"{name}.weight"].T + fc[f"{name}.bias"]

    flat = pydeform.deform_roi_pool(x, BOXES, **options).reshape(3, -1)
    hidden = np.maximum(linear(np.maximum(linear(flat, "offset.0"), 0), "offset.2"), 0)
    offset = linear(hidden, "offset.4").reshape(3, 2, 3, 2)
    mask = 1 / (1 + np.exp(-linear(np.maximum(linear(flat, "mask.0"), 0), "mask.2").reshape(3, 1, 3, 2)))
    expected = pydeform.deform_roi_pool(x, BOXES, offset, **options) * mask
    np.testing.assert_allclose(layer(x, BOXES)[0], expected, rtol=1e-13)
    for found, value in zip(layer.offset_and_mask(x, BOXES), (offset, mask), strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-13)


def test_the_fully_connected_branch_is_the_papers():
    """The first paper's Faster R-CNN head; with hidden layers and a mask the second paper's DCNPooling."""
    x = normal(2, 4, 9, 10)
    common = {"output_dim": 4, "pooled_size": 3, "sample_per_part": 2}
    flat = pydeform.deform_psroi_pool(x, BOXES, **common).reshape(3, -1)
    layer = psroi()
    trans = (flat @ layer.params["offset.weight"].T + layer.params["offset.bias"]).reshape(3, 2, 3, 3)
    expected = pydeform.deform_psroi_pool(x, BOXES, trans, trans_std=0.3, **common)
    np.testing.assert_allclose(layer(x, BOXES)[0], expected, rtol=1e-13)

    layer = psroi(hidden=6, modulated=True)
    for name in ("offset.0", "offset.2", "offset.4"):
        flat = flat @ layer.params[f"{name}.weight"].T + layer.params[f"{name}.bias"]
        flat = flat if name == "offset.4" else np.maximum(flat, 0)
    x_y_mask = flat.reshape(3, 3, 3, 3)  # what its chunk(3) separates
    pooled = pydeform.deform_psroi_pool(x, BOXES, x_y_mask[:, :2], trans_std=0.3, **common)
    np.testing.assert_allclose(layer(x, BOXES)[0], pooled / (1 + np.exp(-x_y_mask[:, 2:])), rtol=1e-12)


def test_the_convolutional_branch_is_the_papers():
    """The first paper's R-FCN head: offset maps by a 1x1 convolution, pooled without offsets into trans."""
    layer = psroi(classes=2, group_size=3, feature_channels=5)
    x, features = inputs(36, 5).values()
    maps = pydeform.conv2d(features, layer.params["offset.weight"], layer.params["offset.bias"])
    assert maps.shape == (2, 2 * 2 * 9, 9, 10)
    common = {"pooled_size": 3, "group_size": 3, "sample_per_part": 2}
    trans = pydeform.deform_psroi_pool(maps, BOXES, output_dim=4, **common)
    expected = pydeform.deform_psroi_pool(x, BOXES, trans, output_dim=4, part_size=3, trans_std=0.3, **common)
    np.testing.assert_array_equal(layer(x, BOXES, features)[0], expected)
    np.testing.assert_array_equal(layer.trans_and_mask(x, BOXES, features)[0], trans)
    assert layer.trans_and_mask(x, BOXES, features)[1] is None


@pytest.mark.parametrize(
    ("layer", "channels", "features"), [pytest.param(RoIAlign(3), 3, None, id="align"), *DEFORMABLE]
)
def test_without_train_the_same_numbers_and_nothing_kept(layer, channels, features):
    maps = inputs(channels, features)
    before = {name: array.copy() for name, array in maps.items()}
    y, backprop = layer(boxes=BOXES, **maps, train=False)
    np.testing.assert_array_equal(y, layer(boxes=BOXES, **maps)[0])
    for name, array in maps.items():
        np.testing.assert_array_equal(array, before[name])
    with pytest.raises(RuntimeError, match=f"{layer.name}: nothing was kept for backprop"):
        backprop(y)
    assert {type(cell.cell_contents) for cell in backprop.__closure__} == {str}


@pytest.mark.parametrize(
    ("layer", "channels", "features"), [pytest.param(RoIAlign(3), 3, None, id="align"), *DEFORMABLE]
)
def test_no_boxes(layer, channels, features):
    maps = inputs(channels, features)
    y, backprop = layer(boxes=np.zeros((0, 5)), **maps)
    assert y.shape[0] == 0 and y.size == 0
    layer.zero_grads()
    for name, grad in as_dict(maps, backprop(y)).items():
        np.testing.assert_array_equal(grad, np.zeros_like(maps[name]))
    assert not any(grad.any() for grad in layer.grads.values())


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_other_dtypes(dtype):
    boxes = BOXES.astype(dtype)
    for layer, maps in (
        (DeformRoIPool(3, 3, hidden=8, modulated=True, rng=0, dtype=dtype), inputs(3, dtype=dtype)),
        (DeformPSRoIPool(4, 3, classes=2, feature_channels=5, modulated=True, dtype=dtype), inputs(4, 5, dtype=dtype)),
    ):
        y, backprop = moved(layer)(boxes=boxes, **maps)
        grads = backprop(y)
        found = (y, *(grads if isinstance(grads, tuple) else (grads,)), *layer.params.values(), *layer.grads.values())
        assert {array.dtype for array in found} == {np.dtype(dtype)}


def test_rng_decides_the_hidden_layers():
    for build in (
        lambda rng: DeformRoIPool(2, 3, hidden=4, rng=rng),
        lambda rng: DeformPSRoIPool(4, 2, hidden=4, rng=rng),
    ):
        a, b, c = build(1), build(np.random.default_rng(1)), build(2)
        np.testing.assert_array_equal(a.params["offset.0.weight"], b.params["offset.0.weight"])
        assert (a.params["offset.0.weight"] != c.params["offset.0.weight"]).any()
        assert (a.params["offset.2.weight"] != a.params["offset.0.weight"].mean()).all()


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize(
    "build",
    [lambda: roi(modulated=True), lambda: psroi(hidden=6), lambda: psroi(feature_channels=5), lambda: RoIAlign(3)],
)
def test_save_and_load(tmp_path, suffix, build):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    a, b = build(), build()
    for param in b.params.values():
        param[...] = 7
    kept = dict(b.params)
    layers.save(a, tmp_path / f"layer{suffix}")
    layers.load(b, tmp_path / f"layer{suffix}")
    for name, param in a.params.items():
        np.testing.assert_array_equal(b.params[name], param)
        assert b.params[name] is kept[name]
    if isinstance(b, DeformRoIPool):  # and its branches compute with what was loaded
        np.testing.assert_array_equal(b(inputs(3)["x"], BOXES)[0], a(inputs(3)["x"], BOXES)[0])


class Head(Layer):
    """A convolution and a deformable RoI pooling behind it, as a detector would hold them."""

    def __init__(self):
        super().__init__()
        self.conv, self.roi = Conv2d(2, 3, 3, padding=1, rng=0), DeformRoIPool(2, 3, hidden=4, modulated=True, rng=0)
        for name, layer in (("conv", self.conv), ("roi", self.roi)):
            self.params |= {f"{name}.{own}": array for own, array in layer.params.items()}
            self.grads |= {f"{name}.{own}": array for own, array in layer.grads.items()}


@pytest.mark.parametrize("layer", [Head(), roi(), psroi(), psroi(hidden=6), psroi(feature_channels=5)])
def test_lr_mult_reaches_the_offset_branch_only(layer):
    factors = SGD(layer, lr=1, lr_mult={"*offset.*": 0.01}).factors
    assert {name for name, factor in factors.items() if factor == 0.01} == {n for n in layer.params if "offset." in n}
    assert set(factors.values()) <= {1, 0.01} and 0.01 in factors.values()


def blobs():
    """Two images with a bright spot each, and boxes around it whose upper left quarter sees little of it."""
    y, x = np.mgrid[:16, :16]
    images = [np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 8) for cy, cx in ((8.3, 7.2), (9.1, 9.4))]
    return np.stack(images)[:, None], np.array([[0, 4, 3, 13, 12.0], [1, 4, 5, 13, 14.0]])


@pytest.mark.parametrize(
    "layer",
    [
        DeformRoIPool(2, 1, hidden=8, rng=0, dtype=F8),
        DeformPSRoIPool(1, 2, hidden=8, rng=0, dtype=F8),
        DeformPSRoIPool(1, 2, dtype=F8),
        DeformPSRoIPool(1, 2, feature_channels=1, dtype=F8),
    ],
)
def test_training_the_branch_alone_moves_the_bins_to_the_spot(layer):
    """Nothing else can learn: the input is given, and the layer has no parameters but those of its branch."""
    x, boxes = blobs()
    maps = {"x": x} | ({"features": x} if getattr(layer, "feature_channels", None) else {})
    optimizer = SGD(layer, lr=1.0)
    seen = []
    for _ in range(30):
        y, backprop = layer(boxes=boxes, **maps)
        seen.append(float(y[:, 0, 0, 0].mean()))
        grad = np.zeros_like(y)
        grad[:, :, 0, 0] = -1  # loss: minus what the upper left bins see
        layer.zero_grads()
        backprop(grad)
        optimizer.step()
    assert seen[-1] > 3 * seen[0]


X = normal(2, 4, 9, 10)
REFUSED = [
    (lambda: roi()(X, BOXES), ValueError,
     r"DeformRoIPool: x must have shape \(N, in_channels, H, W\) = \(N, 3, H, W\), got \(2, 4, 9, 10\)"),
    (lambda: roi()(X[:, :3].astype(np.float32), BOXES), TypeError,
     r"DeformRoIPool: x must have the dtype of the parameters, float64, got float32"),
    (lambda: roi()(X[:, :3], BOXES[:, 1:]), ValueError,
     r"deform_roi_pool: boxes must have shape \(R, 5\), .* got \(3, 4\)"),
    (lambda: roi()(X[:, :3], BOXES)[1](np.ones((3, 3, 2, 2))), ValueError,
     r"DeformRoIPool: grad_y must have the shape of y, \(3, 3, 3, 2\), got \(3, 3, 2, 2\)"),
    (lambda: DeformRoIPool(0, 3), ValueError, r"DeformRoIPool: output_size must be an int >= 1 or 2 of them, got 0"),
    (lambda: DeformRoIPool(3, 0), ValueError, r"DeformRoIPool: in_channels must be an int >= 1, got 0"),
    (lambda: DeformRoIPool(3, 3, gamma=np.nan), ValueError, r"DeformRoIPool: gamma must be a finite number, got nan"),
    (lambda: psroi(group_size=2)(X, BOXES), ValueError,
     r"DeformPSRoIPool: x must have shape \(N, output_dim\*group_size\*\*2, H, W\) = \(N, 16, H, W\), got \(2, 4, "),
    (lambda: psroi()(X, BOXES, X), TypeError,
     r"DeformPSRoIPool: features must be None without feature_channels, got an argument"),
    (lambda: psroi(feature_channels=5)(X, BOXES), TypeError,
     r"DeformPSRoIPool: features must be an array with feature_channels, got None"),
    (lambda: psroi(feature_channels=5)(X, BOXES, X), ValueError,
     r"DeformPSRoIPool: features must have shape \(N, feature_channels, H, W\) = \(2, 5, 9, 10\), got \(2, 4, 9, 10\)"),
    (lambda: psroi(feature_channels=4)(X, BOXES, X.astype(np.float32)), TypeError,
     r"DeformPSRoIPool: features must have the dtype of x, float64, got float32"),
    (lambda: psroi()(X, BOXES)[1](np.ones(3)), ValueError,
     r"DeformPSRoIPool: grad_y must have the shape of y, \(3, 4, 3, 3\), got \(3,\)"),
    (lambda: psroi(classes=3), ValueError, r"DeformPSRoIPool: output_dim must be a multiple of classes = 3, got 4"),
    (lambda: psroi(part_size=2, modulated=True), ValueError,
     r"DeformPSRoIPool: part_size must be pooled_size = 3 when modulated, got 2"),
    (lambda: psroi(hidden=4, feature_channels=5), ValueError,
     r"DeformPSRoIPool: hidden must be None with feature_channels, got 4"),
    (lambda: RoIAlign(3)(X[0], BOXES), ValueError, r"RoIAlign: x must have shape \(N, C, H, W\), got \(4, 9, 10\)"),
    (lambda: RoIAlign(3, spatial_scale=0), ValueError, r"RoIAlign: spatial_scale must be a finite number > 0, got 0"),
    (lambda: RoIAlign(3, mode="sum"), ValueError, r"RoIAlign: mode must be one of 'avg', 'max', got 'sum'"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_errors_name_layer_argument_expected_and_got(call, error, message):
    with pytest.raises(error, match=message):
        call()


BAD = [
    (lambda: RoIAlign(3, sampling_ratio=1.5), TypeError, "RoIAlign: sampling_ratio must be an int >= -1, got 1.5"),
    (lambda: RoIAlign(3, sampling_ratio=-2), ValueError, "RoIAlign: sampling_ratio must be an int >= -1, got -2"),
    (lambda: RoIAlign(3, aligned="yes"), TypeError, "RoIAlign: aligned must be True or False, got 'yes'"),
    (lambda: RoIAlign((3, 0)), ValueError, "RoIAlign: output_size must be an int >= 1 or 2 of them"),
    (lambda: DeformRoIPool(3, 3, np.inf), ValueError, "DeformRoIPool: spatial_scale must be a finite number > 0"),
    (lambda: DeformRoIPool(3, 3, sampling_ratio=None), TypeError, "DeformRoIPool: sampling_ratio must be an int >= -1"),
    (lambda: DeformRoIPool(3, 3, hidden=0), ValueError, "DeformRoIPool: hidden must be an int >= 1, got 0"),
    (lambda: DeformRoIPool(3, 3, modulated=1), TypeError, "DeformRoIPool: modulated must be True or False, got 1"),
    (lambda: DeformRoIPool(3, 3, dtype=int), TypeError, "DeformRoIPool: dtype must be float64, .*, got int64"),
    (lambda: DeformRoIPool(3, 3, rng="x"), TypeError, "DeformRoIPool: rng must be a numpy.random.Generator or"),
    (lambda: DeformPSRoIPool(4, 3, sample_per_part=0), ValueError, "DeformPSRoIPool: sample_per_part must be an int"),
    (lambda: DeformPSRoIPool(4, 3.5), TypeError, "DeformPSRoIPool: pooled_size must be an int >= 1, got 3.5"),
    (lambda: DeformPSRoIPool(4, trans_std=np.nan), ValueError, "DeformPSRoIPool: trans_std must be a finite number"),
    (lambda: DeformPSRoIPool(4, spatial_scale=0), ValueError, "DeformPSRoIPool: spatial_scale must be a finite"),
    (lambda: DeformPSRoIPool(4, hidden=-1), ValueError, "DeformPSRoIPool: hidden must be an int >= 1, got -1"),
    (lambda: DeformPSRoIPool(4, feature_channels=0), ValueError, "DeformPSRoIPool: feature_channels must be an int"),
    (lambda: DeformPSRoIPool(4, modulated=None), TypeError, "DeformPSRoIPool: modulated must be True or False"),
    (lambda: DeformPSRoIPool(4, dtype="f1"), TypeError, "DeformPSRoIPool: dtype must be float64, .*, got 'f1'"),
    (lambda: DeformPSRoIPool(4, hidden=5, rng=-1), ValueError, "DeformPSRoIPool: rng must be a numpy.random.Generator"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "error", "message"), BAD)
def test_bad_options_are_refused_when_the_layer_is_made(build, error, message):
    with pytest.raises(error, match=f"^{message}"):
        build()


def test_making_a_layer_draws_no_more_than_its_hidden_layers():
    """Layers made one after the other from one generator: the next one's weights depend on it."""
    rng = np.random.default_rng(0)
    DeformPSRoIPool(4, 2, feature_channels=5, rng=rng)
    assert rng.random() == np.random.default_rng(0).random()
