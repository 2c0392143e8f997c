// The products of expert layers by themselves, against sums in fp64.
//
//     gemm_test SCENARIO bf16|f16|f32 [forward|reverse|shuffled] [eager|early]
//
// prints, for each product, its worst error over the rounding that its type allows, then accesses to shared memory and the phases that
// served them, then a hash of all results.

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "device/launch.h"
#include "emulator/types.h"
#include "gemm/gemm.h"

using namespace cmoe::cuda;

namespace {

struct Scenario {
  const char* name;
  std::vector<int> rows;  // of each expert; one number and no offsets: dense
  bool dense, gated, sum, transposed, indexed;
  int64_t depth, width, experts, none;
  bool wide = false, bad = false;  // weights in fp32; indices that are none
  int64_t gap = 0;                 // elements between one row of depth and the next, not numbers
};
// Sizes that are no multiple of a tile, and of 8 where operands come by cp.async; experts without rows, rows without an expert.
const Scenario scenarios[] = {
    {"sparse", {3, 0, 70, 1}, false, false, false, false, true, 40, 24, 4, 5},
    {"sorted", {70, 0, 5, 66}, false, false, false, false, false, 72, 40, 4, 3},
    {"transposed", {3, 0, 70, 1}, false, false, false, true, true, 40, 72, 4, 5},
    {"gated", {9, 66, 0}, false, true, false, false, true, 72, 40, 3, 2},
    {"gated_transposed", {9, 66, 0}, false, true, false, true, true, 72, 40, 3, 2},
    {"gated_in_fours", {9, 66, 0}, false, true, false, true, true, 72, 20, 3, 2},
    {"dense", {67}, true, false, false, false, false, 72, 40, 3, 0},
    {"sum", {67}, true, false, true, false, false, 40, 72, 3, 0},
    {"sum_transposed", {67}, true, false, true, true, false, 40, 72, 3, 0},
    {"odd", {3, 0, 66, 1}, false, false, false, false, true, 37, 23, 4, 2},
    {"odd_gated", {5, 67}, false, true, false, true, true, 13, 9, 2, 1},
    {"odd_sum", {35}, true, false, true, false, false, 37, 23, 3, 0},
    {"large", {150, 0, 0, 131, 150}, false, false, false, false, true, 72, 136, 5, 60},
    {"large_transposed", {230, 3}, false, false, false, true, true, 40, 136, 2, 0},
    {"large_gated", {230, 3}, false, true, false, false, true, 40, 104, 2, 0},
    {"empty", {0, 0}, false, false, false, false, true, 24, 16, 2, 3},
    {"wide", {3, 0, 70, 1}, false, false, false, false, true, 40, 24, 4, 5, true},
    {"bad", {3, 0, 70, 1}, false, false, false, false, true, 40, 24, 4, 5, false, true},
    {"odd_bad", {3, 70}, false, false, false, true, true, 37, 23, 2, 5, false, true},
    {"padded", {3, 0, 70, 1}, false, false, false, false, true, 37, 24, 4, 5, false, false, 3},
    {"deep", {3, 0, 37}, false, false, false, false, true, 200, 24, 3, 1},
    {"many", std::vector<int>(40, 2), false, false, false, false, true, 24, 16, 40, 1},
};

uint64_t state = 1, hash = 1469598103934665603ull;
double uniform() {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<double>(state >> 11) / 9007199254740992.0 * 2 - 1;
}

template <class T>
struct Values {
  std::vector<T> bits;
  explicit Values(int64_t n) : bits(n) {
    for (T& v : bits) v = from_float<T>(static_cast<float>(uniform()));
  }
  double operator[](int64_t i) const { return to_float(bits[i]); }
};

template <class T>
struct Results {
  std::vector<T> bits;
  explicit Results(int64_t n) : bits(n) { memset(bits.data(), 0xff, n * sizeof(T)); }  // NaN where nothing is written
};

constexpr Type type_of(float) { return Type::f32; }
constexpr Type type_of(bf16) { return Type::bf16; }
constexpr Type type_of(fp16) { return Type::f16; }
template <class T>
constexpr double epsilon = sizeof(T) == 4               ? 0x1p-23
                           : type_of(T{}) == Type::bf16 ? 0x1p-8
                                                        : 0x1p-11;

// Worst error over eps max |expected|; f(i) is the expected value.
template <class V, class F>
double compare(const std::vector<V>& got, int64_t n, double eps, F&& f) {
  double worst = 0, largest = 1e-30;
  for (int64_t i = 0; i < n; ++i) {
    const double want = f(i), is = to_float(got[i]);
    largest = std::max(largest, std::abs(want));
    worst = std::isnan(is) ? 1e30 : std::max(worst, std::abs(is - want));
    uint64_t bits = 0;
    memcpy(&bits, &got[i], sizeof(V));
    hash = (hash ^ bits) * 1099511628211ull;
  }
  return worst / largest / eps;
}

double silu(double u) { return u / (1 + std::exp(-u)); }
double silu_slope(double u) {
  const double s = 1 / (1 + std::exp(-u));
  return s * (1 + u * (1 - s));
}

template <class T>
void run(const Scenario& s) {
  const int64_t D = s.depth, L = D + s.gap, N = s.width, E = s.experts, halves = s.gated ? 2 : 1;
  int64_t rows = s.none;
  std::vector<int32_t> offsets{0};
  for (const int n : s.rows) rows += n, offsets.push_back(static_cast<int32_t>(rows - s.none));
  std::vector<int64_t> order(rows), expert(rows, E);
  for (int64_t r = 0; r < rows; ++r) order[r] = s.indexed ? (r * 7 + 3) % rows : r;
  if (rows % 7 == 0 && s.indexed)
    for (int64_t r = 0; r < rows; ++r) order[r] = rows - 1 - r;
  std::vector<int64_t> reads = order;
  if (s.bad) reads[1] = -5, reads[4] = rows, reads[5] = int64_t{1} << 40;
  if (!s.dense)
    for (int64_t e = 0; e < E; ++e)
      for (int64_t r = offsets[e]; r < offsets[e + 1]; ++r) expert[r] = e;
  const Groups groups{s.dense ? nullptr : offsets.data(), rows, E};
  const int64_t each = s.dense ? E : 1;  // results of a row
  const int64_t *const index = s.indexed ? order.data() : nullptr, *const read = s.indexed ? reads.data() : nullptr;
  const auto served = [&](int64_t r) { return (s.dense || expert[r] < E) && reads[r] >= 0 && reads[r] < rows; };
  const auto source = [&](int64_t r) { return reads[r]; };

  Values<T> x(rows * L * (s.sum ? E : 1)), w(E * halves * N * L), dy(rows * L);
  const Values<T> b(E * halves * N), pre(rows * each * halves * N);
  if (s.gap)
    for (std::vector<T>* v : {&x.bits, &w.bits, &dy.bits})
      for (size_t i = 0; i < v->size(); ++i)
        if (static_cast<int64_t>(i) % L >= D) memset(&(*v)[i], 0xff, sizeof(T));
  Values<float> routing_weights(rows * E);
  const Type type = type_of(T{});
  std::vector<float> wide(s.wide ? w.bits.size() : 0);  // between two halves, so that rounding shows
  for (size_t i = 0; i < wide.size(); ++i) wide[i] = to_float(w.bits[i]) * (1 + static_cast<float>(epsilon<T>) / 5);
  const WeightOperand weights = s.wide         ? WeightOperand{wide.data(), Type::f32, halves * N * L, L, 1}
                                : s.transposed ? WeightOperand{w.bits.data(), type, halves * N * L, 1, halves * N}
                                               : WeightOperand{w.bits.data(), type, halves * N * L, L, 1};
  const auto weight = [&](int64_t e, int64_t n, int64_t k) {
    const int64_t at = e * halves * N * L + (s.transposed ? k * halves * N + n : n * L + k);
    return s.wide ? double{to_float(from_float<T>(wide[at]))} : w[at];
  };
  const RoutingWeights by{routing_weights.bits.data(), s.dense ? E : 1, s.dense ? 1 : 0};
  const auto scaled = [&](int64_t r, int64_t e) { return routing_weights[s.dense ? r * E + e : r]; };

  // y = routing_weights silu(W x + b), stored where the index says; the sum has no activation
  GroupedGemm p;
  p.type = type, p.groups = groups, p.width = N, p.depth = D, p.w = weights, p.sum = s.sum, p.gated = s.gated;
  p.x = {x.bits.data(), type, s.sum ? E * L : L, 1, s.sum ? L : 0, read, 1};
  p.b = {b.bits.data(), type, halves * N, 1};
  p.routing_weights = by;
  p.activation = s.sum ? Activation::none : Activation::silu;
  const int64_t outputs = s.sum ? 1 : each;
  Results<T> y(rows * outputs * N), u(rows * each * halves * N);
  p.y = {y.bits.data(), type, outputs * N, s.dense && !s.sum ? N : 0, index};
  if (!s.sum) p.u = {u.bits.data(), type, each * halves * N, s.dense ? halves * N : 0, nullptr};
  grouped_gemm("forward", p, nullptr);
  std::vector<int64_t> inverse(rows);
  for (int64_t r = 0; r < rows; ++r) inverse[order[r]] = r;
  const auto product = [&](int64_t r, int64_t e, int64_t n) {
    double sum = b[e * halves * N + n];
    for (int64_t k = 0; k < D; ++k) sum += weight(e, n, k) * x[s.sum ? (r * E + e) * L + k : source(r) * L + k];
    return sum;
  };
  const double forward = compare(y.bits, rows * outputs * N, epsilon<T>, [&](int64_t i) {
    const int64_t n = i % N, r = inverse[i / N / outputs], e = s.dense ? i / N % outputs : expert[r];
    if (!served(r)) return 0.0;
    if (s.sum) {
      double sum = 0;
      for (int64_t j = 0; j < E; ++j) sum += product(r, j, n) - b[j * N + n] + scaled(r, j) * b[j * N + n];
      return sum;
    }
    // The saved value is what act sees.
    const auto seen = [&](int64_t m) { return double{to_float(u.bits[(r * each + (s.dense ? e : 0)) * halves * N + m])}; };
    return scaled(r, e) * silu(seen(n)) * (s.gated ? seen(N + n) : 1.0);
  });
  const double saved = s.sum ? 0 : compare(u.bits, rows * each * halves * N, epsilon<T>, [&](int64_t i) {
    const int64_t n = i % (halves * N), r = i / (halves * N) / each, e = s.dense ? i / (halves * N) % each : expert[r];
    return served(r) ? product(r, e, n) : 0.0;
  });

  // dh = W^T dy with the same W [N, D]: dy has D columns
  double du_error = 0, h_error = 0, partials_error = 0;
  if (!s.sum) {
    DactGemm q;
    q.type = type, q.groups = groups, q.width = N, q.depth = D, q.w = weights, q.gated = s.gated, q.activation = Activation::silu,
    q.routing_weights = by;
    q.dy = {dy.bits.data(), type, L, 1, 0, read, 1};
    q.u = {pre.bits.data(), type, each * halves * N, 1, s.dense ? halves * N : 0, nullptr, 1};
    Results<T> du(rows * each * halves * N), h(rows * each * N);
    q.du = {du.bits.data(), type, each * halves * N, s.dense ? halves * N : 0, nullptr};
    q.weighted_hidden = {h.bits.data(), type, each * N, s.dense ? N : 0, nullptr};
    Results<float> partials(dact_partials(q) * rows * each);
    q.partials = partials.bits.data();
    dact_gemm("hidden", q, nullptr);
    const auto dh = [&](int64_t r, int64_t e, int64_t n) {
      double sum = 0;
      for (int64_t k = 0; k < D; ++k) sum += weight(e, n, k) * dy[source(r) * L + k];
      return sum;
    };
    const auto at = [&](int64_t i, int64_t columns, int64_t& r, int64_t& e) {
      r = i / columns / each, e = s.dense ? i / columns % each : expert[r];
    };
    du_error = compare(du.bits, rows * each * halves * N, epsilon<T>, [&](int64_t i) {
      int64_t r, e;
      at(i, halves * N, r, e);
      if (!served(r)) return 0.0;
      const int64_t column = i % (halves * N), n = column % N, base = i - column;
      const double u0 = pre[base + n], up = s.gated ? pre[base + N + n] : 1.0;
      return scaled(r, e) * dh(r, e, n) * (column < N ? silu_slope(u0) * up : silu(u0));
    });
    h_error = compare(h.bits, rows * each * N, epsilon<T>, [&](int64_t i) {
      int64_t r, e;
      at(i, N, r, e);
      if (!served(r)) return 0.0;
      const int64_t n = i % N, base = i / N * halves * N;
      return scaled(r, e) * silu(pre[base + n]) * (s.gated ? pre[base + N + n] : 1.0);
    });
    std::vector<float> sums(rows * each, 0.0f);
    for (size_t i = 0; i < partials.bits.size(); ++i) sums[i % (rows * each)] += partials.bits[i];
    partials_error = compare(sums, rows * each, 64 * 0x1p-23, [&](int64_t i) {
      int64_t r, e;
      at(i, 1, r, e);
      if (!served(r)) return 0.0;
      double sum = 0;
      for (int64_t n = 0; n < N; ++n) sum += dh(r, e, n) * silu(pre[i * halves * N + n]) * (s.gated ? pre[i * halves * N + N + n] : 1.0);
      return sum;
    });
  }

  // dW[e] = sum of pre x^T, db = sum of routing_weights pre
  Wgrad v;
  v.type = type, v.groups = groups, v.height = halves * N, v.width = D;
  v.p = {pre.bits.data(), type, each * halves * N, 1, s.dense ? halves * N : 0, nullptr, 1};
  v.q = {x.bits.data(), type, L, 1, 0, read, 1};
  v.routing_weights = by;
  Results<T> dw(E * halves * N * D);
  Results<float> db(E * halves * N);
  v.dw = {dw.bits.data(), type, D, halves * N * D, nullptr};
  v.db = {db.bits.data(), Type::f32, 0, halves * N, nullptr};
  wgrad("weight", v, nullptr);
  const auto over_rows = [&](int64_t e, auto&& f) {
    double sum = 0;
    for (int64_t r = 0; r < rows; ++r)
      if (s.dense || expert[r] == e) sum += f(r, (r * each + (s.dense ? e : 0)) * halves * N);
    return sum;
  };
  const double dw_error = compare(dw.bits, E * halves * N * D, epsilon<T>, [&](int64_t i) {
    const int64_t k = i % D, n = i / D % (halves * N), e = i / D / (halves * N);
    return over_rows(e, [&](int64_t r, int64_t base) { return served(r) ? pre[base + n] * x[source(r) * L + k] : 0.0; });
  });
  const double db_error = compare(db.bits, E * halves * N, 64 * 0x1p-23, [&](int64_t i) {
    const int64_t n = i % (halves * N), e = i / (halves * N);
    return over_rows(e, [&](int64_t r, int64_t base) { return scaled(r, e) * pre[base + n]; });
  });

  printf("forward %.3g saved %.3g du %.3g h %.3g partials %.3g dw %.3g db %.3g\n", forward, saved, du_error, h_error, partials_error,
         dw_error, db_error);
  const emulator::Counts& c = emulator::counts;
  printf("copies %lu %lu ldmatrix %lu %lu vectors %lu %lu\n", c.copies, c.copy_phases, c.ldmatrix, c.ldmatrix_phases, c.vectors,
         c.vector_phases);
  printf("hash %016lx\n", hash);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return 2;
  for (int i = 3; i < argc; ++i) {
    const std::string option = argv[i];
    if (option == "reverse") emulator::options.order = emulator::Order::reverse;
    if (option == "shuffled") emulator::options.order = emulator::Order::shuffled;
    if (option == "eager") emulator::options.lazy = false;
    if (option == "early") emulator::options.early_copies = true;
  }
  const std::string which = argv[1], type = argv[2];
  for (const Scenario& s : scenarios)
    if (which == s.name) {
      try {
        if (type == "bf16")
          run<bf16>(s);
        else if (type == "f16")
          run<fp16>(s);
        else
          run<float>(s);
      } catch (const std::exception& error) {
        return printf("%s\n", error.what()), 1;
      }
      return 0;
    }
  return 2;
}
