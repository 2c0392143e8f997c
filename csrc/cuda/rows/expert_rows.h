// Memory-bound row kernels between the GEMMs of expert layers: gather routing weights, reduce their gradients, sum a token's K rows. One
// thread or one warp computes each result, added in a fixed order in fp32.
#pragma once

#include "../gemm/gemm.h"

namespace cmoe::cuda {

// out [tokens, columns] = the row of the table that each token has: its group's, or its own where there are no ids; zeros for an id outside
// 0..groups - 1.
void per_token(const float* table, int64_t row, int64_t column, int64_t groups, const int64_t* group_ids, int64_t tokens, int64_t columns,
               float* out, Stream stream);

// out [rows] = the weights of assignments in the order of the experts: row i is assignment order[i] % k of token order[i] / k.
void per_row(const float* table, int64_t row, int64_t column, int64_t groups, const int64_t* group_ids, const int64_t* order, int64_t rows,
             int64_t k, float* out, Stream stream);

// out [groups, columns] = the sum over the tokens of each group of rows [tokens, columns]; without ids one group has all.
void sum_per_group(const float* rows, const int64_t* group_ids, int64_t tokens, int64_t groups, int64_t columns, float* out, Stream stream);

// y [tokens, width] = the sum of each token's k rows of [tokens k, width], in their order.
void sum_assignments(Type type, const void* rows, int64_t tokens, int64_t k, int64_t width, void* y, Stream stream);

// out [rows (, experts), width] = routing weight times x; rows of no expert get zeros.
void weighted_rows(Type type, const RowOperand& x, const Groups& groups, const RoutingWeights& routing_weights, int64_t width, void* out,
                   Stream stream);

// du [rows, width] = dy f'(u), u like du.
void activation_gradient(Type type, const RowOperand& dy, const void* u, int64_t rows, int64_t width, Activation f, void* du,
                         Stream stream);

// The gradient of the rows' weights: the sum of the `tiles` partials that dact_gemm left, and dy . b. Dense: [tokens, experts]; else of
// row r at index[r], zero where it is of no expert.
void routing_weight_grad(const float* partials, int64_t tiles, const RowOperand& dy, Type type, const Table& b, int64_t width,
                         const Groups& groups, float* out, Stream stream);

// Offsets that start at 0, do not decrease and end at `rows` at most, whatever was given: then each row has one tile.
void settled_offsets(const int32_t* offsets, int64_t stride, int64_t experts, int64_t rows, int32_t* out, Stream stream);

}  // namespace cmoe::cuda
