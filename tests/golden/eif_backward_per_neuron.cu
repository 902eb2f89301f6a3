// eif backward float32 hard ATan per tau learn tau delta T seq s k4 l1 r4
//     h = v + ( x - ( v - v_rest ) + delta_T * exp ( ( v - theta_rh ) / delta_T ) ) / tau
//     it fires: theta = v_threshold; s = h >= theta
//     reset (hard): v = h * (1 - s) + v_reset * s
namespace eif_backward_float32_hard_ATan_per_tau_learn_tau_delta_T_seq_s_k4_l1_r4_ns {
struct Sizes {
  using real = float;  // arithmetic, states and parameters
  using storage = float;  // sequences: x, s and their gradients
  static constexpr bool FORWARD = false, AHEAD = false, WHOLE = false, BY_CHANNEL = false;
  static constexpr int LANES = 1, K = 4, LOADS = 4, INPUTS = 1, PER_STEP = 0, SEQUENCES = 2, OUTPUTS = 1, STATES = 1,
      SHARED = 5, SHARED_DIVISORS = 1, EACH = 1, EACH_DIVISORS = 1, SURROGATE = 1, EACH_LEARNED = 1, SUMS = 1;
};
struct Kernel : Arrays<Sizes> {
  struct Args {
    const storage* in[2];  // x, s
    storage* out[1];  // x
    const real* last_grad[1];  // v
    real* start_grad[1];  // v
    const real* checkpoints;
    real* each_grad[1];  // tau
    real* partials;
    const real* start[1];  // v
    const real* each[1];  // tau
    const real* shared[5];  // delta_T, theta_rh, v_rest, v_reset, v_threshold
    long long inner[1];  // tau
    long long count[1];  // tau
    long long N;
    real start_value[1];  // v
    real shared_value[5];  // delta_T, theta_rh, v_rest, v_reset, v_threshold
    real surrogate[1];  // alpha
    int T;
  };
  // ATan: ds/du at u = h - theta
  static CALLED_ real slope_(const real u, const real alpha) {
    return ratio_(real(0.5) * alpha, real(1) + pow2_(real(0.5) * real(3.141592653589793) * alpha * u));
  }
  // One step of one neuron: charge, fire, reset.
  static INLINE_ void step(const Params<Kernel>& p_, const In& in_, State& z_, Out& out_, const int l_) {
    const real x = in_[0][l_], v = z_[0][l_], delta_T = p_.shared[0], theta_rh = p_.shared[1],
        v_rest = p_.shared[2], v_reset = p_.shared[3], v_threshold = p_.shared[4];
    const auto &r_delta_T_ = p_.shared_divisor[0], &r_tau_ = p_.each_divisor[0][l_];
    const real theta = v_threshold;
    const real h = fma_(divide_(x - (v - v_rest) + delta_T * exp_(divide_(v - theta_rh, r_delta_T_) * r_delta_T_.scale),
        r_tau_), r_tau_.scale, v);
    const real s = (h >= theta ? real(1) : real(0));
    const real new_v_ = h * (real(1) - s) + v_reset * s;
    z_[0][l_] = new_v_;
  }
  // Its adjoint, the last statement first: from the gradients of the states after the step to those before it.
  static INLINE_ void step_back(const Params<Kernel>& p_, const Sequences& in_, const State& z_, Gradients& d_,
                                const Some& some_, Out& out_, const int l_) {
    const real x = in_[0][l_], v = z_[0][l_], delta_T = p_.shared[0], theta_rh = p_.shared[1],
        v_rest = p_.shared[2], v_reset = p_.shared[3], v_threshold = p_.shared[4],
        sg_alpha_ = p_.surrogate[0];
    const auto &r_delta_T_ = p_.shared_divisor[0], &r_tau_ = p_.each_divisor[0][l_];
    const bool some_v_ = some_[0];
    const real theta = v_threshold;
    const real h = fma_(divide_(x - (v - v_rest) + delta_T * exp_(divide_(v - theta_rh, r_delta_T_) * r_delta_T_.scale),
        r_tau_), r_tau_.scale, v);
    const real s = (h >= theta ? real(1) : real(0));
    const real after_v_ = d_.z[0][l_];
    const real given_s_ = in_[1][l_];
    const real d_s_ = given_s_ + only_if_(some_v_, after_v_ * (-h + v_reset));
    const real fired_s_ = d_s_ * slope_(h - theta, sg_alpha_);
    const real d_h_ = after_v_ * (real(1) - s) + fired_s_;
    d_.z[0][l_] = d_h_ * (real(1) + (real(-1.0) + delta_T * (exp_(divide_(v - theta_rh, r_delta_T_) * r_delta_T_.scale)
        * r_delta_T_.r * r_delta_T_.scale)) * r_tau_.r * r_tau_.scale);
    out_[0][l_] = d_h_ * r_tau_.r * r_tau_.scale;
    d_.learned[0][l_] += -(d_h_ * ((x - (v - v_rest) + delta_T * exp_(divide_(v - theta_rh, r_delta_T_) *
        r_delta_T_.scale)) * r_tau_.r * r_tau_.scale * r_tau_.r * r_tau_.scale));
    d_.learned[1][l_] += d_h_ * ((exp_(divide_(v - theta_rh, r_delta_T_) * r_delta_T_.scale) - delta_T * (exp_(divide_(v
        - theta_rh, r_delta_T_) * r_delta_T_.scale) * ((v - theta_rh) * r_delta_T_.r * r_delta_T_.scale * r_delta_T_.r *
        r_delta_T_.scale))) * r_tau_.r * r_tau_.scale);
  }
  static INLINE_ void pass(Some& some_) { some_[0] = true; }
};
extern "C" __global__ void __launch_bounds__(128)
eif_backward_float32_hard_ATan_per_tau_learn_tau_delta_T_seq_s_k4_l1_r4(const Kernel::Args a) { run<Kernel>(a); }
}  // namespace
