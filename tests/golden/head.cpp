// What the kernels below use, for a host C++17 compiler: LANES neurons are one vectorised inner loop.
// No header is included: compilers take longer to read <cmath> than to compile a kernel.
#pragma GCC diagnostic ignored "-Wunused-parameter"  // all steps have the same, whether they read them or not
#define INLINE_ inline __attribute__((always_inline))
#define CALLED_ INLINE_
#define UNROLL_
#define AS_IT_IS_
#define LOADS_ISSUED_
#if defined(__clang__)
#define FOR_LANES_ _Pragma("clang loop vectorize(enable)") for (int l = 0; l < LANES; ++l)
#else
#define FOR_LANES_ _Pragma("GCC ivdep") for (int l = 0; l < LANES; ++l)
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
  template <typename R> static INLINE_ S from(R a) { return a; }
};
template <> struct Storage<half_t> {  // to nearest, ties to even
  static INLINE_ half_t from(float a) {
    const uint32 bits = as_bits(a), magnitude = bits & 0x7fffffffu;
    const uint32 small = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;  // the addition rounds subnormals
    const uint32 normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32 large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32 rounded = magnitude < 0x38800000u ? small : (magnitude < 0x47800000u ? normal : large);
    return half_t{(uint16)(rounded | ((bits >> 16) & 0x8000u))};
  }
};
template <> struct Storage<bfloat16_t> {
  static INLINE_ bfloat16_t from(float a) {
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
template <typename R, typename S, int L>
INLINE_ void store_reals_if(S* base, long long at, const R (&from)[L], int valid) {  // where there is a base
  if (base) { store_reals(base + at, from, valid); }
}
template <typename R, int L>
INLINE_ void load_state(R (&to)[L], const R* from, long long first, int valid, R otherwise) {
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

// The parameters that repeat over the neurons, of the neurons first .. first + LANES - 1: neuron n has element
// n / inner % count. Counted on from the first, because a division for each takes longer than a step.
template <class M>
INLINE_ void load_each(typename M::real (&each)[M::EACH + 1][M::LANES], const typename M::Args& a,
                       const long long first, int) {
  constexpr int LANES = M::LANES;
  long long inner = 0, count = 0, channel = 0, left = 0;  // so many neurons of this channel are left
  for (int i = 0; i < M::EACH; ++i) {
    if (inner != a.inner[i] || count != a.count[i]) {  // most repeat as the one before
      inner = a.inner[i];
      count = a.count[i];
      channel = first / inner % count;
      left = inner - first % inner;
    }
    const typename M::real* from = a.each[i];
    long long c = channel, more = left;
    for (int l = 0; l < LANES;) {
      if (inner == 1) {  // of channels next to each other
        const int n = count - c < LANES - l ? (int)(count - c) : LANES - l;
        __builtin_memcpy(each[i] + l, from + c, sizeof(typename M::real) * (unsigned)n);
        l += n;
        c = 0;
      } else {  // one channel's
        const int n = more < LANES - l ? (int)more : LANES - l;
        const typename M::real value = from[c];
        for (int k = 0; k < n; ++k) { each[i][l + k] = value; }
        l += n;
        c = c + 1 < count ? c + 1 : 0;
        more = inner;
      }
    }
  }
}

#if defined(_OPENMP)
#define OMP_FOR_ _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")
#else
#define OMP_FOR_
#endif
template <class M> struct Params;
template <class M> struct Totals;
template <class M> struct Walk;
template <class M> INLINE_ void run(const typename M::Args& a, int threads) {
  const long long blocks = (a.N + M::LANES - 1) / M::LANES;
  OMP_FOR_ for (long long b = 0; b < blocks; ++b) {
    const long long left = a.N - b * M::LANES;
    const int valid = left < M::LANES ? (int)left : M::LANES;
    Params<M> params(a);
    params.of_neurons(a, b * M::LANES, valid);
    Totals<M> totals;
    Walk<M>(a, params, b * M::LANES, valid).run(totals);
    if constexpr (M::SUMS > 0) {
      for (int i = 0; i < M::SUMS; ++i) { a.partials[i * blocks + b] = totals.shared[i]; }
    }
  }
}

INLINE_ float log_(float a) { return __builtin_logf(a); }
INLINE_ float sqrt_(float a) { return __builtin_sqrtf(a); }
INLINE_ float tanh_(float a) { return __builtin_tanhf(a); }
INLINE_ float sin_(float a) { return __builtin_sinf(a); }
INLINE_ float cos_(float a) { return __builtin_cosf(a); }
INLINE_ float atan_(float a) { return __builtin_atanf(a); }
INLINE_ float erf_(float a) { return __builtin_erff(a); }
INLINE_ float erfc_(float a) { return __builtin_erfcf(a); }
INLINE_ float floor_(float a) { return __builtin_floorf(a); }
INLINE_ float abs_(float a) { return __builtin_fabsf(a); }
INLINE_ float round_(float a) { return __builtin_rintf(a); }  // ties to even, as torch
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
INLINE_ double floor_(double a) { return __builtin_floor(a); }
INLINE_ double abs_(double a) { return __builtin_fabs(a); }
INLINE_ double round_(double a) { return __builtin_rint(a); }  // ties to even, as torch
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
template <typename R> struct Divisor {
  R scaled;   // b * scale; 0 if that is infinite: the remainder of a quotient of 0 is then no NaN
  R r;        // 1 / (b * scale)
  R scale;
  R inverse;  // 1 / b, for gradients; finite unless b is 0: no gradient must stay none
};
template <typename R> INLINE_ Divisor<R> divisor(R b, R large, R greatest) {
  const R size = abs_(b), scale = size < R(1) / large ? large : (size > large ? R(1) / large : R(1));
  const R scaled = b * scale, r = R(1) / scaled, inverse = r * scale;
  const bool over = size > R(0) && abs_(inverse) > greatest;
  return {scaled - scaled == R(0) ? scaled : R(0), r, scale, over ? (b < R(0) ? -greatest : greatest) : inverse};
}
INLINE_ Divisor<float> divisor(float b) { return divisor(b, 0x1p100f, 0x1.fffffep127f); }
INLINE_ Divisor<double> divisor(double b) { return divisor(b, 0x1p900, 0x1.fffffffffffffp1023); }
// a / (b * scale), correctly rounded (Markstein 1990, IBM J. Res. Dev. 34(1)): the remainder of the first guess is
// exact. An infinite guess stays, where the remainder would be NaN. The fma is meant; it is no contraction. Quotients
// next to the smallest normal number and to the greatest may lose their last bit.
template <typename R> INLINE_ R divide_(R a, const Divisor<R>& d) {
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
template <typename R> INLINE_ R near_sigmoid_(R a) { return sigmoid_(a); }
// How a kernel walks T steps of N neurons, whatever its equations. LANES neurons next to each other are handled
// together, by one CUDA thread or by one vectorised stretch of a host loop; K steps lie between two checkpoints of the
// states. A kernel M says how much there is of everything (its Size), what one step does (step, step_back) and which
// gradients of states there are before it (pass).

// What a step works on: arrays of LANES neurons, `Sizes` says of how many things.
template <class Sizes> struct Arrays : Sizes {
  using real = typename Sizes::real;
  static constexpr int LANES = Sizes::LANES;
  using State = real[Sizes::STATES][LANES];
  using Some = bool[Sizes::STATES];            // whether there is a gradient of a state
  using In = real[Sizes::INPUTS][LANES];       // what a step reads: first of each neuron, then of all neurons
  using Sequences = real[Sizes::SEQUENCES][LANES];  // these, and the gradients that arrive
  static constexpr int OWN = Sizes::INPUTS - Sizes::PER_STEP;  // inputs that differ between neurons
  using Out = real[Sizes::OUTPUTS + 1][LANES];
  struct Gradients {
    State z;  // of the states after the step in hand
    real learned[Sizes::EACH_LEARNED + Sizes::SUMS + 1][LANES];
  };
};

// The parameters of LANES neurons: those that all neurons share, and each neuron's own.
template <class M> struct Params {
  using real = typename M::real;
  real shared[M::SHARED + 1];
  static constexpr int LANES = M::LANES;
  real each[M::EACH + 1][LANES];
  Divisor<real> shared_divisor[M::SHARED_DIVISORS + 1];  // of the first so many of the parameters
  Divisor<real> each_divisor[M::EACH_DIVISORS + 1][LANES];
  real surrogate[M::SURROGATE + 1];

  INLINE_ explicit Params(const typename M::Args& a) {
    if constexpr (M::SHARED > 0) {
      UNROLL_ for (int i = 0; i < M::SHARED; ++i) { shared[i] = a.shared[i] ? *a.shared[i] : a.shared_value[i]; }
      UNROLL_ for (int i = 0; i < M::SHARED_DIVISORS; ++i) { shared_divisor[i] = divisor(shared[i]); }
    }
    if constexpr (M::SURROGATE > 0) {
      UNROLL_ for (int i = 0; i < M::SURROGATE; ++i) { surrogate[i] = a.surrogate[i]; }
    }
  }

  // Each neuron's own, of the neurons first .. first + LANES - 1, of which so many are valid.
  INLINE_ void of_neurons(const typename M::Args& a, const long long first, const int valid) {
    if constexpr (M::EACH > 0) {
      load_each<M>(each, a, first, valid);
      divide();
    }
  }

  // The same where all of them repeat alike: lane l has those of channel + l * next.
  INLINE_ void of_channels(const typename M::Args& a, const long long channel, const int next) {
    if constexpr (M::EACH > 0) {
      UNROLL_ for (int i = 0; i < M::EACH; ++i) { FOR_LANES_ { each[i][l] = a.each[i][channel + l * next]; } }
      divide();
    }
  }

  INLINE_ void divide() {
    UNROLL_ for (int i = 0; i < M::EACH_DIVISORS; ++i) { FOR_LANES_ { each_divisor[i][l] = divisor(each[i][l]); } }
  }
};

// Gradients of parameters, summed by those who walk: of parameters that all neurons share, and of a channel's.
template <class M> struct Totals {
  typename M::real shared[M::SUMS + 1] = {};
  typename M::real channel[M::BY_CHANNEL ? M::EACH_LEARNED + 1 : 1][M::LANES] = {};
};

// What COUNT steps read of all sequences, loaded together: one waiting time for all of them.
template <class M, int COUNT, bool TOGETHER> struct Inputs {
  using real = typename M::real;
  static constexpr int LANES = M::LANES;
  Row<typename M::storage, LANES> rows[M::SEQUENCES - M::PER_STEP][COUNT];
  real shared[M::PER_STEP + 1][COUNT];

  // of n steps from t on; past the last the last again, because a branch would serialise the loads
  template <bool ALL>
  INLINE_ void load(const typename M::Args& a, const long long first, const long long t, const int valid, const int n) {
    const long long at = first + t * a.N;
    UNROLL_ for (int k = 0; k < COUNT; ++k) {
      const int step = ALL || k < n ? k : n - 1;
      UNROLL_ for (int i = 0; i < M::SEQUENCES - M::PER_STEP; ++i) {
        rows[i][k] = load_row<LANES>(a.in[i] + at + step * a.N, valid);
      }
      if constexpr (M::PER_STEP > 0) {
        UNROLL_ for (int i = 0; i < M::PER_STEP; ++i) { shared[i][k] = a.step[i][t + step]; }
      }
    }
  }
  // the first ones of step k's
  template <int SOME> INLINE_ void get(real (&to)[SOME][LANES], const int k) const {
    UNROLL_ for (int i = 0; i < SOME; ++i) {
      UNROLL_ for (int l = 0; l < LANES; ++l) {
        if (i >= M::OWN && i < M::INPUTS) {
          to[i][l] = shared[i - M::OWN][k];
        } else {
          to[i][l] = to_real(rows[i < M::OWN ? i : i - M::PER_STEP][k].lane[l]);
        }
      }
    }
  }
};

// Each loaded when it is used, by a loop of its own: compilers vectorise narrow and wide numbers apart, not mixed.
template <class M, int COUNT> struct Inputs<M, COUNT, false> {
  using real = typename M::real;
  static constexpr int LANES = M::LANES;
  const typename M::Args* from;
  long long first_row, first_step;
  int existing;

  template <bool ALL>
  INLINE_ void load(const typename M::Args& a, const long long first, const long long t, const int valid, int) {
    from = &a;
    first_row = first + t * a.N;
    first_step = t;
    existing = valid;
  }
  template <int SOME> INLINE_ void get(real (&to)[SOME][LANES], const int k) const {
    UNROLL_ for (int i = 0; i < SOME; ++i) {
      if constexpr (M::PER_STEP > 0) {
        if (i >= M::OWN && i < M::INPUTS) {
          const real shared = from->step[i - M::OWN][first_step + k];
          FOR_LANES_ { to[i][l] = shared; }
          continue;
        }
      }
      load_reals(to[i], from->in[i < M::OWN ? i : i - M::PER_STEP] + first_row + k * from->N, existing);
    }
  }
};

template <class M> struct Walk {
  using real = typename M::real;
  using Args = typename M::Args;
  using State = typename M::State;
  using Some = typename M::Some;
  using Gradients = typename M::Gradients;
  static constexpr int LANES = M::LANES, STATES = M::STATES, K = M::K, LOADS = M::LOADS;
  static constexpr bool TOGETHER = LOADS > 1;

  const Args& a;
  const long long N;
  const int T;  // K, where the kernel is for that alone
  const long long first;  // the neurons first .. first + LANES - 1, of which
  const int valid;        // so many exist
  const Params<M>& p;

  INLINE_ Walk(const Args& args, const Params<M>& params, const long long first_neuron, const int existing)
      : a(args), N(args.N), T(M::WHOLE ? K : args.T), first(first_neuron), valid(existing), p(params) {}

  INLINE_ void run(Totals<M>& totals) const {
    if constexpr (M::FORWARD) {
      forward();
    } else {
      backward(totals);
    }
  }

  INLINE_ long long row(const long long t) const { return first + t * N; }

  // of the states after t steps
  INLINE_ long long checkpoint(const long long t) const { return (t / K - 1) * (STATES * N); }

  // the states before step t: those of the checkpoint there, or the first
  INLINE_ void load_states(State& z, const long long t) const {
    if (t > 0) {
      const real* from = a.checkpoints + checkpoint(t);
      UNROLL_ for (int i = 0; i < STATES; ++i) { load_state(z[i], from + i * N, first, valid, real(0)); }
    } else {
      UNROLL_ for (int i = 0; i < STATES; ++i) { load_state(z[i], a.start[i], first, valid, a.start_value[i]); }
    }
  }

  INLINE_ void fetch_rows(const long long t) const {
    UNROLL_ for (int i = 0; i < M::OWN; ++i) { fetch(a.in[i] + row(t)); }
  }

  // --- forward ---

  INLINE_ void forward() const {
    State z;
    load_states(z, 0);
    Inputs<M, LOADS, TOGETHER> now, ahead;
    long long t = 0;
    if constexpr (M::AHEAD) {
      if (LOADS <= T) { ahead.template load<true>(a, first, 0, valid, LOADS); }
      for (int k = LOADS; k < 2 * LOADS && k < T; ++k) { fetch_rows(k); }
    }
    // without guards, which would serialise the loads
    AS_IT_IS_ for (; t + LOADS <= T; t += LOADS) {
      if constexpr (M::AHEAD) {
        now = ahead;
        if (t + 2 * LOADS <= T) { ahead.template load<true>(a, first, t + LOADS, valid, LOADS); }
        if (t + 3 * LOADS <= T) {
          UNROLL_ for (int k = 0; k < LOADS; ++k) { fetch_rows(t + 2 * LOADS + k); }
        }
      } else {
        now.template load<true>(a, first, t, valid, LOADS);
      }
      advance<true>(z, now, t, LOADS);
    }
    if constexpr (TOGETHER) {
      if (t < T) {
        const int n = (int)(T - t);
        now.template load<false>(a, first, t, valid, n);
        advance<false>(z, now, t, n);
      }
    }
    UNROLL_ for (int i = 0; i < STATES; ++i) {
      if (a.last[i]) { store_state(z[i], a.last[i] + first, valid); }
    }
  }

  template <bool ALL, class Rows>
  INLINE_ void advance(State& z, const Rows& now, const long long t, const int n) const {
    LOADS_ISSUED_
    if (a.checkpoints && t > 0 && t % K == 0) {
      real* to = a.checkpoints + checkpoint(t) + first;
      UNROLL_ for (int i = 0; i < STATES; ++i) { store_state(z[i], to + i * N, valid); }
    }
    UNROLL_ for (int k = 0; k < LOADS; ++k) {
      if (ALL || k < n) {
        typename M::In in;
        typename M::Out out;
        now.get(in, k);
        FOR_LANES_ { M::step(p, in, z, out, l); }
        UNROLL_ for (int i = 0; i < M::OUTPUTS; ++i) { store_reals(a.out[i] + row(t + k), out[i], valid); }
      }
    }
  }

  // --- backward: the states of K steps again from a checkpoint, then the steps' adjoints, the last first ---

  INLINE_ void backward(Totals<M>& totals) const {
    Gradients d;
    Some some;  // after the step in hand
    UNROLL_ for (int i = 0; i < STATES; ++i) {
      load_state(d.z[i], a.last_grad[i], first, valid, real(0));
      some[i] = a.last_grad[i];
    }
    UNROLL_ for (int i = 0; i < M::EACH_LEARNED + M::SUMS; ++i) { FOR_LANES_ { d.learned[i][l] = real(0); } }
    go_back(d, some);
    UNROLL_ for (int i = 0; i < STATES; ++i) {
      if (a.start_grad[i]) { store_state(d.z[i], a.start_grad[i] + first, valid); }
    }
    if constexpr (M::BY_CHANNEL) {
      UNROLL_ for (int i = 0; i < M::EACH_LEARNED; ++i) { FOR_LANES_ { totals.channel[i][l] += d.learned[i][l]; } }
    } else if constexpr (M::EACH_LEARNED > 0) {
      UNROLL_ for (int i = 0; i < M::EACH_LEARNED; ++i) { store_state(d.learned[i], a.each_grad[i] + first, valid); }
    }
    UNROLL_ for (int i = 0; i < M::SUMS; ++i) {
      FOR_LANES_ { totals.shared[i] += l < valid ? d.learned[M::EACH_LEARNED + i][l] : real(0); }
    }
  }

  INLINE_ void go_back(Gradients& d, Some& some) const {
    State z, z_ahead;
    Inputs<M, K, TOGETHER> now, ahead;
    if constexpr (!TOGETHER || LANES > 2) {  // a guard around each step: many lanes have no registers to compute ahead
      AS_IT_IS_ for (long long t = (T - 1) / K * K; t >= 0; t -= K) {
        const int n = T - t < K ? (int)(T - t) : K;  // only the last steps are fewer than K
        now.template load<false>(a, first, t, valid, n);
        LOADS_ISSUED_
        load_states(z, t);
        again_and_back<false>(z, d, some, now, t, n);
      }
    } else {
      long long t = T / K * K;
      if (t < T) {  // the last steps, where they are fewer than K
        const int n = (int)(T - t);
        now.template load<false>(a, first, t, valid, n);
        LOADS_ISSUED_
        load_states(z, t);
        again_and_back<false>(z, d, some, now, t, n);
      }
      t -= K;
      if constexpr (M::AHEAD) {
        if (t >= 0) {
          ahead.template load<true>(a, first, t, valid, K);
          load_states(z_ahead, t);
        }
      }
      AS_IT_IS_ for (; t >= 0; t -= K) {  // without guards: what needs no later step's gradient is computed meanwhile
        if constexpr (M::AHEAD) {
          now = ahead;
          UNROLL_ for (int i = 0; i < STATES; ++i) { FOR_LANES_ { z[i][l] = z_ahead[i][l]; } }
          if (t > 0) {
            ahead.template load<true>(a, first, t - K, valid, K);
            load_states(z_ahead, t - K);
          }
          LOADS_ISSUED_
        } else {
          now.template load<true>(a, first, t, valid, K);
          LOADS_ISSUED_
          load_states(z, t);
        }
        again_and_back<true>(z, d, some, now, t, K);
      }
    }
  }

  template <bool ALL, class Rows>
  INLINE_ void again_and_back(
      State& z, Gradients& d, Some& some, const Rows& now, const long long t, const int n) const {
    State before[K];
    UNROLL_ for (int k = 0; k < K; ++k) {
      if (ALL || TOGETHER || k < n) {
        typename M::In in;
        typename M::Out none;
        now.get(in, k);
        FOR_LANES_ {
          UNROLL_ for (int i = 0; i < STATES; ++i) { before[k][i][l] = z[i][l]; }
          M::step(p, in, z, none, l);
        }
      }
    }
    UNROLL_ for (int k = K - 1; k >= 0; --k) {
      if (ALL || k < n) {
        typename M::Sequences in;
        typename M::Out out;
        now.get(in, k);
        FOR_LANES_ { M::step_back(p, in, before[k], d, some, out, l); }
        M::pass(some);
        if constexpr (M::OUTPUTS > 0) {
          UNROLL_ for (int i = 0; i < M::OUTPUTS; ++i) { store_reals_if(a.out[i], row(t + k), out[i], valid); }
        }
      }
    }
  }
};


