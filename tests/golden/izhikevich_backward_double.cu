namespace izhikevich_backward_float64_hard_ATan_seq_s_k4_l1_r4_ns {

typedef double real;         // arithmetic, states and parameters
typedef double storage;  // sequences: x, s and their gradients
constexpr int LANES = 1;  // neurons handled together
constexpr int K = 4;      // steps between two checkpoints of the state
typedef Row<storage, LANES> Seq;

struct Args {
  const storage* x_;
  storage* x_grad_;
  const storage* s_dseq_;
  const real* v_dlast_;
  const real* w_dlast_;
  real* v_grad_;
  real* w_grad_;
  const real* checkpoints_;
  real* partials_;
  const real* v_ptr_;
  const real* w_ptr_;
  const real* tau_ptr_;
  const real* v_c_ptr_;
  const real* a0_ptr_;
  const real* v_rest_ptr_;
  const real* tau_w_ptr_;
  const real* a_ptr_;
  const real* b_ptr_;
  const real* v_threshold_ptr_;
  const real* v_reset_ptr_;
  long long N_;
  real v_value_;
  real w_value_;
  real tau_value_;
  real v_c_value_;
  real a0_value_;
  real v_rest_value_;
  real tau_w_value_;
  real a_value_;
  real b_value_;
  real v_threshold_value_;
  real v_reset_value_;
  real alpha_sg_;
  int T_;
};

// ATan: ds/du at u = h - theta
CALLED_ real slope_([[maybe_unused]] const real u, [[maybe_unused]] const real alpha) {
  return ratio_(real(0.5) * alpha, real(1) + pow2_(real(0.5) * real(3.141592653589793) * alpha * u));
}

// One step of one neuron: charge, fire, reset.
INLINE_ void step_([[maybe_unused]] const real x, real& z_v_, real& z_w_, real& s_, real& h_, [[maybe_unused]] const real tau, [[maybe_unused]] const real v_c, [[maybe_unused]] const real a0, [[maybe_unused]] const real v_rest, [[maybe_unused]] const real tau_w, [[maybe_unused]] const real a, [[maybe_unused]] const real b, [[maybe_unused]] const real v_threshold, [[maybe_unused]] const real v_reset, [[maybe_unused]] const Divisor_<real>& r_tau_, [[maybe_unused]] const Divisor_<real>& r_tau_w_) {
  const real v = z_v_;
  const real w = z_w_;
  const real theta = v_threshold;
  const real h = fma_(divide_(x + a0 * (v - v_rest) * (v - v_c) - w, r_tau_), r_tau_.scale, v);
  const real s = h >= theta ? real(1) : real(0);
  const real new_v_ = h * (real(1) - s) + v_reset * s;
  const real new_w_ = fma_(divide_(a * (h - v_rest) - w, r_tau_w_), r_tau_w_.scale, w) + b * s;
  z_v_ = new_v_;
  z_w_ = new_w_;
  s_ = s;
  h_ = h;
}

// The step again, then its adjoint, last statement first. On entry zd_*_ are the gradients of the states after
// the step, on return of those before it; pd_*_ add up those of learned parameters.
INLINE_ void step_backward_([[maybe_unused]] const real x, [[maybe_unused]] const real v, [[maybe_unused]] const real w, real& zd_v_, [[maybe_unused]] const bool some_v_, real& zd_w_, [[maybe_unused]] const bool some_w_, [[maybe_unused]] const real sd_, [[maybe_unused]] const real hd_, real& xd_, [[maybe_unused]] const real tau, [[maybe_unused]] const real v_c, [[maybe_unused]] const real a0, [[maybe_unused]] const real v_rest, [[maybe_unused]] const real tau_w, [[maybe_unused]] const real a, [[maybe_unused]] const real b, [[maybe_unused]] const real v_threshold, [[maybe_unused]] const real v_reset, [[maybe_unused]] const Divisor_<real>& r_tau_, [[maybe_unused]] const Divisor_<real>& r_tau_w_, [[maybe_unused]] const real sg_alpha_) {
  const real theta = v_threshold;
  const real h = fma_(divide_(x + a0 * (v - v_rest) * (v - v_c) - w, r_tau_), r_tau_.scale, v);
  const real s = h >= theta ? real(1) : real(0);
  const real after_v_ = zd_v_;
  const real after_w_ = zd_w_;
  const real d_s_ = sd_ + only_if_(some_w_, after_w_ * b) + only_if_(some_v_, after_v_ * (-h + v_reset));
  const real fired_ = d_s_ * slope_(h - theta, sg_alpha_);
  const real d_h_ = only_if_(some_w_, after_w_ * (a * r_tau_w_.r * r_tau_w_.scale)) + after_v_ * (real(1) - s) + fired_;
  zd_v_ = d_h_ * (real(1) + ((v - v_c) * a0 + a0 * (v - v_rest)) * r_tau_.r * r_tau_.scale);
  zd_w_ = only_if_(some_w_, after_w_ * (real(1) - r_tau_w_.inverse)) - d_h_ * r_tau_.r * r_tau_.scale;
  xd_ = d_h_ * r_tau_.r * r_tau_.scale;
}

// All T steps of the neurons first_ .. first_ + LANES - 1, of which valid_ exist.
INLINE_ void neurons_(const Args& a_, const long long first_, [[maybe_unused]] const int valid_, [[maybe_unused]] real* sums_) {
  const long long N_ = a_.N_;
  const int T_ = a_.T_;
  const real p_tau_ = a_.tau_ptr_ ? *a_.tau_ptr_ : a_.tau_value_;
  const real p_v_c_ = a_.v_c_ptr_ ? *a_.v_c_ptr_ : a_.v_c_value_;
  const real p_a0_ = a_.a0_ptr_ ? *a_.a0_ptr_ : a_.a0_value_;
  const real p_v_rest_ = a_.v_rest_ptr_ ? *a_.v_rest_ptr_ : a_.v_rest_value_;
  const real p_tau_w_ = a_.tau_w_ptr_ ? *a_.tau_w_ptr_ : a_.tau_w_value_;
  const real p_a_ = a_.a_ptr_ ? *a_.a_ptr_ : a_.a_value_;
  const real p_b_ = a_.b_ptr_ ? *a_.b_ptr_ : a_.b_value_;
  const real p_v_threshold_ = a_.v_threshold_ptr_ ? *a_.v_threshold_ptr_ : a_.v_threshold_value_;
  const real p_v_reset_ = a_.v_reset_ptr_ ? *a_.v_reset_ptr_ : a_.v_reset_value_;
  const Divisor_<real> r_tau_ = divisor_(p_tau_);
  const Divisor_<real> r_tau_w_ = divisor_(p_tau_w_);
  real z_v_[LANES];
  real z_w_[LANES];
  real zd_v_[LANES];  // gradient of v
  load_state(zd_v_, a_.v_dlast_, first_, valid_, real(0));
  bool some_v_ = a_.v_dlast_;  // a gradient arrives after the step in hand
  real zd_w_[LANES];  // gradient of w
  load_state(zd_w_, a_.w_dlast_, first_, valid_, real(0));
  bool some_w_ = a_.w_dlast_;  // a gradient arrives after the step in hand

  long long t_ = T_ / K * K;
  if (t_ < T_) {  // the last steps, where they are fewer than K
    const int n_ = (int)(T_ - t_);
    Seq now_x_[K], now_s_[K];

    UNROLL_ for (int k_ = 0; k_ < K; ++k_) {
      now_x_[k_] = load_row<LANES>(a_.x_ + first_ + (t_ + (k_ < n_ ? k_ : n_ - 1)) * N_, valid_);
      now_s_[k_] = load_row<LANES>(a_.s_dseq_ + first_ + (t_ + (k_ < n_ ? k_ : n_ - 1)) * N_, valid_);
    }

    LOADS_ISSUED_
    if (t_ > 0) {
      const real* c_ = a_.checkpoints_ + (t_ / K - 1) * (2 * N_);
      load_state(z_v_, c_ + 0 * N_, first_, valid_, real(0));
      load_state(z_w_, c_ + 1 * N_, first_, valid_, real(0));
    } else {
      load_state(z_v_, a_.v_ptr_, first_, valid_, a_.v_value_);
      load_state(z_w_, a_.w_ptr_, first_, valid_, a_.w_value_);
    }

    real zin_v_[K][LANES];
    real zin_w_[K][LANES];
    UNROLL_ for (int k_ = 0; k_ < K; ++k_) {
      {
        FOR_LANES_ {
          zin_v_[k_][l_] = z_v_[l_];
          zin_w_[k_][l_] = z_w_[l_];
          real spike_, charged_;
          step_(to_real(now_x_[k_].lane[l_]), z_v_[l_], z_w_[l_], spike_, charged_, p_tau_, p_v_c_, p_a0_, p_v_rest_, p_tau_w_, p_a_, p_b_, p_v_threshold_, p_v_reset_, r_tau_, r_tau_w_);
        }
      }
    }
    UNROLL_ for (int k_ = K - 1; k_ >= 0; --k_) {
      if (k_ < n_) {
        Seq out_x_;
        FOR_LANES_ {
          real xd_;
          step_backward_(to_real(now_x_[k_].lane[l_]), zin_v_[k_][l_], zin_w_[k_][l_], zd_v_[l_], some_v_, zd_w_[l_], some_w_, to_real(now_s_[k_].lane[l_]), real(0), xd_, p_tau_, p_v_c_, p_a0_, p_v_rest_, p_tau_w_, p_a_, p_b_, p_v_threshold_, p_v_reset_, r_tau_, r_tau_w_, a_.alpha_sg_);
          out_x_.lane[l_] = from_real<storage>(xd_);
        }
        some_v_ = true;
        some_w_ = true;
        if (a_.x_grad_) { store_row(a_.x_grad_ + first_ + (t_ + k_) * N_, out_x_, valid_); }
      }
    }

  }
  t_ -= K;
  for (; t_ >= 0; t_ -= K) {  // without guards: what needs no later step's gradient is computed meanwhile
    Seq now_x_[K], now_s_[K];

    UNROLL_ for (int k_ = 0; k_ < K; ++k_) {
      now_x_[k_] = load_row<LANES>(a_.x_ + first_ + (t_ + k_) * N_, valid_);
      now_s_[k_] = load_row<LANES>(a_.s_dseq_ + first_ + (t_ + k_) * N_, valid_);
    }

    LOADS_ISSUED_
    if (t_ > 0) {
      const real* c_ = a_.checkpoints_ + (t_ / K - 1) * (2 * N_);
      load_state(z_v_, c_ + 0 * N_, first_, valid_, real(0));
      load_state(z_w_, c_ + 1 * N_, first_, valid_, real(0));
    } else {
      load_state(z_v_, a_.v_ptr_, first_, valid_, a_.v_value_);
      load_state(z_w_, a_.w_ptr_, first_, valid_, a_.w_value_);
    }

    real zin_v_[K][LANES];
    real zin_w_[K][LANES];
    UNROLL_ for (int k_ = 0; k_ < K; ++k_) {
      {
        FOR_LANES_ {
          zin_v_[k_][l_] = z_v_[l_];
          zin_w_[k_][l_] = z_w_[l_];
          real spike_, charged_;
          step_(to_real(now_x_[k_].lane[l_]), z_v_[l_], z_w_[l_], spike_, charged_, p_tau_, p_v_c_, p_a0_, p_v_rest_, p_tau_w_, p_a_, p_b_, p_v_threshold_, p_v_reset_, r_tau_, r_tau_w_);
        }
      }
    }
    UNROLL_ for (int k_ = K - 1; k_ >= 0; --k_) {
      {
        Seq out_x_;
        FOR_LANES_ {
          real xd_;
          step_backward_(to_real(now_x_[k_].lane[l_]), zin_v_[k_][l_], zin_w_[k_][l_], zd_v_[l_], some_v_, zd_w_[l_], some_w_, to_real(now_s_[k_].lane[l_]), real(0), xd_, p_tau_, p_v_c_, p_a0_, p_v_rest_, p_tau_w_, p_a_, p_b_, p_v_threshold_, p_v_reset_, r_tau_, r_tau_w_, a_.alpha_sg_);
          out_x_.lane[l_] = from_real<storage>(xd_);
        }
        some_v_ = true;
        some_w_ = true;
        if (a_.x_grad_) { store_row(a_.x_grad_ + first_ + (t_ + k_) * N_, out_x_, valid_); }
      }
    }

  }
  if (a_.v_grad_) { store_state(zd_v_, a_.v_grad_ + first_, valid_); }
  if (a_.w_grad_) { store_state(zd_w_, a_.w_grad_ + first_, valid_); }
}

ENTRY_(izhikevich_backward_float64_hard_ATan_seq_s_k4_l1_r4, 0)

}  // namespace
