// Kernels of the RoI operators.
#include "roi/forward.cuh"
#include "roi/backward.cuh"
