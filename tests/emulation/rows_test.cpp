// Kernels over rows by themselves, for the sanitizers: every buffer has exactly its size on the heap, so that an access past it shows.
//
//     rows_test [forward|reverse|shuffled] [few]        prints what is wrong, then "done"; few: of the sizes the first two

#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "balance_loss.h"
#include "emulator/launch.h"
#include "soft_gate.h"
#include "rows/sort_by_expert.h"
#include "topk_gate.h"

using namespace cmoe::cuda;

namespace {

uint32_t state = 1;
float uniform() { return static_cast<float>((state = state * 1664525u + 1013904223u) >> 8) / 8388608.0f - 1.0f; }
std::vector<float> drawn(int64_t n) {
  std::vector<float> values(n);
  for (float& v : values) v = uniform();
  return values;
}
Matrix matrix(const std::vector<float>& values, int64_t columns) { return {values.data(), Type::f32, columns, 1}; }
void expect(bool right, const char* what, int64_t tokens, int64_t experts) {
  if (!right) printf("%s, %ld tokens, %ld experts\n", what, tokens, experts);
}

void gates(int64_t tokens, int64_t experts, int64_t k) {
  const std::vector<float> logits = drawn(tokens * experts), upstream = drawn(tokens * experts), dweights = drawn(tokens * k);
  std::vector<float> made(tokens * experts), gradient(tokens * experts);
  soft_gate(matrix(logits, experts), made.data(), tokens, experts, nullptr);
  soft_gate_backward(matrix(upstream, experts), matrix(logits, experts), gradient.data(), tokens, experts, nullptr);
  for (int64_t t = 0; t < tokens; ++t) {
    float sum = 0;
    for (int64_t e = 0; e < experts; ++e) sum += made[t * experts + e];
    expect(std::abs(sum - 1) < 1e-5f, "gates do not sum to one", tokens, experts);
  }
  for (const bool sigmoid : {false, true})
    for (const bool renormalize : {false, true}) {
      const TopkGate op{matrix(logits, experts), matrix(logits, experts), tokens, experts, k, sigmoid, renormalize, 1.5f};
      std::vector<float> weights(tokens * k);
      std::vector<int64_t> indices(tokens * k);
      std::vector<int32_t> counts(experts);
      topk_gate(op, weights.data(), indices.data(), counts.data(), nullptr);
      topk_gate_backward(op, matrix(dweights, k), {indices.data(), k, 1}, gradient.data(), nullptr);
      int64_t counted = 0;
      for (const int32_t count : counts) counted += count;
      expect(counted == tokens * k, "not every choice was counted", tokens, experts);
    }
}

// Indices one below and one past what is an expert among them.
std::vector<int64_t> assignments(int64_t n, int64_t experts) {
  std::vector<int64_t> values(n);
  for (int64_t& v : values) v = static_cast<int64_t>((uniform() + 1) / 2 * static_cast<float>(experts + 2)) - 1;
  return values;
}

void sort(int64_t tokens, int64_t experts, int64_t k) {
  const std::vector<int64_t> indices = assignments(tokens * k, experts);
  const std::vector<float> weights = drawn(tokens * k);
  const Assignments s{{indices.data(), k, 1}, tokens, nullptr, tokens, k, experts};
  std::vector<int64_t> order(tokens * k);
  std::vector<int32_t> offsets(experts + 1), scratch(sort_scratch(s));
  std::vector<float> row_weights(tokens * k);
  sort_by_expert(s, matrix(weights, k), order.data(), offsets.data(), row_weights.data(), scratch.data(), nullptr);
  for (int64_t e = 0; e < experts; ++e)
    for (int32_t r = offsets[e]; r < offsets[e + 1]; ++r)
      expect(indices[order[r]] == e && row_weights[r] == weights[order[r]], "a row of another expert", tokens, experts);
}

void losses(int64_t tokens, int64_t experts, int64_t k) {
  using Kind = BalanceLoss::Kind;
  const std::vector<float> scores = drawn(tokens * experts), dloss{1.0f};
  const std::vector<int64_t> indices = assignments(tokens * k, experts);
  std::vector<int64_t> labels(tokens), order(tokens);
  for (int64_t t = 0; t < tokens; ++t) labels[t] = t / 3, order[t] = tokens - 1 - t;
  for (const Kind kind : {Kind::switch_, Kind::importance, Kind::z})
    for (const bool segments : {false, true}) {
      BalanceLoss op{matrix(scores, experts), tokens, experts, kind};
      if (kind == Kind::switch_) op.indices = {indices.data(), k, 1}, op.k = k;
      if (segments) op.labels = labels.data(), op.order = order.data();
      std::vector<float> loss(1), gradient(tokens * experts, NAN), scratch(balance_loss_scratch(op));
      balance_loss(op, loss.data(), scratch.data(), nullptr);
      balance_loss_backward(op, dloss.data(), gradient.data(), scratch.data(), nullptr);
      for (const float g : gradient) expect(std::isfinite(loss[0]) && std::isfinite(g), "not finite", tokens, experts);
    }
}

}  // namespace

int main(int count, char** arguments) {
  bool few = false;
  for (int i = 1; i < count; ++i) {
    if (std::string(arguments[i]) == "reverse") emulator::options.order = emulator::Order::reverse;
    if (std::string(arguments[i]) == "shuffled") emulator::options.order = emulator::Order::shuffled;
    few |= std::string(arguments[i]) == "few";
  }
  const int64_t sizes[][3] = {{11, 5, 2}, {3, 40, 16}, {1, 1, 1}, {2, 300, 2}};
  for (int i = 0; i < (few ? 2 : 4); ++i) {
    const auto& [tokens, experts, k] = sizes[i];
    gates(tokens, experts, k), sort(tokens, experts, k), losses(tokens, experts, k);
  }
  sort(1100, 5, 2);  // more than one block
  printf("done\n");
}
