// Kernels of the RoI operators.
#include "roi_forward.cuh"
#include "roi_backward.cuh"
