// Kernels of roi_pool, roi_align, roi_align_rotated, prroi_pool, ps_roi_pool, ps_roi_align, deform_roi_pool and
// deform_psroi_pool. Equations are those of docs/math/roi.md. What a bin reads, eq. 1 to 4, 10 and 11, is at one place for
// all kernels: roi/bins.cuh, with roi/turned.cuh.
//
// eq.          by warps, on a channels-last copy       by single threads, on the input as it is
// 5, 6         pool_bins                               pool_direct
//   maximum                                            pool_largest
//   turned     turn_boxes, then pool_turned            turn_boxes, then pool_turned_direct
// 7            box_bounds, then input_gradient, which needs no input
//   maximum    the same with the winners of pool_largest
//   turned     turn_boxes, turned_bounds, then input_gradient
// 8            bin_gradients, then mask_gradient       bin_gradients_direct, then mask_gradient
// 9            bin_gradients, then offset_gradient     bin_gradients_direct, then offset_gradient
// 12, 13       edge_gradients, then box_gradient       edge_gradients_direct, then box_gradient
//   maximum                                            edge_gradients_of_largest, then box_gradient
//
// The maximum is that of pixels in roi_pool, and of points in roi_align with mode="max". Eq. 8 and 9 are for
// deform_roi_pool and deform_psroi_pool, which have offsets and a mask, eq. 12 and 13 for roi_align and prroi_pool. Other
// differences are the rules in RoiGeometry.
#include "roi/forward.cuh"
#include "roi/backward.cuh"
