// Kernels of ms_deform_attn, ms_deform_attn_fused, deform_aggregation, dcnv3 and dcnv4. Equations are those of
// docs/math/gather.md. Eq. 1 and 6, where a sample reads and its weight, are at one place for all kernels:
// gather/points.cuh.
//
// eq.            kernel
// 2              gather_samples
// 3, 4           number_gradients; of raw offsets, logits and reference points, eq. 6, fused_gradients
// 5              scatter_samples, in no order; or count_points, fill_cells, sort_bins, softmax_sums and gather_cells
//
// An operator is its table of samples (`SampleTable`, which fill_table brings to the device) and its GatherGeometry.
#include "gather/forward.cuh"
#include "gather/fused.cuh"
#include "gather/cells.cuh"
