namespace alif_backward_bfloat16_hard_PiecewiseLeakyReLU_seq_s_k4_l64_r1_ns {

typedef float real;         // arithmetic, states and parameters
typedef bfloat16_t storage;  // sequences: x, s and their gradients
constexpr int LANES = 64;  // neurons handled together
constexpr int K = 4;      // steps between two checkpoints of the state
typedef Row<storage, LANES> Seq;

struct Args {
  const storage* x_;
  storage* x_grad_;
  const storage* s_dseq_;
  const real* v_dlast_;
  const real* a_dlast_;
  real* v_grad_;
  real* a_grad_;
  const real* checkpoints_;
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
  real w_sg_;
  real c_sg_;
  int T_;
};

// PiecewiseLeakyReLU: ds/du at u = h - theta
CALLED_ real slope_([[maybe_unused]] const real u, [[maybe_unused]] const real w, [[maybe_unused]] const real c) {
  return (abs_(u) < w ? ratio_(real(0.5), w) : c);
}

// One step of one neuron: charge, fire, reset.
INLINE_ void step_([[maybe_unused]] const real x, real& z_v_, real& z_a_, real& s_, real& h_, [[maybe_unused]] const real beta, [[maybe_unused]] const real beta_a, [[maybe_unused]] const real rho, [[maybe_unused]] const real v_threshold, [[maybe_unused]] const real v_reset) {
  const real v = z_v_;
  const real a = z_a_;
  const real h = v * beta + x;
  const real theta = v_threshold + beta_a * a;
  const real s = h >= theta ? real(1) : real(0);
  const real new_v_ = h * (real(1) - s) + v_reset * s;
  const real new_a_ = a * rho + s;
  z_v_ = new_v_;
  z_a_ = new_a_;
  s_ = s;
  h_ = h;
}

// The step again, then its adjoint, last statement first. On entry zd_*_ are the gradients of the states after
// the step, on return of those before it; pd_*_ add up those of learned parameters.
INLINE_ void step_backward_([[maybe_unused]] const real x, [[maybe_unused]] const real v, [[maybe_unused]] const real a, real& zd_v_, [[maybe_unused]] const bool some_v_, real& zd_a_, [[maybe_unused]] const bool some_a_, [[maybe_unused]] const real sd_, [[maybe_unused]] const real hd_, real& xd_, [[maybe_unused]] const real beta, [[maybe_unused]] const real beta_a, [[maybe_unused]] const real rho, [[maybe_unused]] const real v_threshold, [[maybe_unused]] const real v_reset, [[maybe_unused]] const real sg_w_, [[maybe_unused]] const real sg_c_) {
  const real h = v * beta + x;
  const real theta = v_threshold + beta_a * a;
  const real s = h >= theta ? real(1) : real(0);
  const real after_v_ = zd_v_;
  const real after_a_ = zd_a_;
  const real d_s_ = sd_ + after_a_ + only_if_(some_v_, after_v_ * (-h + v_reset));
  const real fired_ = d_s_ * slope_(h - theta, sg_w_, sg_c_);
  const real d_theta_ = -fired_;
  const real d_h_ = after_v_ * (real(1) - s) + fired_;
  zd_v_ = d_h_ * beta;
  zd_a_ = only_if_(some_a_, after_a_ * rho) + d_theta_ * beta_a;
  xd_ = d_h_;
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
  real zd_v_[LANES];  // gradient of v
  load_state(zd_v_, a_.v_dlast_, first_, valid_, real(0));
  bool some_v_ = a_.v_dlast_;  // a gradient arrives after the step in hand
  real zd_a_[LANES];  // gradient of a
  load_state(zd_a_, a_.a_dlast_, first_, valid_, real(0));
  bool some_a_ = a_.a_dlast_;  // a gradient arrives after the step in hand

  for (long long t_ = (T_ - 1) / K * K; t_ >= 0; t_ -= K) {
    const int n_ = T_ - t_ < K ? (int)(T_ - t_) : K;  // only the last chunk has fewer than K steps
    if (t_ > 0) {
      const real* c_ = a_.checkpoints_ + (t_ / K - 1) * (2 * N_);
      load_state(z_v_, c_ + 0 * N_, first_, valid_, real(0));
      load_state(z_a_, c_ + 1 * N_, first_, valid_, real(0));
    } else {
      load_state(z_v_, a_.v_ptr_, first_, valid_, a_.v_value_);
      load_state(z_a_, a_.a_ptr_, first_, valid_, a_.a_value_);
    }

    real zin_v_[K][LANES];
    real zin_a_[K][LANES];
    UNROLL_ for (int k_ = 0; k_ < K; ++k_) {
      if (k_ < n_) {
        real now_x_[LANES];
        load_reals(now_x_, a_.x_ + first_ + (t_ + k_) * N_, valid_);

        FOR_LANES_ {
          zin_v_[k_][l_] = z_v_[l_];
          zin_a_[k_][l_] = z_a_[l_];
          real spike_, charged_;
          step_(now_x_[l_], z_v_[l_], z_a_[l_], spike_, charged_, p_beta_, p_beta_a_, p_rho_, p_v_threshold_, p_v_reset_);
        }
      }
    }
    UNROLL_ for (int k_ = K - 1; k_ >= 0; --k_) {
      if (k_ < n_) {
        real now_x_[LANES];
        load_reals(now_x_, a_.x_ + first_ + (t_ + k_) * N_, valid_);

        real now_s_[LANES];
        load_reals(now_s_, a_.s_dseq_ + first_ + (t_ + k_) * N_, valid_);

        real out_x_[LANES];
        FOR_LANES_ {
          real xd_;
          step_backward_(now_x_[l_], zin_v_[k_][l_], zin_a_[k_][l_], zd_v_[l_], some_v_, zd_a_[l_], some_a_, now_s_[l_], real(0), xd_, p_beta_, p_beta_a_, p_rho_, p_v_threshold_, p_v_reset_, a_.w_sg_, a_.c_sg_);
          out_x_[l_] = xd_;
        }
        some_v_ = true;
        some_a_ = true;
        if (a_.x_grad_) { store_reals(a_.x_grad_ + first_ + (t_ + k_) * N_, out_x_, valid_); }
      }
    }

  }
  if (a_.v_grad_) { store_state(zd_v_, a_.v_grad_ + first_, valid_); }
  if (a_.a_grad_) { store_state(zd_a_, a_.a_grad_ + first_, valid_); }
}

ENTRY_(alif_backward_bfloat16_hard_PiecewiseLeakyReLU_seq_s_k4_l64_r1, 0)

}  // namespace
