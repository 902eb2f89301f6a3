// izhikevich backward float64 hard ATan seq s k4 l1 r4
//     h = v + ( x + a0 * ( v - v_rest ) * ( v - v_c ) - w ) / tau
//     w = w + ( a * ( h - v_rest ) - w ) / tau_w + b * s
//     it fires: theta = v_threshold; s = h >= theta
//     reset (hard): v = h * (1 - s) + v_reset * s
namespace izhikevich_backward_float64_hard_ATan_seq_s_k4_l1_r4_ns {
struct Sizes {
  using real = double;  // arithmetic, states and parameters
  using storage = double;  // sequences: x, s and their gradients
  static constexpr bool FORWARD = false, AHEAD = false, WHOLE = false, BY_CHANNEL = false;
  static constexpr int LANES = 1, K = 4, LOADS = 4, INPUTS = 1, PER_STEP = 0, SEQUENCES = 2, OUTPUTS = 1, STATES = 2,
      SHARED = 9, SHARED_DIVISORS = 2, EACH = 0, EACH_DIVISORS = 0, SURROGATE = 1, EACH_LEARNED = 0, SUMS = 0;
};
struct Kernel : Arrays<Sizes> {
  struct Args {
    const storage* in[2];  // x, s
    storage* out[1];  // x
    const real* last_grad[2];  // v, w
    real* start_grad[2];  // v, w
    const real* checkpoints;
    const real* start[2];  // v, w
    const real* shared[9];  // tau, tau_w, v_c, a0, v_rest, a, b, v_threshold, v_reset
    long long N;
    real start_value[2];  // v, w
    real shared_value[9];  // tau, tau_w, v_c, a0, v_rest, a, b, v_threshold, v_reset
    real surrogate[1];  // alpha
    int T;
  };
  // ATan: ds/du at u = h - theta
  static CALLED_ real slope_(const real u, const real alpha) {
    return ratio_(real(0.5) * alpha, real(1) + pow2_(real(0.5) * real(3.141592653589793) * alpha * u));
  }
  // One step of one neuron: charge, fire, reset.
  static INLINE_ void step(const Params<Kernel>& p_, const In& in_, State& z_, Out& out_, const int l_) {
    const real x = in_[0][l_], v = z_[0][l_], w = z_[1][l_], v_c = p_.shared[2], a0 = p_.shared[3],
        v_rest = p_.shared[4], a = p_.shared[5], b = p_.shared[6], v_threshold = p_.shared[7],
        v_reset = p_.shared[8];
    const auto &r_tau_ = p_.shared_divisor[0], &r_tau_w_ = p_.shared_divisor[1];
    const real theta = v_threshold;
    const real h = fma_(divide_(x + a0 * (v - v_rest) * (v - v_c) - w, r_tau_), r_tau_.scale, v);
    const real s = (h >= theta ? real(1) : real(0));
    const real new_v_ = h * (real(1) - s) + v_reset * s;
    const real new_w_ = fma_(divide_(a * (h - v_rest) - w, r_tau_w_), r_tau_w_.scale, w) + b * s;
    z_[0][l_] = new_v_;
    z_[1][l_] = new_w_;
  }
  // Its adjoint, the last statement first: from the gradients of the states after the step to those before it.
  static INLINE_ void step_back(const Params<Kernel>& p_, const Sequences& in_, const State& z_, Gradients& d_,
                                const Some& some_, Out& out_, const int l_) {
    const real x = in_[0][l_], v = z_[0][l_], w = z_[1][l_], v_c = p_.shared[2], a0 = p_.shared[3],
        v_rest = p_.shared[4], a = p_.shared[5], b = p_.shared[6], v_threshold = p_.shared[7],
        v_reset = p_.shared[8], sg_alpha_ = p_.surrogate[0];
    const auto &r_tau_ = p_.shared_divisor[0], &r_tau_w_ = p_.shared_divisor[1];
    const bool some_v_ = some_[0], some_w_ = some_[1];
    const real theta = v_threshold;
    const real h = fma_(divide_(x + a0 * (v - v_rest) * (v - v_c) - w, r_tau_), r_tau_.scale, v);
    const real s = (h >= theta ? real(1) : real(0));
    const real after_v_ = d_.z[0][l_];
    const real after_w_ = d_.z[1][l_];
    const real given_s_ = in_[1][l_];
    const real d_s_ = given_s_ + only_if_(some_w_, after_w_ * b) + only_if_(some_v_, after_v_ * (-h + v_reset));
    const real fired_s_ = d_s_ * slope_(h - theta, sg_alpha_);
    const real d_h_ = only_if_(some_w_, after_w_ * (a * r_tau_w_.r * r_tau_w_.scale)) + after_v_ * (real(1) - s) +
        fired_s_;
    d_.z[0][l_] = d_h_ * (real(1) + ((v - v_c) * a0 + a0 * (v - v_rest)) * r_tau_.r * r_tau_.scale);
    d_.z[1][l_] = only_if_(some_w_, after_w_ * (real(1) - r_tau_w_.inverse)) - d_h_ * r_tau_.r * r_tau_.scale;
    out_[0][l_] = d_h_ * r_tau_.r * r_tau_.scale;
  }
  static INLINE_ void pass(Some& some_) { some_[0] = true; some_[1] = true; }
};
extern "C" __global__ void __launch_bounds__(128)
izhikevich_backward_float64_hard_ATan_seq_s_k4_l1_r4(const Kernel::Args a) { run<Kernel>(a); }
}  // namespace
