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
