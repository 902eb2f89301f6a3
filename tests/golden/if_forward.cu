// if forward float32 hard k4 l1 r4
//     h = v + x
//     it fires: theta = v_threshold; s = h >= theta
//     reset (hard): v = h * (1 - s) + v_reset * s
namespace if_forward_float32_hard_k4_l1_r4_ns {
struct Sizes {
  using real = float;  // arithmetic, states and parameters
  using storage = float;  // sequences: x, s and their gradients
  static constexpr bool FORWARD = true, AHEAD = false, WHOLE = false, BY_CHANNEL = false;
  static constexpr int LANES = 1, K = 4, LOADS = 4, INPUTS = 1, PER_STEP = 0, SEQUENCES = 1, OUTPUTS = 1, STATES = 1,
      SHARED = 2, SHARED_DIVISORS = 0, EACH = 0, EACH_DIVISORS = 0, SURROGATE = 0, EACH_LEARNED = 0, SUMS = 0;
};
struct Kernel : Arrays<Sizes> {
  struct Args {
    const storage* in[1];  // x
    storage* out[1];  // s
    real* last[1];  // v
    real* checkpoints;
    const real* start[1];  // v
    const real* shared[2];  // v_threshold, v_reset
    long long N;
    real start_value[1];  // v
    real shared_value[2];  // v_threshold, v_reset
    int T;
  };
  // One step of one neuron: charge, fire, reset.
  static INLINE_ void step(const Params<Kernel>& p_, const In& in_, State& z_, Out& out_, const int l_) {
    const real x = in_[0][l_], v = z_[0][l_], v_threshold = p_.shared[0], v_reset = p_.shared[1];
    const real theta = v_threshold;
    const real h = v + x;
    const real s = (h >= theta ? real(1) : real(0));
    const real new_v_ = h * (real(1) - s) + v_reset * s;
    z_[0][l_] = new_v_;
    out_[0][l_] = s;
  }
};
extern "C" __global__ void __launch_bounds__(128)
if_forward_float32_hard_k4_l1_r4(const Kernel::Args a) { run<Kernel>(a); }
}  // namespace
