"""nn.Modules of pydeform.torch: their parameters are those of the modules that people have, and they compute the same.

Against the layers of NumPy arrays, whose gradients are written by hand, and modules of transformers.
"""

import math

import numpy as np
import pytest

import pydeform
from pydeform import layers, weights

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
import pydeform.torch as bridge  # noqa: E402

RNG = np.random.default_rng(0)


def some(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def randomised(module):
    """Every parameter: many start at zero, where mistakes do not show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in module.parameters():
            param += 0.3 * torch.randn(param.shape, generator=generator)
    return module


def close(got, want):
    got, want = np.asarray(got), np.asarray(want)
    largest = np.abs(want).max()
    assert largest > 0 and got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * largest)


def is_the_layer(module, layer, inputs, call=lambda layer, arrays: layer(*arrays), **keywords):
    """Same results and gradients with the same parameters, which go over as a state dict. `keywords`: the module's."""
    weights.load(layer, randomised(module).state_dict())
    tensors = [torch.tensor(array, requires_grad=array.dtype.kind == "f") for array in inputs]
    want, backprop = call(layer, inputs)
    got = module(*tensors, **keywords)
    grad = some(*want.shape)
    got.backward(torch.tensor(grad.reshape(got.shape)))
    close(got.detach().reshape(want.shape), want)
    grads = backprop(grad)
    for tensor, expected in zip(tensors, grads if isinstance(grads, tuple) else (grads,), strict=False):
        close(tensor.grad.reshape(expected.shape), expected)
    theirs = {name.replace("conv_offset.", "offset."): param for name, param in module.named_parameters()}
    assert theirs.keys() == layer.grads.keys()
    for name, expected in layer.grads.items():
        close(theirs[name].grad, expected)


# Deformable convolutions ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bias", [True, False])
def test_deform_conv2d(bias):
    module = randomised(bridge.DeformConv2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 2), groups=2, bias=bias))
    assert list(module.state_dict()) == ["weight", "bias"][: 1 + bias]
    assert module.weight.shape == (6, 2, 3, 2)
    x, offset, mask = some(2, 4, 7, 8), some(2, 24, 4, 6), some(2, 12, 4, 6)
    arrays = [param.detach().numpy() for param in module.parameters()] + ([] if bias else [None])
    for masks in ((), (mask,)):
        tensors = [torch.tensor(array, requires_grad=True) for array in (x, offset, *masks)]
        got = module(*tensors)
        options = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "mask": masks[0] if masks else None}
        close(got.detach(), pydeform.deform_conv2d(x, offset, *arrays, **options))
        grad = some(*got.shape)
        module.zero_grad()
        got.backward(torch.tensor(grad))
        grads = pydeform.deform_conv2d_backward(grad, x, offset, *arrays, **options)
        for tensor, name in zip(tensors, ("input", "offset", "mask"), strict=False):
            close(tensor.grad, getattr(grads, name))
        for name, param in module.named_parameters():
            close(param.grad, getattr(grads, name))


def test_deform_conv2d_starts_as_torchs_convolution():
    torch.manual_seed(0)
    plain = torch.nn.Conv2d(4, 6, 3, groups=2)
    torch.manual_seed(0)
    module = bridge.DeformConv2d(4, 6, 3, groups=2)
    assert torch.equal(module.weight, plain.weight) and torch.equal(module.bias, plain.bias)
    assert repr(module) == (
        "DeformConv2d(4, 6, kernel_size=(3, 3), stride=1, padding=0, dilation=1, groups=2, bias=True)"
    )


@pytest.mark.parametrize("modulated", [False, True])
def test_packs(modulated):
    kind = bridge.ModulatedDeformConv2dPack if modulated else bridge.DeformConv2dPack
    module = kind(4, 6, 3, stride=2, padding=1, groups=2, deform_groups=2)
    names = ["weight", "bias", "conv_offset.weight", "conv_offset.bias"]
    assert list(module.state_dict()) == (names if modulated else names[:1] + names[2:])
    assert module.conv_offset.weight.shape == (54 if modulated else 36, 4, 3, 3)
    options = {"stride": 2, "padding": 1, "groups": 2, "offset_groups": 2, "bias": modulated}
    layer = layers.DeformConv2d(4, 6, 3, modulated=modulated, boundary="dcnv2", rng=0, **options)
    is_the_layer(module, layer, [some(2, 4, 7, 8)])


def test_packs_start_at_the_plain_convolution():
    x = torch.tensor(some(1, 4, 6, 6))
    for kind, share in ((bridge.DeformConv2dPack, 1), (bridge.ModulatedDeformConv2dPack, 0.5)):
        module = kind(4, 6, 3, padding=1)
        bias = 0 if module.bias is None else module.bias[:, None, None]
        want = share * torch.nn.functional.conv2d(x, module.weight, padding=1) + bias
        torch.testing.assert_close(module(x), want, rtol=1e-4, atol=1e-5)


# Attention ------------------------------------------------------------------------------------------------------------
SHAPES = [(6, 4), (3, 2)]
NAMES = [f"{part}.{kind}" for part in ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
         for kind in ("weight", "bias")]  # fmt: skip


@pytest.mark.parametrize("numbers", [2, 4])
@pytest.mark.parametrize("is_padded", [False, True])
def test_ms_deform_attn(numbers, is_padded):
    module = bridge.MSDeformAttn(16, 2, 4, 3)
    assert list(module.state_dict()) == NAMES
    layer = layers.MSDeformAttn(16, 2, 4, 3, rng=0)
    reference = RNG.uniform(0.1, 0.9, (2, 5, 2, numbers)).astype(np.float32)
    padding = [RNG.random((2, 30)) < 0.3] if is_padded else []
    inputs = [some(2, 5, 16), reference, some(2, 30, 16), np.array(SHAPES), np.array([0, 24]), *padding]
    is_the_layer(module, layer, inputs, lambda layer, a: layer(*a[:3], SHAPES, *a[5:]))


def test_ms_deform_attn_starts_as_deformable_detrs():
    module, layer = bridge.MSDeformAttn(16, 2, 4, 3), layers.MSDeformAttn(16, 2, 4, 3, rng=0)
    for name, param in module.state_dict().items():
        if name.endswith("proj.weight"):
            limit = math.sqrt(6 / 32)
            assert 0.8 * limit < param.abs().max() <= limit
        else:
            np.testing.assert_allclose(param, layer.params[name], atol=1e-6)


# DCNv3 and DCNv4 ------------------------------------------------------------------------------------------------------
OF_DCNV3 = ["dw_conv.0.weight", "dw_conv.0.bias", "dw_conv.1.1.weight", "dw_conv.1.1.bias", "offset.weight",
            "offset.bias", "mask.weight", "mask.bias", "input_proj.weight", "input_proj.bias", "output_proj.weight",
            "output_proj.bias"]  # fmt: skip
OF_DCNV4 = ["offset_mask_dw.weight", "offset_mask_dw.bias", "offset_mask.weight", "offset_mask.bias",
            "value_proj.weight", "value_proj.bias", "output_proj.weight", "output_proj.bias"]  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"remove_center": True, "offset_scale": 0.5}, {"stride": 2}])
def test_dcnv3(options):
    module = bridge.DCNv3(8, group=2, dw_kernel_size=5, **options)
    assert list(module.state_dict()) == OF_DCNV3
    is_the_layer(module, layers.DCNv3(8, groups=2, dw_kernel_size=5, rng=0, **options), [some(2, 5, 6, 8)])


@pytest.mark.parametrize("options", [{}, {"remove_center": True, "offset_scale": 0.5}, {"dw_kernel_size": 3},
                                     {"without_pointwise": True}, {"output_bias": False}])  # fmt: skip
def test_dcnv4(options):
    module = bridge.DCNv4(8, group=2, **options)
    names = OF_DCNV4 if "dw_kernel_size" in options else OF_DCNV4[2:]
    names = names[:2] if "without_pointwise" in options else names[:-1] if "output_bias" in options else names
    assert list(module.state_dict()) == names
    theirs = {"projections": False} if "without_pointwise" in options else options
    layer = layers.DCNv4(8, groups=2, rng=0, **theirs)
    x = some(2, 30, 8)
    is_the_layer(module, layer, [x], lambda layer, a: layer(a[0].reshape(2, 5, 6, 8)), shape=(5, 6))
    square = module(torch.tensor(x[:, :25]))
    torch.testing.assert_close(square, module(torch.tensor(x[:, :25]), (5, 5)))


@pytest.mark.parametrize("kind", [bridge.DCNv3, bridge.DCNv4])
def test_center_feature_scale(kind):
    """A share of each group that goes past the operator: none, all, all of one group."""
    plain = randomised(kind(8, group=2))
    module = kind(8, group=2, center_feature_scale=True)
    missing = module.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing == ["center_feature_scale_proj_weight", "center_feature_scale_proj_bias"]
    assert module.center_feature_scale_proj_weight.shape == (2, 8)
    x = torch.tensor(some(1, 4, 4, 8))
    x = x if kind is bridge.DCNv3 else x.flatten(1, 2)
    module.output_proj.weight.data = plain.output_proj.weight.data = torch.eye(8)
    projected = module.output_proj((module.input_proj if kind is bridge.DCNv3 else module.value_proj)(x))
    bias = module.center_feature_scale_proj_bias.data
    for shares in ((0, 0), (1, 1), (1, 0), (0.5, 0.5)):
        bias[:] = torch.tensor([{0: -100.0, 0.5: 0.0, 1: 100.0}[share] for share in shares])
        share = torch.tensor(shares).repeat_interleave(4)
        torch.testing.assert_close(module(x), plain(x) * (1 - share) + projected * share, rtol=1e-4, atol=1e-5)
    bias[:] = 0
    module.center_feature_scale_proj_weight.data[0, 3] = 1
    module(x).sum().backward()
    assert module.center_feature_scale_proj_weight.grad.abs().min() > 0


def test_dcns_start_as_their_authors():
    module = bridge.DCNv3(8, group=2)
    for name in ("offset.weight", "offset.bias", "mask.weight", "mask.bias", "input_proj.bias", "output_proj.bias"):
        assert not module.get_parameter(name).any()
    assert module.input_proj.weight.abs().max() <= math.sqrt(6 / 16)
    assert not bridge.DCNv4(8, group=2).offset_mask.weight.any()


# Boxes ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("module", "operator", "options"),
    [
        (bridge.RoIAlign((3, 2), 0.5, 2, True), "roi_align",
         {"spatial_scale": 0.5, "sampling_ratio": 2, "aligned": True}),
        (bridge.RoIAlign(output_size=(3, 2), spatial_scale=0.5), "roi_align", {"spatial_scale": 0.5}),
        (bridge.RoIPool((3, 2), 0.5), "roi_pool", {"spatial_scale": 0.5}),
        (bridge.PSRoIAlign((3, 2), 0.5, 2), "ps_roi_align", {"spatial_scale": 0.5, "sampling_ratio": 2}),
        (bridge.PSRoIPool((3, 2), 0.5), "ps_roi_pool", {"spatial_scale": 0.5}),
        (bridge.RoIAlignRotated((3, 2), 0.5, 2), "roi_align_rotated", {"spatial_scale": 0.5, "sampling_ratio": 2}),
        (bridge.PrRoIPool((3, 2), 0.5), "prroi_pool", {"spatial_scale": 0.5}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_modules_of_boxes(module, operator, options):
    image = some(2, 12, 9, 8)
    boxes = [[0, 1, 2, 9.5, 12], [1, 3, 3, 14, 15]]
    boxes = np.array([[*row, 0.3] if operator == "roi_align_rotated" else row for row in boxes], np.float32)
    want = getattr(pydeform, operator)(image, boxes, (3, 2), **options)
    np.testing.assert_array_equal(module(torch.tensor(image), torch.tensor(boxes)), want)
    if operator != "roi_align_rotated":  # whose rows have an angle, so that none is without batch index
        by_image = [torch.tensor(boxes[:1, 1:]), torch.tensor(boxes[1:, 1:])]
        np.testing.assert_array_equal(module(torch.tensor(image), by_image), want)
    assert not list(module.parameters())
    assert repr(module).startswith(f"{type(module).__name__}(output_size=(3, 2), spatial_scale=0.5")


# All ------------------------------------------------------------------------------------------------------------------
def test_a_module_can_be_compiled_and_moved_to_another_dtype():
    module = randomised(bridge.ModulatedDeformConv2dPack(4, 6, 3, padding=1)).double()
    x = torch.tensor(some(1, 4, 6, 6)).double()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
    assert compiled(x).dtype == torch.float64


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bridge.DeformConv2d(3, 6, 3, groups=2),
         "DeformConv2d: in_channels must be a multiple of groups = 2, got 3"),
        (lambda: bridge.DeformConv2dPack(4, 3, 3, groups=2),
         "DeformConv2dPack: out_channels must be a multiple of groups = 2, got 3"),
        (lambda: bridge.DeformConv2d(4, 6, 0), "DeformConv2d: kernel_size must be an int >= 1 or 2 of them, got 0"),
        (lambda: bridge.MSDeformAttn(10, n_heads=4), "MSDeformAttn: d_model must be a multiple of n_heads = 4, got 10"),
        (lambda: bridge.DCNv3(10, group=4), "DCNv3: channels must be a multiple of group = 4, got 10"),
        (lambda: bridge.DCNv4(8, stride=2), "DCNv4: stride must be 1, as x has no other places for its offsets, got 2"),
        (lambda: bridge.DCNv4(8)(torch.ones(1, 30, 8)),
         "DCNv4: input must have shape (N, H*W, channels) = (1, 25, 8), got (1, 30, 8)"),
        (lambda: bridge.DCNv4(8)(torch.ones(1, 30, 8), (5, 7)),
         "DCNv4: input must have shape (N, H*W, channels) = (1, 35, 8), got (1, 30, 8)"),
    ],
)  # fmt: skip
def test_errors(make, message):
    with pytest.raises(ValueError) as raised:
        make()
    assert str(raised.value) == message
