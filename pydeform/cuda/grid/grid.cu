// Kernels of grid_sample and warp. Where a number of the grid reads, and how much of each pixel, is at one place for all
// kernels: grid/points.cuh.
//
// result                kernel
// output                sample_points
// gradient of grid      point_gradients
// gradient of input     scatter_points, in no order; or count_taps, fill_taps, sort_bins and gather_taps
//
// An operator is its GridGeometry.
#include "grid/forward.cuh"
#include "grid/backward.cuh"
#include "grid/sorted.cuh"
