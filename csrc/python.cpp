// fused_rnn._C: what is not a tensor op. It tells how the package was built and what this
// processor offers, plans CUDA launches (plan.h), and calls the one kernel that is too short for
// the dispatcher (small_step.h); the ops are in libfused_rnn_cpu.so, which knows nothing of Python.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <map>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "plan_binding.h"
#include "small_step.h"

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "g++ " __VERSION__;
#endif

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const fused_rnn::Isa& isa : fused_rnn::kIsas) names.emplace_back(isa.name);
  return names;
}

std::map<std::string, bool> cpu_features() {
#if defined(__x86_64__)
#define FUSED_RNN_FEATURE(name)              \
  {                                          \
    name, bool(__builtin_cpu_supports(name)) \
  }
  return {FUSED_RNN_FEATURE("avx2"),     FUSED_RNN_FEATURE("fma"),
          FUSED_RNN_FEATURE("avx512f"),  FUSED_RNN_FEATURE("avx512bw"),
          FUSED_RNN_FEATURE("avx512dq"), FUSED_RNN_FEATURE("avx512vl")};
#else
  return {};
#endif
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = kCompiler;
  info["flags"] = FUSED_RNN_FLAGS;
  info["instruction_sets"] = instruction_sets();
  info["torch"] = TORCH_VERSION;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "How fused_rnn was built, and what this processor offers.";
  m.def("build_info", &build_info,
        "Compiler, flags, the instruction sets compiled in (best first), and the torch built "
        "against.");
  m.def("cpu_features", &cpu_features,
        "The features that the choice of an instruction set depends on; empty where there is "
        "nothing to choose.");
  m.def(
      "instruction_set", [] { return fused_rnn::best_isa().name; },
      "The instruction set whose kernels run in this process.");
  fused_rnn::bind_plan(m);
  fused_rnn::bind_small_step(m);
}
