// Kernels of grid_sample and warp. Equations are those of docs/math/grid.md. Eq. 1 to 4, which pixels a query reads and
// how much of each, are at one place for all kernels: grid/points.cuh.
//
// eq.            kernel
// 5              sample_points
// 6              scatter_points, in no order; or count_taps, fill_taps, sort_bins and gather_taps
// 7              point_gradients
//
// An operator is its GridGeometry.
#include "grid/forward.cuh"
#include "grid/backward.cuh"
#include "grid/sorted.cuh"
