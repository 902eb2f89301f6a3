// own reset backward float32 own ATan seq s k4 l64 r1
//     i = i * alpha + x
//     h = v * beta + i
//     a = a * rho + s
//     v = h - s * ( theta + sigmoid ( a ) )
//     it fires: theta = v_threshold; s = h >= theta
namespace own_reset_backward_float32_own_ATan_seq_s_k4_l64_r1_ns {
struct Sizes {
  using real = float;  // arithmetic, states and parameters
  using storage = float;  // sequences: x, s and their gradients
  static constexpr bool FORWARD = false, AHEAD = false, WHOLE = false, BY_CHANNEL = false;
  static constexpr int LANES = 64, K = 4, LOADS = 1, INPUTS = 1, PER_STEP = 0, SEQUENCES = 2, OUTPUTS = 1, STATES = 3,
      SHARED = 5, SHARED_DIVISORS = 0, EACH = 0, EACH_DIVISORS = 0, SURROGATE = 1, EACH_LEARNED = 0, SUMS = 0;
};
struct Kernel : Arrays<Sizes> {
  struct Args {
    const storage* in[2];  // x, s
    storage* out[1];  // x
    const real* last_grad[3];  // v, i, a
    real* start_grad[3];  // v, i, a
    const real* checkpoints;
    const real* start[3];  // v, i, a
    const real* shared[5];  // alpha, beta, rho, v_threshold, v_reset
    long long N;
    real start_value[3];  // v, i, a
    real shared_value[5];  // alpha, beta, rho, v_threshold, v_reset
    real surrogate[1];  // alpha
    int T;
  };
  // ATan: ds/du at u = h - theta
  static CALLED_ real slope_(const real u, const real alpha) {
    return ratio_(real(0.5) * alpha, real(1) + pow2_(real(0.5) * real(3.141592653589793) * alpha * u));
  }
  // One step of one neuron: charge, fire, reset.
  static INLINE_ void step(const Params<Kernel>& p_, const In& in_, State& z_, Out& out_, const int l_) {
    const real x = in_[0][l_], v = z_[0][l_], i = z_[1][l_], a = z_[2][l_], alpha = p_.shared[0],
        beta = p_.shared[1], rho = p_.shared[2], v_threshold = p_.shared[3];
    const real theta = v_threshold;
    const real new_i_ = i * alpha + x;
    const real h = v * beta + new_i_;
    const real s = (h >= theta ? real(1) : real(0));
    const real new_a_ = a * rho + s;
    const real new_v_ = h - s * (theta + sigmoid_(new_a_));
    z_[0][l_] = new_v_;
    z_[1][l_] = new_i_;
    z_[2][l_] = new_a_;
  }
  // Its adjoint, the last statement first: from the gradients of the states after the step to those before it.
  static INLINE_ void step_back(const Params<Kernel>& p_, const Sequences& in_, const State& z_, Gradients& d_,
                                const Some& some_, Out& out_, const int l_) {
    const real x = in_[0][l_], v = z_[0][l_], i = z_[1][l_], a = z_[2][l_], alpha = p_.shared[0],
        beta = p_.shared[1], rho = p_.shared[2], v_threshold = p_.shared[3], sg_alpha_ = p_.surrogate[0];
    const bool some_v_ = some_[0], some_a_ = some_[2];
    const real theta = v_threshold;
    const real new_i_ = i * alpha + x;
    const real h = v * beta + new_i_;
    const real s = (h >= theta ? real(1) : real(0));
    const real new_a_ = a * rho + s;
    const real after_v_ = d_.z[0][l_];
    const real after_i_ = d_.z[1][l_];
    const real after_a_ = d_.z[2][l_];
    const real given_s_ = in_[1][l_];
    const real dnew_a_ = after_a_ + only_if_(some_v_, -(after_v_ * (s * (sigmoid_(new_a_) * (real(1) -
        sigmoid_(new_a_))))));
    const real d_s_ = given_s_ + only_if_(some_v_, -(after_v_ * (theta + sigmoid_(new_a_)))) + dnew_a_;
    const real fired_s_ = d_s_ * slope_(h - theta, sg_alpha_);
    const real d_h_ = after_v_ + fired_s_;
    const real dnew_i_ = after_i_ + d_h_;
    d_.z[0][l_] = d_h_ * beta;
    d_.z[1][l_] = dnew_i_ * alpha;
    d_.z[2][l_] = only_if_(some_v_ || some_a_, dnew_a_ * rho);
    out_[0][l_] = dnew_i_;
  }
  static INLINE_ void pass(Some& some_) { const bool before_a_ = some_[0] || some_[2]; some_[0] = true; some_[1] = true;
      some_[2] = before_a_; }
};
extern "C" void
own_reset_backward_float32_own_ATan_seq_s_k4_l64_r1(const Kernel::Args* a, int threads) { run<Kernel>(*a, threads); }
}  // namespace
