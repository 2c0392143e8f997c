// From the tensors of expert layers to operands of products.
#pragma once

#include "rows/expert_rows.h"
#include "tensors.h"

namespace cmoe::cuda {

// Rows and columns of a tensor [rows, columns].
inline RowOperand rows_of(const char* name, const Tensor& t, const int64_t* index = nullptr, int64_t divisor = 1) {
  return {t.const_data_ptr(), type_of(name, t), t.stride(0), t.stride(1), 0, index, divisor};
}
// Of a tensor [rows, experts, columns].
inline RowOperand expert_rows_of(const char* name, const Tensor& t) {
  return {t.const_data_ptr(), type_of(name, t), t.stride(0), t.stride(2), t.stride(1)};
}
inline WeightOperand weights_of(const char* name, const Tensor& w) {
  return {w.const_data_ptr(), type_of(name, w), w.stride(0), w.stride(1), w.stride(2)};
}
// fp32 weights under half-precision rows, rounded once: a pass over the weights costs less than reading them element by element in every
// tile.
inline Tensor rounded(const Tensor& w, const Tensor& x) {
  return w.scalar_type() == x.scalar_type() ? w : torch::stable::to(w, x.scalar_type());
}
inline Table table_of(const char* name, const std::optional<Tensor>& t) {
  return t ? Table{t->const_data_ptr(), type_of(name, *t), t->stride(0), t->stride(1)} : Table{};
}

// Where results go: a contiguous tensor [rows, columns], [rows, experts, columns] or, a weight's gradient, [experts, rows, columns].
inline Target target_of(Tensor& t, const int64_t* index = nullptr) {
  const int64_t last = t.dim() - 1;
  return {t.mutable_data_ptr(), type_of("a result", t), t.stride(0), last == 2 ? t.stride(1) : 0, index};
}
inline Target gradient_of(Tensor& t) {
  return {t.mutable_data_ptr(), type_of("a gradient", t), t.dim() == 3 ? t.stride(1) : 0, t.stride(0)};
}

inline GroupedGemm grouped_gemm_of(Type type, const Groups& groups, int64_t width, int64_t depth, const RowOperand& x,
                                   const WeightOperand& w) {
  GroupedGemm p;
  p.type = type, p.groups = groups, p.width = width, p.depth = depth, p.x = x, p.w = w;
  return p;
}
inline DactGemm dact_gemm_of(Type type, const Groups& groups, int64_t width, int64_t depth, const RowOperand& dy, const WeightOperand& w) {
  DactGemm p;
  p.type = type, p.groups = groups, p.width = width, p.depth = depth, p.dy = dy, p.w = w;
  return p;
}
inline Wgrad wgrad_of(Type type, const Groups& groups, int64_t height, int64_t width, const RowOperand& p, const RowOperand& q) {
  Wgrad w;
  w.type = type, w.groups = groups, w.height = height, w.width = width, w.p = p, w.q = q;
  return w;
}

inline Tensor empty_tensor(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), dtype);
}
inline Tensor empty_tensor(const Tensor& like, std::vector<int64_t> sizes) {
  return empty_tensor(like, std::move(sizes), like.scalar_type());
}
inline Tensor zeros(const Tensor& like, std::vector<int64_t> sizes) {
  return torch::stable::new_zeros(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), like.scalar_type());
}
// The gradient of a tensor where it is wanted.
inline Tensor gradient_like(const std::optional<Tensor>& t, bool wanted, const Tensor& like) {
  return t && wanted ? empty_tensor(*t, sizes_of(*t)) : empty_placeholder(like);
}

inline const int64_t* indices_of(const std::optional<Tensor>& t) { return t ? static_cast<const int64_t*>(t->const_data_ptr()) : nullptr; }

// Rows are counted in int32, also those of a tile that ends beyond the last.
constexpr int64_t most_rows = INT32_MAX - 255;
inline void require_rows(int64_t rows) {
  STD_TORCH_CHECK(rows <= most_rows, "x has too many rows, ", rows, " with every assignment; at most ", most_rows);
}

}  // namespace cmoe::cuda
