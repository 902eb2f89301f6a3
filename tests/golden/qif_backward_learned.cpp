namespace qif_backward_float32_soft_Erf_learn_v_c_a0_seq_s_k16_l64_r1_ns {

typedef float real;         // arithmetic, states and parameters
typedef float storage;  // sequences: x, s and their gradients
constexpr int LANES = 64;  // neurons handled together
constexpr int K = 16;      // steps between two checkpoints of the state
typedef Row<storage, LANES> Seq;

struct Args {
  const storage* x_;
  storage* x_grad_;
  const storage* s_dseq_;
  const real* v_dlast_;
  real* v_grad_;
  const real* checkpoints_;
  real* partials_;
  const real* v_ptr_;
  const real* tau_ptr_;
  const real* v_c_ptr_;
  const real* a0_ptr_;
  const real* v_rest_ptr_;
  const real* v_reset_ptr_;
  const real* v_threshold_ptr_;
  long long N_;
  real v_value_;
  real tau_value_;
  real v_c_value_;
  real a0_value_;
  real v_rest_value_;
  real v_reset_value_;
  real v_threshold_value_;
  real alpha_sg_;
  int T_;
};

// Erf: ds/du at u = h - theta
CALLED_ real slope_([[maybe_unused]] const real u, [[maybe_unused]] const real alpha) {
  return ratio_(alpha, sqrt_(real(3.141592653589793))) * exp_(-pow2_(alpha * u));
}

// One step of one neuron: charge, fire, reset.
INLINE_ void step_([[maybe_unused]] const real x, real& z_v_, real& s_, real& h_, [[maybe_unused]] const real tau, [[maybe_unused]] const real v_c, [[maybe_unused]] const real a0, [[maybe_unused]] const real v_rest, [[maybe_unused]] const real v_reset, [[maybe_unused]] const real v_threshold) {
  const real v = z_v_;
  const real theta = v_threshold;
  const real h = v + (x + a0 * (v - v_rest) * (v - v_c)) / tau;
  const real s = h >= theta ? real(1) : real(0);
  const real new_v_ = h - s * theta;
  z_v_ = new_v_;
  s_ = s;
  h_ = h;
}

// The step again, then its adjoint, last statement first. On entry zd_*_ are the gradients of the states after
// the step, on return of those before it; pd_*_ add up those of learned parameters.
INLINE_ void step_backward_([[maybe_unused]] const real x, [[maybe_unused]] const real v, real& zd_v_, [[maybe_unused]] const bool some_v_, [[maybe_unused]] const real sd_, [[maybe_unused]] const real hd_, real& xd_, real& pd_v_c_, real& pd_a0_, [[maybe_unused]] const real tau, [[maybe_unused]] const real v_c, [[maybe_unused]] const real a0, [[maybe_unused]] const real v_rest, [[maybe_unused]] const real v_reset, [[maybe_unused]] const real v_threshold, [[maybe_unused]] const real sg_alpha_) {
  const real theta = v_threshold;
  const real h = v + (x + a0 * (v - v_rest) * (v - v_c)) / tau;
  const real after_v_ = zd_v_;
  const real d_s_ = sd_ + only_if_(some_v_, -(after_v_ * theta));
  const real fired_ = d_s_ * slope_(h - theta, sg_alpha_);
  const real d_h_ = after_v_ + fired_;
  zd_v_ = d_h_ * (real(1) + ratio_((v - v_c) * a0 + a0 * (v - v_rest), tau));
  xd_ = ratio_(d_h_, tau);
  pd_v_c_ += -(d_h_ * ratio_(a0 * (v - v_rest), tau));
  pd_a0_ += d_h_ * ratio_((v - v_c) * (v - v_rest), tau);
}

// All T steps of the neurons first_ .. first_ + LANES - 1, of which valid_ exist.
INLINE_ void neurons_(const Args& a_, const long long first_, [[maybe_unused]] const int valid_, [[maybe_unused]] real* sums_) {
  const long long N_ = a_.N_;
  const int T_ = a_.T_;
  const real p_tau_ = a_.tau_ptr_ ? *a_.tau_ptr_ : a_.tau_value_;
  const real p_v_c_ = a_.v_c_ptr_ ? *a_.v_c_ptr_ : a_.v_c_value_;
  const real p_a0_ = a_.a0_ptr_ ? *a_.a0_ptr_ : a_.a0_value_;
  const real p_v_rest_ = a_.v_rest_ptr_ ? *a_.v_rest_ptr_ : a_.v_rest_value_;
  const real p_v_reset_ = a_.v_reset_ptr_ ? *a_.v_reset_ptr_ : a_.v_reset_value_;
  const real p_v_threshold_ = a_.v_threshold_ptr_ ? *a_.v_threshold_ptr_ : a_.v_threshold_value_;
  real z_v_[LANES];
  real zd_v_[LANES];  // gradient of v
  load_state(zd_v_, a_.v_dlast_, first_, valid_, real(0));
  bool some_v_ = a_.v_dlast_;  // a gradient arrives after the step in hand
  real pd_v_c_[LANES];
  FOR_LANES_ { pd_v_c_[l_] = real(0); }
  real pd_a0_[LANES];
  FOR_LANES_ { pd_a0_[l_] = real(0); }

  for (long long t_ = (T_ - 1) / K * K; t_ >= 0; t_ -= K) {
    const int n_ = T_ - t_ < K ? (int)(T_ - t_) : K;  // only the last chunk has fewer than K steps
    if (t_ > 0) {
      const real* c_ = a_.checkpoints_ + (t_ / K - 1) * (1 * N_);
      load_state(z_v_, c_ + 0 * N_, first_, valid_, real(0));
    } else {
      load_state(z_v_, a_.v_ptr_, first_, valid_, a_.v_value_);
    }

    real zin_v_[K][LANES];
    UNROLL_ for (int k_ = 0; k_ < K; ++k_) {
      if (k_ < n_) {
        real now_x_[LANES];
        load_reals(now_x_, a_.x_ + first_ + (t_ + k_) * N_, valid_);

        FOR_LANES_ {
          zin_v_[k_][l_] = z_v_[l_];
          real spike_, charged_;
          step_(now_x_[l_], z_v_[l_], spike_, charged_, p_tau_, p_v_c_, p_a0_, p_v_rest_, p_v_reset_, p_v_threshold_);
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
          step_backward_(now_x_[l_], zin_v_[k_][l_], zd_v_[l_], some_v_, now_s_[l_], real(0), xd_, pd_v_c_[l_], pd_a0_[l_], p_tau_, p_v_c_, p_a0_, p_v_rest_, p_v_reset_, p_v_threshold_, a_.alpha_sg_);
          out_x_[l_] = xd_;
        }
        some_v_ = true;
        if (a_.x_grad_) { store_reals(a_.x_grad_ + first_ + (t_ + k_) * N_, out_x_, valid_); }
      }
    }

  }
  if (a_.v_grad_) { store_state(zd_v_, a_.v_grad_ + first_, valid_); }
  FOR_LANES_ { sums_[0] += l_ < valid_ ? pd_v_c_[l_] : real(0); }
  FOR_LANES_ { sums_[1] += l_ < valid_ ? pd_a0_[l_] : real(0); }
}

ENTRY_(qif_backward_float32_soft_Erf_learn_v_c_a0_seq_s_k16_l64_r1, 2)

}  // namespace
