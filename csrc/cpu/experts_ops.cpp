// soft_experts, sparse_experts and grouped_linear as operations on tensors: arguments checked, rows sorted by expert, drivers called.

#include <numeric>

#include "grouped_linear.h"
#include "tensors.h"

namespace cmoe::cpu {

namespace {

using torch::stable::contiguous;

// Arguments of an expert layer, and what keeps their memory.
template <class T>
struct Layers : Experts<T> {
  Tensor x_kept, w1_kept, b1_kept, w2_kept, b2_kept;

  Layers(const Tensor& x, const Tensor& w1_, const std::optional<Tensor>& b1_, const std::optional<Tensor>& w2_,
         const std::optional<Tensor>& b2_, Activation activation, bool gated)
      : Experts<T>{type_of("x", x), x.size(0), x.size(1), 0, w1_.size(1), w1_.size(0), gated, activation, nullptr, {}, {}, {}, {}},
        x_kept(contiguous(x)) {
    this->x = bytes_of(x_kept);
    this->w1 = weight_of("w1", w1_, &w1_kept);
    this->b1 = bias_of("b1", b1_, &b1_kept);
    if (w2_) {
      this->hidden = w2_->size(2);
      this->outputs = w2_->size(1);
      this->w2 = weight_of("w2", *w2_, &w2_kept);
      this->b2 = bias_of("b2", b2_, &b2_kept);
    }
  }
};

// Single linear experts whose gates have fewer rows than there are tokens become one linear layer per row of gates: W_g = sum_e gates[g, e]
// W_e.
template <class T>
struct Merged {
  Experts<T> op;
  Tensor w_kept;
  const Gates<T>& gates;
  Array<char> w;  // [groups, outputs, inputs]
  Array<T> b;     // [groups, outputs]
  Array<int64_t> order;
  std::vector<int32_t> offsets;

  Merged(const Layers<T>& layers, const Tensor& w1, const Gates<T>& g)
      : op(layers), w_kept(contiguous(w1)), gates(g), w(g.rows * op.outputs * op.inputs * size_of(op.type)),
        b(op.b1 ? g.rows * op.outputs : 0), order(op.tokens), offsets(g.rows + 1, 0) {
    op.w1 = {bytes_of(w_kept), type_of("w1", w1), op.outputs * op.inputs, op.inputs, 1};
    STD_TORCH_CHECK(op.tokens <= INT32_MAX, "x has ", op.tokens, " tokens, must have at most ", INT32_MAX);
    for (int64_t t = 0; t < op.tokens; ++t) ++offsets[gates.row(t) + 1];
    std::partial_sum(offsets.begin(), offsets.end(), offsets.begin());
    std::vector<int32_t> at = offsets;
    for (int64_t t = 0; t < op.tokens; ++t) order[at[gates.row(t)]++] = t;

    const Kernels<T> kernels = kernels_for<T>(op.type);
    const int64_t threads = thread_count();
    const Array<T> scratch(threads * 2 * op.inputs);
    parallel(threads, [&](int64_t thread) {
      T *const sum = scratch.get() + thread * 2 * op.inputs, *const row = sum + op.inputs;
      const Share share(gates.rows * op.outputs, thread, threads);
      for (int64_t i = share.first; i < share.last; ++i) {
        const int64_t g = i / op.outputs, o = i % op.outputs;
        std::fill(sum, sum + op.inputs, T(0));
        for (int64_t e = 0; e < op.experts; ++e) {
          kernels.rows->load(op.w1.type, op.w1.matrix(e).row(o), row, op.inputs);
          kernels.rows->axpy(gates.data[g * op.experts + e], row, sum, op.inputs);
        }
        kernels.rows->store(op.type, sum, w.get() + i * op.inputs * size_of(op.type), op.inputs);
      }
    });
    if (op.b1) {
      const Array<T> row(op.outputs);
      for (int64_t g = 0; g < gates.rows; ++g) {
        std::fill(b.get() + g * op.outputs, b.get() + (g + 1) * op.outputs, T(0));
        for (int64_t e = 0; e < op.experts; ++e) {
          op.b1.load(kernels, e, 0, op.outputs, row.get());
          kernels.rows->axpy(gates.data[g * op.experts + e], row.get(), b.get() + g * op.outputs, op.outputs);
        }
      }
    }
  }

  // The layers of the groups, as experts.
  Experts<T> layers() const {
    Experts<T> merged = op;
    merged.experts = gates.rows;
    merged.w1 = {w.get(), op.type, op.outputs * op.inputs, op.inputs, 1};
    merged.b1 = op.b1 ? Bias{reinterpret_cast<const char*>(b.get()), sizeof(T) == 8 ? Type::f64 : Type::f32, op.outputs} : Bias{};
    return merged;
  }

  void backward(const char* dy, char* dx, T* dgates, const Gradient& dw, const Gradient& db) const {
    const Kernels<T> kernels = kernels_for<T>(op.type);
    const int64_t threads = thread_count(), groups = gates.rows;
    const bool weights = dgates || dw || db;
    const Type exact = sizeof(T) == 8 ? Type::f64 : Type::f32;
    const Array<T> dmerged(weights ? groups * op.outputs * op.inputs : 0), dbias(weights && op.b1 ? groups * op.outputs : 0);
    ExpertsBackward<T> grads{};
    grads.offsets = offsets.data();
    grads.index = grads.dy_index = order.get();
    grads.divisor = grads.dy_divisor = 1;
    grads.dy = dy;
    grads.dx = dx;
    if (weights) grads.dw1 = {reinterpret_cast<char*>(dmerged.get()), exact};
    if (dbias.size()) grads.db1 = {reinterpret_cast<char*>(dbias.get()), exact};
    experts_backward(layers(), grads);
    if (!weights) return;

    // What a merged layer gets is shared out to its experts by their gates.
    const Array<T> scratch(threads * 2 * op.inputs), dots(threads * groups * op.experts);
    parallel(threads, [&](int64_t thread) {
      T *const sum = scratch.get() + thread * 2 * op.inputs, *const row = sum + op.inputs,
               *const dot = dots.get() + thread * groups * op.experts;
      std::fill(dot, dot + groups * op.experts, T(0));
      const Share share(op.outputs, thread, threads);
      for (int64_t o = share.first; o < share.last; ++o)
        for (int64_t e = 0; e < op.experts; ++e) {
          if (dw) {
            std::fill(sum, sum + op.inputs, T(0));
            for (int64_t g = 0; g < groups; ++g)
              kernels.rows->axpy(gates.data[g * op.experts + e], dmerged.get() + (g * op.outputs + o) * op.inputs, sum, op.inputs);
            dw.store(kernels, (e * op.outputs + o) * op.inputs, sum, op.inputs);
          }
          if (dgates) {
            kernels.rows->load(op.w1.type, op.w1.matrix(e).row(o), row, op.inputs);
            for (int64_t g = 0; g < groups; ++g)
              dot[g * op.experts + e] += kernels.rows->dot(dmerged.get() + (g * op.outputs + o) * op.inputs, row, op.inputs);
          }
        }
    });
    const Array<T> row(op.outputs), sum(op.outputs);
    for (int64_t e = 0; e < op.experts; ++e) {
      if (op.b1) op.b1.load(kernels, e, 0, op.outputs, row.get());
      std::fill(sum.get(), sum.get() + op.outputs, T(0));
      for (int64_t g = 0; g < groups; ++g) {
        if (dgates) {
          T total = op.b1 ? kernels.rows->dot(dbias.get() + g * op.outputs, row.get(), op.outputs) : T(0);
          for (int64_t thread = 0; thread < threads; ++thread) total += dots[(thread * groups + g) * op.experts + e];
          dgates[g * op.experts + e] = total;
        }
        if (db) kernels.rows->axpy(gates.data[g * op.experts + e], dbias.get() + g * op.outputs, sum.get(), op.outputs);
      }
      if (db) db.store(kernels, e * op.outputs, sum.get(), op.outputs);
    }
  }
};

// Sums of values [tokens, columns], given by at(token, column), per row of a table.
template <class T, class At>
void sum_rows(const Gates<T>& table, int64_t tokens, int64_t columns, T* to, const At& at) {
  std::fill(to, to + table.rows * columns, T(0));
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t c = 0; c < columns; ++c) to[table.row(t) * columns + c] += at(t, c);
}

}  // namespace

std::tuple<Tensor, Tensor> soft_experts(Tensor x, Tensor gates, Tensor w1, std::optional<Tensor> b1, std::optional<Tensor> w2,
                                        std::optional<Tensor> b2, std::optional<Tensor> group_ids, OwnedString activation, bool save) {
  const Activation act = activation_of(activation);
  return computing(x, [&](auto zero) {
    using T = decltype(zero);
    const Layers<T> op(x, w1, b1, w2, b2, act, false);
    const Tensor g = contiguous(gates);
    const std::optional<Tensor> ids = contiguous_or_null(group_ids);
    const Gates<T> table = gates_of<T>(g, ids, "rows of gates");
    Tensor y = empty_tensor(x, {op.tokens, op.outputs}, x.scalar_type()),
           u = save ? empty_tensor(x, {op.tokens, op.experts, op.hidden}, x.scalar_type()) : empty_placeholder(x);
    if (!w2 && table.rows < op.tokens) {
      const Merged<T> merged(op, w1, table);
      grouped_linear(merged.layers(), {merged.offsets.data(), merged.order.get(), 1}, merged.order.get(), false, bytes_of(y), nullptr);
    } else {
      soft_experts<T>(op, table, bytes_of(y), save ? bytes_of(u) : nullptr);
    }
    return std::make_tuple(y, u);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> soft_experts_backward(Tensor dy, Tensor x, Tensor gates, Tensor w1,
                                                                                 std::optional<Tensor> b1, std::optional<Tensor> w2,
                                                                                 std::optional<Tensor> b2, std::optional<Tensor> group_ids,
                                                                                 Tensor u, OwnedString activation,
                                                                                 std::vector<bool> needs) {
  const Activation act = activation_of(activation);
  return computing(x, [&](auto zero) {
    using T = decltype(zero);
    const Layers<T> op(x, w1, b1, w2, b2, act, false);
    const Tensor g = contiguous(gates), dy_kept = contiguous(dy), u_kept = contiguous(u);
    const std::optional<Tensor> ids = contiguous_or_null(group_ids);
    const Gates<T> table = gates_of<T>(g, ids, "rows of gates");
    Tensor dx = gradient_like(x, needs[0], x), dgates = gradient_like(g, needs[1], x), dw1 = gradient_like(w1, needs[2], x),
           db1 = gradient_like(b1, needs[3], x), dw2 = gradient_like(w2, needs[4], x), db2 = gradient_like(b2, needs[5], x);
    T* const dgates_data = needs[1] ? static_cast<T*>(dgates.mutable_data_ptr()) : nullptr;
    if (!w2 && table.rows < op.tokens) {
      const Merged<T> merged(op, w1, table);
      merged.backward(bytes_of(dy_kept), needs[0] ? bytes_of(dx) : nullptr, dgates_data, gradient_of(dw1, w1, needs[2]),
                      gradient_of(db1, b1, needs[3]));
    } else {
      const Array<T> weights(op.experts * op.tokens), dweights(needs[1] ? op.experts * op.tokens : 0);
      for (int64_t e = 0; e < op.experts; ++e)
        for (int64_t t = 0; t < op.tokens; ++t) weights[e * op.tokens + t] = table(t, e);
      ExpertsBackward<T> grads{};
      grads.divisor = grads.dy_divisor = 1;
      grads.routing_weights = weights.get();
      grads.dy = bytes_of(dy_kept);
      grads.u = u.numel() ? bytes_of(u_kept) : nullptr;
      grads.u_expert = op.hidden;
      grads.u_row = op.experts * op.hidden;
      grads.dx = needs[0] ? bytes_of(dx) : nullptr;
      grads.routing_weight_grad = needs[1] ? dweights.get() : nullptr;
      grads.dw1 = gradient_of(dw1, w1, needs[2]);
      grads.db1 = gradient_of(db1, b1, needs[3]);
      grads.dw2 = gradient_of(dw2, w2, needs[4]);
      grads.db2 = gradient_of(db2, b2, needs[5]);
      experts_backward<T>(op, grads);
      if (needs[1]) sum_rows(table, op.tokens, op.experts, dgates_data, [&](int64_t t, int64_t e) { return dweights[e * op.tokens + t]; });
    }
    return std::make_tuple(dx, dgates, dw1, db1, dw2, db2);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sparse_experts(Tensor x, std::optional<Tensor> weights, Tensor indices, Tensor w1,
                                                          std::optional<Tensor> b1, std::optional<Tensor> w2, std::optional<Tensor> b2,
                                                          std::optional<Tensor> group_ids, OwnedString activation, bool gated, bool save) {
  const Activation act = activation_of(activation);
  return computing(x, [&](auto zero) {
    using T = decltype(zero);
    const Layers<T> op(x, w1, b1, w2, b2, act, gated);
    Sorted<T> sorted(x, weights, indices, group_ids, op.tokens, op.experts);
    const int64_t rows = op.tokens * indices.size(1), live = sorted.assignments().offsets[op.experts],
                  row_bytes = op.first_outputs() * size_of(op.type);
    Tensor y = empty_tensor(x, {op.tokens, op.outputs}, x.scalar_type()),
           u = save ? empty_tensor(x, {rows, op.first_outputs()}, x.scalar_type()) : empty_placeholder(x);
    if (save && live < rows) std::memset(bytes_of(u) + live * row_bytes, 0, (rows - live) * row_bytes);
    sparse_experts<T>(op, sorted.assignments(), sorted.weights(), bytes_of(y), save ? bytes_of(u) : nullptr);
    return std::make_tuple(y, u, sorted.gather_idx, sorted.offsets);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sparse_experts_backward(
    Tensor dy, Tensor x, std::optional<Tensor> weights, Tensor indices, Tensor w1, std::optional<Tensor> b1, std::optional<Tensor> w2,
    std::optional<Tensor> b2, std::optional<Tensor> group_ids, Tensor u, Tensor gather_idx, Tensor offsets, OwnedString activation,
    bool gated, std::vector<bool> needs) {
  const Activation act = activation_of(activation);
  return computing(x, [&](auto zero) {
    using T = decltype(zero);
    const Layers<T> op(x, w1, b1, w2, b2, act, gated);
    const Tensor dy_kept = contiguous(dy), u_kept = contiguous(u);
    const std::optional<Tensor> ids = contiguous_or_null(group_ids), w = contiguous_or_null(weights);
    const int64_t k = indices.size(1), rows = op.tokens * k;
    const Gates<T> table{w ? static_cast<const T*>(w->const_data_ptr()) : nullptr, indices.size(0), k,
                         ids ? static_cast<const int64_t*>(ids->const_data_ptr()) : nullptr};
    const int64_t* const order = static_cast<const int64_t*>(gather_idx.const_data_ptr());
    Tensor dx = gradient_like(x, needs[0], x), dweights = gradient_like(w, needs[1], x), dw1 = gradient_like(w1, needs[2], x),
           db1 = gradient_like(b1, needs[3], x), dw2 = gradient_like(w2, needs[4], x), db2 = gradient_like(b2, needs[5], x);
    const bool need_weights = w && needs[1];
    const Array<T> row_weights(w ? rows : 0), drows(need_weights ? rows : 0), by_assignment(need_weights ? rows : 0);
    if (w)
      for (int64_t i = 0; i < rows; ++i) row_weights[i] = table.data[table.row(order[i] / k) * k + order[i] % k];
    std::fill(drows.get(), drows.get() + drows.size(), T(0));
    ExpertsBackward<T> grads{};
    grads.offsets = static_cast<const int32_t*>(offsets.const_data_ptr());
    grads.index = grads.dy_index = order;
    grads.divisor = grads.dy_divisor = k;
    grads.routing_weights = w ? row_weights.get() : nullptr;
    grads.dy = bytes_of(dy_kept);
    grads.u = u.numel() ? bytes_of(u_kept) : nullptr;
    grads.u_row = op.first_outputs();
    grads.dx = needs[0] ? bytes_of(dx) : nullptr;
    grads.routing_weight_grad = need_weights ? drows.get() : nullptr;
    grads.dw1 = gradient_of(dw1, w1, needs[2]);
    grads.db1 = gradient_of(db1, b1, needs[3]);
    grads.dw2 = gradient_of(dw2, w2, needs[4]);
    grads.db2 = gradient_of(db2, b2, needs[5]);
    experts_backward<T>(op, grads);
    if (need_weights) {
      for (int64_t i = 0; i < rows; ++i) by_assignment[order[i]] = drows[i];
      sum_rows(table, op.tokens, k, static_cast<T*>(dweights.mutable_data_ptr()),
               [&](int64_t t, int64_t i) { return by_assignment[t * k + i]; });
    }
    return std::make_tuple(dx, dweights, dw1, db1, dw2, db2);
  });
}

namespace {

// The rows of grouped_linear: offsets checked, index and scatter as they are or the identity.
struct GroupedRows {
  Tensor offsets, index, scatter;
  std::vector<int64_t> identity;

  GroupedRows(const Tensor& ends, int64_t rows, const std::optional<Tensor>& gather_idx, const std::optional<Tensor>& scatter_idx,
              bool check)
      : offsets(contiguous(ends)), identity(gather_idx && scatter_idx ? 0 : rows) {
    std::iota(identity.begin(), identity.end(), int64_t{0});
    if (gather_idx) index = contiguous(*gather_idx);
    if (scatter_idx) scatter = contiguous(*scatter_idx);
    if (!check) return;
    const int32_t* const e = static_cast<const int32_t*>(offsets.const_data_ptr());
    bool valid = offsets.numel() > 0 && e[0] == 0 && e[offsets.numel() - 1] <= rows;
    for (int64_t i = 1; i < offsets.numel(); ++i) valid = valid && e[i - 1] <= e[i];
    STD_TORCH_CHECK(valid, "offsets must start at 0, not decrease and end at ", rows, " rows or before");
    for (const auto& [name, given, t] : {std::make_tuple("gather_idx", gather_idx.has_value(), &index),
                                         std::make_tuple("scatter_idx", scatter_idx.has_value(), &scatter)}) {
      if (!given) continue;
      std::vector<bool> seen(rows, false);
      const int64_t* const values = static_cast<const int64_t*>(t->const_data_ptr());
      for (int64_t i = 0; i < rows; ++i) {
        STD_TORCH_CHECK(values[i] >= 0 && values[i] < rows && !seen[values[i]], name, " must be a permutation of range(", rows, ")");
        seen[values[i]] = true;
      }
    }
  }
  const int32_t* ends() const { return static_cast<const int32_t*>(offsets.const_data_ptr()); }
  const int64_t* gather() const { return index.defined() ? static_cast<const int64_t*>(index.const_data_ptr()) : identity.data(); }
  const int64_t* scattered() const { return scatter.defined() ? static_cast<const int64_t*>(scatter.const_data_ptr()) : identity.data(); }
};

}  // namespace

std::tuple<Tensor, Tensor> grouped_linear(Tensor x, Tensor w, std::optional<Tensor> b, Tensor offsets, std::optional<Tensor> gather_idx,
                                          int64_t k, std::optional<Tensor> scatter_idx, std::optional<OwnedString> activation, bool save) {
  const Activation act = activation_of(activation);
  const bool activated = act != Activation::none;
  return computing(x, [&](auto zero) {
    using T = decltype(zero);
    const Layers<T> op(x, w, b, std::nullopt, std::nullopt, act, false);
    const int64_t rows = op.tokens * k, row_bytes = op.outputs * size_of(op.type);
    const GroupedRows layout(offsets, rows, gather_idx, scatter_idx, true);
    Tensor y = empty_tensor(x, {rows, op.outputs}, x.scalar_type()),
           u = save ? empty_tensor(x, {rows, op.outputs}, x.scalar_type()) : empty_placeholder(x);
    const int64_t live = layout.ends()[op.experts];
    for (int64_t i = live; i < rows; ++i) {
      std::memset(bytes_of(y) + layout.scattered()[i] * row_bytes, 0, row_bytes);
      if (save) std::memset(bytes_of(u) + i * row_bytes, 0, row_bytes);
    }
    grouped_linear<T>(op, {layout.ends(), layout.gather(), k}, layout.scattered(), activated, bytes_of(y), save ? bytes_of(u) : nullptr);
    return std::make_tuple(y, u);
  });
}

std::tuple<Tensor, Tensor, Tensor> grouped_linear_backward(Tensor dy, Tensor x, Tensor w, std::optional<Tensor> b, Tensor offsets,
                                                           std::optional<Tensor> gather_idx, std::optional<Tensor> scatter_idx, Tensor u,
                                                           int64_t k, std::optional<OwnedString> activation, std::vector<bool> needs) {
  const Activation act = activation_of(activation);
  const bool activated = act != Activation::none;
  return computing(x, [&](auto zero) {
    using T = decltype(zero);
    const Layers<T> op(x, w, b, std::nullopt, std::nullopt, act, false);
    const int64_t rows = op.tokens * k;
    const GroupedRows layout(offsets, rows, gather_idx, scatter_idx, false);
    const Tensor dy_kept = contiguous(dy), u_kept = contiguous(u);
    Tensor dx = gradient_like(x, needs[0], x), dw = gradient_like(w, needs[1], x), db = gradient_like(b, needs[2], x);
    const std::vector<int64_t>& identity = layout.identity;
    std::vector<int64_t> own;
    const Array<char> du(activated ? rows * op.outputs * size_of(op.type) : 0);
    ExpertsBackward<T> grads{};
    grads.offsets = layout.ends();
    grads.index = layout.gather();
    grads.divisor = k;
    grads.dy_index = layout.scattered();
    grads.dy_divisor = 1;
    grads.dy = bytes_of(dy_kept);
    if (activated) {
      activation_backward<T>(op, bytes_of(dy_kept), layout.scattered(), bytes_of(u_kept), rows, du.get());
      if (identity.empty()) {
        own.resize(rows);
        std::iota(own.begin(), own.end(), int64_t{0});
      }
      grads.dy = du.get();
      grads.dy_index = identity.empty() ? own.data() : identity.data();
    }
    grads.dx = needs[0] ? bytes_of(dx) : nullptr;
    grads.dw1 = gradient_of(dw, w, needs[1]);
    grads.db1 = gradient_of(db, b, needs[2]);
    experts_backward<T>(op, grads);
    return std::make_tuple(dx, dw, db);
  });
}

}  // namespace cmoe::cpu
