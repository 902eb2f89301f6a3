namespace plif_backward_float32_soft_detached_Sigmoid_learn_reciprocal_tau_seq_s_k16_l1_r16_ahead_ns {

typedef float real;         // arithmetic, states and parameters
typedef float storage;  // sequences: x, s and their gradients
constexpr int LANES = 1;  // neurons handled together
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
  const real* reciprocal_tau_ptr_;
  const real* v_threshold_ptr_;
  const real* v_reset_ptr_;
  long long N_;
  real v_value_;
  real reciprocal_tau_value_;
  real v_threshold_value_;
  real v_reset_value_;
  real alpha_sg_;
  int T_;
};

// Sigmoid: ds/du at u = h - theta
CALLED_ real slope_([[maybe_unused]] const real u, [[maybe_unused]] const real alpha) {
  return alpha * sigmoid_(alpha * u) * (real(1) - sigmoid_(alpha * u));
}

// One step of one neuron: charge, fire, reset.
INLINE_ void step_([[maybe_unused]] const real x, real& z_v_, real& s_, real& h_, [[maybe_unused]] const real reciprocal_tau, [[maybe_unused]] const real v_threshold, [[maybe_unused]] const real v_reset) {
  const real v = z_v_;
  const real theta = v_threshold;
  const real h = v + (x - (v - v_reset)) * reciprocal_tau;
  const real s = h >= theta ? real(1) : real(0);
  const real new_v_ = h - s * theta;
  z_v_ = new_v_;
  s_ = s;
  h_ = h;
}

// The step again, then its adjoint, last statement first. On entry zd_*_ are the gradients of the states after
// the step, on return of those before it; pd_*_ add up those of learned parameters.
INLINE_ void step_backward_([[maybe_unused]] const real x, [[maybe_unused]] const real v, real& zd_v_, [[maybe_unused]] const bool some_v_, [[maybe_unused]] const real sd_, [[maybe_unused]] const real hd_, real& xd_, real& pd_reciprocal_tau_, [[maybe_unused]] const real reciprocal_tau, [[maybe_unused]] const real v_threshold, [[maybe_unused]] const real v_reset, [[maybe_unused]] const real sg_alpha_) {
  const real theta = v_threshold;
  const real h = v + (x - (v - v_reset)) * reciprocal_tau;
  const real after_v_ = zd_v_;
  const real fired_ = sd_ * slope_(h - theta, sg_alpha_);
  const real d_h_ = after_v_ + fired_;
  zd_v_ = d_h_ * (real(1) - reciprocal_tau);
  xd_ = d_h_ * reciprocal_tau;
  pd_reciprocal_tau_ += d_h_ * (x - (v - v_reset));
}

// All T steps of the neurons first_ .. first_ + LANES - 1, of which valid_ exist.
INLINE_ void neurons_(const Args& a_, const long long first_, [[maybe_unused]] const int valid_, [[maybe_unused]] real* sums_) {
  const long long N_ = a_.N_;
  const int T_ = a_.T_;
  const real p_reciprocal_tau_ = a_.reciprocal_tau_ptr_ ? *a_.reciprocal_tau_ptr_ : a_.reciprocal_tau_value_;
  const real p_v_threshold_ = a_.v_threshold_ptr_ ? *a_.v_threshold_ptr_ : a_.v_threshold_value_;
  const real p_v_reset_ = a_.v_reset_ptr_ ? *a_.v_reset_ptr_ : a_.v_reset_value_;
  real z_v_[LANES];
  real zd_v_[LANES];  // gradient of v
  load_state(zd_v_, a_.v_dlast_, first_, valid_, real(0));
  bool some_v_ = a_.v_dlast_;  // a gradient arrives after the step in hand
  real pd_reciprocal_tau_[LANES];
  FOR_LANES_ { pd_reciprocal_tau_[l_] = real(0); }

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
          step_(to_real(now_x_[k_].lane[l_]), z_v_[l_], spike_, charged_, p_reciprocal_tau_, p_v_threshold_, p_v_reset_);
        }
      }
    }
    UNROLL_ for (int k_ = K - 1; k_ >= 0; --k_) {
      if (k_ < n_) {
        Seq out_x_;
        FOR_LANES_ {
          real xd_;
          step_backward_(to_real(now_x_[k_].lane[l_]), zin_v_[k_][l_], zd_v_[l_], some_v_, to_real(now_s_[k_].lane[l_]), real(0), xd_, pd_reciprocal_tau_[l_], p_reciprocal_tau_, p_v_threshold_, p_v_reset_, a_.alpha_sg_);
          out_x_.lane[l_] = from_real<storage>(xd_);
        }
        some_v_ = true;
        if (a_.x_grad_) { store_row(a_.x_grad_ + first_ + (t_ + k_) * N_, out_x_, valid_); }
      }
    }

  }
  t_ -= K;
    Seq ahead_x_[K], ahead_s_[K];

  real znext_v_[LANES];
  if (t_ >= 0) {
    UNROLL_ for (int k_ = 0; k_ < K; ++k_) {
      ahead_x_[k_] = load_row<LANES>(a_.x_ + first_ + (t_ + k_) * N_, valid_);
      ahead_s_[k_] = load_row<LANES>(a_.s_dseq_ + first_ + (t_ + k_) * N_, valid_);
    }

    if (t_ > 0) {
      const real* c_ = a_.checkpoints_ + (t_ / K - 1) * (1 * N_);
      load_state(znext_v_, c_ + 0 * N_, first_, valid_, real(0));
    } else {
      load_state(znext_v_, a_.v_ptr_, first_, valid_, a_.v_value_);
    }

  }
  for (; t_ >= 0; t_ -= K) {  // without guards: what needs no later step's gradient is computed meanwhile
    Seq now_x_[K], now_s_[K];

    UNROLL_ for (int k_ = 0; k_ < K; ++k_) { now_x_[k_] = ahead_x_[k_]; }
    UNROLL_ for (int k_ = 0; k_ < K; ++k_) { now_s_[k_] = ahead_s_[k_]; }
    FOR_LANES_ { z_v_[l_] = znext_v_[l_]; }
    if (t_ > 0) {
    UNROLL_ for (int k_ = 0; k_ < K; ++k_) {
      ahead_x_[k_] = load_row<LANES>(a_.x_ + first_ + (t_ - K + k_) * N_, valid_);
      ahead_s_[k_] = load_row<LANES>(a_.s_dseq_ + first_ + (t_ - K + k_) * N_, valid_);
    }

    if ((t_ - K) > 0) {
      const real* c_ = a_.checkpoints_ + ((t_ - K) / K - 1) * (1 * N_);
      load_state(znext_v_, c_ + 0 * N_, first_, valid_, real(0));
    } else {
      load_state(znext_v_, a_.v_ptr_, first_, valid_, a_.v_value_);
    }

    }
    LOADS_ISSUED_
    real zin_v_[K][LANES];
    UNROLL_ for (int k_ = 0; k_ < K; ++k_) {
      {
        FOR_LANES_ {
          zin_v_[k_][l_] = z_v_[l_];
          real spike_, charged_;
          step_(to_real(now_x_[k_].lane[l_]), z_v_[l_], spike_, charged_, p_reciprocal_tau_, p_v_threshold_, p_v_reset_);
        }
      }
    }
    UNROLL_ for (int k_ = K - 1; k_ >= 0; --k_) {
      {
        Seq out_x_;
        FOR_LANES_ {
          real xd_;
          step_backward_(to_real(now_x_[k_].lane[l_]), zin_v_[k_][l_], zd_v_[l_], some_v_, to_real(now_s_[k_].lane[l_]), real(0), xd_, pd_reciprocal_tau_[l_], p_reciprocal_tau_, p_v_threshold_, p_v_reset_, a_.alpha_sg_);
          out_x_.lane[l_] = from_real<storage>(xd_);
        }
        some_v_ = true;
        if (a_.x_grad_) { store_row(a_.x_grad_ + first_ + (t_ + k_) * N_, out_x_, valid_); }
      }
    }

  }
  if (a_.v_grad_) { store_state(zd_v_, a_.v_grad_ + first_, valid_); }
  FOR_LANES_ { sums_[0] += l_ < valid_ ? pd_reciprocal_tau_[l_] : real(0); }
}

ENTRY_(plif_backward_float32_soft_detached_Sigmoid_learn_reciprocal_tau_seq_s_k16_l1_r16_ahead, 1)

}  // namespace
