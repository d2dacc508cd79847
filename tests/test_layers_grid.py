"""The spatial transformer layer: gradients through both ways, what it starts as, and that it learns a transform."""

import math

import ml_dtypes
import numpy as np
import pytest

import pydeform
from pydeform import layers
from pydeform.layers import Conv2d, Flatten, GlobalAvgPool2d, Linear, ReLU, Sequential, Sigmoid, SpatialTransformer
from pydeform.optim import SGD
from tests.reference import grid as reference
from tests.test_layers_gather import without_train
from tests.test_layers_roi import check_gradients, normal

F8 = np.float64
HALVES = [np.float16, ml_dtypes.bfloat16]


def network(dtype=F8, rng=0):
    return Sequential(Conv2d(3, 4, 3, rng=rng, dtype=dtype), Sigmoid(), GlobalAvgPool2d())


def transformer(localisation=None, dtype=F8, seed=0, **options):
    """Whose matrices depend on the input; no sample of the images below is on a pixel."""
    layer = SpatialTransformer(localisation or network(dtype), dtype=dtype, **options)
    layer.params["head.weight"][...] = 0.1 * normal(*layer.params["head.weight"].shape, seed=seed + 7)
    layer.params["head.bias"][...] += 0.1 * normal(*layer.params["head.bias"].shape, seed=seed + 8)
    return layer


def image(dtype=F8, seed=1):
    return normal(2, 3, 5, 6, seed=seed, dtype=dtype)


def volume(dtype=F8):
    return normal(2, 2, 3, 4, 5, seed=2, dtype=dtype)


def of_volume():
    return Sequential(Flatten(), Linear(120, 3, rng=4, dtype=F8), Sigmoid())


LAYERS = [
    pytest.param(transformer(), image, id="plain"),
    pytest.param(transformer(output_size=(4, 7), padding_mode="border", align_corners=True), image, id="border-size"),
    pytest.param(transformer(output_size=3, padding_mode="reflection", mode="bicubic"), image, id="bicubic"),
    pytest.param(transformer(Sequential(Flatten()), features=90), image, id="no-parameters-before-the-head"),
    pytest.param(transformer(of_volume(), axes=3, output_size=(2, 4, 3)), volume, id="volume"),
]


@pytest.mark.parametrize(("layer", "make"), LAYERS)
def test_gradients_through_grid_and_image(layer, make):
    report = check_gradients(layer, {"x": make()}, lambda layer, x: layer(x))
    assert set(report.checked) == {"x", *layer.params}
    assert all(grad.any() for grad in layer.grads.values())


@pytest.mark.parametrize(("layer", "make"), LAYERS)
def test_is_what_it_is_made_of(layer, make):
    """The oracle of the operators, on the matrices that the head's own equation gives."""
    x = make()
    features, _ = layer.localisation(x)
    theta = (features @ layer.params["head.weight"].T + layer.params["head.bias"]).reshape(
        2, layer.axes, layer.axes + 1
    )
    np.testing.assert_allclose(layer.theta(x), theta, rtol=1e-12, atol=1e-12)
    size = *x.shape[:2], *(layer.output_size or x.shape[2:])
    grid = reference.affine_grid(theta, size, layer.align_corners)
    np.testing.assert_allclose(layer(x)[0], reference.grid_sample(x, grid, **layer.options), rtol=1e-11, atol=1e-11)


def test_both_ways_have_their_part_of_the_gradient():
    layer, x = transformer(), image()
    y, backprop = layer(x)
    grid = pydeform.affine_grid(layer.theta(x), x.shape)
    through_image = pydeform.grid_sample_backward(y, x, grid).input
    through_theta = backprop(y) - through_image
    assert np.abs(through_theta).max() > 0.001 * np.abs(through_image).max()


@pytest.mark.parametrize("dtype", [F8, np.float32, *HALVES])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
def test_starts_as_the_identity(dtype, mode, align_corners):
    for padding_mode in ("zeros", "border", "reflection"):
        layer = SpatialTransformer(network(dtype), None, mode, padding_mode, align_corners, dtype=dtype)
        x = image(dtype)
        y, _ = layer(x)
        assert y.dtype == x.dtype
        tolerance = {8: 1e-13, 4: 1e-5}.get(x.dtype.itemsize, 0.02)
        np.testing.assert_allclose(y.astype(F8), x.astype(F8), rtol=tolerance, atol=tolerance)
        np.testing.assert_array_equal(layer.theta(x), np.repeat(np.eye(2, 3, dtype=dtype)[None], 2, 0))


def test_starts_as_the_identity_of_a_volume():
    layer = SpatialTransformer(of_volume(), axes=3, dtype=F8)
    assert layer.params["head.weight"].shape == (12, 3)
    np.testing.assert_allclose(layer(volume())[0], volume(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("half", HALVES)
def test_the_grid_of_halves_is_of_float32(half):
    """64 pixels in a row: their own numbers would not tell all of them apart."""
    layer = SpatialTransformer(Sequential(Conv2d(1, 2, 1, rng=0, dtype=half), GlobalAvgPool2d()), dtype=half)
    x = np.repeat(np.arange(64) % 2, 2)[None, None, None, 32:96].astype(half)
    y, backprop = layer(x)
    np.testing.assert_array_equal(y, x)
    assert backprop(y).dtype == half and layer.grads["head.bias"].dtype == half


def test_used_twice_in_one_graph():
    layer = transformer()
    twice = Sequential(layer, Sigmoid(), layer)
    assert list(twice.params) == [f"0.{name}" for name in layer.params]
    report = check_gradients(twice, {"x": image()}, lambda layer, x: layer(x))
    assert set(report.checked) == {"x", *twice.params}


@pytest.mark.parametrize(("layer", "make"), LAYERS)
def test_without_train(layer, make):
    without_train(layer, {"x": make()})


def test_no_images():
    layer = transformer(output_size=(4, 2))
    layer.zero_grads()
    y, backprop = layer(image()[:0])
    assert y.shape == (0, 3, 4, 2) and backprop(y).shape == (0, 3, 5, 6)
    assert not any(grad.any() for grad in layer.grads.values())


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_files(tmp_path, suffix):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    a, b, x = transformer(), transformer(network(rng=1), seed=9), image()
    assert (a(x)[0] != b(x)[0]).any()
    layers.save(a, tmp_path / f"layer{suffix}")
    layers.load(b, tmp_path / f"layer{suffix}")
    np.testing.assert_array_equal(b(x)[0], a(x)[0])
    names = ["localisation.0.weight", "localisation.0.bias", "head.weight", "head.bias"]
    assert list(a.params) == names == list(b.grads)


# Training -------------------------------------------------------------------------------------------------------------


def waves(rng, transform, size=16):
    """Eight smooth pictures, and the same under the inverse of a transform of their coordinates."""
    frequency, phase = rng.uniform(-3, 3, (8, 1, 3, 2)), rng.uniform(0, 7, (8, 1, 3, 1, 1))
    centres = (2 * np.arange(size) + 1) / size - 1
    place = np.stack(np.meshgrid(centres, centres), -1)
    back = (place - transform[:, 2]) @ np.linalg.inv(transform[:, :2]).T

    def at(place):
        return np.cos(np.einsum("bcki,hwi->bckhw", frequency, place) + phase).sum(2)

    return at(place), at(back)


@pytest.mark.parametrize(
    "transform",
    [[[math.cos(0.4), -math.sin(0.4), 0], [math.sin(0.4), math.cos(0.4), 0]], [[1, 0, 0.25], [0, 1, -0.2]]],
    ids=["rotation", "shift"],
)
def test_learns_to_undo_a_transform(transform):
    """From nothing but how far the middle of the picture is from the one that it was made of."""
    transform = np.array(transform)
    wanted, x = waves(np.random.default_rng(5), transform)
    localisation = Sequential(Conv2d(1, 3, 3, rng=0, dtype=F8), ReLU(), GlobalAvgPool2d())
    layer = SpatialTransformer(localisation, padding_mode="border", dtype=F8)
    optimiser = SGD(layer, 0.05, momentum=0.8)
    middle, losses = np.s_[:, :, 3:-3, 3:-3], []
    for _ in range(120):
        y, backprop = layer(x)
        away = np.zeros_like(y)
        away[middle] = (y - wanted)[middle]
        losses.append((away[middle] ** 2).mean())
        layer.zero_grads()
        backprop(2 * away / away[middle].size)
        optimiser.step()
    assert losses[-1] < 0.02 * losses[0], losses
    np.testing.assert_allclose(layer.theta(x), np.broadcast_to(transform, (8, 2, 3)), atol=0.15)


# Arguments ------------------------------------------------------------------------------------------------------------

BAD = [
    (lambda: SpatialTransformer(ReLU), TypeError, "localisation must be a Layer, got <class"),
    (lambda: SpatialTransformer(Flatten()), ValueError, "features must be given, localisation has no weight"),
    (lambda: SpatialTransformer(network(), features=0), ValueError, "features must be"),
    (lambda: SpatialTransformer(network(), axes=1), ValueError, "axes must be 2 or 3, got 1"),
    (lambda: SpatialTransformer(network(), axes=2.0), ValueError, r"axes must be 2 or 3, got 2\.0"),
    (lambda: SpatialTransformer(network(), axes=3, mode="bicubic"), ValueError, "mode 'bicubic' needs axes 2, got 3"),
    (lambda: SpatialTransformer(network(), 0), ValueError, "output_size must be"),
    (lambda: SpatialTransformer(network(), (3, 4, 5)), ValueError, "output_size must be"),
    (lambda: SpatialTransformer(network(), mode="linear"), ValueError, "mode must be .*'linear'"),
    (lambda: SpatialTransformer(network(), padding_mode="wrap"), ValueError, "padding_mode must be .*'wrap'"),
    (lambda: SpatialTransformer(network(), align_corners=1), TypeError, "align_corners must be True or False, got 1"),
    (lambda: SpatialTransformer(network(), dtype=int), TypeError, "dtype must be"),
    (lambda: transformer()(image()[0]), ValueError, r"x must have shape \(N, C, H, W\).*got \(3, 5, 6\)"),
    (lambda: transformer()(image(np.float32)), TypeError, "x must .*float64.*float32"),
    (lambda: transformer()(image())[1](image()[1:]), ValueError, r"grad_y must have the shape of y, \(2, 3, 5, 6\)"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=f"^SpatialTransformer: {message}"):
        call()


def test_features_that_do_not_fit():
    """The last weight's rows are not always what localisation gives."""
    layer = SpatialTransformer(Sequential(Conv2d(3, 4, 3, rng=0, dtype=F8), Flatten()), dtype=F8)
    with pytest.raises(ValueError, match=r"Linear: x must have shape \(N, in_features\) = \(N, 4\), got \(2, 48\)"):
        layer(image())


def test_repr():
    assert repr(SpatialTransformer(Sequential(Flatten()), 3, features=5, mode="nearest")) == (
        "SpatialTransformer(localisation=Sequential(\n  0: Flatten()\n), output_size=(3, 3), mode=nearest, features=5)"
        ": 36 parameters"
    )
