// The hot path of a plan: allocate, pack the argument, launch, and leave a node for autograd.
//
// front_end.py describes plans and their loaded kernels to it. Whatever is not plain (a kernel that
// is not loaded yet, a gradient in another layout, create_graph, ...) is left to plan.py.

#include <dlfcn.h>

#include <array>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/ExpandUtils.h>
#include <ATen/Parallel.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/custom_class.h>

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Sizes = std::vector<int64_t>;

// --- CUDA, as CuPy and torch have loaded it ------------------------------------------------------

struct Cuda {
  int (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*,
                void**, void**) = nullptr;
  int (*get_context)(void**) = nullptr;
  int (*set_context)(void*) = nullptr;
  int (*get_stream)(int32_t, void**) = nullptr;

  static const Cuda& get() {
    static const Cuda cuda;
    return cuda;
  }

 private:
  Cuda() {
    const char* driver = "libcuda.so.1";
    find(driver, "cuLaunchKernel", launch);
    find(driver, "cuCtxGetCurrent", get_context);
    find(driver, "cuCtxSetCurrent", set_context);
    // torch's C interface, the same in all versions; Stream::native_handle came after 2.6
    find("libtorch_cuda.so", "aoti_torch_get_current_cuda_stream", get_stream);
  }

  template <typename Function>
  static void find(const char* name, const char* symbol, Function& function) {
    void* library = dlopen(name, RTLD_NOW);
    TORCH_CHECK(library, name, " cannot be loaded: ", dlerror());
    function = reinterpret_cast<Function>(dlsym(library, symbol));
    TORCH_CHECK(function, name, " has no ", symbol);
  }
};

// --- what Python has said ------------------------------------------------------------------------

// Where a member of an argument lies.
enum Kind : int64_t { NOWHERE, X, GIVEN, OUT, CHECKPOINTS, GRAD, RESULT, PARTIAL, KINDS };
using Places = std::array<std::vector<void*>, KINDS>;  // by kind: where each of them lies

struct Source {
  int64_t kind, index;
};

// What becomes of one gradient: made where it is wanted, or a row of partial sums.
struct Result {
  bool wanted, like_x;
  int64_t part, row;  // part < 0: it is none of sums
};

struct Launch {
  void* function;
  void* context;  // of CUDA
  std::vector<Source> sources;
  std::string tail;  // the rest of the argument, always the same
  unsigned blocks, threads;
  bool parallel;              // on the CPU
  std::vector<Sizes> parts;   // sizes of partial sums
  std::vector<Result> results;

  void run(const Places& places, const c10::Device& device) const;
};

// A tensor among those of a call: as kernels read it, and how a parameter repeats.
struct Given {
  Sizes shape, strides;  // no strides: any
  at::ScalarType dtype;
  bool per_step;
  Sizes padded, order, back;  // none: it does not repeat
  bool in_order;              // its numbers are in memory as in its shape
};

constexpr uint64_t FORWARD = ~uint64_t(0);

// Which of a call's tensors a backward in two passes is about (normed.py): the first pass gives the
// gradients of weight and bias, from which the second has its sums.
struct Twice {
  int64_t weight, bias, sum, scaled, after;  // after < 0: the output gets no residual
};

struct Plan : torch::CustomClassHolder {
  c10::Device device{c10::kCPU};
  at::ScalarType dtype, real;
  Sizes sequence, sequence_strides, step, step_strides;
  int64_t finals, records, checkpoints;  // checkpoints < 0: none
  std::vector<Given> given;
  std::optional<Twice> twice;
  // By what arrives and is wanted (FORWARD: nothing does), and whether addresses are aligned. A
  // kernel that is loaded stays, and is added while others run.
  std::map<std::pair<uint64_t, bool>, Launch> launches;
  mutable std::mutex adding;

  const Launch* find(uint64_t asked, bool aligned) const {
    std::lock_guard<std::mutex> lock(adding);
    auto found = launches.find({asked, aligned});
    return found == launches.end() ? nullptr : &found->second;
  }
  const Launch* any(uint64_t asked) const {
    const Launch* launch = find(asked, true);
    return launch ? launch : find(asked, false);
  }
  at::TensorOptions options() const { return at::TensorOptions().dtype(real).device(device); }
  Tensor empty_state() const { return at::empty_strided(step, step_strides, options()); }
};

PyObject* in_python = nullptr;  // plan.gradients
PyObject* gone = nullptr;       // plan.is_gone
bool forked = false;            // GNU OpenMP's threads do not survive a fork

// --- running -------------------------------------------------------------------------------------

void Launch::run(const Places& places, const c10::Device& device) const {
  std::vector<char> packed(sources.size() * sizeof(void*) + tail.size());
  char* end = packed.data();
  for (const Source& source : sources) {
    std::memcpy(end, &places[source.kind][source.index], sizeof(void*));
    end += sizeof(void*);
  }
  std::memcpy(end, tail.data(), tail.size());
  if (device.is_cpu()) {
    int count = parallel && !forked ? at::get_num_threads() : 1;
    reinterpret_cast<void (*)(const char*, int)>(function)(packed.data(), count);
    return;
  }
  c10::DeviceGuard here(device);  // and back to the device that was current, whatever comes
  const Cuda& cuda = Cuda::get();
  void *current = nullptr, *stream = nullptr;
  cuda.get_context(&current);
  if (current != context) cuda.set_context(context);  // autograd's threads start with none
  int error = cuda.get_stream(device.index(), &stream);
  TORCH_CHECK(!error, "torch has no current stream on ", device);
  void* arguments[] = {packed.data()};
  error = cuda.launch(function, blocks, 1, 1, threads, 1, 1, 0, stream, arguments, nullptr);
  TORCH_CHECK(!error, "cuLaunchKernel failed with CUDA error ", error);
}

bool is_plain(const Tensor& t) {
  static const c10::DispatchKeySet others(
      {c10::DispatchKey::Python, c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched,
       c10::DispatchKey::ZeroTensor, c10::DispatchKey::Negative, c10::DispatchKey::Conjugate,
       c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::Functionalize});
  return t.layout() == at::kStrided && !t.key_set().has_any(others);
}

bool is_as(const Tensor& t, at::IntArrayRef shape, at::IntArrayRef strides, at::ScalarType dtype,
           const c10::Device& device) {
  return is_plain(t) && t.scalar_type() == dtype && t.device() == device && t.sizes() == shape &&
         (strides.empty() || t.strides() == strides);
}

// The tensor whose numbers lie as a kernel counts them (layout.Repeat.elements).
Tensor elements(const Given& how, const Tensor& t) {
  if (how.padded.empty() || (how.in_order && t.is_contiguous())) return t;
  return t.detach().reshape(how.padded).permute(how.order).contiguous();
}

// All tensors of a call, and where they lie; `aligned` tells which kernel serves.
struct Addresses {
  bool complete = true;  // false: one has no memory
  uintptr_t bits = 0;

  void* of(const Tensor& t) {
    if (!t.defined()) return nullptr;
    void* at = t.data_ptr();
    complete &= at != nullptr;
    bits |= reinterpret_cast<uintptr_t>(at);
    return at;
  }
  std::vector<void*> of(const std::vector<Tensor>& tensors) {
    std::vector<void*> at;
    at.reserve(tensors.size());
    for (const Tensor& t : tensors) at.push_back(of(t));
    return at;
  }
  bool aligned() const { return !(bits & 15); }
};

// What kernels read of the tensors; nothing where one has no memory.
bool readable(const Plan& plan, at::TensorList tensors, std::vector<Tensor>& own) {
  own.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!tensors[i].data_ptr()) return false;
    own.push_back(elements(plan.given[i], tensors[i]));
  }
  return true;
}

// Outputs and checkpoints of a call, or nothing where its kernel is not loaded.
bool run_forward(const Plan& plan, const Tensor& x, at::TensorList tensors, bool save,
                 variable_list& outputs, Tensor& checkpoints) {
  at::NoGradGuard no_grad;
  std::vector<Tensor> own;
  if (!plan.any(FORWARD) || !readable(plan, tensors, own)) return false;
  outputs.push_back(at::empty_like(x));
  for (int64_t i = 0; i < plan.finals; ++i) outputs.push_back(plan.empty_state());
  for (int64_t i = 0; i < plan.records; ++i) outputs.push_back(at::empty_like(x));
  if (save && plan.checkpoints >= 0)
    checkpoints = at::empty({plan.checkpoints}, plan.options());
  Addresses addresses;
  Places places{{{nullptr}, {addresses.of(x)}, addresses.of(own), addresses.of(outputs),
                 {addresses.of(checkpoints)}}};
  const Launch* launch = plan.find(FORWARD, addresses.aligned());
  if (!addresses.complete || !launch) return false;
  launch->run(places, plan.device);
  return true;
}

// Gradients of x and of each tensor; nothing where the call is not plain.
bool run_pass(const Plan& plan, const Tensor& x, const Tensor& checkpoints,
              const std::vector<Tensor>& tensors, const variable_list& grads,
              const std::vector<bool>& wanted, variable_list& gradients) {
  if (!is_as(x, plan.sequence, plan.sequence_strides, plan.dtype, plan.device)) return false;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Given& how = plan.given[i];
    if (!is_as(tensors[i], how.shape, how.strides, how.dtype, plan.device)) return false;
  }
  if (plan.checkpoints >= 0 && !is_as(checkpoints, {plan.checkpoints}, {1}, plan.real, plan.device))
    return false;
  uint64_t asked = 0;
  for (size_t i = 0; i < grads.size(); ++i) {
    if (!grads[i].defined()) continue;
    bool is_state = i > 0 && static_cast<int64_t>(i) <= plan.finals;
    if (is_state ? !is_as(grads[i], plan.step, plan.step_strides, plan.real, plan.device)
                 : !is_as(grads[i], plan.sequence, plan.sequence_strides, plan.dtype, plan.device))
      return false;
    asked |= uint64_t(1) << i;
  }
  for (size_t i = 0; i < wanted.size(); ++i) asked |= uint64_t(wanted[i]) << (32 + i);
  const Launch* launch = plan.any(asked);
  std::vector<Tensor> given;
  if (!launch || !readable(plan, tensors, given)) return false;

  std::vector<Tensor> own(wanted.size());
  for (size_t i = 0; i < wanted.size(); ++i) {
    const Result& result = launch->results[i];
    if (result.wanted && result.part < 0)
      own[i] = result.like_x ? at::empty_like(x) : plan.empty_state();
  }
  Addresses addresses;
  Places places{{{nullptr}, {addresses.of(x)}, addresses.of(given), {},
                 {addresses.of(checkpoints)}, addresses.of(grads), addresses.of(own)}};
  launch = plan.find(asked, addresses.aligned());
  if (!addresses.complete || !launch) return false;
  std::vector<Tensor> parts;
  for (const Sizes& sizes : launch->parts) {
    parts.push_back(at::empty(sizes, plan.options()));
    places[PARTIAL].push_back(parts.back().data_ptr());
  }
  launch->run(places, plan.device);

  for (Tensor& part : parts) part = part.sum(2);
  gradients = std::move(own);
  for (size_t i = 1; i < wanted.size(); ++i) {
    const Result& result = launch->results[i];
    if (!result.wanted) continue;
    const Given& how = plan.given[i - 1];
    Tensor& gradient = gradients[i];
    if (result.part >= 0) {
      gradient = parts[result.part].select(0, result.row);
      if (!how.padded.empty() && !how.in_order) {
        Sizes ordered;
        for (int64_t d : how.order) ordered.push_back(how.padded[d]);
        gradient = gradient.reshape(ordered).permute(how.back);
      }
      gradient = gradient.reshape(how.shape);
    } else if (how.per_step) {
      Sizes neurons;
      for (int64_t d = 1; d < x.dim(); ++d) neurons.push_back(d);
      gradient = gradient.sum(neurons, true, plan.real);
    } else {
      gradient = at::sum_to(std::move(gradient), how.shape);
    }
  }
  return true;
}

// The same, in the two passes of a plan that has them.
bool run_backward(const Plan& plan, const Tensor& x, const Tensor& checkpoints,
                  const std::vector<Tensor>& tensors, const variable_list& grads,
                  const std::vector<bool>& wanted, variable_list& gradients) {
  if (!plan.twice) return run_pass(plan, x, checkpoints, tensors, grads, wanted, gradients);
  const auto& [weight, bias, sum, scaled, after] = *plan.twice;
  std::vector<bool> first = wanted, only_x(wanted.size());
  only_x[0] = wanted[0], first[0] = false;
  first[1 + weight] = first[1 + weight] || wanted[0];
  first[1 + bias] = first[1 + bias] || wanted[0];
  if (after >= 0) first[1 + after] = false;  // what arrives at the output, as it is
  variable_list found(wanted.size()), of_x(wanted.size());
  if (!run_pass(plan, x, checkpoints, tensors, grads, first, found)) return false;
  if (wanted[0]) {
    std::vector<Tensor> summed = tensors;
    summed[sum] = found[1 + bias], summed[scaled] = found[1 + weight];
    if (!run_pass(plan, x, checkpoints, summed, grads, only_x, of_x)) return false;
    found[0] = of_x[0];
  }
  if (after >= 0) found[1 + after] = grads[0];
  for (size_t i = 0; i < wanted.size(); ++i)
    if (wanted[i]) gradients[i] = found[i];
  return true;
}

// --- autograd ------------------------------------------------------------------------------------

// What a node keeps besides tensors.
struct Kept : torch::CustomClassHolder {
  c10::intrusive_ptr<Plan> plan;
  PyObject* owner;      // the KernelPlan
  std::string carried;  // the layer that passed its state on, if one did

  Kept(c10::intrusive_ptr<Plan> plan, PyObject* owner) : plan(std::move(plan)), owner(owner) {
    Py_INCREF(owner);
  }
  ~Kept() override {
    if (!Py_IsInitialized()) return;
    pybind11::gil_scoped_acquire gil;
    Py_DECREF(owner);
  }
};

struct Ran {
  c10::intrusive_ptr<Kept> kept;
  variable_list outputs;
  Tensor checkpoints;
};

struct Multistep : torch::autograd::Function<Multistep> {
  static variable_list forward(AutogradContext* ctx, Ran* ran, const Tensor& x,
                               at::TensorList tensors) {
    ctx->set_materialize_grads(false);
    variable_list saved{x, ran->checkpoints};
    saved.insert(saved.end(), tensors.begin(), tensors.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["kept"] = c10::IValue::make_capsule(ran->kept);
    return std::move(ran->outputs);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    auto kept = c10::static_intrusive_pointer_cast<Kept>(ctx->saved_data["kept"].toCapsule());
    const Plan& plan = *kept->plan;
    variable_list saved;
    try {
      saved = ctx->get_saved_variables();
    } catch (const c10::Error& error) {  // freed by an earlier backward, or changed
      explain(*kept, grads, error.what_without_backtrace());
      throw;
    }
    std::vector<bool> wanted;
    for (size_t i = 0; i <= plan.given.size(); ++i) wanted.push_back(ctx->needs_input_grad(i));
    variable_list gradients(wanted.size());
    bool arrived = false;
    for (const Tensor& grad : grads) arrived |= grad.defined();
    if (arrived) {
      variable_list tensors(saved.begin() + 2, saved.end());
      if (at::GradMode::is_enabled() ||
          !run_backward(plan, saved[0], saved[1], tensors, grads, wanted, gradients))
        gradients = by_python(*kept, saved[0], saved[1], tensors, grads, wanted);
    }
    gradients.insert(gradients.begin(), Tensor());  // of `ran`
    return gradients;
  }

 private:
  static pybind11::object or_none(const Tensor& t) {
    return t.defined() ? pybind11::cast(t) : pybind11::none();
  }

  static pybind11::tuple all(const variable_list& tensors) {
    pybind11::tuple items(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) items[i] = or_none(tensors[i]);
    return items;
  }

  static variable_list by_python(const Kept& kept, const Tensor& x, const Tensor& checkpoints,
                                 const variable_list& tensors, const variable_list& grads,
                                 const std::vector<bool>& wanted) {
    pybind11::gil_scoped_acquire gil;
    pybind11::tuple want(wanted.size());
    for (size_t i = 0; i < wanted.size(); ++i) want[i] = pybind11::bool_(wanted[i]);
    pybind11::handle ask = in_python, owner = kept.owner;
    pybind11::object found =
        ask(owner, x, or_none(checkpoints), all(tensors), all(grads), want);
    variable_list gradients;
    for (pybind11::handle each : found)
      gradients.push_back(each.is_none() ? Tensor() : pybind11::cast<Tensor>(each));
    return gradients;
  }

  static void explain(const Kept& kept, const variable_list& grads, const char* said) {
    if (kept.carried.empty()) return;
    pybind11::gil_scoped_acquire gil;
    pybind11::handle ask = gone, owner = kept.owner;
    ask(owner, kept.carried, all(grads), said);
  }
};

// --- what Python calls ---------------------------------------------------------------------------

// (owner, x, tensors) -> the outputs; None where the plan is to run in Python.
PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  auto* plan = static_cast<Plan*>(PyCapsule_GetPointer(self, nullptr));
  if (!plan) return nullptr;
  Tensor x = THPVariable_Unpack(args[1]);
  bool save = x.requires_grad();
  std::vector<Tensor> tensors;
  Py_ssize_t size = PySequence_Fast_GET_SIZE(args[2]);
  for (Py_ssize_t i = 0; i < size; ++i) {
    tensors.push_back(THPVariable_Unpack(PySequence_Fast_GET_ITEM(args[2], i)));
    save |= tensors.back().requires_grad();
  }
  save &= at::GradMode::is_enabled();
  Ran ran;
  bool done;
  {
    pybind11::gil_scoped_release no_gil;
    done = run_forward(*plan, x, tensors, save, ran.outputs, ran.checkpoints);
  }
  if (!done) Py_RETURN_NONE;
  variable_list outputs;
  if (save) {
    auto own = c10::intrusive_ptr<Plan>::reclaim_copy(plan);
    ran.kept = c10::make_intrusive<Kept>(std::move(own), args[0]);
    outputs = Multistep::apply(&ran, x, at::TensorList(tensors));
  } else {
    outputs = std::move(ran.outputs);
  }
  PyObject* list = PyList_New(outputs.size());
  for (size_t i = 0; i < outputs.size(); ++i)
    PyList_SET_ITEM(list, i, THPVariable_Wrap(outputs[i]));
  return list;
  END_HANDLE_TH_ERRORS
}

PyMethodDef call_definition = {"call", reinterpret_cast<PyCFunction>(call), METH_FASTCALL, nullptr};

at::ScalarType as_dtype(pybind11::handle dtype) {
  TORCH_CHECK(THPDtype_Check(dtype.ptr()), "a dtype is expected");
  return reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type;
}

using Described = std::tuple<Sizes, Sizes, pybind11::object, bool, Sizes, Sizes, Sizes, bool>;

// The callable of a plan; its kernels are added later.
pybind11::object make_plan(int device, pybind11::object dtype, pybind11::object real,
                           Sizes sequence, Sizes sequence_strides, Sizes step, Sizes step_strides,
                           int64_t finals, int64_t records, int64_t checkpoints,
                           std::vector<Described> given) {
  auto plan = c10::make_intrusive<Plan>();
  if (device >= 0) plan->device = c10::Device(c10::kCUDA, device);
  plan->dtype = as_dtype(dtype), plan->real = as_dtype(real);
  plan->sequence = sequence, plan->sequence_strides = sequence_strides;
  plan->step = step, plan->step_strides = step_strides;
  plan->finals = finals, plan->records = records, plan->checkpoints = checkpoints;
  for (auto& [shape, strides, its, per_step, padded, order, back, in_order] : given)
    plan->given.push_back({shape, strides, as_dtype(its), per_step, padded, order, back, in_order});
  PyObject* capsule = PyCapsule_New(plan.release(), nullptr, [](PyObject* self) {
    c10::intrusive_ptr<Plan>::reclaim(static_cast<Plan*>(PyCapsule_GetPointer(self, nullptr)));
  });
  PyObject* callable = PyCFunction_NewEx(&call_definition, capsule, nullptr);
  Py_DECREF(capsule);
  return pybind11::reinterpret_steal<pybind11::object>(callable);
}

Plan& plan_of(pybind11::handle capsule) {
  auto* plan = static_cast<Plan*>(PyCapsule_GetPointer(capsule.ptr(), nullptr));
  TORCH_CHECK(plan, "no plan");
  return *plan;
}

// A kernel that was loaded.
void add_kernel(pybind11::object capsule, uint64_t asked, bool aligned, uintptr_t function,
                std::vector<std::pair<int64_t, int64_t>> sources, std::string tail,
                unsigned blocks, unsigned threads, bool parallel, std::vector<Sizes> parts,
                std::vector<std::tuple<bool, bool, int64_t, int64_t>> results) {
  Plan* plan = &plan_of(capsule);
  Launch launch{reinterpret_cast<void*>(function), nullptr, {}, tail, blocks, threads,
                parallel, parts, {}};
  for (auto& [kind, index] : sources) launch.sources.push_back({kind, index});
  for (auto& [wanted, like_x, part, row] : results)
    launch.results.push_back({wanted, like_x, part, row});
  if (plan->device.is_cuda()) {
    c10::DeviceGuard guard(plan->device);
    Cuda::get().get_context(&launch.context);
  }
  std::lock_guard<std::mutex> lock(plan->adding);
  plan->launches.emplace(std::make_pair(asked, aligned), std::move(launch));
}

// One pass of backward, without autograd; None where it is to run in Python.
pybind11::object backward(pybind11::object capsule, Tensor x, std::optional<Tensor> checkpoints,
                          std::vector<Tensor> tensors, std::vector<std::optional<Tensor>> grads,
                          std::vector<bool> wanted) {
  const Plan& plan = plan_of(capsule);
  variable_list arrived, gradients(wanted.size());
  for (auto& grad : grads) arrived.push_back(grad.value_or(Tensor()));
  at::NoGradGuard no_grad;
  bool done;
  {
    pybind11::gil_scoped_release no_gil;
    Tensor kept = checkpoints.value_or(Tensor());
    done = run_pass(plan, x, kept, tensors, arrived, wanted, gradients);
  }
  if (!done) return pybind11::none();
  pybind11::list found;
  for (const Tensor& g : gradients)
    found.append(g.defined() ? pybind11::cast(g) : pybind11::object(pybind11::none()));
  return found;
}

// Let the call that made this state know which layer passes it on.
void note_carried(const Tensor& state, std::string layer) {
  auto* node = dynamic_cast<torch::autograd::CppNode<Multistep>*>(state.grad_fn().get());
  if (!node) return;
  auto kept = node->ctx_.saved_data["kept"].toCapsule();
  c10::static_intrusive_pointer_cast<Kept>(kept)->carried = std::move(layer);
}

}  // namespace

// The functions that front_end.py uses, by name.
extern "C" __attribute__((visibility("default"))) PyObject* neuronjit_front_end(
    PyObject* by_python, PyObject* explain) {
  try {
    in_python = by_python, gone = explain;
    Py_INCREF(in_python), Py_INCREF(gone);
    pybind11::dict functions;
    pybind11::dict kinds;
    for (auto [name, kind] : {std::pair{"nowhere", NOWHERE}, {"x", X}, {"given", GIVEN},
                              {"out", OUT}, {"checkpoints", CHECKPOINTS}, {"grad", GRAD},
                              {"result", RESULT}, {"partial", PARTIAL}})
      kinds[name] = static_cast<int64_t>(kind);
    functions["kinds"] = kinds;
    functions["plan"] = pybind11::cpp_function(make_plan);
    functions["add"] = pybind11::cpp_function(add_kernel);
    functions["backward"] = pybind11::cpp_function(backward);
    functions["twice"] = pybind11::cpp_function(
        [](pybind11::object capsule, int64_t weight, int64_t bias, int64_t sum, int64_t scaled,
           int64_t after) { plan_of(capsule).twice = Twice{weight, bias, sum, scaled, after}; });
    functions["note_carried"] = pybind11::cpp_function(note_carried);
    functions["after_fork"] = pybind11::cpp_function([] { forked = true; });
    return functions.release().ptr();
  } catch (pybind11::error_already_set& error) {
    error.restore();
    return nullptr;
  }
}
