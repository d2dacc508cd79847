// Kernels of conv1d, conv2d, conv3d, deform_conv1d, deform_conv2d, deform_conv3d and active_conv2d, compiled for one
// number of axes. Equations are those of docs/math/deform_conv2d.md:
//
// eq.       by tiles                                by single threads
// 1, 2      forward, sum_slices                     forward_direct
// 3, 4      backward_data                           backward_data_direct; active_conv2d: and add_offset_parts
// 5         backward_data, or gather_bins           backward_data_direct, or gather_bins
//           nothing moves: forward of ADJOINT       input_gradient_direct
// 6         backward_weight, sum_weight             weight_direct, add_parts
// 7                                                 bias_gradient, add_parts
//
// gather_bins, with count_samples, fill_bins and sort_bins before it, is for who asks for the same bits on each run.
#include "conv/direct.cuh"
#include "conv/forward.cuh"
#include "conv/backward_data.cuh"
#include "conv/backward_weight.cuh"
#include "conv/gather.cuh"
