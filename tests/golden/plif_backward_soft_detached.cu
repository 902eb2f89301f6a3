// plif backward float32 soft detached Sigmoid learn reciprocal tau seq s k16 l1 r16 ahead
//     h = v + ( x - ( v - v_reset ) ) * reciprocal_tau
//     it fires: theta = v_threshold; s = h >= theta
//     reset (soft): v = h - s * theta
namespace plif_backward_float32_soft_detached_Sigmoid_learn_reciprocal_tau_seq_s_k16_l1_r16_ahead_ns {
struct Sizes {
  using real = float;  // arithmetic, states and parameters
  using storage = float;  // sequences: x, s and their gradients
  static constexpr bool FORWARD = false, AHEAD = true, WHOLE = false, BY_CHANNEL = false;
  static constexpr int LANES = 1, K = 16, LOADS = 16, INPUTS = 1, PER_STEP = 0, SEQUENCES = 2, OUTPUTS = 1, STATES = 1,
      SHARED = 3, SHARED_DIVISORS = 0, EACH = 0, EACH_DIVISORS = 0, SURROGATE = 1, EACH_LEARNED = 0, SUMS = 1;
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
    const real* shared[3];  // reciprocal_tau, v_threshold, v_reset
    long long N;
    real start_value[1];  // v
    real shared_value[3];  // reciprocal_tau, v_threshold, v_reset
    real surrogate[1];  // alpha
    int T;
  };
  // Sigmoid: ds/du at u = h - theta
  static CALLED_ real slope_(const real u, const real alpha) {
    return alpha * near_sigmoid_(alpha * u) * (real(1) - near_sigmoid_(alpha * u));
  }
  // One step of one neuron: charge, fire, reset.
  static INLINE_ void step(const Params<Kernel>& p_, const In& in_, State& z_, Out& out_, const int l_) {
    const real x = in_[0][l_], v = z_[0][l_], reciprocal_tau = p_.shared[0], v_threshold = p_.shared[1],
        v_reset = p_.shared[2];
    const real theta = v_threshold;
    const real h = v + (x - (v - v_reset)) * reciprocal_tau;
    const real s = (h >= theta ? real(1) : real(0));
    const real new_v_ = h - s * theta;
    z_[0][l_] = new_v_;
  }
  // Its adjoint, the last statement first: from the gradients of the states after the step to those before it.
  static INLINE_ void step_back(const Params<Kernel>& p_, const Sequences& in_, const State& z_, Gradients& d_,
                                const Some& some_, Out& out_, const int l_) {
    const real x = in_[0][l_], v = z_[0][l_], reciprocal_tau = p_.shared[0], v_threshold = p_.shared[1],
        v_reset = p_.shared[2], sg_alpha_ = p_.surrogate[0];
    const real theta = v_threshold;
    const real h = v + (x - (v - v_reset)) * reciprocal_tau;
    const real after_v_ = d_.z[0][l_];
    const real given_s_ = in_[1][l_];
    const real fired_s_ = given_s_ * slope_(h - theta, sg_alpha_);
    const real d_h_ = after_v_ + fired_s_;
    d_.z[0][l_] = d_h_ * (real(1) - reciprocal_tau);
    out_[0][l_] = d_h_ * reciprocal_tau;
    d_.learned[0][l_] += d_h_ * (x - (v - v_reset));
  }
  static INLINE_ void pass(Some& some_) { some_[0] = true; }
};
extern "C" __global__ void __launch_bounds__(128)
plif_backward_float32_soft_detached_Sigmoid_learn_reciprocal_tau_seq_s_k16_l1_r16_ahead(const Kernel::Args a) {
    run<Kernel>(a); }
}  // namespace
