"""Detectors that nobody here wrote, of transformers: with our attention in place of theirs they compute the same.

They are small and random; nothing is downloaded.
"""

import importlib

import numpy as np
import pytest

import pydeform
from pydeform.layers import MSDeformAttn

torch = pytest.importorskip("torch", reason="PyTorch is not installed")


@pytest.fixture(autouse=True)
def _transformers():
    """Not when tests are collected: it takes seconds to import."""
    pytest.importorskip("transformers", reason="transformers is not installed")


def of_transformers(name):
    return getattr(importlib.import_module("transformers"), name)


class Attention(torch.autograd.Function):
    """ms_deform_attn of PyTorch's tensors, which go in and out through DLPack."""

    calls = 0

    @staticmethod
    def forward(ctx, value, shapes, locations, weights, points, method):
        Attention.calls += 1
        ctx.save_for_backward(value, locations, weights)
        ctx.shapes, ctx.options = shapes, {"points": points, "method": method}
        return pydeform.ms_deform_attn(value.detach(), shapes, locations.detach(), weights.detach(), **ctx.options)

    @staticmethod
    def backward(ctx, grad):
        value, locations, weights = (tensor.detach() for tensor in ctx.saved_tensors)
        arrays = grad.detach(), value, ctx.shapes, locations, weights
        grads = pydeform.ms_deform_attn_backward(*arrays, **ctx.options)
        return grads.value, None, grads.sampling_locations, grads.attention_weights, None, None


def in_place_of_v2(value, shapes, locations, weights, points, method="default"):
    return Attention.apply(value, shapes, locations, weights, points, "bilinear" if method == "default" else method)


def in_place_of_detrs(_module, value, _tensor, shapes, _starts, locations, weights, _step):
    return Attention.apply(value, shapes, locations, weights, None, "bilinear")


def modeling(name):
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


# Configurations ------------------------------------------------------------------------------------------------------
STAGES = {"embedding_size": 8, "hidden_sizes": [8, 8, 12, 16], "depths": [1, 1, 1, 1]}
OUT = {"out_features": ["stage2", "stage3", "stage4"]}
DETECTOR = {"num_labels": 3, "num_queries": 7, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
            "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}  # fmt: skip
WITH_NECK = {**DETECTOR, "d_model": 16, "encoder_hidden_dim": 16, "encoder_in_channels": [8, 12, 16],
             "decoder_in_channels": [16] * 3, "num_denoising": 0}  # fmt: skip


def rt_detr_v2(method="default"):
    backbone = of_transformers("RTDetrResNetConfig")(**STAGES, layer_type="basic", **OUT)
    sizes = {"decoder_n_points": 3, "decoder_offset_scale": 0.7, "decoder_method": method}
    return of_transformers("RTDetrV2Config")(backbone_config=backbone, **WITH_NECK, **sizes)


def d_fine():
    four = {"stage_num_blocks": [1] * 4, "stage_num_of_layers": [1] * 4, "stage_mid_channels": [8] * 4}
    channels = {"stage_in_channels": [8, 8, 8, 12], "stage_out_channels": STAGES["hidden_sizes"]}
    backbone = of_transformers("HGNetV2Config")(**STAGES, stem_channels=[3, 8, 8], **four, **channels, **OUT)
    return of_transformers("DFineConfig")(backbone_config=backbone, **WITH_NECK, decoder_n_points=[3, 6, 3])


def deformable_detr(two_stage=True):
    backbone = of_transformers("ResNetConfig")(**STAGES, layer_type="basic", **OUT)
    refined = {"with_box_refine": two_stage, "two_stage": two_stage, "two_stage_num_proposals": 7}
    return of_transformers("DeformableDetrConfig")(
        backbone_config=backbone, use_timm_backbone=False, d_model=64, encoder_layers=2, **refined, **DETECTOR
    )


def randomised(module):
    """Every parameter and statistic: many start at zero, where mistakes do not show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in module.parameters():
            param += 0.1 * torch.randn(param.shape, generator=generator)
    return module


# Whole models --------------------------------------------------------------------------------------------------------
def run(model, pixels, mask):
    """The outputs, and the gradients of all parameters and of the picture."""
    pixels = pixels.clone().requires_grad_()
    model.zero_grad()
    found = model(pixel_values=pixels, pixel_mask=mask)
    outputs = {"logits": found.logits, "boxes": found.pred_boxes}
    generator = torch.Generator().manual_seed(1)
    loss = sum((y * torch.randn(y.shape, generator=generator).to(y.dtype)).sum() for y in outputs.values())
    loss.backward()
    grads = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    return outputs, {"pixels": pixels.grad, **grads}


def close(got, want, tolerance, names):
    """Of what is the sum of many things that cancel, rounding is left: it is measured by the largest of all."""
    assert got.keys() == want.keys()
    sizes = {name: float(tensor.detach().abs().max()) for name, tensor in want.items()}
    assert all(np.isfinite(size) for size in sizes.values()) and all(sizes[name] > 0 for name in names)
    for name, tensor in want.items():
        allowed = tolerance * max(sizes[name], 1e-3 * max(sizes.values()))
        np.testing.assert_allclose(got[name].detach(), tensor.detach(), 0, allowed, err_msg=name)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-10)])
@pytest.mark.parametrize(
    ("name", "config", "head"),
    [
        pytest.param("rt_detr_v2", rt_detr_v2, "RTDetrV2ForObjectDetection", id="RT-DETRv2"),
        pytest.param("rt_detr_v2", lambda: rt_detr_v2("discrete"), "RTDetrV2ForObjectDetection",
                     id="RT-DETRv2-discrete"),
        pytest.param("d_fine", d_fine, "DFineForObjectDetection", id="D-FINE"),
        pytest.param("deformable_detr", deformable_detr, "DeformableDetrForObjectDetection", id="Deformable-DETR"),
        pytest.param("deformable_detr", lambda: deformable_detr(False), "DeformableDetrForObjectDetection",
                     id="Deformable-DETR-one-stage"),
    ],
)  # fmt: skip
def test_detectors_with_our_attention(monkeypatch, name, config, head, dtype, tolerance):
    theirs = modeling(name)
    torch.manual_seed(0)
    model = randomised(of_transformers(head)(config())).eval().to(getattr(torch, dtype))
    pixels = torch.randn(2, 3, 128, 160).to(model.dtype)
    mask = torch.ones(2, 128, 160, dtype=torch.int64)
    mask[1, :, 130:] = 0  # the second picture is narrower
    want, want_grads = run(model, pixels, mask)
    if name == "deformable_detr":
        monkeypatch.setattr(theirs.MultiScaleDeformableAttention, "forward", in_place_of_detrs)
    monkeypatch.setattr(theirs, "multi_scale_deformable_attention_v2", in_place_of_v2, raising=False)
    for module in model.modules():  # D-FINE's have the function as an attribute
        if hasattr(module, "ms_deformable_attn_core"):
            monkeypatch.setattr(module, "ms_deformable_attn_core", in_place_of_v2)
    monkeypatch.setattr(Attention, "calls", 0)
    got, got_grads = run(model, pixels, mask)
    assert Attention.calls == (4 if name == "deformable_detr" else 2)
    close(got, want, tolerance, want)
    is_discrete = getattr(model.config, "decoder_method", "default") == "discrete"
    of_attention = [n for n in want_grads if "attention_weights." in n or "sampling_offsets." in n]
    assert len(of_attention) == Attention.calls * (2 if is_discrete else 4) and len(want_grads) > 50
    close(got_grads, want_grads, tolerance, of_attention)


# The layer with the weights of a module -----------------------------------------------------------------------------
SHAPES = [(6, 4), (3, 2), (2, 2)]


def attention_of(name):
    """A module and the layer of its kind."""
    theirs = modeling(name)
    if name == "deformable_detr":
        config = of_transformers("DeformableDetrConfig")(
            backbone_config=of_transformers("ResNetConfig")(), use_timm_backbone=False, d_model=16, num_feature_levels=3
        )
        module = theirs.DeformableDetrMultiscaleDeformableAttention(config, num_heads=4, n_points=2)
        return module, MSDeformAttn(16, 3, 4, 2, rng=0)
    if name == "d_fine":
        return theirs.DFineMultiscaleDeformableAttention(d_fine()), MSDeformAttn(16, 3, 2, (3, 6, 3), projections=False)
    module = theirs.RTDetrV2MultiscaleDeformableAttention(rt_detr_v2())
    return module, MSDeformAttn(16, 3, 2, 3, offset_scale=0.7, rng=0)


def their_arrays(module):
    """What its parameters are called and hold. Their buffers follow from the options."""
    return {name: param.detach().numpy() for name, param in module.named_parameters()}


# Beside points the other two fail: their shapes do not broadcast.
@pytest.mark.parametrize(
    ("name", "numbers"), [("deformable_detr", 2), ("deformable_detr", 4), ("rt_detr_v2", 4), ("d_fine", 4)]
)
def test_the_layer_is_their_module(name, numbers):
    module, layer = attention_of(name)
    weights = their_arrays(randomised(module))
    assert list(weights) == list(layer.params)
    for own, param in layer.params.items():
        assert param.shape == weights[own].shape
        param[...] = weights[own]
    rng = np.random.default_rng(0)
    levels = 3 if name == "deformable_detr" else 1
    query, input = (rng.standard_normal((2, n, 16)).astype(np.float32) for n in (5, 34))
    reference = rng.uniform(0.1, 0.9, (2, 5, levels, numbers)).astype(np.float32)
    # theirs of D-FINE cannot be called with a mask: it has no heads where it meets the value
    padding = None if name == "d_fine" else rng.random((2, 34)) < 0.3
    given = [torch.tensor(array, requires_grad=True) for array in (query, reference, input)]
    want, _ = module(
        hidden_states=given[0],
        reference_points=given[1],
        encoder_hidden_states=given[2],
        spatial_shapes=torch.tensor(SHAPES),
        spatial_shapes_list=SHAPES,
        attention_mask=None if padding is None else torch.tensor(~padding),  # what there is to see
    )
    y, backprop = layer(query, reference, input, SHAPES, padding)
    np.testing.assert_allclose(y, want.detach(), rtol=1e-4, atol=1e-5)
    grad = rng.standard_normal(y.shape).astype(np.float32)
    want.backward(torch.tensor(grad))
    pairs = [*zip(backprop(grad), given, strict=True), *((layer.grads[n], p) for n, p in module.named_parameters())]
    for got, tensor in pairs:
        largest = float(tensor.grad.abs().max())
        assert largest > 0
        np.testing.assert_allclose(got, tensor.grad, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("name", ["deformable_detr", "rt_detr_v2", "d_fine"])
def test_the_layer_starts_as_theirs(name):
    """In a model, whose constructor sets what its modules start with."""
    configs = {"deformable_detr": deformable_detr, "rt_detr_v2": rt_detr_v2, "d_fine": d_fine}
    heads = {"deformable_detr": "DeformableDetrModel", "rt_detr_v2": "RTDetrV2Model", "d_fine": "DFineModel"}
    model = of_transformers(heads[name])(configs[name]())
    module = next(m for m in model.modules() if hasattr(m, "sampling_offsets"))
    theirs, layer = their_arrays(module), attention_of(name)[1]
    if name == "deformable_detr":
        layer = MSDeformAttn(64, 4, 2, 4, rng=0)
    for own, param in layer.params.items():
        if own.endswith("proj.weight"):
            limit = np.sqrt(6 / sum(param.shape))
            assert 0.8 * limit < np.abs(theirs[own]).max() <= limit * (1 + 1e-6)
            assert 0.8 * limit < np.abs(param).max() <= limit * (1 + 1e-6)
        else:
            np.testing.assert_allclose(param, theirs[own], atol=1e-6)
