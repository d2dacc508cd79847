"""Deformable operators as plain functions of arrays: forward and analytic backward, on NumPy and CuPy."""

from pydeform._runtime import get_num_threads, num_threads, set_num_threads
from pydeform._version import __version__
from pydeform.ops.active_conv2d import ActiveConv2dGrads, active_conv2d, active_conv2d_backward
from pydeform.ops.affine_grid import AffineGridGrads, affine_grid, affine_grid_backward
from pydeform.ops.analysis import convert_offset, effective_dilation, sampling_locations
from pydeform.ops.conv1d import Conv1dGrads, conv1d, conv1d_backward
from pydeform.ops.conv2d import Conv2dGrads, conv2d, conv2d_backward
from pydeform.ops.conv3d import Conv3dGrads, conv3d, conv3d_backward
from pydeform.ops.dcnv3 import Dcnv3Grads, dcnv3, dcnv3_backward
from pydeform.ops.dcnv4 import Dcnv4Grads, dcnv4, dcnv4_backward
from pydeform.ops.deform_aggregation import DeformAggregationGrads, deform_aggregation, deform_aggregation_backward
from pydeform.ops.deform_conv1d import DeformConv1dGrads, deform_conv1d, deform_conv1d_backward
from pydeform.ops.deform_conv2d import DeformConv2dGrads, deform_conv2d, deform_conv2d_backward
from pydeform.ops.deform_conv3d import DeformConv3dGrads, deform_conv3d, deform_conv3d_backward
from pydeform.ops.deform_psroi_pool import DeformPsroiPoolGrads, deform_psroi_pool, deform_psroi_pool_backward
from pydeform.ops.deform_roi_pool import DeformRoiPoolGrads, deform_roi_pool, deform_roi_pool_backward
from pydeform.ops.grid_sample import GridSampleGrads, grid_sample, grid_sample_backward
from pydeform.ops.ms_deform_attn import MsDeformAttnGrads, ms_deform_attn, ms_deform_attn_backward
from pydeform.ops.ms_deform_attn_fused import (
    MsDeformAttnFusedGrads,
    ms_deform_attn_fused,
    ms_deform_attn_fused_backward,
)
from pydeform.ops.prroi_pool import PrroiPoolGrads, prroi_pool, prroi_pool_backward
from pydeform.ops.ps_roi_align import PsRoiAlignGrads, ps_roi_align, ps_roi_align_backward
from pydeform.ops.ps_roi_pool import PsRoiPoolGrads, ps_roi_pool, ps_roi_pool_backward
from pydeform.ops.roi_align import RoiAlignGrads, roi_align, roi_align_backward
from pydeform.ops.roi_align_rotated import RoiAlignRotatedGrads, roi_align_rotated, roi_align_rotated_backward
from pydeform.ops.roi_pool import RoiPoolGrads, roi_pool, roi_pool_backward
from pydeform.ops.warp import WarpGrads, warp, warp_backward

__all__ = [
    "ActiveConv2dGrads",
    "AffineGridGrads",
    "Conv1dGrads",
    "Conv2dGrads",
    "Conv3dGrads",
    "Dcnv3Grads",
    "Dcnv4Grads",
    "DeformAggregationGrads",
    "DeformConv1dGrads",
    "DeformConv2dGrads",
    "DeformConv3dGrads",
    "DeformPsroiPoolGrads",
    "DeformRoiPoolGrads",
    "GridSampleGrads",
    "MsDeformAttnFusedGrads",
    "MsDeformAttnGrads",
    "PrroiPoolGrads",
    "PsRoiAlignGrads",
    "PsRoiPoolGrads",
    "RoiAlignGrads",
    "RoiAlignRotatedGrads",
    "RoiPoolGrads",
    "WarpGrads",
    "__version__",
    "active_conv2d",
    "active_conv2d_backward",
    "affine_grid",
    "affine_grid_backward",
    "conv1d",
    "conv1d_backward",
    "conv2d",
    "conv2d_backward",
    "conv3d",
    "conv3d_backward",
    "convert_offset",
    "dcnv3",
    "dcnv3_backward",
    "dcnv4",
    "dcnv4_backward",
    "deform_aggregation",
    "deform_aggregation_backward",
    "deform_conv1d",
    "deform_conv1d_backward",
    "deform_conv2d",
    "deform_conv2d_backward",
    "deform_conv3d",
    "deform_conv3d_backward",
    "deform_psroi_pool",
    "deform_psroi_pool_backward",
    "deform_roi_pool",
    "deform_roi_pool_backward",
    "effective_dilation",
    "get_num_threads",
    "grid_sample",
    "grid_sample_backward",
    "ms_deform_attn",
    "ms_deform_attn_backward",
    "ms_deform_attn_fused",
    "ms_deform_attn_fused_backward",
    "num_threads",
    "prroi_pool",
    "prroi_pool_backward",
    "ps_roi_align",
    "ps_roi_align_backward",
    "ps_roi_pool",
    "ps_roi_pool_backward",
    "roi_align",
    "roi_align_backward",
    "roi_align_rotated",
    "roi_align_rotated_backward",
    "roi_pool",
    "roi_pool_backward",
    "sampling_locations",
    "set_num_threads",
    "warp",
    "warp_backward",
]
