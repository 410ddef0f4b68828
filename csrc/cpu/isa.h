// Which instruction-set build runs here. FUSED_RNN_HAS_AVX2 and FUSED_RNN_HAS_AVX512 come from
// setup.py and say what was compiled in. The environment variable FUSED_RNN_ISA (baseline, avx2,
// avx512) asks for a lesser one; a name that is not available is ignored.
#pragma once

#include <stdlib.h>
#include <string.h>

namespace fused_rnn {

struct Isa {
  const char* name;
  bool (*runs_here)();
};

// Best first; register.cpp lists their kernels in the same order.
inline const Isa kIsas[] = {
#ifdef FUSED_RNN_HAS_AVX512
    {"avx512",
     [] {
       return bool(__builtin_cpu_supports("avx512f")) && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
#endif
#ifdef FUSED_RNN_HAS_AVX2
    {"avx2", [] { return bool(__builtin_cpu_supports("avx2")) && __builtin_cpu_supports("fma"); }},
#endif
    {"baseline", [] { return true; }},
};

inline const Isa& best_isa() {
  static const Isa* const chosen = [] {
    const char* wanted = getenv("FUSED_RNN_ISA");
    const Isa* best = nullptr;
    for (const Isa& isa : kIsas) {
      if (!isa.runs_here()) continue;
      if (wanted && strcmp(wanted, isa.name) == 0) return &isa;
      if (!best) best = &isa;
    }
    return best;
  }();
  return *chosen;
}

}  // namespace fused_rnn
