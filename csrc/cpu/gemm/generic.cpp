// The portable tier: any processor. fp64 runs here alone.

#include "panels.h"

namespace {

constexpr Microkernel f32 = plain_microkernel<float, 6, 2>(Type::f32, 256);
constexpr Microkernel w8 = w8_microkernel<6, 2, pack_rows_plain<float, 6>>;
constexpr Microkernel w8_wide = widened<6, 2>(w8);

static void load_double(Type, const void* from, double* to, int64_t n) { memcpy(to, from, sizeof(double) * n); }
static void store_double(Type, const double* from, void* to, int64_t n) { memcpy(to, from, sizeof(double) * n); }
static void round_double(Type, double*, int64_t) {}
static void activate_backward_double(Activation f, const double* u, double* h, double* slope, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const double x = u[i];
    double value = 0, derivative = 0;
    switch (f) {
      case Activation::none: return;
      case Activation::gelu: {
        const double below = 0.5 * erfc(-x * 0.70710678118654752440), density = exp(-0.5 * x * x) * 0.39894228040143267794;
        value = below == 0 ? 0 : x * below;
        derivative = below + (density == 0 ? 0 : x * density);
        break;
      }
      case Activation::gelu_tanh: {
        const double a = 0.79788456080286535588, b = 0.044715, t = tanh(a * (x + b * x * x * x));
        value = t == -1 ? 0 : 0.5 * x * (1 + t);
        derivative = 0.5 * (1 + t) + (t * t == 1 ? 0 : 0.5 * x * (1 - t * t) * a * (1 + 3 * b * x * x));
        break;
      }
      case Activation::silu: {
        const double s = 1 / (1 + exp(-x));
        value = s == 0 ? 0 : x * s;
        derivative = s == 0 || s == 1 ? s : s * (1 + x * (1 - s));
        break;
      }
      case Activation::relu:
        value = x > 0 || x != x ? x : 0;
        derivative = x > 0 ? 1 : 0;
        break;
      case Activation::relu2: {
        const double part = x > 0 || x != x ? x : 0;
        value = part * part;
        derivative = 2 * part;
        break;
      }
    }
    h[i] = value;
    if (slope) slope[i] = derivative;
  }
}
static void activate_double(Activation f, const double* u, double* h, int64_t n) { activate_backward_double(f, u, h, nullptr, n); }
static void add_double(const double* x, double* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += x[i];
}
static void multiply_double(const double* x, double* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] *= x[i];
}
static void scale_double(double s, double* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] *= s;
}
static void axpy_double(double s, const double* x, double* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += s * x[i];
}
static double dot_double(const double* x, const double* y, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}
static void exp_double(const double* x, double* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = exp(x[i]);
}
static void store_block_double(Type, const double* from, int64_t from_ld, char* to, int64_t to_stride, int64_t rows, int64_t n) {
  for (int64_t r = 0; r < rows; ++r) memcpy(to + r * to_stride, from + r * from_ld, sizeof(double) * n);
}

}  // namespace

namespace cmoe::cpu {

const Isa isa_generic = {"generic",       &f32, nullptr,  &f32_small_m, &widened_small_m, &row_functions, convert,
                         transpose_plain, &w8,  &w8_wide, nullptr};
const Microkernel microkernel_f64 = plain_microkernel<double, 4, 2>(Type::f64, 256);
const RowFunctions<double> row_functions_f64 = {load_double, store_double,      round_double, activate_double, activate_backward_double,
                                                add_double,  multiply_double,   scale_double, axpy_double,     dot_double,
                                                exp_double,  store_block_double};

}  // namespace cmoe::cpu
