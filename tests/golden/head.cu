// The names that the kernels below use, for CUDA (NVRTC, no headers needed): one thread handles LANES neurons.
#define INLINE_ __device__ __forceinline__
#if defined(LARGE_)  // many calls of what is a page of code each: compiling them in line takes minutes
#define CALLED_ static __device__ __noinline__
#else
#define CALLED_ INLINE_
#endif
#define UNROLL_ _Pragma("unroll")
#define LOADS_ISSUED_ asm volatile("" ::: "memory");  // the compiler may not move loads down past this
#define FOR_LANES_ _Pragma("unroll") for (int l_ = 0; l_ < LANES; ++l_)

struct half_t { unsigned short bits; };
struct bfloat16_t { unsigned short bits; };

INLINE_ float to_real(float a) { return a; }
INLINE_ double to_real(double a) { return a; }
INLINE_ float to_real(half_t a) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(a.bits));
  return r;
}
INLINE_ float to_real(bfloat16_t a) { return __uint_as_float((unsigned)a.bits << 16); }

template <typename S> struct Storage {
  template <typename R> static INLINE_ S from(R a) { return a; }
};
template <> struct Storage<half_t> {
  static INLINE_ half_t from(float a) {
    half_t r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(a));
    return r;
  }
};
template <> struct Storage<bfloat16_t> {
  static INLINE_ bfloat16_t from(float a) {
    bfloat16_t r;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(a));
#else  // by hand: to nearest, ties to even
    const unsigned b = __float_as_uint(a);
    r.bits = (unsigned short)(a == a ? (b + 0x7fffu + ((b >> 16) & 1u)) >> 16 : 0x7fffu);
#endif
    return r;
  }
};
template <typename S, typename R> INLINE_ S from_real(R a) { return Storage<S>::from(a); }

// LANES values next to each other, moved by accesses of up to 16 bytes.
template <typename S, int L> struct alignas(sizeof(S) * L < 16 ? sizeof(S) * L : 16) Row { S lane[L]; };
template <int L, typename S> INLINE_ Row<S, L> load_row(const S* from, int) {
  return *reinterpret_cast<const Row<S, L>*>(from);
}
template <typename S, int L> INLINE_ void store_row(S* to, const Row<S, L>& row, int) {
  *reinterpret_cast<Row<S, L>*>(to) = row;
}
// Into L2 only: that takes no register, and a load from there is soon back.
INLINE_ void fetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" : : "l"(from)); }
template <typename R, typename S, int L> INLINE_ void load_reals(R (&to)[L], const S* from, int valid) {
  const Row<S, L> row = load_row<L>(from, valid);
  UNROLL_ for (int l = 0; l < L; ++l) { to[l] = to_real(row.lane[l]); }
}
template <typename R, typename S, int L> INLINE_ void store_reals(S* to, const R (&from)[L], int valid) {
  Row<S, L> row;
  UNROLL_ for (int l = 0; l < L; ++l) { row.lane[l] = from_real<S>(from[l]); }
  store_row(to, row, valid);
}
template <typename R, int L> INLINE_ void load_state(R (&to)[L], const R* from, long long first, int valid, R otherwise) {
  if (from) {
    const Row<R, L> row = load_row<L>(from + first, valid);
    UNROLL_ for (int l = 0; l < L; ++l) { to[l] = row.lane[l]; }
  } else {
    UNROLL_ for (int l = 0; l < L; ++l) { to[l] = otherwise; }
  }
}
template <typename R, int L> INLINE_ void store_state(const R (&from)[L], R* to, int valid) {
  Row<R, L> row;
  UNROLL_ for (int l = 0; l < L; ++l) { row.lane[l] = from[l]; }
  store_row(to, row, valid);
}

#define only_if_(condition, a) ((condition) ? (a) : real(0))

// Which element of a parameter that repeats over the neurons belongs to neuron n.
INLINE_ long long channel_of(long long n, long long inner, long long count) {
  if (n < 0x7fffffff && inner < 0x7fffffff && count < 0x7fffffff) {  // 64-bit divisions take four times as long
    return (unsigned)n / (unsigned)inner % (unsigned)count;
  }
  return n / inner % count;
}

// The sum over a block's threads, in an order that never changes; thread 0 has it.
template <typename R> INLINE_ R block_sum(R a) {
  __shared__ R warps[32];
  UNROLL_ for (int d = 16; d > 0; d /= 2) { a += __shfl_down_sync(0xffffffffu, a, d); }
  __syncthreads();
  if (threadIdx.x % 32 == 0) { warps[threadIdx.x / 32] = a; }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned w = 1; w < blockDim.x / 32; ++w) { a += warps[w]; }
  }
  return a;
}

#define ENTRY_(symbol, SUMS)                                                                                  \
  extern "C" __global__ void __launch_bounds__(128) symbol(const Args a_) {                                    \
    const long long first_ = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * LANES;                     \
    real sums_[SUMS + 1] = {};                                                                               \
    if (first_ < a_.N_) { neurons_(a_, first_, LANES, sums_); }                                              \
    UNROLL_ for (int i_ = 0; i_ < SUMS; ++i_) {                                                               \
      const real total_ = block_sum(sums_[i_]);                                                              \
      if (threadIdx.x == 0) { a_.partials_[(long long)i_ * gridDim.x + blockIdx.x] = total_; }               \
    }                                                                                                        \
  }

CALLED_ float exp_(float a) { return expf(a); }
CALLED_ float log_(float a) { return logf(a); }
CALLED_ float sqrt_(float a) { return sqrtf(a); }
CALLED_ float tanh_(float a) { return tanhf(a); }
CALLED_ float sin_(float a) { return sinf(a); }
CALLED_ float cos_(float a) { return cosf(a); }
CALLED_ float atan_(float a) { return atanf(a); }
CALLED_ float erf_(float a) { return erff(a); }
CALLED_ float erfc_(float a) { return erfcf(a); }
CALLED_ float pow_(float a, float b) { return powf(a, b); }
INLINE_ float abs_(float a) { return fabsf(a); }
INLINE_ float fma_(float a, float b, float c) { return fmaf(a, b, c); }
CALLED_ double exp_(double a) { return exp(a); }
CALLED_ double log_(double a) { return log(a); }
CALLED_ double sqrt_(double a) { return sqrt(a); }
CALLED_ double tanh_(double a) { return tanh(a); }
CALLED_ double sin_(double a) { return sin(a); }
CALLED_ double cos_(double a) { return cos(a); }
CALLED_ double atan_(double a) { return atan(a); }
CALLED_ double erf_(double a) { return erf(a); }
CALLED_ double erfc_(double a) { return erfc(a); }
CALLED_ double pow_(double a, double b) { return pow(a, b); }
INLINE_ double abs_(double a) { return fabs(a); }
INLINE_ double fma_(double a, double b, double c) { return fma(a, b, c); }
INLINE_ float ratio_(float a, float b) {  // of gradients
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(b));
  return a * r;
}
INLINE_ double ratio_(double a, double b) { return a / b; }
// Whether q = a * (1 / b) is finite, told from a, so that nothing waits for q; the limit is found once, before the steps.
INLINE_ bool finite_quotient_(float, float a, float b) {
  float most;
  asm("mul.ftz.f32 %0, %1, %2;" : "=f"(most) : "f"(fminf(abs_(b), 1.0f)), "f"(3.4028e38f));
  return abs_(a) <= (abs_(b) < 1.0f ? most : 0x1.fffffep127f);
}
INLINE_ bool finite_quotient_(double q, double, double) { return q - q == 0; }
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

