namespace lif_backward_float16_hard_ATan_seq_s_k4_l4_r4_ns {

typedef float real;         // arithmetic, states and parameters
typedef half_t storage;  // sequences: x, s and their gradients
constexpr int LANES = 4;  // neurons handled together
constexpr int K = 4;      // steps between two checkpoints of the state
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
  const real* v_threshold_ptr_;
  const real* v_reset_ptr_;
  long long N_;
  real v_value_;
  real tau_value_;
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

// The step again, then its adjoint, last statement first. On entry zd_*_ are the gradients of the states after
// the step, on return of those before it; pd_*_ add up those of learned parameters.
INLINE_ void step_backward_([[maybe_unused]] const real x, [[maybe_unused]] const real v, real& zd_v_, [[maybe_unused]] const bool some_v_, [[maybe_unused]] const real sd_, [[maybe_unused]] const real hd_, real& xd_, [[maybe_unused]] const real tau, [[maybe_unused]] const real v_threshold, [[maybe_unused]] const real v_reset, [[maybe_unused]] const Divisor_<real>& r_tau_, [[maybe_unused]] const real sg_alpha_) {
  const real theta = v_threshold;
  const real h = fma_(divide_(x - (v - v_reset), r_tau_), r_tau_.scale, v);
  const real s = h >= theta ? real(1) : real(0);
  const real after_v_ = zd_v_;
  const real d_s_ = sd_ + only_if_(some_v_, after_v_ * (-h + v_reset));
  const real fired_ = d_s_ * slope_(h - theta, sg_alpha_);
  const real d_h_ = after_v_ * (real(1) - s) + fired_;
  zd_v_ = d_h_ * (real(1) - r_tau_.inverse);
  xd_ = d_h_ * r_tau_.r * r_tau_.scale;
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
  real zd_v_[LANES];  // gradient of v
  load_state(zd_v_, a_.v_dlast_, first_, valid_, real(0));
  bool some_v_ = a_.v_dlast_;  // a gradient arrives after the step in hand

  for (long long t_ = (T_ - 1) / K * K; t_ >= 0; t_ -= K) {
    const int n_ = T_ - t_ < K ? (int)(T_ - t_) : K;  // only the last chunk has fewer than K steps
    Seq now_x_[K], now_s_[K];

    UNROLL_ for (int k_ = 0; k_ < K; ++k_) {
      now_x_[k_] = load_row<LANES>(a_.x_ + first_ + (t_ + (k_ < n_ ? k_ : n_ - 1)) * N_, valid_);
      now_s_[k_] = load_row<LANES>(a_.s_dseq_ + first_ + (t_ + (k_ < n_ ? k_ : n_ - 1)) * N_, valid_);
    }

    LOADS_ISSUED_
    if (t_ > 0) {
      const real* c_ = a_.checkpoints_ + (t_ / K - 1) * (1 * N_);
      load_state(z_v_, c_ + 0 * N_, first_, valid_, real(0));
    } else {
      load_state(z_v_, a_.v_ptr_, first_, valid_, a_.v_value_);
    }

    real zin_v_[K][LANES];
    UNROLL_ for (int k_ = 0; k_ < K; ++k_) {
      {
        FOR_LANES_ {
          zin_v_[k_][l_] = z_v_[l_];
          real spike_, charged_;
          step_(to_real(now_x_[k_].lane[l_]), z_v_[l_], spike_, charged_, p_tau_, p_v_threshold_, p_v_reset_, r_tau_);
        }
      }
    }
    UNROLL_ for (int k_ = K - 1; k_ >= 0; --k_) {
      if (k_ < n_) {
        Seq out_x_;
        FOR_LANES_ {
          real xd_;
          step_backward_(to_real(now_x_[k_].lane[l_]), zin_v_[k_][l_], zd_v_[l_], some_v_, to_real(now_s_[k_].lane[l_]), real(0), xd_, p_tau_, p_v_threshold_, p_v_reset_, r_tau_, a_.alpha_sg_);
          out_x_.lane[l_] = from_real<storage>(xd_);
        }
        some_v_ = true;
        if (a_.x_grad_) { store_row(a_.x_grad_ + first_ + (t_ + k_) * N_, out_x_, valid_); }
      }
    }

  }
  if (a_.v_grad_) { store_state(zd_v_, a_.v_grad_ + first_, valid_); }
}

ENTRY_(lif_backward_float16_hard_ATan_seq_s_k4_l4_r4, 0)

}  // namespace
