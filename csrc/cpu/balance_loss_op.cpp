// balance_loss on the CPU.
//
//     switch       E sum_e f_e m_e / n          m_e = sum of scores[:, e], n tokens that count,
//                                               f_e = share of the assignments that went to e
//     importance   E sum_e d_e^2                d_e = m_e / sum_j m_j - 1/E: zero where there is no mass
//     z            sum_t logsumexp(scores[t])^2 / n
//     softmax_switch, softmax_importance: of softmax(scores) in place of scores
//     the mean over the segments that hold a token that counts; without segments all tokens are one.
//
// d loss / d scores[t, e] is one slope per segment and expert for every token that counts (for "z" a factor on logsumexp times softmax), so
// backward sums what the slope needs and then writes rows.
//
// Memory plan: segments are labels, not ranges. Neighbours with one label are a run; runs are sorted by label, not tokens: labels that come
// in order, such as one per image, cost one look each. Runs of a segment are grouped into pieces of a few thousand scores. Each piece is
// summed by one thread in token order, in double (an addition in double costs what one in float does); the pieces of a segment are added in
// order. Pieces follow from the shape and the labels, so the result has the same bits for any number of threads. Scores are read in blocks
// of 16 rows side by side (blocks.h), each lane with its own sum. Scratch: E doubles and E counts per piece, E doubles per segment, some
// blocks [E, 16] per thread. Inputs are read through their strides.

#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>

#include "../registration.h"
#include "blocks.h"
#include "tensors.h"

namespace cmoe::cpu::bindings {
namespace {

enum class Kind { switch_, importance, z };

struct Named {
  Kind kind;
  bool softmax;

  explicit Named(OwnedString handle) {
    std::string name = consume_string(handle);
    softmax = name.starts_with("softmax_");
    if (softmax) name = name.substr(8);
    STD_TORCH_CHECK(name == "switch" || name == "importance" || (name == "z" && !softmax), "kind is '", name,
                    "', must be one of switch, importance, z");
    kind = name == "switch" ? Kind::switch_ : name == "importance" ? Kind::importance : Kind::z;
  }
};

// Values of a dimension or two, at any strides; everywhere `otherwise` where there is no tensor.
template <class T>
class Values {
 public:
  Values(const std::optional<Tensor>& t, T otherwise) : otherwise_(otherwise) {
    if (!t) return;
    data_ = static_cast<const T*>(t->const_data_ptr());
    row_ = t->stride(0);
    if (t->dim() == 2) column_ = t->stride(1);
  }
  T operator()(int64_t row, int64_t column = 0) const { return data_ ? data_[row * row_ + column * column_] : otherwise_; }

 private:
  const T* data_ = nullptr;
  int64_t row_ = 0, column_ = 0;
  T otherwise_;
};

// The tokens first..last-1, neighbours with one label.
struct Run {
  int64_t label, first, last;
};

// The runs first..last-1, all of one segment.
struct Piece {
  int64_t first, last, segment;
};

struct Pieces {
  std::vector<Run> runs;
  std::vector<Piece> list;
  int64_t segments = 0;

  Pieces(const std::optional<Tensor>& labels, int64_t tokens, int64_t experts) {
    const int64_t most = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, experts));
    const Values<int64_t> label(labels, 0);
    for (int64_t t = 0; t < tokens;) {
      Run run{label(t), t, std::min(t + most, tokens)};
      if (labels) {
        while (++t < run.last && label(t) == run.label) {
        }
        run.last = t;
      }
      runs.push_back(run);
      t = run.last;
    }
    const auto before = [](const Run& a, const Run& b) { return a.label < b.label; };
    if (!std::is_sorted(runs.begin(), runs.end(), before)) std::stable_sort(runs.begin(), runs.end(), before);
    int64_t held = 0;
    for (int64_t r = 0; r < static_cast<int64_t>(runs.size()); ++r) {
      const int64_t length = runs[r].last - runs[r].first;
      const bool next = r == 0 || runs[r].label != runs[r - 1].label;
      segments += next;
      if (next || held + length > most) {
        list.push_back({r, r, segments - 1});
        held = 0;
      }
      list.back().last = r + 1;
      held += length;
    }
  }

  int64_t count() const { return static_cast<int64_t>(list.size()); }

  // f(piece) of each, on some thread.
  template <class F>
  void each(int64_t tokens, int64_t experts, const F& f) const {
    Chunks(count(), tokens * experts / std::max<int64_t>(1, count())).run([&](int64_t, int64_t first, int64_t last) {
      for (int64_t piece = first; piece < last; ++piece) f(piece);
    });
  }
};

// Sums over the tokens that count, one row per piece or per segment.
struct Sums {
  std::vector<double> mass;       // [rows, E] scores
  std::vector<int64_t> selected;  // [rows, E] assignments
  std::vector<int64_t> tokens;    // [rows]
  std::vector<double> squares;    // [rows] logsumexp^2

  Sums(int64_t rows, int64_t experts) : mass(rows * experts), selected(rows * experts), tokens(rows), squares(rows) {}
};

struct Arguments {
  const Tensor& scores;
  const std::optional<Tensor>&indices, &mask;
  const Named named;
  const Kind kind;
  const std::optional<Tensor>&segments, &counts, &total;
  int64_t tokens, experts;

  Arguments(const Tensor& scores_, const std::optional<Tensor>& indices_, const std::optional<Tensor>& mask_, OwnedString kind_,
            const std::optional<Tensor>& segments_, const std::optional<Tensor>& counts_, const std::optional<Tensor>& total_)
      : scores(scores_), indices(indices_), mask(mask_), named(kind_), kind(named.kind), segments(segments_), counts(counts_),
        total(total_) {
    require_2d("scores", scores, "[T, E]");
    tokens = scores.size(0), experts = scores.size(1);
    if (indices) {
      require_2d("indices", *indices, "[T, K]");
      require_shape("indices", *indices, tokens, indices->size(1), "scores in its rows");
      require_dtype("indices", *indices, ScalarType::Long);
    }
    STD_TORCH_CHECK(kind != Kind::switch_ || indices.has_value() != counts.has_value(), "kind='switch' needs either indices or counts");
    require_vector("mask", mask, tokens);
    if (mask) require_dtype("mask", *mask, ScalarType::Bool);
    require_vector("segments", segments, tokens);
    if (segments) require_dtype("segments", *segments, ScalarType::Long);
    require_vector("counts", counts, experts);
  }

  static void require_dtype(const char* name, const Tensor& t, ScalarType dtype) {
    STD_TORCH_CHECK(t.scalar_type() == dtype, name, " must be ", torch::headeronly::toString(dtype), ", got ",
                    torch::headeronly::toString(t.scalar_type()));
  }
  static void require_vector(const char* name, const std::optional<Tensor>& t, int64_t size) {
    STD_TORCH_CHECK(!t || (t->dim() == 1 && t->size(0) == size), name, " has shape ", shape(*t), ", must be (", size, ")");
  }
};

// One number, of any dtype.
double number(const Tensor& t) { return *static_cast<const double*>(torch::stable::to(t, ScalarType::Double).const_data_ptr()); }

// logsumexp of row t; leaves exp(scores - their maximum) in powers and the sum of these in `sum`.
template <class L>
double logsumexp(const Rows<L>& scores, int64_t t, int64_t experts, accumulate_t<L>* powers, sum_t* sum) {
  auto largest = -std::numeric_limits<accumulate_t<L>>::infinity();
  for (int64_t e = 0; e < experts; ++e) {
    const auto l = scores(t, e);
    largest = l > largest || l != l ? l : largest;
  }
  *sum = 0;
  for (int64_t e = 0; e < experts; ++e) *sum += powers[e] = std::exp(scores(t, e) - largest);
  return std::isinf(largest) ? largest : largest + std::log(*sum);
}

// Rows t.. of the scores as a block x [E, 16], their softmax where the kind asks for it.
template <class L>
void read_scores(const Arguments& a, const Rows<L>& scores, int64_t t, int64_t rows, accumulate_t<L>* x) {
  using A = accumulate_t<L>;
  using V = Vector<A>;
  read_block(scores, t, rows, a.experts, x);
  if (!a.named.softmax) return;
  const RowFunctions<A>& f = row_functions_here<A>();
  each_vector<A>([&](int64_t lane) {
    const auto largest = greatest(x + lane, a.experts);
    for (int64_t e = 0; e < a.experts; ++e) V::store(x + e * lanes + lane, V::load(x + e * lanes + lane) - largest);
  });
  f.exp(x, x, a.experts * lanes);
  each_vector<A>([&](int64_t lane) {
    Sum<A> sum;
    for (int64_t e = 0; e < a.experts; ++e) sum.add(V::load(x + e * lanes + lane));
    const auto whole = sum.value();
    for (int64_t e = 0; e < a.experts; ++e) V::store(x + e * lanes + lane, V::load(x + e * lanes + lane) / whole);
  });
}

// The sums of each segment that the loss needs, or those that its slopes need.
template <class L>
Sums sums_of(const Arguments& a, const Pieces& pieces, bool backward) {
  const Rows<L> scores(a.scores);
  const Values<bool> live(a.mask, true);
  const Values<int64_t> index(a.indices, 0);
  const int64_t experts = a.experts, k = a.indices ? a.indices->size(1) : 0;
  const bool mass = a.kind == Kind::importance || (a.kind == Kind::switch_ && !backward), squares = a.kind == Kind::z && !backward;
  std::atomic<bool> bad_index = false;
  Sums parts(pieces.count(), experts), sums(pieces.segments, experts);
  pieces.each(a.tokens, experts, [&](int64_t piece) {
    double* const part = parts.mass.data() + piece * experts;
    int64_t* const selected = parts.selected.data() + piece * experts;
    std::vector<accumulate_t<L>> powers(squares ? experts : 0), x(mass ? experts * lanes : 0);
    std::vector<double> by_lane(x.size());
    bool bad = false;
    for (int64_t r = pieces.list[piece].first; r < pieces.list[piece].last; ++r) {
      for (int64_t t = pieces.runs[r].first; t < pieces.runs[r].last; ++t) {
        for (int64_t i = 0; i < k; ++i) {
          const int64_t e = index(t, i);
          if (e < -1 || e > experts) {
            bad = true;
          } else if (e >= 0 && e < experts) {
            selected[e] += live(t);
          }
        }
        if (!live(t)) continue;
        ++parts.tokens[piece];
        if (squares) {
          sum_t sum;
          const double z = logsumexp(scores, t, experts, powers.data(), &sum);
          parts.squares[piece] += z * z;
        }
      }
      if (!mass) continue;
      each_block(pieces.runs[r].first, pieces.runs[r].last, [&](int64_t t, int64_t rows) {
        read_scores(a, scores, t, rows, x.data());
        // A full block without a mask needs no choice, and is added in vectors.
        if (rows == lanes && !a.mask) {
          for (int64_t i = 0; i < experts * lanes; ++i) by_lane[i] += x[i];
        } else {
          for (int64_t row = 0; row < rows; ++row) {
            for (int64_t e = 0; live(t + row) && e < experts; ++e) by_lane[e * lanes + row] += x[e * lanes + row];
          }
        }
      });
    }
    for (int64_t i = 0; i < static_cast<int64_t>(by_lane.size()); ++i) part[i / lanes] += by_lane[i];
    if (bad) bad_index = true;
  });
  if (bad_index) require_experts(torch::stable::contiguous(*a.indices), experts);
  for (int64_t piece = 0; piece < pieces.count(); ++piece) {
    const int64_t segment = pieces.list[piece].segment;
    for (int64_t e = 0; e < experts; ++e) {
      sums.mass[segment * experts + e] += parts.mass[piece * experts + e];
      sums.selected[segment * experts + e] += parts.selected[piece * experts + e];
    }
    sums.tokens[segment] += parts.tokens[piece];
    sums.squares[segment] += parts.squares[piece];
  }
  return sums;
}

struct Statistic {
  double loss = 0;
  std::vector<double> slopes;  // [segments, E]
};

Statistic statistic(const Arguments& a, const Sums& sums, int64_t segments) {
  const int64_t experts = a.experts;
  Statistic result;
  result.slopes.resize(segments * experts);
  std::vector<double> shares(experts);
  if (a.counts) {
    const Tensor counts = torch::stable::contiguous(torch::stable::to(*a.counts, ScalarType::Double));
    std::copy_n(static_cast<const double*>(counts.const_data_ptr()), experts, shares.begin());
    const double whole = std::max(a.total ? number(*a.total) : std::accumulate(shares.begin(), shares.end(), 0.), 1.);
    for (double& share : shares) share /= whole;
  }
  const auto filled = std::count_if(sums.tokens.begin(), sums.tokens.end(), [](int64_t tokens) { return tokens > 0; });
  for (int64_t segment = 0; segment < segments; ++segment) {
    if (!sums.tokens[segment]) continue;
    const double tokens = static_cast<double>(sums.tokens[segment]), weight = 1. / static_cast<double>(filled);
    const double* const mass = sums.mass.data() + segment * experts;
    double* const slope = result.slopes.data() + segment * experts;
    if (a.kind == Kind::switch_) {
      double product = 0;
      for (int64_t e = 0; e < experts; ++e) {
        const double share =
            a.counts ? shares[e]
                     : static_cast<double>(sums.selected[segment * experts + e]) / (tokens * static_cast<double>(a.indices->size(1)));
        slope[e] = weight * experts * share / tokens;
        product += slope[e] * mass[e];
      }
      result.loss += product;
    } else if (a.kind == Kind::importance) {
      const double whole = std::accumulate(mass, mass + experts, 0.);
      if (whole == 0) continue;
      // E sum p^2 - 1 in terms of d = p - 1/E, and d in terms of differences: no difference of nearly equal sums, exactly zero at balance.
      double mean = 0, square = 0;
      for (int64_t e = 0; e < experts; ++e) mean += (slope[e] = mass[e] - mass[0]) / experts;
      for (int64_t e = 0; e < experts; ++e) {
        slope[e] = (slope[e] - mean) / whole;
        square += slope[e] * slope[e];
      }
      for (int64_t e = 0; e < experts; ++e) slope[e] = weight * 2 * experts / whole * (slope[e] - square);
      result.loss += weight * experts * square;
    } else {
      std::fill_n(slope, experts, weight * 2 / tokens);
      result.loss += weight * sums.squares[segment] / tokens;
    }
  }
  return result;
}

}  // namespace

Tensor balance_loss(Tensor scores, std::optional<Tensor> indices, std::optional<Tensor> mask, OwnedString kind,
                    std::optional<Tensor> segments, std::optional<Tensor> counts, std::optional<Tensor> total) {
  const Arguments a(scores, indices, mask, kind, segments, counts, total);
  const Pieces pieces(a.segments, a.tokens, a.experts);
  Tensor loss = torch::stable::new_empty(scores, {}, accumulate_dtype(scores.scalar_type()));
  dispatch_float("scores", scores, [&](auto zero) {
    using A = accumulate_t<decltype(zero)>;
    *static_cast<A*>(loss.mutable_data_ptr()) =
        static_cast<A>(statistic(a, sums_of<decltype(zero)>(a, pieces, false), pieces.segments).loss);
  });
  return loss;
}

Tensor balance_loss_backward(Tensor dloss, Tensor scores, std::optional<Tensor> indices, std::optional<Tensor> mask, OwnedString kind,
                             std::optional<Tensor> segments, std::optional<Tensor> counts, std::optional<Tensor> total) {
  const Arguments a(scores, indices, mask, kind, segments, counts, total);
  STD_TORCH_CHECK(dloss.numel() == 1, "dloss has shape ", shape(dloss), ", must hold one number");
  const Pieces pieces(a.segments, a.tokens, a.experts);
  Tensor dscores = torch::stable::new_empty(scores, {a.tokens, a.experts});
  if (dscores.numel() == 0) return dscores;
  dispatch_float("scores", scores, [&](auto zero) {
    using L = decltype(zero);
    using A = accumulate_t<L>;
    const std::vector<double> slopes = statistic(a, sums_of<L>(a, pieces, true), pieces.segments).slopes;
    const double scale = number(dloss);
    const Rows<L> s(scores);
    const Values<bool> live(a.mask, true);
    L* const out = static_cast<L*>(dscores.mutable_data_ptr());
    const int64_t experts = a.experts;
    pieces.each(a.tokens, experts, [&](int64_t piece) {
      const double* const slope = slopes.data() + pieces.list[piece].segment * experts;
      std::vector<A> powers(a.kind == Kind::z ? experts : 0);
      std::vector<L> row(experts);
      // What all slopes have in common has no effect through a softmax; near balance it is nearly all there is.
      std::vector<A> x(a.named.softmax ? experts * lanes : 0), beyond(experts);
      const double common = std::accumulate(slope, slope + experts, 0.) / static_cast<double>(experts);
      for (int64_t e = 0; e < experts; ++e) beyond[e] = static_cast<A>((slope[e] - common) * scale);
      for (int64_t e = 0; e < experts; ++e) row[e] = static_cast<L>(static_cast<A>(slope[e] * scale));
      for (int64_t r = pieces.list[piece].first; r < pieces.list[piece].last; ++r) {
        if (a.named.softmax) {
          each_block(pieces.runs[r].first, pieces.runs[r].last, [&](int64_t t, int64_t rows) {
            using V = Vector<A>;
            read_scores(a, s, t, rows, x.data());
            each_vector<A>([&](int64_t lane) {
              A* const p = x.data() + lane;
              Sum<A> dot;
              for (int64_t e = 0; e < experts; ++e) dot.add(V::load(p + e * lanes) * beyond[e]);
              const auto mean = dot.value();
              for (int64_t e = 0; e < experts; ++e) V::store(p + e * lanes, V::load(p + e * lanes) * (beyond[e] - mean));
            });
            write_block(x.data(), rows, experts, out + t * experts);
            for (int64_t i = t; i < t + rows; ++i) {
              if (!live(i)) std::fill_n(out + i * experts, experts, L(0));
            }
          });
          continue;
        }
        for (int64_t t = pieces.runs[r].first; t < pieces.runs[r].last; ++t) {
          L* const to = out + t * experts;
          if (!live(t)) {
            std::fill_n(to, experts, L(0));
          } else if (a.kind == Kind::z) {
            sum_t sum;
            const double factor = slope[0] * scale * logsumexp(s, t, experts, powers.data(), &sum) / sum;
            for (int64_t e = 0; e < experts; ++e) to[e] = static_cast<L>(static_cast<A>(factor * powers[e]));
          } else {
            std::copy_n(row.data(), experts, to);
          }
        }
      }
    });
  });
  return dscores;
}

CMOE_IMPLEMENT(CPU, balance_loss)
CMOE_IMPLEMENT(CPU, balance_loss_backward)

}  // namespace cmoe::cpu::bindings
