// The names that the kernels below use, for a host C++17 compiler: LANES neurons are one vectorised inner loop.
// No header is included: compilers take longer to read <cmath> than to compile a kernel.
#define INLINE_ static inline __attribute__((always_inline))
#define CALLED_ INLINE_
#define UNROLL_
#define LOADS_ISSUED_
#if defined(__clang__)
#define FOR_LANES_ _Pragma("clang loop vectorize(enable)") for (int l_ = 0; l_ < LANES; ++l_)
#else
#define FOR_LANES_ _Pragma("GCC ivdep") for (int l_ = 0; l_ < LANES; ++l_)
#endif

typedef unsigned short uint16;
typedef unsigned int uint32;
typedef unsigned long long uint64;
struct half_t { uint16 bits; };
struct bfloat16_t { uint16 bits; };

INLINE_ float as_float(uint32 bits) {
  float a;
  __builtin_memcpy(&a, &bits, 4);
  return a;
}
INLINE_ uint32 as_bits(float a) {
  uint32 bits;
  __builtin_memcpy(&bits, &a, 4);
  return bits;
}

// 16-bit numbers by integer arithmetic, without branches: loops over it vectorise on every machine.
INLINE_ float to_real(float a) { return a; }
INLINE_ double to_real(double a) { return a; }
INLINE_ float to_real(half_t a) {
  const uint32 magnitude = a.bits & 0x7fffu, sign = (uint32)(a.bits & 0x8000u) << 16;
  const uint32 finite = as_bits(as_float(magnitude << 13) * 0x1p112f);  // subnormal halves become normal
  return as_float(sign | finite | (magnitude >= 0x7c00u ? 0x7f800000u : 0u));
}
INLINE_ float to_real(bfloat16_t a) { return as_float((uint32)a.bits << 16); }
template <typename S> struct Storage {
  template <typename R> INLINE_ S from(R a) { return a; }
};
template <> struct Storage<half_t> {  // to nearest, ties to even
  INLINE_ half_t from(float a) {
    const uint32 bits = as_bits(a), magnitude = bits & 0x7fffffffu;
    const uint32 small = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;  // the addition rounds subnormals
    const uint32 normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32 large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32 rounded = magnitude < 0x38800000u ? small : (magnitude < 0x47800000u ? normal : large);
    return half_t{(uint16)(rounded | ((bits >> 16) & 0x8000u))};
  }
};
template <> struct Storage<bfloat16_t> {
  INLINE_ bfloat16_t from(float a) {
    const uint32 bits = as_bits(a);
    const uint32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return bfloat16_t{(uint16)(a == a ? rounded : 0x7fffu)};
  }
};
template <typename S, typename R> INLINE_ S from_real(R a) { return Storage<S>::from(a); }

// LANES values next to each other; the last row of a sequence may have fewer.
template <typename S, int L> struct Row { S lane[L]; };
template <int L, typename S> INLINE_ Row<S, L> load_row(const S* from, int valid) {
  Row<S, L> row;
  __builtin_memset(&row, 0, sizeof(row));
  __builtin_memcpy(&row, from, sizeof(S) * (unsigned)valid);
  return row;
}
template <typename S, int L> INLINE_ void store_row(S* to, const Row<S, L>& row, int valid) {
  __builtin_memcpy(to, &row, sizeof(S) * (unsigned)valid);
}
// Ahead by two stretches of the same row: rows lie too far apart for the CPU to see where this goes. Any address may
// be fetched so, those past the end too.
template <int L, typename S> INLINE_ void fetch_ahead(const S* row) {
  for (unsigned i = 0; i < sizeof(S) * L; i += 64) { __builtin_prefetch((const char*)row + sizeof(S) * L * 2 + i); }
}
template <typename R, typename S, int L> INLINE_ void load_reals(R (&to)[L], const S* from, int valid) {
  if (valid == L) {
    fetch_ahead<L>(from);
    for (int l = 0; l < L; ++l) { to[l] = to_real(from[l]); }
  } else {
    for (int l = 0; l < L; ++l) { to[l] = l < valid ? to_real(from[l]) : R(0); }
  }
}
template <typename R, typename S, int L> INLINE_ void store_reals(S* to, const R (&from)[L], int valid) {
  if (valid == L) {
    fetch_ahead<L>(to);
    for (int l = 0; l < L; ++l) { to[l] = from_real<S>(from[l]); }
  } else {
    for (int l = 0; l < valid; ++l) { to[l] = from_real<S>(from[l]); }
  }
}
template <typename R, int L> INLINE_ void load_state(R (&to)[L], const R* from, long long first, int valid, R otherwise) {
  if (!from) {  // a branch: a masked load of no address traps inside the CPU, at a hundred times its cost
    for (int l = 0; l < L; ++l) { to[l] = otherwise; }
  } else if (valid == L) {
    for (int l = 0; l < L; ++l) { to[l] = from[first + l]; }
  } else {
    for (int l = 0; l < L; ++l) { to[l] = l < valid ? from[first + l] : otherwise; }
  }
}
template <typename R, int L> INLINE_ void store_state(const R (&from)[L], R* to, int valid) {
  __builtin_memcpy(to, from, sizeof(R) * (unsigned)valid);
}

// a, or 0, by its bits: GCC vectorises no choice whose condition is the same for all lanes.
INLINE_ float only_if_(bool condition, float a) { return as_float(as_bits(a) & (0u - (uint32)condition)); }
INLINE_ double only_if_(bool condition, double a) {
  uint64 bits;
  __builtin_memcpy(&bits, &a, 8);
  bits &= 0ull - (uint64)condition;
  __builtin_memcpy(&a, &bits, 8);
  return a;
}

// Which element of a parameter that repeats over the neurons belongs to neuron n.
INLINE_ long long channel_of(long long n, long long inner, long long count) { return n / inner % count; }

#if defined(_OPENMP)
#define OMP_FOR_ _Pragma("omp parallel for schedule(static) num_threads(threads_) if (threads_ > 1)")
#else
#define OMP_FOR_
#endif
#define ENTRY_(symbol, SUMS)                                                                                 \
  extern "C" void symbol(const Args* a_, [[maybe_unused]] int threads_) {                                   \
    const long long blocks_ = (a_->N_ + LANES - 1) / LANES;                                                 \
    OMP_FOR_ for (long long b_ = 0; b_ < blocks_; ++b_) {                                                    \
      const long long left_ = a_->N_ - b_ * LANES;                                                          \
      real sums_[SUMS + 1] = {};                                                                            \
      neurons_(*a_, b_ * LANES, left_ < LANES ? (int)left_ : LANES, sums_);                                 \
      for (int i_ = 0; i_ < SUMS; ++i_) { a_->partials_[i_ * blocks_ + b_] = sums_[i_]; }                   \
    }                                                                                                       \
  }

INLINE_ float log_(float a) { return __builtin_logf(a); }
INLINE_ float sqrt_(float a) { return __builtin_sqrtf(a); }
INLINE_ float tanh_(float a) { return __builtin_tanhf(a); }
INLINE_ float sin_(float a) { return __builtin_sinf(a); }
INLINE_ float cos_(float a) { return __builtin_cosf(a); }
INLINE_ float atan_(float a) { return __builtin_atanf(a); }
INLINE_ float erf_(float a) { return __builtin_erff(a); }
INLINE_ float erfc_(float a) { return __builtin_erfcf(a); }
INLINE_ float abs_(float a) { return __builtin_fabsf(a); }
INLINE_ float fma_(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
INLINE_ float ratio_(float a, float b) { return a / b; }
INLINE_ bool finite_quotient_(float q, float, float) { return q - q == 0; }
INLINE_ float pow_(float a, float b) { return __builtin_powf(a, b); }
INLINE_ double log_(double a) { return __builtin_log(a); }
INLINE_ double sqrt_(double a) { return __builtin_sqrt(a); }
INLINE_ double tanh_(double a) { return __builtin_tanh(a); }
INLINE_ double sin_(double a) { return __builtin_sin(a); }
INLINE_ double cos_(double a) { return __builtin_cos(a); }
INLINE_ double atan_(double a) { return __builtin_atan(a); }
INLINE_ double erf_(double a) { return __builtin_erf(a); }
INLINE_ double erfc_(double a) { return __builtin_erfc(a); }
INLINE_ double abs_(double a) { return __builtin_fabs(a); }
INLINE_ double fma_(double a, double b, double c) { return __builtin_fma(a, b, c); }
INLINE_ double ratio_(double a, double b) { return a / b; }
INLINE_ bool finite_quotient_(double q, double, double) { return q - q == 0; }
INLINE_ double pow_(double a, double b) { return __builtin_pow(a, b); }
INLINE_ double exp_(double a) { return __builtin_exp(a); }
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define MULTIPLY_ADD_(a, b, c) fma_(a, b, c)
#else
#define MULTIPLY_ADD_(a, b, c) ((a) * (b) + (c))
#endif
// exp in float, written so that a loop over it vectorises: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].
// The polynomial is the Taylor series to degree 7 (truncation below 2^-27 there); ln 2 is split in two so that
// n * ln 2 is subtracted exactly; 2^n is applied in two factors so that subnormal results round once, at the end.
INLINE_ float exp_(float a) {
  const float x = a > -104.0f ? (a < 89.0f ? a : 89.0f) : -104.0f;
  const float n = __builtin_nearbyintf(x * 1.44269504f);
  const float r = MULTIPLY_ADD_(n, 2.12194440e-4f, MULTIPLY_ADD_(n, -0.693359375f, x));
  float p = MULTIPLY_ADD_(r, 1.98412698e-4f, 1.38888889e-3f);
  p = MULTIPLY_ADD_(p, r, 8.33333333e-3f);
  p = MULTIPLY_ADD_(p, r, 4.16666667e-2f);
  p = MULTIPLY_ADD_(p, r, 1.66666667e-1f);
  p = MULTIPLY_ADD_(p, r, 0.5f);
  p = MULTIPLY_ADD_(p, r * r, r) + 1.0f;
  const int i = (int)n, half = i >> 1;
  return a == a ? p * as_float((uint32)(half + 127) << 23) * as_float((uint32)(i - half + 127) << 23) : a;
}
// What a thread keeps of a divisor b. Where b or 1 / b is no normal number, or close to being none, b is scaled by a
// power of two and so is the quotient; everywhere else the scale is 1.
template <typename R> struct Divisor_ {
  R scaled;   // b * scale; 0 if that is infinite: the remainder of a quotient of 0 is then no NaN
  R r;        // 1 / (b * scale)
  R scale;
  R inverse;  // 1 / b, for gradients; finite unless b is 0: no gradient must stay none
};
template <typename R> INLINE_ Divisor_<R> divisor_(R b, R large, R greatest) {
  const R size = abs_(b), scale = size < R(1) / large ? large : (size > large ? R(1) / large : R(1));
  const R scaled = b * scale, r = R(1) / scaled, inverse = r * scale;
  const bool over = size > R(0) && abs_(inverse) > greatest;
  return {scaled - scaled == R(0) ? scaled : R(0), r, scale, over ? (b < R(0) ? -greatest : greatest) : inverse};
}
INLINE_ Divisor_<float> divisor_(float b) { return divisor_(b, 0x1p100f, 0x1.fffffep127f); }
INLINE_ Divisor_<double> divisor_(double b) { return divisor_(b, 0x1p900, 0x1.fffffffffffffp1023); }
// a / (b * scale), correctly rounded (Markstein 1990, IBM J. Res. Dev. 34(1)): the remainder of the first guess is
// exact. An infinite guess stays, where the remainder would be NaN. The fma is meant; it is no contraction. Quotients
// next to the smallest normal number and to the greatest may lose their last bit.
template <typename R> INLINE_ R divide_(R a, const Divisor_<R>& d) {
  const R q = a * d.r;
  const R refined = fma_(d.r, fma_(-q, d.scaled, a), q);
  return finite_quotient_(q, a, d.scaled) ? refined : q;
}
template <typename R> INLINE_ R pow2_(R a) { return a * a; }
template <typename R> INLINE_ R pow3_(R a) { return a * a * a; }
template <typename R> INLINE_ R sigmoid_(R a) { return R(1) / (R(1) + exp_(-a)); }
template <typename R> INLINE_ R sign_(R a) { return a > R(0) ? R(1) : (a < R(0) ? R(-1) : R(0)); }
template <typename R> INLINE_ R minimum_(R a, R b) { return a < b || a != a ? a : b; }  // a NaN wins, as in torch
template <typename R> INLINE_ R maximum_(R a, R b) { return a > b || a != a ? a : b; }

