// The main loop of sm_90a's products, its sums stored as they are, against plain loops: small integers, so that every sum is exact.
//
//     gemm_sm90_test [forward|reverse|shuffled] [eager|early]        prints the number of wrong elements of each case

#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "gemm/sm90.cuh"

using namespace cmoe::cuda;
using emulator::options;

namespace {

// [rows (, experts), width (gated: 2 width)], untouched where no tile is.
struct Sums {
  float* to;
  int64_t experts;
  bool by_expert;

  template <class Tile>
  void store(const RowArguments& p, const RowTile& tile, bool known, const WarpPlace<Tile>& place, Accumulator<Tile>& sums, float*) const {
    const int halves = p.gated ? 2 : 1;
    for (int j = 0; j < Tile::tiles_n; ++j)
      for (int i = 0; i < 4; ++i) {
        const int row = tile.first + place.row(0, i / 2),
                  column = tile.column * Tile::n / halves + j / halves * 8 + 2 * (place.lane % 4) + i % 2;
        if (row >= tile.end || column >= p.width) continue;
        if (!known && sums[0][j][i] != 0) printf("rows of no expert are not zeros\n");
        to[((by_expert ? row * experts + tile.expert : row) * halves + j % halves) * p.width + column] = sums[0][j][i];
      }
  }
};

struct Case {
  const char* name;
  int rows, width, depth;
  std::vector<int> counts;  // of the rows of each expert; none: every expert has every row
  int experts = 1;
  bool sum = false, gathers = false, gated = false;
  int divisor = 1;
};

template <class T, class Tile, Major major>
int wrong(const Case& c) {
  const int experts = c.counts.empty() ? c.experts : static_cast<int>(c.counts.size()), tokens = (c.rows + c.divisor - 1) / c.divisor;
  const int outputs = c.gated ? 2 * c.width : c.width, x_rows = c.sum ? tokens * experts : tokens;
  const int ld_x = (c.depth + 7) / 8 * 8, ld_w = ((major == Major::k ? c.depth : outputs) + 7) / 8 * 8,
            w_rows = major == Major::k ? outputs : c.depth;
  std::mt19937 random(7);
  const auto number = [&] { return from_float<T>(static_cast<float>(static_cast<int>(random() % 9) - 4)); };
  T* const x = static_cast<T*>(std::aligned_alloc(16, sizeof(T) * x_rows * ld_x));
  T* const w = static_cast<T*>(std::aligned_alloc(16, sizeof(T) * experts * w_rows * ld_w));
  // What lies beyond the ends of rows is no operand.
  for (int i = 0; i < x_rows * ld_x; ++i) x[i] = i % ld_x < c.depth ? number() : from_float<T>(NAN);
  for (int i = 0; i < experts * w_rows * ld_w; ++i)
    w[i] = i % ld_w < (major == Major::k ? c.depth : outputs) ? number() : from_float<T>(NAN);
  std::vector<int32_t> offsets{0};
  for (const int n : c.counts) offsets.push_back(offsets.back() + n);
  std::vector<int64_t> index(c.rows);
  for (int i = 0; i < c.rows; ++i) index[i] = i;
  std::shuffle(index.begin(), index.end(), random);
  if (c.gathers && c.rows > 3) index[2] = c.rows, index[3] = -1;

  Groups groups{c.counts.empty() ? nullptr : offsets.data(), c.rows, experts};
  const bool by_expert = c.counts.empty() && !c.sum;
  const int64_t cells = int64_t{c.rows} * (by_expert ? experts : 1) * outputs;
  std::vector<float> y(cells, -1000), expected(cells, 0);
  RowOperand rows{x,        Type::bf16, c.sum ? int64_t{ld_x} * experts : ld_x, 1, c.sum ? ld_x : 0, c.gathers ? index.data() : nullptr,
                  c.divisor};
  const int64_t per_matrix = int64_t{ld_w} * w_rows;
  const WeightOperand weights{w, Type::bf16, per_matrix, major == Major::k ? ld_w : 1, major == Major::k ? 1 : ld_w};
  const RowArguments p{groups, c.width, c.depth, 0, c.sum, c.gated, rows, weights, false, false};
  const Mapped mapped(Type::bf16, p);
  if (!mapped.can || mapped.major != major) printf("%s: not served\n", c.name);
  launch_rows_sm90<T, Tile, major>("test", mapped, p, Sums{y.data(), experts, by_expert}, nullptr);

  for (int r = 0; r < c.rows; ++r)
    for (int e = 0; e < experts; ++e) {
      if (groups.offsets && (r < offsets[e] || r >= offsets[e + 1])) continue;
      const int64_t source = c.gathers ? index[r] : r;
      if (source < 0 || source >= c.rows) continue;
      for (int n = 0; n < outputs; ++n) {
        float s = 0;
        for (int k = 0; k < c.depth; ++k)
          s += to_float(x[source / c.divisor * rows.row + (c.sum ? e * ld_x : 0) + k]) *
               to_float(w[(int64_t{e} * w_rows + (major == Major::k ? n : k)) * ld_w + (major == Major::k ? k : n)]);
        expected[(by_expert ? int64_t{r} * experts + e : r) * outputs + n] += s;
      }
    }
  int bad = 0;
  for (int64_t i = 0; i < cells; ++i) bad += y[i] != expected[i];
  free(x);
  free(w);
  return bad;
}

const Case cases[] = {
    {"one tile", 128, 256, 64, {128}},
    {"longer than the ring", 100, 40, 600, {60, 40}},
    {"tails, empty experts, rows of none", 300, 300, 72, {0, 129, 1, 0, 65, 0, 100}},
    {"no rows of any", 70, 24, 40, {0, 0}},
    {"gathered", 200, 136, 104, {30, 0, 150}, 1, false, true},
    {"assignments of tokens", 201, 48, 200, {100, 90, 5}, 1, false, true, false, 3},
    {"assignments in their order", 96, 48, 80, {40, 50}, 1, false, false, false, 2},
    {"gated", 150, 200, 136, {10, 140}, 1, false, false, true},
    {"gated and gathered", 150, 70, 72, {100, 40}, 1, false, true, true},
    {"every expert", 70, 60, 136, {}, 3},
    {"summed", 130, 140, 88, {}, 3, true},
};

template <class T, class Tile, Major major>
void run(const char* name) {
  for (const Case& c : cases)
    if (const int bad = wrong<T, Tile, major>(c)) printf("%s, %s: %d wrong\n", name, c.name, bad);
}

}  // namespace

int main(int count, char** arguments) {
  for (int i = 1; i < count; ++i) {
    const std::string option = arguments[i];
    if (option == "reverse") options.order = emulator::Order::reverse;
    if (option == "shuffled") options.order = emulator::Order::shuffled;
    if (option == "eager") options.lazy = false;
    if (option == "early") options.early_copies = true;
  }
  try {
    run<bf16, CommonTile, Major::k>("large");
    run<fp16, OwnTile, Major::k>("small");
    run<fp16, CommonTile, Major::mn>("large, outputs next to each other");
    run<bf16, OwnTile, Major::mn>("small, outputs next to each other");
    printf("done\n");
  } catch (const std::exception& error) {
    printf("fault: %s\n", error.what());
  }
}
