// task_router's first layer on sm_90a.

#include "gemm/sm90.cuh"
#include "router_epilogue.cuh"

namespace cmoe::cuda {

template <class T>
constexpr int columns_at_once<RouterEpilogue<T>> = 32;

bool router_product_sm90(const char* operation, const RouterProduct& p, Stream stream) {
  return run_rows_sm90<RouterEpilogue>(operation, p.type, arguments(p), p, stream);
}

int64_t router_partials_sm90(const RouterProduct& p) { return partials_sm90<RouterEpilogue>(p.type, arguments(p)); }

}  // namespace cmoe::cuda
