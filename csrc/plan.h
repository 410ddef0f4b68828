// Which CUDA algorithm runs one layer, in one direction or in both, and how it is cut up. Pure host
// code: no CUDA header and no GPU is needed to ask, so that every GPU's plans are tested on any
// machine. The formulae and where their constants come from are in docs/cuda-plan.md.
#pragma once

#include <stdint.h>

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "cluster_layout.h"
#include "grid_layout.h"

namespace fused_rnn {

enum class Algorithm { kStepwise, kCluster, kGrid };

struct AlgorithmInfo {
  const char* name;
  bool proven;  // has run on a GPU; before that it runs only where asked for by name
};

inline constexpr AlgorithmInfo kAlgorithms[] = {
    {"stepwise", true},  // a GEMM and a pointwise kernel a step: runs everything
    {"cluster", false},  // a cluster of CTAs holds W_hh and runs a batch tile for all T
    {"grid", false},     // all SMs hold W_hh together; h crosses L2
};

// What the recurrent product is computed in.
enum class Arithmetic { kFp64, kFp32, kTf32, kBf16, kFp16 };

inline constexpr struct {
  const char* name;
  int bytes;  // of one element of W_hh
} kArithmetics[] = {{"fp64", 8}, {"fp32", 4}, {"tf32", 4}, {"bf16", 2}, {"fp16", 2}};

// A cluster of 1 << i CTAs has index i everywhere.
inline constexpr int kClusterSizes = 5;

// A GPU, as cuda/describe.cu asks for it. Of plain C types in this order: native.py reads it.
struct Gpu {
  char name[256] = "";
  int64_t capability = 0;  // 10 * major + minor
  int64_t sms = 0;
  int64_t shared_per_sm = 0, shared_per_block = 0;        // bytes; the latter with opt-in
  int64_t registers_per_sm = 0, registers_per_block = 0;  // of 32 bits
  int64_t threads_per_block = 0;
  int64_t l2_bytes = 0;
  double clock_ghz = 0, dram_gb_s = 0;  // 0: the driver does not tell
  // The most clusters of each size that are active at a time with one CTA an SM; 0: none fits.
  int64_t clusters[kClusterSizes] = {};

  int64_t shared_of_cta() const {
    return shared_per_block < shared_per_sm ? shared_per_block : shared_per_sm;
  }
};

struct PlanProblem {
  int cell = 0;  // CellId
  Arithmetic arithmetic = Arithmetic::kFp32;
  int64_t T = 0, N = 0, H = 0, P = 0;  // P = 0: no projection
  bool backward = false;
  int64_t directions = 1, layers = 1;
};

struct Cost {
  std::string what;
  double us;  // of a step of the whole batch, in all directions
};

// How one algorithm runs a problem.
struct Plan {
  Algorithm algorithm = Algorithm::kStepwise;
  int64_t team = 1;        // CTAs that hold W_hh together: a cluster, or a group of the grid
  int64_t line = 1;        // of these, how many have the same rows, each for its part of K
  bool overlaid = false;   // sums take the operand's place in shared memory
  int64_t directions = 1;  // that one launch runs: all, or each has a launch of its own
  int64_t teams = 1;       // at work at a time
  int64_t batch_tile = 0;  // rows of the batch that a team runs together
  int64_t tiles = 0;       // of a launch: directions * ceil(N / batch_tile)
  int64_t waves = 1;       // ceil(tiles / teams): tiles that run one after another
  int64_t ctas = 0;        // of the launch; 0: torch's GEMM decides
  int64_t granule = 1;     // units are dealt to CTAs in blocks of so many
  int64_t units = 0;       // hidden units of the CTA that has most of them
  int64_t rows = 0;        // their rows of W_hh, G * units
  std::vector<int64_t> unit_bounds;  // CTA i of a team owns units [bounds[i], bounds[i + 1])
  int64_t threads = 0, registers = 0, k_split = 1;  // of a CTA, of a thread, of the product
  // Of a CTA. W_hh's part is padded to whole tensor-core tiles; shared_bytes is all it allocates.
  int64_t weight_bytes = 0, register_bytes = 0, shared_weight_bytes = 0, shared_bytes = 0;
  int64_t workspace_bytes = 0;  // global memory, meant to stay in L2
  std::vector<Cost> costs;
  double us_per_step = 0, setup_us = 0;  // of a layer; predicted, not measured
  // Steps that each layer of a stack runs while the one before it runs the next ones; 0: layers run
  // one after the other.
  int64_t chunk = 0;
  double stack_us = 0;  // predicted for all layers

  double total_us(int64_t T) const { return setup_us + double(T) * us_per_step; }
  const Cost& limit() const;  // the dearest of the costs
};

// A plan for each algorithm, or the reason why it has none, and the choice among them.
struct Choice {
  std::array<Plan, 3> plans;
  std::array<std::string, 3> refusals;  // "" where there is a plan
  Algorithm runs, fastest;              // fastest: of all that have a plan
  std::string why;
};

// `algorithm` is a name of kAlgorithms, or "auto" for the one predicted to be fastest. With
// proven_only, "auto" does not run what is not proven.
// Throws std::invalid_argument for a problem or a name that makes no sense, std::runtime_error
// with the reason where the named algorithm cannot run the problem.
Choice make_plan(const PlanProblem& problem, const Gpu& device, const std::string& algorithm,
                 bool proven_only);

// The same with proven_only, made once: a plan takes longer than some calls, and a program asks for
// few.
std::shared_ptr<const Choice> remembered_plan(const PlanProblem& problem, const Gpu& device,
                                              const std::string& algorithm);

}  // namespace fused_rnn
