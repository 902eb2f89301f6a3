namespace lif_forward_float32_hard_k16_l1_r16_ahead_ns {

typedef float real;         // arithmetic, states and parameters
typedef float storage;  // sequences: x, s and their gradients
constexpr int LANES = 1;  // neurons handled together
constexpr int K = 16;      // steps between two checkpoints of the state
constexpr int LOADS = 16;  // rows of x on their way before the first is used
typedef Row<storage, LANES> Seq;

struct Args {
  const storage* x_;
  storage* s_;
  real* v_last_;
  real* checkpoints_;
  real* partials_;
  const real* v_ptr_;
  const real* tau_ptr_;
  const real* v_threshold_ptr_;
  const real* v_reset_ptr_;
  long long N_;
  real v_value_;
  real tau_value_;
  real v_threshold_value_;
  real v_reset_value_;
  int T_;
};

// One step of one neuron: charge, fire, reset.
INLINE_ void step_([[maybe_unused]] const real x, real& z_v_, real& s_, real& h_, [[maybe_unused]] const real tau, [[maybe_unused]] const real v_threshold, [[maybe_unused]] const real v_reset, [[maybe_unused]] const Divisor_<real>& r_tau_) {
  const real v = z_v_;
  const real theta = v_threshold;
  const real h = fma_(divide_(x - (v - v_reset), r_tau_), r_tau_.scale, v);
  const real s = h >= theta ? real(1) : real(0);
  const real new_v_ = h * (real(1) - s) + v_reset * s;
  z_v_ = new_v_;
  s_ = s;
  h_ = h;
}

// All T steps of the neurons first_ .. first_ + LANES - 1, of which valid_ exist.
INLINE_ void neurons_(const Args& a_, const long long first_, [[maybe_unused]] const int valid_, [[maybe_unused]] real* sums_) {
  const long long N_ = a_.N_;
  const int T_ = a_.T_;
  const real p_tau_ = a_.tau_ptr_ ? *a_.tau_ptr_ : a_.tau_value_;
  const real p_v_threshold_ = a_.v_threshold_ptr_ ? *a_.v_threshold_ptr_ : a_.v_threshold_value_;
  const real p_v_reset_ = a_.v_reset_ptr_ ? *a_.v_reset_ptr_ : a_.v_reset_value_;
  const Divisor_<real> r_tau_ = divisor_(p_tau_);
  real z_v_[LANES];
  load_state(z_v_, a_.v_ptr_, first_, valid_, a_.v_value_);

  long long t_ = 0;
  Seq ahead_x_[LOADS];
  if (LOADS <= T_) {
    UNROLL_ for (int k_ = 0; k_ < LOADS; ++k_) {
      ahead_x_[k_] = load_row<LANES>(a_.x_ + first_ + (0 + k_) * N_, valid_);
    }

  }
  for (int k_ = LOADS; k_ < 2 * LOADS && k_ < T_; ++k_) { fetch(a_.x_ + first_ + (k_) * N_); }
  for (; t_ + LOADS <= T_; t_ += LOADS) {  // without guards: they would keep loads from being on their way together
    Seq now_x_[LOADS];
    UNROLL_ for (int k_ = 0; k_ < LOADS; ++k_) { now_x_[k_] = ahead_x_[k_]; }
    if (t_ + 2 * LOADS <= T_) {
    UNROLL_ for (int k_ = 0; k_ < LOADS; ++k_) {
      ahead_x_[k_] = load_row<LANES>(a_.x_ + first_ + (t_ + LOADS + k_) * N_, valid_);
    }

    }
    if (t_ + 3 * LOADS <= T_) {
      UNROLL_ for (int k_ = 0; k_ < LOADS; ++k_) { fetch(a_.x_ + first_ + (t_ + 2 * LOADS + k_) * N_); }
    }
    LOADS_ISSUED_
    if (a_.checkpoints_ && t_ > 0 && t_ % K == 0) {
      real* c_ = a_.checkpoints_ + (t_ / K - 1) * (1 * N_) + first_;
      store_state(z_v_, c_ + 0 * N_, valid_);
    }
    UNROLL_ for (int k_ = 0; k_ < LOADS; ++k_) {
      {
        Seq out_s_;
        FOR_LANES_ {
          real spike_, charged_;
          step_(to_real(now_x_[k_].lane[l_]), z_v_[l_], spike_, charged_, p_tau_, p_v_threshold_, p_v_reset_, r_tau_);
          out_s_.lane[l_] = from_real<storage>(spike_);
        }
        const long long row_ = first_ + (t_ + k_) * N_;
        store_row(a_.s_ + row_, out_s_, valid_);
      }
    }

  }
  if (t_ < T_) {
    const int n_ = (int)(T_ - t_);
    Seq now_x_[LOADS];
    UNROLL_ for (int k_ = 0; k_ < LOADS; ++k_) {
      now_x_[k_] = load_row<LANES>(a_.x_ + first_ + (t_ + (k_ < n_ ? k_ : n_ - 1)) * N_, valid_);
    }

    LOADS_ISSUED_
    if (a_.checkpoints_ && t_ > 0 && t_ % K == 0) {
      real* c_ = a_.checkpoints_ + (t_ / K - 1) * (1 * N_) + first_;
      store_state(z_v_, c_ + 0 * N_, valid_);
    }
    UNROLL_ for (int k_ = 0; k_ < LOADS; ++k_) {
      if (k_ < n_) {
        Seq out_s_;
        FOR_LANES_ {
          real spike_, charged_;
          step_(to_real(now_x_[k_].lane[l_]), z_v_[l_], spike_, charged_, p_tau_, p_v_threshold_, p_v_reset_, r_tau_);
          out_s_.lane[l_] = from_real<storage>(spike_);
        }
        const long long row_ = first_ + (t_ + k_) * N_;
        store_row(a_.s_ + row_, out_s_, valid_);
      }
    }

  }
  if (a_.v_last_) { store_state(z_v_, a_.v_last_ + first_, valid_); }
}

ENTRY_(lif_forward_float32_hard_k16_l1_r16_ahead, 0)

}  // namespace
