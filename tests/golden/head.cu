// What the kernels below use, for CUDA (NVRTC, no headers needed): one thread handles LANES neurons.
#define INLINE_ __device__ __forceinline__
#if defined(LARGE_)  // many calls of what is a page of code each: compiling them in line takes minutes
#define CALLED_ inline __device__ __noinline__
#else
#define CALLED_ INLINE_
#endif
#define UNROLL_ _Pragma("unroll")
#define AS_IT_IS_ _Pragma("unroll 1")
#define LOADS_ISSUED_ asm volatile("" ::: "memory");  // the compiler may not move loads down past this
#define FOR_LANES_ _Pragma("unroll") for (int l = 0; l < LANES; ++l)

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
// The same, where there is a base. Predicated, because a branch around each store would keep the steps apart.
INLINE_ void store_word_if(int wanted, const void* to, unsigned short a) {
  asm volatile("{ .reg .pred p; setp.ne.s32 p, %0, 0; @p st.global.b16 [%1], %2; }" : : "r"(wanted), "l"(to), "h"(a));
}
INLINE_ void store_word_if(int wanted, const void* to, unsigned a) {
  asm volatile("{ .reg .pred p; setp.ne.s32 p, %0, 0; @p st.global.b32 [%1], %2; }" : : "r"(wanted), "l"(to), "r"(a));
}
INLINE_ void store_word_if(int wanted, const void* to, uint2 a) {
  asm volatile("{ .reg .pred p; setp.ne.s32 p, %0, 0; @p st.global.v2.b32 [%1], { %2, %3}; }"
               : : "r"(wanted), "l"(to), "r"(a.x), "r"(a.y));
}
INLINE_ void store_word_if(int wanted, const void* to, uint4 a) {
  asm volatile("{ .reg .pred p; setp.ne.s32 p, %0, 0; @p st.global.v4.b32 [%1], { %2, %3, %4, %5}; }"
               : : "r"(wanted), "l"(to), "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w));
}
template <int BYTES> struct WordOf { using type = uint4; };
template <> struct WordOf<2> { using type = unsigned short; };
template <> struct WordOf<4> { using type = unsigned; };
template <> struct WordOf<8> { using type = uint2; };
template <typename R, typename S, int L>
INLINE_ void store_reals_if(S* base, long long at, const R (&from)[L], int) {
  Row<S, L> row;
  UNROLL_ for (int l = 0; l < L; ++l) { row.lane[l] = from_real<S>(from[l]); }
  using Word = typename WordOf<sizeof(row)>::type;
  UNROLL_ for (int i = 0; i < (int)(sizeof(row) / sizeof(Word)); ++i) {
    Word word;
    memcpy(&word, (const char*)&row + i * sizeof(Word), sizeof(Word));
    store_word_if(base != nullptr, (Word*)(base + at) + i, word);
  }
}
template <typename R, int L>
INLINE_ void load_state(R (&to)[L], const R* from, long long first, int valid, R otherwise) {
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

template <typename R> INLINE_ R only_if_(bool condition, R a) { return condition ? a : R(0); }

// Which element of a parameter that repeats over the neurons belongs to neuron n.
INLINE_ long long channel_of(long long n, long long inner, long long count) {
  if (n < 0x7fffffff && inner < 0x7fffffff && count < 0x7fffffff) {  // 64-bit divisions take four times as long
    return (unsigned)n / (unsigned)inner % (unsigned)count;
  }
  return n / inner % count;
}

// The parameters that repeat over the neurons, of the neurons first .. first + LANES - 1, of which so many are valid.
template <class M>
INLINE_ void load_each(typename M::real (&each)[M::EACH + 1][M::LANES], const typename M::Args& a,
                       const long long first, const int valid) {
  constexpr int LANES = M::LANES;
  UNROLL_ for (int i = 0; i < M::EACH; ++i) {
    const typename M::real* from = a.each[i];
    const long long inner = a.inner[i], count = a.count[i];
    if (inner % LANES == 0) {  // one channel's
      const typename M::real value = from[channel_of(first, inner, count)];
      FOR_LANES_ { each[i][l] = value; }
    } else if (inner == 1 && count % LANES == 0) {  // of channels next to each other
      from += channel_of(first, 1, count);
      FOR_LANES_ { each[i][l] = from[l < valid ? l : 0]; }
    } else {
      FOR_LANES_ { each[i][l] = from[channel_of(first + (l < valid ? l : 0), inner, count)]; }
    }
  }
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

template <class M> struct Params;
template <class M> struct Totals;
template <class M> struct Walk;

// Parameters that repeat by channel: a thread stays with its channels, so that it reads them once, and adds up their
// gradients over its neurons. Neuron (o * C + c) * I + i has channel c. A slice is the share of one block.
template <class M> INLINE_ void run_by_channel(const typename M::Args& a, Totals<M>& totals) {
  constexpr int LANES = M::LANES, BLOCK = 128;
  const long long I = a.inner[0], C = a.count[0];
  const bool apart = I > 1;  // a block has one channel; else a thread has LANES channels, the next thread the next
  const int columns = apart ? 1 : (int)(C / LANES), tiles = (columns + BLOCK - 1) / BLOCK;
  const int width = (columns + tiles - 1) / tiles, rows = BLOCK / width;
  const int x = threadIdx.x % width, y = threadIdx.x / width;
  const int group = (int)(blockIdx.x % (apart ? C : tiles));
  const long long slice = blockIdx.x / (apart ? C : tiles), slices = gridDim.x / (apart ? C : tiles);
  const long long c = apart ? group : ((long long)group * width + x) * LANES;
  const bool works = y < rows && c < C;
  const int lanes = apart ? LANES : 1;
  if (works) {
    Params<M> params(a);
    params.of_channels(a, c, apart ? 0 : 1);
    AS_IT_IS_ for (long long j = (slice * rows + y) * lanes; j < a.N / C; j += slices * rows * lanes) {
      const long long o = !apart ? j : j < 0x7fffffff && I < 0x7fffffff ? (unsigned)j / (unsigned)I : j / I;
      Walk<M>(a, params, (o * C + c) * I + j - o * I, LANES).run(totals);
    }
  }
  if constexpr (M::EACH_LEARNED > 0) {
    __shared__ typename M::real of[BLOCK];
    UNROLL_ for (int i = 0; i < M::EACH_LEARNED; ++i) {
      typename M::real* to = a.channel_partials + (i * C + c) * slices + slice;
      if (apart) {
        typename M::real sum = 0;
        FOR_LANES_ { sum += totals.channel[i][l]; }
        sum = block_sum(sum);
        if (threadIdx.x == 0) { *to = sum; }
      } else {
        FOR_LANES_ {
          __syncthreads();
          of[threadIdx.x] = totals.channel[i][l];
          __syncthreads();
          if (works && y == 0) {
            typename M::real sum = 0;
            for (int r = 0; r < rows; ++r) { sum += of[r * width + x]; }
            to[l * slices] = sum;
          }
        }
      }
    }
  }
}

// The work of one thread, and the block's sums.
template <class M> INLINE_ void run(const typename M::Args& a) {
  Totals<M> totals;
  if constexpr (M::BY_CHANNEL) {
    run_by_channel<M>(a, totals);
  } else {
    const long long first = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * M::LANES;
    if (first < a.N) {
      Params<M> params(a);
      params.of_neurons(a, first, M::LANES);
      Walk<M>(a, params, first, M::LANES).run(totals);
    }
  }
  if constexpr (M::SUMS > 0) {
    UNROLL_ for (int i = 0; i < M::SUMS; ++i) {
      const auto total = block_sum(totals.shared[i]);
      if (threadIdx.x == 0) { a.partials[(long long)i * gridDim.x + blockIdx.x] = total; }
    }
  }
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
CALLED_ float floor_(float a) { return floorf(a); }
CALLED_ float pow_(float a, float b) { return powf(a, b); }
INLINE_ float abs_(float a) { return fabsf(a); }
INLINE_ float round_(float a) { return rintf(a); }  // ties to even, as torch
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
CALLED_ double floor_(double a) { return floor(a); }
CALLED_ double pow_(double a, double b) { return pow(a, b); }
INLINE_ double abs_(double a) { return fabs(a); }
INLINE_ double round_(double a) { return rint(a); }  // ties to even, as torch
INLINE_ double fma_(double a, double b, double c) { return fma(a, b, c); }
INLINE_ float ratio_(float a, float b) {  // of gradients
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(b));
  return a * r;
}
INLINE_ double ratio_(double a, double b) { return a / b; }
INLINE_ float near_sigmoid_(float a) {  // of gradients: no exact quotient, no branch
  float e, r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(a * -1.44269504f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(1.0f + e));
  return r;
}
INLINE_ double near_sigmoid_(double a) { return 1 / (1 + exp_(-a)); }
// Whether q = a * (1 / b) is finite, told from a, so that nothing waits for q; its limit is found once, before steps.
INLINE_ bool finite_quotient_(float, float a, float b) {
  float most;
  asm("mul.ftz.f32 %0, %1, %2;" : "=f"(most) : "f"(fminf(abs_(b), 1.0f)), "f"(3.4028e38f));
  return abs_(a) <= (abs_(b) < 1.0f ? most : 0x1.fffffep127f);
}
INLINE_ bool finite_quotient_(double q, double, double) { return q - q == 0; }
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


