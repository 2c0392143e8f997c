// From tensors to what the drivers take, and back.
#pragma once

#include <new>
#include <optional>
#include <string>
#include <vector>

#include "dispatch.h"
#include "experts.h"
#include "rows.h"

namespace cmoe::cpu {

constexpr int64_t large_output = 4 << 20;  // bytes from which fresh pages cost enough to ask for large ones

inline Type type_of(const char* name, const Tensor& t) {
  Type type = Type::f32;
  dispatch_float(name, t, [&](auto zero) {
    using V = decltype(zero);
    type = std::is_same_v<V, double>     ? Type::f64
           : std::is_same_v<V, float>    ? Type::f32
           : std::is_same_v<V, BFloat16> ? Type::bf16
                                         : Type::f16;
  });
  return type;
}

// Calls f with a value of the type that x is computed in, once the instruction set is known to be there.
template <class F>
auto computing(const Tensor& x, F&& f) {
  require_instruction_set();
  try {
    return x.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
  } catch (const std::bad_alloc&) {
    STD_TORCH_CHECK(false, "not enough memory for the scratch of an operation on x of shape ", shape(x),
                    "; fewer rows at a time need less");
  }
}

// A tensor in memory of the pool; none where the pool does not serve, or has no memory.
std::optional<Tensor> pooled_tensor(const std::vector<int64_t>& sizes, ScalarType dtype);

inline Tensor empty_tensor(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  if (std::optional<Tensor> t = pooled_tensor(sizes, dtype)) return *t;
  Tensor t;
  try {
    t = torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), dtype);
  } catch (const std::exception&) {  // whose message names a function of torch and no reason
    std::string text;
    for (const int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
    STD_TORCH_CHECK(false, "not enough memory for a result of shape (", text, ")");
  }
  const int64_t bytes = t.numel() * static_cast<int64_t>(t.element_size());
  if (bytes >= large_output) advise_large_pages(t.mutable_data_ptr(), bytes);
  return t;
}

inline const char* bytes_of(const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); }
inline char* bytes_of(Tensor& t) { return static_cast<char*>(t.mutable_data_ptr()); }

// A view of weights [E, outputs, inputs] (or [outputs, inputs]) that packing can read; `kept` holds the copy where strides allow no view.
inline Weight weight_of(const char* name, const Tensor& w, Tensor* kept) {
  const int64_t last = w.dim() - 1;
  const auto next = [&](const Tensor& t, int64_t d) { return t.size(d) == 1 || t.stride(d) == 1; };
  *kept = next(w, last) || next(w, last - 1) ? w : torch::stable::contiguous(w);
  // An empty tensor has no memory, and is a weight all the same.
  Weight view{kept->numel() ? bytes_of(*kept) : "", type_of(name, w), last == 2 ? kept->stride(0) : 0, kept->stride(last - 1),
              kept->stride(last)};
  if (next(*kept, last)) {
    view.input = 1;
  } else {
    view.output = 1;
  }
  return view;
}

inline Bias bias_of(const char* name, const std::optional<Tensor>& b, Tensor* kept) {
  if (!b) return {};
  *kept = torch::stable::contiguous(*b);
  return {bytes_of(*kept), type_of(name, *b), kept->size(kept->dim() - 1)};
}

// The gradient of a tensor where it is wanted.
inline Tensor gradient_like(const std::optional<Tensor>& t, bool wanted, const Tensor& like) {
  return t && wanted ? empty_tensor(*t, sizes_of(*t), t->scalar_type()) : empty_placeholder(like);
}
// `into`: a gradient that exists, to add to.
inline Gradient gradient_of(Tensor& grad, const std::optional<Tensor>& t, bool wanted, const std::optional<Tensor>& into = {}) {
  if (!t || !wanted) return {};
  if (into) return {static_cast<char*>(into->mutable_data_ptr()), type_of("gradient", *into), true};
  return {bytes_of(grad), type_of("gradient", grad)};
}

inline void require_range(const char* name, const Tensor& index, int64_t size, const char* what, int64_t least = 0) {
  const int64_t* const values = static_cast<const int64_t*>(index.const_data_ptr());
  for (int64_t i = 0, n = index.numel(); i < n; ++i)
    STD_TORCH_CHECK(values[i] >= least && values[i] < size, name, " holds ", values[i], ", must be in ", least, "..", size - 1, " (", what,
                    ")");
}

// Indices of experts: 0..experts - 1, or -1 or `experts` for no expert.
inline void require_experts(const Tensor& indices, int64_t experts) {
  const std::string count = std::to_string(experts);
  require_range("indices", indices, experts + 1, (count + " experts; -1 and " + count + " mean no expert").c_str(), -1);
}

template <class T>
Gates<T> gates_of(const Tensor& gates, const std::optional<Tensor>& group_ids, const char* rows_of) {
  if (group_ids) require_range("group_ids", *group_ids, gates.size(0), rows_of);
  return {static_cast<const T*>(gates.const_data_ptr()), gates.size(0), gates.size(1),
          group_ids ? static_cast<const int64_t*>(group_ids->const_data_ptr()) : nullptr};
}

// Assignments [T, K] in the order of their experts, by a counting sort: stable, "no expert" last.
template <class T>
class Sorted {
 public:
  Tensor gather_idx, offsets;

  Sorted(const Tensor& x, const std::optional<Tensor>& weights, const Tensor& indices, const std::optional<Tensor>& group_ids,
         int64_t tokens, int64_t experts)
      : k_(indices.size(1)), row_weights_(weights ? tokens * k_ : 0) {
    const int64_t rows = tokens * k_;
    STD_TORCH_CHECK(rows <= INT32_MAX, "x has ", tokens, " tokens of ", k_, " experts each, must make at most ", INT32_MAX, " rows");
    const Tensor chosen = torch::stable::contiguous(indices);
    const std::optional<Tensor> ids = contiguous_or_null(group_ids), w = contiguous_or_null(weights);
    require_experts(chosen, experts);
    if (ids) require_range("group_ids", *ids, indices.size(0), "rows of indices");
    const Gates<T> table{w ? static_cast<const T*>(w->const_data_ptr()) : nullptr, indices.size(0), k_,
                         ids ? static_cast<const int64_t*>(ids->const_data_ptr()) : nullptr};
    const int64_t* const named = static_cast<const int64_t*>(chosen.const_data_ptr());
    const auto expert = [&](int64_t t, int64_t i) {
      const int64_t e = named[table.row(t) * k_ + i];
      return e < 0 ? experts : e;
    };
    gather_idx = empty_tensor(x, {rows}, ScalarType::Long);
    offsets = empty_tensor(x, {experts + 1}, ScalarType::Int);
    int64_t* const order = static_cast<int64_t*>(gather_idx.mutable_data_ptr());
    int32_t* const ends = static_cast<int32_t*>(offsets.mutable_data_ptr());
    std::vector<int64_t> at(experts + 2, 0);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < k_; ++i) ++at[expert(t, i) + 1];
    for (int64_t e = 0; e <= experts; ++e) at[e + 1] += at[e];
    for (int64_t e = 0; e <= experts; ++e) ends[e] = static_cast<int32_t>(at[e]);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < k_; ++i) {
        const int64_t place = at[expert(t, i)]++;
        order[place] = t * k_ + i;
        if (w) row_weights_[place] = table.data[table.row(t) * k_ + i];
      }
  }

  Assignments assignments() const {
    return {static_cast<const int32_t*>(offsets.const_data_ptr()), static_cast<const int64_t*>(gather_idx.const_data_ptr()), k_};
  }
  const T* weights() const { return row_weights_.size() ? row_weights_.get() : nullptr; }

 private:
  int64_t k_;
  Array<T> row_weights_;
};

}  // namespace cmoe::cpu
