// lif forward float32 hard k4 l64 r1
//     h = v + ( x - ( v - v_reset ) ) / tau
//     it fires: theta = v_threshold; s = h >= theta
//     reset (hard): v = h * (1 - s) + v_reset * s
namespace lif_forward_float32_hard_k4_l64_r1_ns {
struct Sizes {
  using real = float;  // arithmetic, states and parameters
  using storage = float;  // sequences: x, s and their gradients
  static constexpr bool FORWARD = true, AHEAD = false, WHOLE = false, BY_CHANNEL = false;
  static constexpr int LANES = 64, K = 4, LOADS = 1, INPUTS = 1, PER_STEP = 0, SEQUENCES = 1, OUTPUTS = 1, STATES = 1,
      SHARED = 3, SHARED_DIVISORS = 0, EACH = 0, EACH_DIVISORS = 0, SURROGATE = 0, EACH_LEARNED = 0, SUMS = 0;
};
struct Kernel : Arrays<Sizes> {
  struct Args {
    const storage* in[1];  // x
    storage* out[1];  // s
    real* last[1];  // v
    real* checkpoints;
    const real* start[1];  // v
    const real* shared[3];  // tau, v_threshold, v_reset
    long long N;
    real start_value[1];  // v
    real shared_value[3];  // tau, v_threshold, v_reset
    int T;
  };
  // One step of one neuron: charge, fire, reset.
  static INLINE_ void step(const Params<Kernel>& p_, const In& in_, State& z_, Out& out_, const int l_) {
    const real x = in_[0][l_], v = z_[0][l_], tau = p_.shared[0], v_threshold = p_.shared[1],
        v_reset = p_.shared[2];
    const real theta = v_threshold;
    const real h = v + (x - (v - v_reset)) / tau;
    const real s = (h >= theta ? real(1) : real(0));
    const real new_v_ = h * (real(1) - s) + v_reset * s;
    z_[0][l_] = new_v_;
    out_[0][l_] = s;
  }
};
extern "C" void
lif_forward_float32_hard_k4_l64_r1(const Kernel::Args* a, int threads) { run<Kernel>(*a, threads); }
}  // namespace
