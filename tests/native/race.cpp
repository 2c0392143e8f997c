// The drivers forward and backward, with one thread and with several: the same bits again with the same number of threads, the same values
// with another number. Under ThreadSanitizer, memory that two threads touch without order ends the program.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <string>

#include "dispatch.h"
#include "grouped_linear.h"
#include "int8_layers.h"
#include "task_router.h"
#include "threads.h"

using namespace cmoe::cpu;

namespace {

struct Sizes {
  int64_t tokens, inputs, hidden, outputs, experts, k, groups;
};

std::mt19937 generator;

template <class T>
std::vector<T> normal(int64_t n) {
  std::normal_distribution<T> draw;
  std::vector<T> values(n);
  for (T& v : values) v = draw(generator);
  return values;
}

// n values of a type, as bytes.
std::vector<char> random(Type type, int64_t n) {
  std::vector<char> bytes(n * size_of(type));
  if (type == Type::f64)
    std::memcpy(bytes.data(), normal<double>(n).data(), bytes.size());
  else
    kernels_for<float>(Type::f32).convert(Type::f32, normal<float>(n).data(), type, bytes.data(), n);
  return bytes;
}

struct Output {
  std::string name;
  Type type;
  std::vector<char> bytes;
};

using Outputs = std::vector<Output>;

// A result that the drivers must write whole: it starts as NaN.
char* result(Outputs& outputs, const std::string& name, Type type, int64_t n) {
  outputs.push_back({name, type, std::vector<char>(n * size_of(type), static_cast<char>(0xff))});
  return outputs.back().bytes.data();
}

template <class T>
struct Layers : Experts<T> {
  std::vector<char> x_, w1_, b1_, w2_, b2_;

  Layers(Type type, const Sizes& s, bool two, bool gated)
      : Experts<T>{type, s.tokens, s.inputs, two ? s.hidden : 0, s.outputs, s.experts, gated, Activation::gelu, nullptr, {}, {}, {}, {}} {
    const int64_t first = two ? this->first_outputs() : s.outputs;
    x_ = random(type, s.tokens * s.inputs), w1_ = random(type, s.experts * first * s.inputs), b1_ = random(type, s.experts * first);
    this->x = x_.data();
    this->w1 = {w1_.data(), type, first * s.inputs, s.inputs, 1};
    this->b1 = {b1_.data(), type, first};
    if (!two) return;
    w2_ = random(type, s.experts * s.outputs * s.hidden), b2_ = random(type, s.experts * s.outputs);
    this->w2 = {w2_.data(), type, s.outputs * s.hidden, s.hidden, 1};
    this->b2 = {b2_.data(), type, s.outputs};
  }

  void wanted(Outputs& outputs, ExpertsBackward<T>& grads, const std::string& name, int64_t rows, Type exact) const {
    grads.dx = result(outputs, name + " dx", this->type, this->tokens * this->inputs);
    grads.routing_weight_grad = reinterpret_cast<T*>(result(outputs, name + " dweights", exact, rows));
    grads.dw1 = {result(outputs, name + " dw1", this->type, w1_.size() / size_of(this->type)), this->type};
    grads.db1 = {result(outputs, name + " db1", this->type, b1_.size() / size_of(this->type)), this->type};
    if (!this->w2) return;
    grads.dw2 = {result(outputs, name + " dw2", this->type, w2_.size() / size_of(this->type)), this->type};
    grads.db2 = {result(outputs, name + " db2", this->type, b2_.size() / size_of(this->type)), this->type};
  }
};

// Rows of tokens, sorted by the experts they go to; one in seven goes to none.
struct Sorted {
  std::vector<int32_t> offsets;
  std::vector<int64_t> index;

  explicit Sorted(const Sizes& s) : offsets(s.experts + 1, 0), index(s.tokens * s.k) {
    std::vector<int64_t> expert(index.size());
    for (int64_t& e : expert) e = generator() % 7 ? static_cast<int64_t>(generator() % s.experts) : s.experts;
    std::iota(index.begin(), index.end(), int64_t{0});
    std::stable_sort(index.begin(), index.end(), [&](int64_t a, int64_t b) { return expert[a] < expert[b]; });
    for (const int64_t e : expert)
      if (e < s.experts) ++offsets[e + 1];
    std::partial_sum(offsets.begin(), offsets.end(), offsets.begin());
  }
};

// int8 weights: what they are does not matter, nor what pads their panels.
struct Int8 : Int8Weight {
  std::vector<char> bytes;
  std::vector<float> scales, biases;

  Int8(int64_t experts, int64_t outputs_, int64_t inputs_, int64_t parts) {
    const Int8Layout layout = int8_layout();
    const int64_t panels_of = parts * ((outputs_ / parts + layout.lanes - 1) / layout.lanes);
    panel_bytes = round_up(inputs_, layout.depth) * layout.lanes, expert_bytes = panels_of * panel_bytes;
    bytes.resize(experts * expert_bytes);
    for (char& byte : bytes) byte = static_cast<char>(static_cast<int>(generator() % 255) - 127);
    scales = normal<float>(experts * outputs_), biases = normal<float>(experts * outputs_);
    for (float& value : scales) value /= 1270;
    panels = bytes.data(), scale = scales.data(), bias = biases.data(), outputs = outputs_, inputs = inputs_;
  }
};

void run_int8(Outputs& outputs, Type type, const Sizes& s) {
  const std::vector<char> x = random(type, s.tokens * s.inputs);
  const int64_t most = s.tokens * s.k;
  for (const int64_t float_rows : has_int8_products() ? std::vector<int64_t>{most, 4, 0} : std::vector<int64_t>{most}) {
    const std::string name = "int8 experts, float rows " + std::to_string(float_rows) + ", ";
    for (const bool gated : {false, true}) {
      const Int8 w1(s.experts, gated ? 2 * s.hidden : s.hidden, s.inputs, gated ? 2 : 1), w2(s.experts, s.outputs, s.hidden, 1);
      const Int8Experts op{type, s.tokens, s.inputs, s.hidden, s.outputs, s.experts, gated, Activation::silu, x.data(), w1, w2, float_rows};
      const std::vector<float> gates = normal<float>(s.tokens * s.experts), weights = normal<float>(s.tokens * s.k);
      const Gates<float> all{gates.data(), s.tokens, s.experts, nullptr};
      const Sorted rows(s);
      int8_experts(op, {&all, {}, nullptr}, result(outputs, name + (gated ? "all, gated" : "all"), type, s.tokens * s.outputs));
      int8_experts(op, {nullptr, {rows.offsets.data(), rows.index.data(), s.k}, weights.data()},
                   result(outputs, name + (gated ? "chosen, gated" : "chosen"), type, s.tokens * s.outputs));
    }
    const Int8 w1(1, s.hidden, s.inputs, 1);
    const std::vector<char> w2 = random(type, s.experts * s.hidden), b2 = random(type, s.experts);
    Int8Router op{};
    op.type = type, op.tokens = s.tokens, op.inputs = s.inputs, op.hidden = s.hidden, op.experts = s.experts;
    op.x = x.data(), op.w1 = w1, op.bias = w1.bias, op.w1.bias = nullptr;
    op.w2 = {w2.data(), type, 0, s.hidden, 1}, op.b2 = {b2.data(), type, s.experts};
    op.activation = Activation::gelu, op.float_rows = float_rows;
    int8_router(op, reinterpret_cast<float*>(result(outputs, name + "router", Type::f32, s.tokens * s.experts)));
  }
}

template <class T>
Outputs run(Type type, const Sizes& s, bool recompute) {
  generator.seed(1);
  const Type exact = sizeof(T) == 8 ? Type::f64 : Type::f32;
  Outputs outputs;
  outputs.reserve(96);  // results stay where they are

  for (const bool two : {true, false}) {
    const std::string name = two ? "soft_experts" : "soft_experts of one layer";
    const Layers<T> op(type, s, two, false);
    const std::vector<T> gates = normal<T>(s.tokens * s.experts);
    const std::vector<char> dy = random(type, s.tokens * s.outputs);
    char* const u = two && !recompute ? result(outputs, name + " u", type, s.tokens * s.experts * s.hidden) : nullptr;
    soft_experts<T>(op, {gates.data(), s.tokens, s.experts, nullptr}, result(outputs, name, type, s.tokens * s.outputs), u);
    ExpertsBackward<T> grads{};
    std::vector<T> weights(gates.size());
    for (int64_t t = 0; t < s.tokens; ++t)
      for (int64_t e = 0; e < s.experts; ++e) weights[e * s.tokens + t] = gates[t * s.experts + e];
    grads.divisor = grads.dy_divisor = 1;
    grads.routing_weights = weights.data();
    grads.dy = dy.data();
    grads.u = u;
    grads.u_expert = s.hidden;
    grads.u_row = s.experts * s.hidden;
    op.wanted(outputs, grads, name, s.experts * s.tokens, exact);
    experts_backward<T>(op, grads);
  }

  for (const bool gated : {false, true}) {
    const std::string name = gated ? "gated sparse_experts" : "sparse_experts";
    const Layers<T> op(type, s, true, gated);
    const Sorted rows(s);
    const int64_t live = rows.offsets.back();
    const std::vector<T> weights = normal<T>(s.tokens * s.k);
    const std::vector<char> dy = random(type, s.tokens * s.outputs);
    char* const u = recompute ? nullptr : result(outputs, name + " u", type, live * op.first_outputs());
    sparse_experts<T>(op, {rows.offsets.data(), rows.index.data(), s.k}, weights.data(), result(outputs, name, type, s.tokens * s.outputs),
                      u);
    ExpertsBackward<T> grads{};
    grads.offsets = rows.offsets.data();
    grads.index = grads.dy_index = rows.index.data();
    grads.divisor = grads.dy_divisor = s.k;
    grads.routing_weights = weights.data();
    grads.dy = dy.data();
    grads.u = u;
    grads.u_row = op.first_outputs();
    op.wanted(outputs, grads, name, live, exact);
    experts_backward<T>(op, grads);
  }

  {
    const Layers<T> op(type, s, false, false);
    const Sorted rows(s);
    const int64_t all = s.tokens * s.k, live = rows.offsets.back();
    std::vector<int64_t> scatter(all), own(all);
    std::iota(own.begin(), own.end(), int64_t{0});
    for (int64_t i = 0; i < all; ++i) scatter[i] = all - 1 - i;
    const std::vector<char> dy = random(type, all * s.outputs);
    char* const u = result(outputs, "grouped_linear u", type, live * s.outputs);
    std::vector<char> y(all * s.outputs * size_of(type));  // rows past the last expert's are the caller's
    grouped_linear<T>(op, {rows.offsets.data(), rows.index.data(), s.k}, scatter.data(), true, y.data(), u);
    outputs.push_back({"grouped_linear", type, y});
    std::vector<char> du(live * s.outputs * size_of(type));
    activation_backward<T>(op, dy.data(), scatter.data(), u, live, du.data());
    ExpertsBackward<T> grads{};
    grads.offsets = rows.offsets.data();
    grads.index = rows.index.data();
    grads.divisor = s.k;
    grads.dy_index = own.data();
    grads.dy_divisor = 1;
    grads.dy = du.data();
    op.wanted(outputs, grads, "grouped_linear", live, exact);
    experts_backward<T>(op, grads);
  }

  for (const bool two : {true, false}) {
    const std::string name = two ? "task_router" : "task_router of one layer";
    const int64_t task_inputs = 5, columns = task_inputs + s.inputs, hidden = two ? s.hidden : s.experts;
    const std::vector<char> x = random(type, s.tokens * s.inputs), task = random(type, s.groups * task_inputs),
                            w1 = random(type, hidden * columns), b1 = random(type, hidden), w2 = random(type, s.experts * hidden),
                            b2 = random(type, s.experts);
    std::vector<int64_t> ids(s.tokens);
    for (int64_t& id : ids) id = static_cast<int64_t>(generator() % s.groups);
    Router<T> op{};
    op.type = type;
    op.tokens = s.tokens, op.inputs = s.inputs, op.groups = s.groups, op.task_inputs = task_inputs, op.hidden = hidden,
    op.experts = s.experts;
    op.x = x.data(), op.task = task.data(), op.group_ids = ids.data();
    op.w1_task = {w1.data(), type, 0, columns, 1};
    op.w1 = {w1.data() + task_inputs * size_of(type), type, 0, columns, 1};
    op.b1 = {b1.data(), type, hidden};
    if (two) op.w2 = {w2.data(), type, 0, hidden, 1}, op.b2 = {b2.data(), type, s.experts};
    op.activation = Activation::silu;
    char* const u = two && !recompute ? result(outputs, name + " u", type, s.tokens * hidden) : nullptr;
    task_router<T>(op, reinterpret_cast<T*>(result(outputs, name, exact, s.tokens * s.experts)), u);
    const std::vector<T> dlogits = normal<T>(s.tokens * s.experts);
    RouterGradients<T> grads{};
    grads.dlogits = dlogits.data();
    grads.u = u;
    grads.dx = result(outputs, name + " dx", type, s.tokens * s.inputs);
    grads.dtask = {result(outputs, name + " dtask", type, s.groups * task_inputs), type};
    grads.dw1 = {result(outputs, name + " dw1", type, hidden * columns), type};
    grads.db1 = {result(outputs, name + " db1", type, hidden), type};
    if (two)
      grads.dw2 = {result(outputs, name + " dw2", type, s.experts * hidden), type},
      grads.db2 = {result(outputs, name + " db2", type, s.experts), type};
    task_router_backward<T>(op, grads);
  }
  if constexpr (sizeof(T) == 4) run_int8(outputs, type, s);
  return outputs;
}

std::vector<double> values(const Output& output) {
  const int64_t n = static_cast<int64_t>(output.bytes.size()) / size_of(output.type);
  std::vector<double> wide(n);
  if (output.type == Type::f64) {
    std::memcpy(wide.data(), output.bytes.data(), output.bytes.size());
  } else {
    std::vector<float> narrow(n);
    kernels_for<float>(Type::f32).convert(output.type, output.bytes.data(), Type::f32, narrow.data(), n);
    std::copy(narrow.begin(), narrow.end(), wide.begin());
  }
  return wide;
}

// The largest difference, as a share of the largest value; more than anything where a value is not finite.
double difference(const Output& a, const Output& b) {
  const std::vector<double> x = values(a), y = values(b);
  double largest = 1e-30, most = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    if (!std::isfinite(x[i]) || !std::isfinite(y[i])) return INFINITY;
    largest = std::max(largest, std::abs(x[i]));
    most = std::max(most, std::abs(x[i] - y[i]));
  }
  return most / largest;
}

template <class T>
int compare(Type type, const char* name, double allowed, int64_t most_threads) {
  int wrong = 0;
  // Blocks that are part of a panel, whole panels, more threads than panels, more than one stretch of k, nearly nothing; experts of few
  // rows, whose kernels have narrower panels, beside experts of more.
  for (const Sizes& s : {Sizes{37, 40, 70, 33, 3, 2, 3}, Sizes{64, 300, 64, 64, 2, 1, 1}, Sizes{5, 3, 2, 1, 4, 4, 2},
                         Sizes{1, 1, 1, 1, 1, 1, 1}, Sizes{11, 7, 9, 46, 5, 2, 3}})
    for (const bool recompute : {false, true}) {
      threads = 1;
      const Outputs alone = run<T>(type, s, recompute);
      for (threads = 2; threads <= most_threads; ++threads) {
        const Outputs once = run<T>(type, s, recompute), again = run<T>(type, s, recompute);
        for (size_t i = 0; i < once.size(); ++i) {
          const bool same = once[i].bytes == again[i].bytes;
          const double gap = difference(alone[i], once[i]);
          if (same && gap <= allowed) continue;
          std::printf("%s %s T=%lld recompute=%d threads=%lld: %s, difference from one thread %.3g (allowed %.3g)\n", name,
                      once[i].name.c_str(), static_cast<long long>(s.tokens), recompute, static_cast<long long>(threads),
                      same ? "same bits again" : "OTHER BITS AGAIN", gap, allowed);
          ++wrong;
        }
      }
    }
  return wrong;
}

}  // namespace

// Without the argument "all", which takes six times as long: bf16, whose operands are packed and converted, with up to three threads.
int main(int count, char** arguments) {
  const bool all = count > 1 && std::strcmp(arguments[1], "all") == 0;
  need_instruction_set();
  std::printf("instruction set %s\n", isa_name());
  // Sums in another order, rounded to the type at the end and, for u and du, in between.
  const int64_t most = all ? 4 : 3;
  int wrong = compare<float>(Type::bf16, "bf16", 3e-2, most);
  if (all) {
    wrong += compare<float>(Type::f32, "fp32", 2e-5, most) + compare<float>(Type::f16, "fp16", 4e-3, most);
    wrong += compare<double>(Type::f64, "fp64", 1e-13, most);
  }
  std::printf("%d results differ\n", wrong);
  return wrong ? 1 : 0;
}
