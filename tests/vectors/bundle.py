"""Choose the vectors that `pydeform check` ships with, in pydeform's terms: pydeform/data/vectors.npz.

    python -m tests.vectors.bundle

Keys are `<operator>/<system>__<case>/<array>`: `in__NAME` arguments, `out__output`, `gout__output`, `gin__NAME`
gradients, all under pydeform's names; `options` and `meta` are JSON strings.
"""

import json
from pathlib import Path

from tests.vectors import load
from tests.vectors.calls import call_of
from tests.vectors.pack import write

# Small, and between them: of deform_conv2d every boundary rule, both versions, groups, offset groups, asymmetric
# arguments, kinks, far samples, an image of one row, forward-only producers; of every RoI operator each system that has
# it, borders, kinks, boxes upside down, adaptive sampling, masks, parts; of attention, DCNv3, DCNv4 and aggregation
# both methods, ragged points, points and boxes, an even kernel, cameras of several sizes; of grid sampling
# images and volumes, bilinear and bicubic, with zeros and the border around.
BUNDLED = {
    "deform_conv2d": (
        "mmcv-cudasrc-v2__mix_small",
        "mxnet1.9.1-v1-cpu__mix_small_v1",
        "onnxruntime1.31__h1_row_image",
        "openvino2026.4-pad0__h1_row_image",
        "paddle2.6.2__mix_small_v1",
        "torchvision0.19csrc__half_offsets",
        "torchvision0.19csrc__mix_small",
    ),
    "deform_conv": (
        "deform_conv1d/torchvision-h1__border",
        "deform_conv1d/torchvision-h1__k5_s2_mask",
        "deform_conv3d/d3dnet-cudasrc__integer2",
    ),
    "gather": (
        "dcnv3/internimage-cudasrc__border",
        "dcnv3/internimage-pytorch__k4_d2_even",
        "dcnv4/dcnv4-cudasrc__border",
        "deform_aggregation/sparse4d-cudasrc__cameras_differ",
        "ms_deform_attn/deformable-detr-cudasrc__out_of_range",
        "ms_deform_attn/transformers-rtdetrv2__discrete_far",
        "ms_deform_attn/transformers-rtdetrv2__ragged142_inside",
        "ms_deform_attn_fused/transformers-deformabledetr__box_far",
        "ms_deform_attn_fused/transformers-deformabledetr__point_far",
        "ms_deform_attn_fused/transformers-rtdetrv2__box_discrete_pixel",
    ),
    "grid": (
        "affine_grid/torch2.13.0__3d_affine_ac0",
        "grid_sample/onnx-testdata1.17__gridsample_bicubic",
        "grid_sample/torch2.13.0__2d_zeros_ac0_size1",
        "grid_sample/torch2.13.0__3d_border_ac1_mix",
    ),
    "roi": (
        "roi_pool/mxnet1.9.1-cpu__half",
        "roi_pool/torchvision0.19csrc__cross_sr1",
        "roi_align/mmcv-cudasrc-max__cross_sr1",
        "roi_align/mxnet1.9.1-cpu__half",
        "roi_align/onnx-testdata1.17__roialign_aligned_false",
        "roi_align/torchvision0.19csrc__adaptive0_aligned",
        "ps_roi_align/mxnet1.9.1-cpu__adaptive0_aligned",
        "ps_roi_align/torchvision0.19csrc__integer_aligned",
        "psroi_pooling/mxnet1.9.1-cpu__cross",
        "psroi_pooling/paddle2.6.2__half_rounding",
        "psroi_pooling/torchvision0.19csrc-ps_roi_pool__inverted2",
        "deform_roi_pool/mmcv-cudasrc__basic_mod",
        "deform_roi_pool/mmcv-cudasrc__cross",
        "prroi_pool/mmcv-cudasrc__one_row",
        "prroi_pool/mmcv-cudasrc__whole_map",
        "roi_align_rotated/mmcv-cudasrc__one_row",
        "roi_align_rotated/mmcv-cudasrc__outside_unaligned",
        "deformable_psroi_pooling/msra-cudasrc__border_exact",
        "deformable_psroi_pooling/mxnet1.9.1-cpu__pooled1",
        "deformable_psroi_pooling/openvino2026.4__border_exact",
        "deformable_psroi_pooling/paddle2.6.2__part_lt_pooled",
    ),
}


def in_our_terms(call):
    """Arrays and options of a call; levels' sizes, which are no data, among the options."""
    arrays, options = dict(call.arrays), dict(call.options)
    if "spatial_shapes" in arrays:
        options["spatial_shapes"] = arrays.pop("spatial_shapes").astype(int).tolist()
    return arrays, options


def bundle(path):
    arrays = {}
    for archive, names in BUNDLED.items():
        vectors = {vector.name: vector for vector in load(archive)}
        for name in names:
            vector, call = vectors[name], call_of(vectors[name])
            place = f"{call.operator}/{name.rpartition('/')[2]}"
            arguments, options = in_our_terms(call)
            entries = {f"in__{n}": array for n, array in arguments.items()}
            output = "grid" if call.operator == "affine_grid" else "y"
            entries["out__output"] = vector.outputs[output]
            if vector.grad_outputs:
                entries["gout__output"] = vector.grad_outputs[output]
            entries |= {f"gin__{n}": grad for n, grad in call.grads.items()}
            meta = {key: vector.meta[key] for key in ("rtol", "atol")}
            entries |= {"options": json.dumps(options), "meta": json.dumps(meta)}
            arrays |= {f"{place}/{key}": entry for key, entry in entries.items()}
    write(path, arrays, sum(map(len, BUNDLED.values())))


if __name__ == "__main__":
    bundle(Path(__file__).parents[2] / "pydeform" / "data" / "vectors.npz")
