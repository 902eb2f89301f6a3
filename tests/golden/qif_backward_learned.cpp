// qif backward float32 soft Erf learn v c a0 seq s k16 l64 r1
//     h = v + ( x + a0 * ( v - v_rest ) * ( v - v_c ) ) / tau
//     it fires: theta = v_threshold; s = h >= theta
//     reset (soft): v = h - s * theta
namespace qif_backward_float32_soft_Erf_learn_v_c_a0_seq_s_k16_l64_r1_ns {
struct Sizes {
  using real = float;  // arithmetic, states and parameters
  using storage = float;  // sequences: x, s and their gradients
  static constexpr bool FORWARD = false, AHEAD = false, WHOLE = false, BY_CHANNEL = false;
  static constexpr int LANES = 64, K = 16, LOADS = 1, INPUTS = 1, PER_STEP = 0, SEQUENCES = 2, OUTPUTS = 1, STATES = 1,
      SHARED = 6, SHARED_DIVISORS = 0, EACH = 0, EACH_DIVISORS = 0, SURROGATE = 1, EACH_LEARNED = 0, SUMS = 2;
};
struct Kernel : Arrays<Sizes> {
  struct Args {
    const storage* in[2];  // x, s
    storage* out[1];  // x
    const real* last_grad[1];  // v
    real* start_grad[1];  // v
    const real* checkpoints;
    real* partials;
    const real* start[1];  // v
    const real* shared[6];  // tau, v_c, a0, v_rest, v_reset, v_threshold
    long long N;
    real start_value[1];  // v
    real shared_value[6];  // tau, v_c, a0, v_rest, v_reset, v_threshold
    real surrogate[1];  // alpha
    int T;
  };
  // Erf: ds/du at u = h - theta
  static CALLED_ real slope_(const real u, const real alpha) {
    return ratio_(alpha, sqrt_(real(3.141592653589793))) * exp_(-pow2_(alpha * u));
  }
  // One step of one neuron: charge, fire, reset.
  static INLINE_ void step(const Params<Kernel>& p_, const In& in_, State& z_, Out& out_, const int l_) {
    const real x = in_[0][l_], v = z_[0][l_], tau = p_.shared[0], v_c = p_.shared[1], a0 = p_.shared[2],
        v_rest = p_.shared[3], v_threshold = p_.shared[5];
    const real theta = v_threshold;
    const real h = v + (x + a0 * (v - v_rest) * (v - v_c)) / tau;
    const real s = (h >= theta ? real(1) : real(0));
    const real new_v_ = h - s * theta;
    z_[0][l_] = new_v_;
  }
  // Its adjoint, the last statement first: from the gradients of the states after the step to those before it.
  static INLINE_ void step_back(const Params<Kernel>& p_, const Sequences& in_, const State& z_, Gradients& d_,
                                const Some& some_, Out& out_, const int l_) {
    const real x = in_[0][l_], v = z_[0][l_], tau = p_.shared[0], v_c = p_.shared[1], a0 = p_.shared[2],
        v_rest = p_.shared[3], v_threshold = p_.shared[5], sg_alpha_ = p_.surrogate[0];
    const bool some_v_ = some_[0];
    const real theta = v_threshold;
    const real h = v + (x + a0 * (v - v_rest) * (v - v_c)) / tau;
    const real after_v_ = d_.z[0][l_];
    const real given_s_ = in_[1][l_];
    const real d_s_ = given_s_ + only_if_(some_v_, -(after_v_ * theta));
    const real fired_s_ = d_s_ * slope_(h - theta, sg_alpha_);
    const real d_h_ = after_v_ + fired_s_;
    d_.z[0][l_] = d_h_ * (real(1) + ratio_((v - v_c) * a0 + a0 * (v - v_rest), tau));
    out_[0][l_] = ratio_(d_h_, tau);
    d_.learned[0][l_] += -(d_h_ * ratio_(a0 * (v - v_rest), tau));
    d_.learned[1][l_] += d_h_ * ratio_((v - v_c) * (v - v_rest), tau);
  }
  static INLINE_ void pass(Some& some_) { some_[0] = true; }
};
extern "C" void
qif_backward_float32_soft_Erf_learn_v_c_a0_seq_s_k16_l64_r1(const Kernel::Args* a, int threads) { run<Kernel>(*a,
    threads); }
}  // namespace
