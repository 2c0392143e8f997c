// task_router's first layer on sm_90a.

#include "gemm/sm90.cuh"
#include "router_epilogue.cuh"

namespace cmoe::cuda {

template <class T>
constexpr int columns_at_once<RouterEpilogue<T>> = 32;

bool router_product_sm90(const char* operation, const RouterProduct& p, Stream stream) {
  return run_rows_sm90<RouterEpilogue>(operation, p.type, arguments(p), p, stream);
}

int64_t router_partials_sm90(const RouterProduct& p) {
  constexpr int64_t part = columns_at_once<RouterEpilogue<bf16>>;
  return runs_sm90() && Mapped(p.type, arguments(p)).can ? (p.width + part - 1) / part : 0;
}

}  // namespace cmoe::cuda
