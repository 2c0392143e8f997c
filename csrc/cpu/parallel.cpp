#include "parallel.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace cmoe::cpu {

int64_t thread_count() { return std::max<int64_t>(1, torch::stable::get_num_threads()); }

void parallel(int64_t n, void (*body)(int64_t, void*), void* context) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i, context);
  });
}

}  // namespace cmoe::cpu
