// Kernels of conv2d: positions are integers, there is no mask.
#include "conv_direct.cuh"
#include "conv_forward.cuh"
#include "conv_backward.cuh"
