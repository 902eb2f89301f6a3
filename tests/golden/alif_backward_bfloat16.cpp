// alif backward bfloat16 hard PiecewiseLeakyReLU seq s k4 l64 r1
//     h = v * beta + x
//     theta = v_threshold + beta_a * a
//     a = a * rho + s
//     it fires: s = h >= theta
//     reset (hard): v = h * (1 - s) + v_reset * s
namespace alif_backward_bfloat16_hard_PiecewiseLeakyReLU_seq_s_k4_l64_r1_ns {
struct Sizes {
  using real = float;  // arithmetic, states and parameters
  using storage = bfloat16_t;  // sequences: x, s and their gradients
  static constexpr bool FORWARD = false, AHEAD = false, WHOLE = false, BY_CHANNEL = false;
  static constexpr int LANES = 64, K = 4, LOADS = 1, INPUTS = 1, PER_STEP = 0, SEQUENCES = 2, OUTPUTS = 1, STATES = 2,
      SHARED = 5, SHARED_DIVISORS = 0, EACH = 0, EACH_DIVISORS = 0, SURROGATE = 2, EACH_LEARNED = 0, SUMS = 0;
};
struct Kernel : Arrays<Sizes> {
  struct Args {
    const storage* in[2];  // x, s
    storage* out[1];  // x
    const real* last_grad[2];  // v, a
    real* start_grad[2];  // v, a
    const real* checkpoints;
    const real* start[2];  // v, a
    const real* shared[5];  // beta, beta_a, rho, v_threshold, v_reset
    long long N;
    real start_value[2];  // v, a
    real shared_value[5];  // beta, beta_a, rho, v_threshold, v_reset
    real surrogate[2];  // w, c
    int T;
  };
  // PiecewiseLeakyReLU: ds/du at u = h - theta
  static CALLED_ real slope_(const real u, const real w, const real c) {
    return (abs_(u) < w ? ratio_(real(0.5), w) : c);
  }
  // One step of one neuron: charge, fire, reset.
  static INLINE_ void step(const Params<Kernel>& p_, const In& in_, State& z_, Out& out_, const int l_) {
    const real x = in_[0][l_], v = z_[0][l_], a = z_[1][l_], beta = p_.shared[0], beta_a = p_.shared[1],
        rho = p_.shared[2], v_threshold = p_.shared[3], v_reset = p_.shared[4];
    const real h = v * beta + x;
    const real theta = v_threshold + beta_a * a;
    const real s = (h >= theta ? real(1) : real(0));
    const real new_v_ = h * (real(1) - s) + v_reset * s;
    const real new_a_ = a * rho + s;
    z_[0][l_] = new_v_;
    z_[1][l_] = new_a_;
  }
  // Its adjoint, the last statement first: from the gradients of the states after the step to those before it.
  static INLINE_ void step_back(const Params<Kernel>& p_, const Sequences& in_, const State& z_, Gradients& d_,
                                const Some& some_, Out& out_, const int l_) {
    const real x = in_[0][l_], v = z_[0][l_], a = z_[1][l_], beta = p_.shared[0], beta_a = p_.shared[1],
        rho = p_.shared[2], v_threshold = p_.shared[3], v_reset = p_.shared[4], sg_w_ = p_.surrogate[0],
        sg_c_ = p_.surrogate[1];
    const bool some_v_ = some_[0], some_a_ = some_[1];
    const real h = v * beta + x;
    const real theta = v_threshold + beta_a * a;
    const real s = (h >= theta ? real(1) : real(0));
    const real after_v_ = d_.z[0][l_];
    const real after_a_ = d_.z[1][l_];
    const real given_s_ = in_[1][l_];
    const real d_s_ = given_s_ + after_a_ + only_if_(some_v_, after_v_ * (-h + v_reset));
    const real fired_s_ = d_s_ * slope_(h - theta, sg_w_, sg_c_);
    const real d_theta_ = -fired_s_;
    const real d_h_ = after_v_ * (real(1) - s) + fired_s_;
    d_.z[0][l_] = d_h_ * beta;
    d_.z[1][l_] = only_if_(some_a_, after_a_ * rho) + d_theta_ * beta_a;
    out_[0][l_] = d_h_;
  }
  static INLINE_ void pass(Some& some_) { some_[0] = true; some_[1] = true; }
};
extern "C" void
alif_backward_bfloat16_hard_PiecewiseLeakyReLU_seq_s_k4_l64_r1(const Kernel::Args* a, int threads) { run<Kernel>(*a,
    threads); }
}  // namespace
