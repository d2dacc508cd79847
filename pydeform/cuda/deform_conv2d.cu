// Kernels of deform_conv2d.
#include "conv_direct.cuh"
#include "conv_forward.cuh"
#include "conv_backward.cuh"
#include "conv_gather.cuh"
