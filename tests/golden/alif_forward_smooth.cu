namespace alif_forward_float32_hard_ATan_smooth_k4_l1_r4_ns {

typedef float real;         // arithmetic, states and parameters
typedef float storage;  // sequences: x, s and their gradients
constexpr int LANES = 1;  // neurons handled together
constexpr int K = 4;      // steps between two checkpoints of the state
constexpr int LOADS = 4;  // rows of x on their way before the first is used
typedef Row<storage, LANES> Seq;

struct Args {
  const storage* x_;
  storage* s_;
  real* v_last_;
  real* a_last_;
  real* checkpoints_;
  real* partials_;
  const real* v_ptr_;
  const real* a_ptr_;
  const real* beta_ptr_;
  const real* beta_a_ptr_;
  const real* rho_ptr_;
  const real* v_threshold_ptr_;
  const real* v_reset_ptr_;
  long long N_;
  real v_value_;
  real a_value_;
  real beta_value_;
  real beta_a_value_;
  real rho_value_;
  real v_threshold_value_;
  real v_reset_value_;
  real alpha_sg_;
  int T_;
};

// ATan: the smooth spike at u = h - theta
CALLED_ real smooth_spike_([[maybe_unused]] const real u, [[maybe_unused]] const real alpha) {
  return atan_(real(0.5) * real(3.141592653589793) * alpha * u) / real(3.141592653589793) + real(0.5);
}

// One step of one neuron: charge, fire, reset.
INLINE_ void step_([[maybe_unused]] const real x, real& z_v_, real& z_a_, real& s_, real& h_, [[maybe_unused]] const real beta, [[maybe_unused]] const real beta_a, [[maybe_unused]] const real rho, [[maybe_unused]] const real v_threshold, [[maybe_unused]] const real v_reset, [[maybe_unused]] const real sg_alpha_) {
  const real v = z_v_;
  const real a = z_a_;
  const real h = v * beta + x;
  const real theta = v_threshold + beta_a * a;
  const real s = smooth_spike_(h - theta, sg_alpha_);
  const real new_v_ = h * (real(1) - s) + v_reset * s;
  const real new_a_ = a * rho + s;
  z_v_ = new_v_;
  z_a_ = new_a_;
  s_ = s;
  h_ = h;
}

// All T steps of the neurons first_ .. first_ + LANES - 1, of which valid_ exist.
INLINE_ void neurons_(const Args& a_, const long long first_, [[maybe_unused]] const int valid_, [[maybe_unused]] real* sums_) {
  const long long N_ = a_.N_;
  const int T_ = a_.T_;
  const real p_beta_ = a_.beta_ptr_ ? *a_.beta_ptr_ : a_.beta_value_;
  const real p_beta_a_ = a_.beta_a_ptr_ ? *a_.beta_a_ptr_ : a_.beta_a_value_;
  const real p_rho_ = a_.rho_ptr_ ? *a_.rho_ptr_ : a_.rho_value_;
  const real p_v_threshold_ = a_.v_threshold_ptr_ ? *a_.v_threshold_ptr_ : a_.v_threshold_value_;
  const real p_v_reset_ = a_.v_reset_ptr_ ? *a_.v_reset_ptr_ : a_.v_reset_value_;
  real z_v_[LANES];
  real z_a_[LANES];
  load_state(z_v_, a_.v_ptr_, first_, valid_, a_.v_value_);
  load_state(z_a_, a_.a_ptr_, first_, valid_, a_.a_value_);

  long long t_ = 0;
  for (; t_ + LOADS <= T_; t_ += LOADS) {  // without guards: they would keep loads from being on their way together
    Seq now_x_[LOADS];
    UNROLL_ for (int k_ = 0; k_ < LOADS; ++k_) {
      now_x_[k_] = load_row<LANES>(a_.x_ + first_ + (t_ + k_) * N_, valid_);
    }

    LOADS_ISSUED_
    if (a_.checkpoints_ && t_ > 0 && t_ % K == 0) {
      real* c_ = a_.checkpoints_ + (t_ / K - 1) * (2 * N_) + first_;
      store_state(z_v_, c_ + 0 * N_, valid_);
      store_state(z_a_, c_ + 1 * N_, valid_);
    }
    UNROLL_ for (int k_ = 0; k_ < LOADS; ++k_) {
      {
        Seq out_s_;
        FOR_LANES_ {
          real spike_, charged_;
          step_(to_real(now_x_[k_].lane[l_]), z_v_[l_], z_a_[l_], spike_, charged_, p_beta_, p_beta_a_, p_rho_, p_v_threshold_, p_v_reset_, a_.alpha_sg_);
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
      real* c_ = a_.checkpoints_ + (t_ / K - 1) * (2 * N_) + first_;
      store_state(z_v_, c_ + 0 * N_, valid_);
      store_state(z_a_, c_ + 1 * N_, valid_);
    }
    UNROLL_ for (int k_ = 0; k_ < LOADS; ++k_) {
      if (k_ < n_) {
        Seq out_s_;
        FOR_LANES_ {
          real spike_, charged_;
          step_(to_real(now_x_[k_].lane[l_]), z_v_[l_], z_a_[l_], spike_, charged_, p_beta_, p_beta_a_, p_rho_, p_v_threshold_, p_v_reset_, a_.alpha_sg_);
          out_s_.lane[l_] = from_real<storage>(spike_);
        }
        const long long row_ = first_ + (t_ + k_) * N_;
        store_row(a_.s_ + row_, out_s_, valid_);
      }
    }

  }
  if (a_.v_last_) { store_state(z_v_, a_.v_last_ + first_, valid_); }
  if (a_.a_last_) { store_state(z_a_, a_.a_last_ + first_, valid_); }
}

ENTRY_(alif_forward_float32_hard_ATan_smooth_k4_l1_r4, 0)

}  // namespace
