"""Layers of attention and of DCNv3 and DCNv4: gradients, what they start as, and that they are what the papers say."""

import math

import ml_dtypes
import numpy as np
import pytest

import pydeform
from pydeform import layers
from pydeform.layers import DCNv3, DCNv4, MSDeformAttn
from pydeform.layers.dcn import _normal_cdf, _NormGelu
from pydeform.optim import SGD
from tests.test_layers_roi import as_dict, check_gradients, normal

F8 = np.float64
LEVELS = (4, 3), (2, 5)
PIXELS = 22


def moved(layer, seed=0):
    """Offsets and masks that depend on the input, and biases that are not zero."""
    for place, param in enumerate(layer.params.values()):
        if not param.any():
            param[...] = 0.3 * normal(*param.shape, seed=100 * seed + place)
    return layer


def attention(points=3, **options):
    return moved(MSDeformAttn(8, 2, 2, points, **{"rng": 0, "dtype": F8, **options}))


def dcnv3(channels=8, **options):
    return moved(DCNv3(channels, **{"groups": 2, "rng": 0, "dtype": F8, **options}))


def dcnv4(channels=8, **options):
    return moved(DCNv4(channels, **{"groups": 2, "rng": 0, "dtype": F8, **options}))


def arrays(numbers=2, levels=1, dtype=F8):
    """Of MSDeformAttn: five queries in two images, points or boxes."""
    reference = np.random.default_rng(3).uniform(0.2, 0.8, (2, 5, levels, numbers))
    return {
        "query": normal(2, 5, 8, seed=1, dtype=dtype),
        "reference_points": reference.astype(dtype),
        "input": normal(2, PIXELS, 8, seed=2, dtype=dtype),
    }


PADDING = np.random.default_rng(4).random((2, PIXELS)) < 0.3
# layer -> numbers and levels of its reference points, padding_mask
ATTENTION = [
    pytest.param(attention(), 2, 1, None, id="points"),
    pytest.param(attention(4), 4, 2, PADDING, id="boxes-padding"),
    pytest.param(attention((3, 1), offset_scale=0.7), 4, 1, None, id="boxes-ragged"),
    pytest.param(attention((1, 2), projections=False), 2, 2, PADDING, id="ragged-levels-no-projections-padding"),
]
DCN = [
    pytest.param(dcnv3(), id="v3"),
    pytest.param(dcnv3(6, kernel_size=(3, 5), stride=(2, 1), padding=(1, 2), offset_scale=0.7, dw_kernel_size=5),
                 id="v3-sizes"),
    pytest.param(dcnv3(9, groups=3, padding="same", dilation=2, remove_center=True), id="v3-no-centre"),
    pytest.param(dcnv4(), id="v4"),
    pytest.param(dcnv4(6, stride=(1, 2), dw_kernel_size=3, output_bias=False), id="v4-depthwise-stride"),
    pytest.param(dcnv4(kernel_size=5, stride=2, padding=2, projections=False, remove_center=True), id="v4-alone"),
]  # fmt: skip


def image(layer, dtype=F8):
    return normal(2, 5, 6, layer.channels, seed=1, dtype=dtype)


# Gradients and what a call keeps -------------------------------------------------------------------------------------
@pytest.mark.parametrize(("layer", "numbers", "levels", "padding"), ATTENTION)
def test_gradients_of_attention(layer, numbers, levels, padding):
    maps = arrays(numbers, levels)
    report = check_gradients(
        layer, maps, lambda layer, **maps: layer(**maps, spatial_shapes=LEVELS, padding_mask=padding)
    )
    assert set(report.checked) == {*maps, *layer.params}
    assert all(grad.any() for grad in layer.grads.values())


def test_gradients_of_discrete_attention():
    layer, maps = attention((3, 2), method="discrete"), arrays()
    reference = maps.pop("reference_points")

    def call(layer, query, input):
        y, backprop = layer(query, reference, input, LEVELS)

        def both(grad):
            grad_query, grad_reference, grad_input = backprop(grad)
            assert grad_reference is None
            return grad_query, grad_input

        return y, both

    check_gradients(layer, maps, call)
    assert {name for name, grad in layer.grads.items() if not grad.any()} == {
        "sampling_offsets.weight", "sampling_offsets.bias",
    }  # fmt: skip


@pytest.mark.parametrize("layer", DCN)
def test_gradients_of_dcn(layer):
    report = check_gradients(layer, {"x": image(layer)}, lambda layer, x: layer(x))
    assert set(report.checked) == {"x", *layer.params}
    assert all(grad.any() for grad in layer.grads.values())


def test_attention_used_twice_in_one_graph():
    """Two calls before the first backprop: each keeps its own arrays, and the gradients add up."""

    def twice(layer, **maps):
        y, backprop = layer(**maps, spatial_shapes=LEVELS)
        z, backprop_z = layer(maps["query"][:, ::-1], maps["reference_points"], maps["input"], LEVELS)

        def both(grad):
            first, second = backprop(grad), backprop_z(grad)
            return first[0] + second[0][:, ::-1], first[1] + second[1], first[2] + second[2]

        return y + z, both

    check_gradients(attention(), arrays(), twice)


@pytest.mark.parametrize("layer", [dcnv3(), dcnv4()])
def test_dcn_used_twice_in_one_graph(layer):
    twice = layers.Sequential(layer, layers.Sigmoid(), layer)
    assert list(twice.params) == [f"0.{name}" for name in layer.params]
    check_gradients(twice, {"x": image(layer)}, lambda layer, x: layer(x))


def without_train(layer, given, **others):
    before = {name: array.copy() for name, array in given.items()}
    y, backprop = layer(**given, **others, train=False)
    np.testing.assert_array_equal(y, layer(**given, **others)[0])
    for name, array in given.items():
        np.testing.assert_array_equal(array, before[name])
    with pytest.raises(RuntimeError, match=f"{layer.name}: nothing was kept for backprop"):
        backprop(y)
    assert {type(cell.cell_contents) for cell in backprop.__closure__} == {str}


@pytest.mark.parametrize(("layer", "numbers", "levels", "padding"), ATTENTION)
def test_attention_without_train(layer, numbers, levels, padding):
    without_train(layer, arrays(numbers, levels), spatial_shapes=LEVELS, padding_mask=padding)


@pytest.mark.parametrize("layer", DCN)
def test_dcn_without_train(layer):
    without_train(layer, {"x": image(layer)})


@pytest.mark.parametrize("empty", ["images", "queries"])
def test_attention_of_nothing(empty):
    maps = {name: array[:0] if empty == "images" else array for name, array in arrays().items()}
    if empty == "queries":
        maps = {name: array if name == "input" else array[:, :0] for name, array in maps.items()}
    layer = attention()
    layer.zero_grads()
    y, backprop = layer(**maps, spatial_shapes=LEVELS)
    assert y.shape == maps["query"].shape
    for name, grad in as_dict(maps, backprop(y)).items():
        np.testing.assert_array_equal(grad, np.zeros_like(maps[name]))
    assert not any(grad.any() for grad in layer.grads.values())


@pytest.mark.parametrize("layer", [dcnv3(), dcnv4(), dcnv4(dw_kernel_size=3)])
def test_dcn_of_no_images(layer):
    layer.zero_grads()
    y, backprop = layer(image(layer)[:0])
    assert y.shape == backprop(y).shape == (0, 5, 6, 8)
    assert not any(grad.any() for grad in layer.grads.values())


# What they compute ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("layer", "numbers", "levels", "padding"), ATTENTION)
def test_attention_written_out(layer, numbers, levels, padding):
    """With locations and weights stored, as the paper has it."""
    maps, p = arrays(numbers, levels), layer.params
    query, reference, input = maps.values()
    points = layer.options["points"]
    value = input @ p["value_proj.weight"].T + p["value_proj.bias"] if "value_proj.weight" in p else input
    if padding is not None:
        value = np.where(padding[..., None], 0, value)
    offsets = query @ p["sampling_offsets.weight"].T + p["sampling_offsets.bias"]
    logits = query @ p["attention_weights.weight"].T + p["attention_weights.bias"]
    offsets, weights = offsets.reshape(2, 5, 2, -1, 2), np.exp(logits.reshape(2, 5, 2, -1))
    weights /= weights.sum(axis=-1, keepdims=True)
    of_point = np.repeat([0, 1], points)
    reference = np.repeat(reference, 2 // levels, axis=2)[:, :, None, of_point]
    if numbers == 2:
        locations = reference + offsets / np.array(LEVELS)[of_point][:, ::-1]
    else:
        count = np.array(points)[of_point][:, None]
        locations = reference[..., :2] + offsets / count * reference[..., 2:] * layer.options["offset_scale"]
    y = pydeform.ms_deform_attn(value.reshape(2, PIXELS, 2, 4), LEVELS, locations, weights, points=points)
    if "output_proj.weight" in p:
        y = y @ p["output_proj.weight"].T + p["output_proj.bias"]
    np.testing.assert_allclose(layer(**maps, spatial_shapes=LEVELS, padding_mask=padding)[0], y, rtol=0, atol=1e-12)


def test_attention_starts_as_the_paper_says():
    layer = MSDeformAttn(16, 2, 4, (3, 1), rng=0, dtype=F8)
    assert [(name, param.shape) for name, param in layer.params.items()] == [
        ("sampling_offsets.weight", (32, 16)), ("sampling_offsets.bias", (32,)),
        ("attention_weights.weight", (16, 16)), ("attention_weights.bias", (16,)),
        ("value_proj.weight", (16, 16)), ("value_proj.bias", (16,)),
        ("output_proj.weight", (16, 16)), ("output_proj.bias", (16,)),
    ]  # fmt: skip
    bias = layer.params["sampling_offsets.bias"].reshape(4, 4, 2)
    steps = np.array([1, 2, 3, 1])
    right, down, left, up = ([1, 0], [0, 1], [-1, 0], [0, -1])
    np.testing.assert_allclose(bias, steps[:, None] * np.array([right, down, left, up])[:, None], atol=1e-12)
    eight = MSDeformAttn(16, 1, 8, 1, dtype=F8).params["sampling_offsets.bias"].reshape(8, 2)
    np.testing.assert_allclose(eight[1], [1, 1])
    for name in ("value_proj", "output_proj"):
        weight = layer.params[f"{name}.weight"]
        assert 0.9 < np.abs(weight).max() / math.sqrt(6 / 32) <= 1
        assert weight.std() == pytest.approx(0.25, rel=0.1)
    assert (layer.params["value_proj.weight"] != layer.params["output_proj.weight"]).any()
    still = [name for name, param in layer.params.items() if not param.any()]
    assert still == ["sampling_offsets.weight", "attention_weights.weight", "attention_weights.bias",
                     "value_proj.bias", "output_proj.bias"]  # fmt: skip


def test_padding_is_not_seen():
    layer, maps = attention(), arrays()
    y, backprop = layer(**maps, spatial_shapes=LEVELS, padding_mask=PADDING)
    grad_input = backprop(y)[2]
    assert not grad_input[PADDING].any() and grad_input[~PADDING].any(axis=1).sum() > 10
    maps["input"][PADDING] = np.inf
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(layer(**maps, spatial_shapes=LEVELS, padding_mask=PADDING)[0], y)


@pytest.mark.parametrize("shapes", [np.array(LEVELS), list(map(list, LEVELS)), np.array(LEVELS, np.int32)])
def test_spatial_shapes_of_every_kind(shapes):
    layer, maps = attention(), arrays()
    np.testing.assert_array_equal(layer(**maps, spatial_shapes=shapes)[0], layer(**maps, spatial_shapes=LEVELS)[0])


def gelu(x):
    return x * np.vectorize(math.erfc)(-x / math.sqrt(2)) / 2


@pytest.mark.parametrize("layer", DCN[:3])
def test_dcnv3_is_internimages_module(layer):
    """Written out; the parameters have its names and shapes, which its state_dict has in this order."""
    p, x = layer.params, image(layer)
    assert list(p) == [f"{name}.{kind}" for name in ("dw_conv.0", "dw_conv.1.1", "offset", "mask", "input_proj",
                                                     "output_proj") for kind in ("weight", "bias")]  # fmt: skip
    kernel = p["dw_conv.0.weight"].shape[2:]
    maps = pydeform.conv2d(
        x.transpose(0, 3, 1, 2), p["dw_conv.0.weight"], p["dw_conv.0.bias"], layer.options["stride"],
        (kernel[0] // 2, kernel[1] // 2), groups=layer.channels,
    ).transpose(0, 2, 3, 1)  # fmt: skip
    normed = (maps - maps.mean(axis=-1, keepdims=True)) / np.sqrt(maps.var(axis=-1, keepdims=True) + 1e-6)
    features = gelu(normed * p["dw_conv.1.1.weight"] + p["dw_conv.1.1.bias"])

    def linear(rows, name):
        return rows @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    mask = np.exp(linear(features, "mask"))
    per_point = mask.reshape(*mask.shape[:3], layer.groups, -1)
    per_point /= per_point.sum(axis=-1, keepdims=True)
    y = pydeform.dcnv3(linear(x, "input_proj"), linear(features, "offset"), mask, **layer.options)
    np.testing.assert_allclose(layer(x)[0], linear(y, "output_proj"), rtol=0, atol=1e-11)


@pytest.mark.parametrize("layer", DCN[3:])
def test_dcnv4_is_the_authors_module(layer):
    p, x = layer.params, image(layer)
    down, right = layer.options["stride"]

    def linear(rows, name):
        return rows @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0) if f"{name}.weight" in p else rows

    features = x[:, ::down, ::right]
    if "offset_mask_dw.weight" in p:
        first, rest = x.transpose(0, 3, 1, 2), {"groups": layer.channels}
        dw = pydeform.conv2d(first, p["offset_mask_dw.weight"], p["offset_mask_dw.bias"], (down, right), 1, **rest)
        features = dw.transpose(0, 2, 3, 1)
    y = pydeform.dcnv4(linear(x, "value_proj"), linear(features, "offset_mask"), **layer.options)
    np.testing.assert_allclose(layer(x)[0], linear(y, "output_proj"), rtol=0, atol=1e-12)


def test_dcn_starts_as_the_papers_say():
    x = normal(2, 5, 6, 16)
    layer = DCNv3(16, rng=0, dtype=F8)
    p = layer.params
    padded = np.pad(x @ p["input_proj.weight"].T, ((0, 0), (1, 1), (1, 1), (0, 0)))
    mean = sum(padded[:, i : i + 5, j : j + 6] for i in range(3) for j in range(3)) / 9
    np.testing.assert_allclose(layer(x)[0], mean @ p["output_proj.weight"].T, rtol=0, atol=1e-12)
    four = DCNv4(16, rng=0, dtype=F8)
    assert not four(x)[0].any()
    assert list(four.params) == [f"{name}.{kind}" for name in ("offset_mask", "value_proj", "output_proj")
                                 for kind in ("weight", "bias")]  # fmt: skip
    for made in (p, four.params):
        for name, param in made.items():
            assert param.any() == (name.endswith("weight") and not name.startswith(("offset", "mask")))
    assert np.abs(p["input_proj.weight"]).max() <= math.sqrt(6 / 32)


@pytest.mark.parametrize(("dtype", "atol"), [(np.float64, 2e-13), (np.float32, 2e-7)])
def test_gelu_is_exact(dtype, atol):
    x = np.concatenate([np.linspace(-9, 9, 4001), [-1e30, -40, -8.01, 8.01, 40, 1e30]]).astype(dtype)
    found = _normal_cdf(np, x)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, np.vectorize(math.erfc)(-x.astype(F8) / math.sqrt(2)) / 2, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_norm_and_gelu_on_a_device(backend, dtype):
    x, grad, found = normal(2, 3, 5, dtype=dtype), normal(2, 3, 5, seed=1, dtype=dtype), []
    for device in ("cpu", "cpu" if backend.on_cpu else "cuda"):
        layer, send = _NormGelu(5, dtype).to(device), np.asarray if device == "cpu" else backend.array
        y, backprop = layer(send(x))
        arrays = y, backprop(send(grad)), layer.grads["weight"], layer.grads["bias"]
        found.append([np.asarray(a) if device == "cpu" else backend.numpy(a) for a in arrays])
    for got, want in zip(*found, strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(
            got.astype(F8), want.astype(F8), rtol=1e-3 if dtype == np.float16 else 1e-5, atol=1e-5
        )


def test_norm_of_rows_that_are_not_finite():
    x = normal(3, 4)
    x[0, 1], x[1, 2] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        y, backprop = _NormGelu(4, F8)(x)
        grad = backprop(np.ones_like(y))
    assert np.isnan(y[:2]).all() and np.isnan(grad[:2]).all() and np.isfinite(y[2]).all()


# Other dtypes, files, optimisers -------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("build", [attention, dcnv3, dcnv4, lambda dtype: dcnv4(dw_kernel_size=3, dtype=dtype)])
def test_other_dtypes(build, dtype):
    """The numbers of float64 up to a few roundings of arrays between operators."""
    layer, exact = build(dtype=dtype), build(dtype=F8)
    for name, param in layer.params.items():
        exact.params[name][...] = param
    if layer.name == "MSDeformAttn":
        given = [*arrays(dtype=dtype).values(), LEVELS]
    else:
        given = [normal(2, 5, 6, 8, seed=1, dtype=dtype)]
    y, backprop = layer(*given)
    want, exact_backprop = exact(*(a if a is LEVELS else a.astype(F8) for a in given))
    grad = normal(*y.shape, seed=5, dtype=dtype)
    found, expected = backprop(grad), exact_backprop(grad.astype(F8))
    found, expected = (a if isinstance(a, tuple) else (a,) for a in (found, expected))
    pairs = [(y, want), *zip(found, expected, strict=True), *((layer.grads[n], exact.grads[n]) for n in layer.params)]
    unit = {np.float32: 2.0**-24, np.float16: 2.0**-11, ml_dtypes.bfloat16: 2.0**-8}[dtype]
    for got, value in pairs:
        assert got.dtype == dtype and got.shape == value.shape
        # of offsets that are rounded the slope may be that of the next pixel
        assert np.linalg.norm(got.astype(F8) - value) < 32 * unit * np.linalg.norm(value)


@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16])
def test_float32_reference_points_beside_half_types(half):
    layer = attention(dtype=half)
    maps = arrays(dtype=half) | {"reference_points": arrays(dtype=np.float32)["reference_points"]}
    y, backprop = layer(**maps, spatial_shapes=LEVELS)
    assert y.dtype == half
    assert [grad.dtype for grad in backprop(y)] == [half, np.float32, half]


MADE = [attention, dcnv3, lambda: dcnv3(remove_center=True), lambda: dcnv4(dw_kernel_size=3), dcnv4]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("build", MADE)
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
    given = [*arrays().values(), LEVELS] if a.name == "MSDeformAttn" else [image(a)]
    np.testing.assert_array_equal(b(*given)[0], a(*given)[0])  # it computes with what was loaded


@pytest.mark.parametrize("build", MADE)
def test_to_replaces_the_arrays_of_the_parts(backend, build):
    layer = build()
    before = {name: param.copy() for name, param in layer.params.items()}
    assert layer.to("cpu" if backend.on_cpu else "cuda") is layer
    part = layer.output_proj
    assert part.params["weight"] is layer.params["output_proj.weight"]
    assert part.grads["bias"] is layer.grads["output_proj.bias"]
    layer.to("cpu")
    for name, param in layer.params.items():
        np.testing.assert_array_equal(param, before[name])


def test_lr_mult_reaches_the_offsets_alone():
    factors = SGD(attention(), lr=1, lr_mult={"*sampling_offsets.*": 0.1}).factors
    assert {n for n, f in factors.items() if f == 0.1} == {"sampling_offsets.weight", "sampling_offsets.bias"}


@pytest.mark.parametrize("build", [MSDeformAttn, DCNv3, DCNv4, lambda rng: DCNv4(dw_kernel_size=3, rng=rng)])
def test_rng_decides_the_weights(build):
    a, b, c = build(rng=1), build(rng=np.random.default_rng(1)), build(rng=2)
    for name in a.params:
        np.testing.assert_array_equal(a.params[name], b.params[name])
    assert (a.params["output_proj.weight"] != c.params["output_proj.weight"]).any()
    rng = np.random.default_rng(0)
    MSDeformAttn(8, projections=False, rng=rng)
    assert rng.random() == np.random.default_rng(0).random()


REPRS = [
    (MSDeformAttn(8, 2, 2, (3, 3)), "MSDeformAttn(embed_dim=8, levels=2, heads=2, points=3): 468 parameters"),
    (MSDeformAttn(8, 3, 2, (3, 6, 3), projections=False, method="discrete", dtype=np.float16),
     "MSDeformAttn(embed_dim=8, levels=3, heads=2, points=(3, 6, 3), method=discrete, projections=False, "
     "dtype=float16): 648 parameters"),
    (DCNv3(8, groups=2), "DCNv3(channels=8, groups=2): 726 parameters"),
    (DCNv3(8, (3, 5), (2, 1), (1, 2), dw_kernel_size=5, groups=np.int64(2)),
     "DCNv3(channels=8, kernel_size=(3, 5), stride=(2, 1), padding=(1, 2), groups=2, dw_kernel_size=5): "
     "1,178 parameters"),
    (DCNv4(8, groups=2, remove_center=True, output_bias=False),
     "DCNv4(channels=8, groups=2, remove_center=True, output_bias=False): 568 parameters"),
]  # fmt: skip


@pytest.mark.parametrize(("layer", "text"), REPRS)
def test_repr_tells_sizes_and_counts(layer, text):
    assert repr(layer) == text


# Refused -------------------------------------------------------------------------------------------------------------
def call(**changed):
    return lambda: attention()(**{**arrays(), "spatial_shapes": LEVELS, **changed})


REFUSED = [
    (call(query=normal(2, 5, 7)), ValueError,
     r"MSDeformAttn: query must have shape \(N, Lq, embed_dim\) = \(2, 5, 8\), got \(2, 5, 7\)"),
    (call(query=normal(5, 8)), ValueError, r"MSDeformAttn: query must have shape \(N, Lq, embed_dim\), got \(5, 8\)"),
    (call(input=normal(2, 21, 8)), ValueError,
     r"MSDeformAttn: input must have shape \(N, S = sum of h\*w, embed_dim\) = \(2, 22, 8\), got \(2, 21, 8\)"),
    (call(input=normal(2, 22, 8, dtype=np.float32)), TypeError,
     r"MSDeformAttn: input must have the dtype of the parameters, float64, got float32"),
    (call(query=[1.0]), TypeError, r"MSDeformAttn: query must be a NumPy or CuPy array, got list"),
    (call(reference_points=None), TypeError, r"MSDeformAttn: reference_points must be a NumPy or CuPy array, got None"),
    (call(reference_points=normal(2, 5, 3, 2)), ValueError,
     r"reference_points must have shape \(N, Lq, 1 or L, 2 or 4\) = \(2, 5, 1 or 2, 2 or 4\), got \(2, 5, 3, 2\)"),
    (call(spatial_shapes=((4, 3),)), ValueError,
     r"MSDeformAttn: spatial_shapes must have shape \(levels, 2\) = \(2, 2\), got \(1, 2\)"),
    (call(spatial_shapes=(4, 3)), ValueError, r"MSDeformAttn: spatial_shapes must have shape \(L, 2\), rows \(h, w\)"),
    (call(padding_mask=PADDING[:, 1:]), ValueError,
     r"MSDeformAttn: padding_mask must have shape \(N, S\) = \(2, 22\), got \(2, 21\)"),
    (call(padding_mask=PADDING * 1.0), TypeError, r"MSDeformAttn: padding_mask must have dtype bool, got float64"),
    (lambda: attention()(*arrays().values(), LEVELS)[1](normal(2, 5, 7)), ValueError,
     r"MSDeformAttn: grad_y must have the shape of y, \(2, 5, 8\), got \(2, 5, 7\)"),
    (lambda: dcnv3()(normal(2, 5, 6, 9)), ValueError,
     r"DCNv3: x must have shape \(N, H, W, channels\) = \(N, H, W, 8\), got \(2, 5, 6, 9\)"),
    (lambda: dcnv4()(normal(2, 30, 8)), ValueError,
     r"DCNv4: x must have shape \(N, H, W, channels\) = \(N, H, W, 8\), got \(2, 30, 8\)"),
    (lambda: dcnv4()(normal(2, 5, 6, 8, dtype=np.float32)), TypeError,
     r"DCNv4: x must have the dtype of the parameters, float64, got float32"),
    (lambda: dcnv3()(image(dcnv3()))[1](np.ones(3)), ValueError,
     r"DCNv3: grad_y must have the shape of y, \(2, 5, 6, 8\), got \(3,\)"),
    (lambda: layers.Sequential(attention()), TypeError,
     r"Sequential: layer 0 must be one that is called with x and train alone, got MSDeformAttn"),
]  # fmt: skip


@pytest.mark.parametrize(("refused", "error", "message"), REFUSED)
def test_errors_name_layer_argument_expected_and_got(refused, error, message):
    with pytest.raises(error, match=message):
        refused()


BAD = [
    (lambda: MSDeformAttn(8, heads=3), ValueError, "MSDeformAttn: embed_dim must be a multiple of heads = 3, got 8"),
    (lambda: MSDeformAttn(0), ValueError, "MSDeformAttn: embed_dim must be an int >= 1, got 0"),
    (lambda: MSDeformAttn(8, 2.5), TypeError, "MSDeformAttn: levels must be an int >= 1, got 2.5"),
    (lambda: MSDeformAttn(8, 3, points=(3, 6)), ValueError, "MSDeformAttn: points must be an int >= 1 or 3 of them"),
    (lambda: MSDeformAttn(8, method="default"), ValueError, "MSDeformAttn: method must be one of 'bilinear', "),
    (lambda: MSDeformAttn(8, offset_scale=np.nan), ValueError, "MSDeformAttn: offset_scale must be a finite number"),
    (lambda: MSDeformAttn(8, projections=None), TypeError, "MSDeformAttn: projections must be True or False, got None"),
    (lambda: MSDeformAttn(8, dtype=int), TypeError, "MSDeformAttn: dtype must be float64, .*, got int64"),
    (lambda: MSDeformAttn(8, rng="x"), TypeError, "MSDeformAttn: rng must be a numpy.random.Generator or"),
    (lambda: DCNv3(6), ValueError, "DCNv3: channels must be a multiple of groups = 4, got 6"),
    (lambda: DCNv3(8, 5), ValueError, r"DCNv3: padding must be dilation\*\(kernel_size - 1\)/2 = \(2, 2\), .* got 1"),
    (lambda: DCNv4(8, 2), ValueError, r"DCNv4: padding must be dilation\*\(kernel_size - 1\)/2 = \(0.5, 0.5\), .* 1"),
    (lambda: DCNv3(8, stride=0), ValueError, "DCNv3: stride must be an int >= 1 or 2 of them, got 0"),
    (lambda: DCNv3(8, (3, 5), 1, (1, 2), remove_center=True), ValueError,
     r"DCNv3: remove_center needs a square kernel of odd size > 1, got kernel_size \(3, 5\)"),
    (lambda: DCNv4(8, 1, 1, 0, remove_center=True), ValueError,
     r"DCNv4: remove_center needs a square kernel of odd size > 1, got kernel_size \(1, 1\)"),
    (lambda: DCNv4(8, remove_center=1), TypeError, "DCNv4: remove_center must be True or False, got 1"),
    (lambda: DCNv3(8, dw_kernel_size=4), ValueError, "DCNv3: dw_kernel_size must be odd, got 4"),
    (lambda: DCNv4(8, offset_scale="1"), TypeError, "DCNv4: offset_scale must be a finite number, got '1'"),
    (lambda: DCNv4(8, output_bias=0), TypeError, "DCNv4: output_bias must be True or False, got 0"),
    (lambda: DCNv4(8, dtype=None), TypeError, "DCNv4: dtype must be float64"),
    (lambda: DCNv3(8, rng=-1), ValueError, "DCNv3: rng must be a numpy.random.Generator"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "error", "message"), BAD)
def test_bad_options_are_refused_when_the_layer_is_made(build, error, message):
    with pytest.raises(error, match=f"^{message}"):
        build()
