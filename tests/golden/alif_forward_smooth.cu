// alif forward float32 hard ATan smooth k4 l1 r4
//     h = v * beta + x
//     theta = v_threshold + beta_a * a
//     a = a * rho + s
//     it fires: s = h >= theta
//     reset (hard): v = h * (1 - s) + v_reset * s
namespace alif_forward_float32_hard_ATan_smooth_k4_l1_r4_ns {
struct Sizes {
  using real = float;  // arithmetic, states and parameters
  using storage = float;  // sequences: x, s and their gradients
  static constexpr bool FORWARD = true, AHEAD = false, WHOLE = false, BY_CHANNEL = false;
  static constexpr int LANES = 1, K = 4, LOADS = 4, INPUTS = 1, PER_STEP = 0, SEQUENCES = 1, OUTPUTS = 1, STATES = 2,
      SHARED = 5, SHARED_DIVISORS = 0, EACH = 0, EACH_DIVISORS = 0, SURROGATE = 1, EACH_LEARNED = 0, SUMS = 0;
};
struct Kernel : Arrays<Sizes> {
  struct Args {
    const storage* in[1];  // x
    storage* out[1];  // s
    real* last[2];  // v, a
    real* checkpoints;
    const real* start[2];  // v, a
    const real* shared[5];  // beta, beta_a, rho, v_threshold, v_reset
    long long N;
    real start_value[2];  // v, a
    real shared_value[5];  // beta, beta_a, rho, v_threshold, v_reset
    real surrogate[1];  // alpha
    int T;
  };
  // ATan: the smooth spike at u = h - theta
  static CALLED_ real smooth_spike_(const real u, const real alpha) {
    return atan_(real(0.5) * real(3.141592653589793) * alpha * u) / real(3.141592653589793) + real(0.5);
  }
  // One step of one neuron: charge, fire, reset.
  static INLINE_ void step(const Params<Kernel>& p_, const In& in_, State& z_, Out& out_, const int l_) {
    const real x = in_[0][l_], v = z_[0][l_], a = z_[1][l_], beta = p_.shared[0], beta_a = p_.shared[1],
        rho = p_.shared[2], v_threshold = p_.shared[3], v_reset = p_.shared[4], sg_alpha_ = p_.surrogate[0];
    const real h = v * beta + x;
    const real theta = v_threshold + beta_a * a;
    const real s = smooth_spike_(h - theta, sg_alpha_);
    const real new_v_ = h * (real(1) - s) + v_reset * s;
    const real new_a_ = a * rho + s;
    z_[0][l_] = new_v_;
    z_[1][l_] = new_a_;
    out_[0][l_] = s;
  }
};
extern "C" __global__ void __launch_bounds__(128)
alif_forward_float32_hard_ATan_smooth_k4_l1_r4(const Kernel::Args a) { run<Kernel>(a); }
}  // namespace
