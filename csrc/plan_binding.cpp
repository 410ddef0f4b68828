// _C.plan: plan.h for Python, in plain dicts. fused_rnn/plan.py gives them types.
#undef TORCH_TARGET_VERSION  // older torches bring a pybind11 that refuses to be read beside it
#include "plan_binding.h"

#include <pybind11/stl.h>
#include <stdio.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "layer.h"
#include "plan.h"

namespace fused_rnn {

namespace {

namespace py = pybind11;

// The index of `name` in a table of structs that have a name.
template <class Table>
int find(const Table& table, const std::string& name, const char* kind) {
  const auto row = std::find_if(std::begin(table), std::end(table),
                                [&](const auto& entry) { return name == entry.name; });
  if (row == std::end(table))
    throw std::invalid_argument(std::string("unknown ") + kind + " '" + name + "'");
  return int(row - std::begin(table));
}

Gpu to_gpu(const py::dict& d) {
  Gpu gpu;
  const auto read = [&](const char* key, auto* field) {
    *field = d[key].cast<std::remove_pointer_t<decltype(field)>>();
  };
  snprintf(gpu.name, sizeof gpu.name, "%s", d["name"].cast<std::string>().c_str());
  read("capability", &gpu.capability);
  read("sms", &gpu.sms);
  read("shared_per_sm", &gpu.shared_per_sm);
  read("shared_per_block", &gpu.shared_per_block);
  read("registers_per_sm", &gpu.registers_per_sm);
  read("registers_per_block", &gpu.registers_per_block);
  read("threads_per_block", &gpu.threads_per_block);
  read("l2_bytes", &gpu.l2_bytes);
  read("clock_ghz", &gpu.clock_ghz);
  read("dram_gb_s", &gpu.dram_gb_s);
  const auto clusters = d["clusters"].cast<std::array<int64_t, kClusterSizes>>();
  std::copy(clusters.begin(), clusters.end(), gpu.clusters);
  return gpu;
}

py::dict to_dict(const Plan& plan) {
  const AlgorithmInfo& algorithm = kAlgorithms[int(plan.algorithm)];
  py::dict d;
  d["algorithm"] = algorithm.name;
  d["proven"] = algorithm.proven;
  d["team"] = plan.team;
  d["teams"] = plan.teams;
  d["directions"] = plan.directions;
  d["line"] = plan.line;
  d["overlaid"] = plan.overlaid;
  d["batch_tile"] = plan.batch_tile;
  d["tiles"] = plan.tiles;
  d["waves"] = plan.waves;
  d["ctas"] = plan.ctas;
  d["units"] = plan.units;
  d["rows"] = plan.rows;
  d["unit_bounds"] = py::tuple(py::cast(plan.unit_bounds));
  d["threads"] = plan.threads;
  d["registers"] = plan.registers;
  d["k_split"] = plan.k_split;
  d["weight_bytes"] = plan.weight_bytes;
  d["register_bytes"] = plan.register_bytes;
  d["shared_weight_bytes"] = plan.shared_weight_bytes;
  d["shared_bytes"] = plan.shared_bytes;
  d["workspace_bytes"] = plan.workspace_bytes;
  py::list costs;
  for (const Cost& cost : plan.costs) costs.append(py::make_tuple(cost.what, cost.us));
  d["costs"] = py::tuple(costs);
  d["limit"] = plan.limit().what;
  d["us_per_step"] = plan.us_per_step;
  d["setup_us"] = plan.setup_us;
  d["chunk"] = plan.chunk;
  d["stack_us"] = plan.stack_us;
  return d;
}

py::dict plan(const py::dict& device, const std::string& cell, const std::string& arithmetic,
              int64_t T, int64_t N, int64_t H, int64_t P, bool backward, int64_t directions,
              int64_t layers, const std::string& algorithm, bool proven_only) {
  PlanProblem problem;
  problem.cell = find(kCellShapes, cell, "cell");
  problem.arithmetic = Arithmetic(find(kArithmetics, arithmetic, "arithmetic"));
  problem.T = T, problem.N = N, problem.H = H, problem.P = P;
  problem.backward = backward;
  problem.directions = directions;
  problem.layers = layers;
  const Choice choice = make_plan(problem, to_gpu(device), algorithm, proven_only);
  py::dict plans, refusals, d;
  for (size_t i = 0; i < choice.plans.size(); ++i) {
    if (choice.refusals[i].empty())
      plans[kAlgorithms[i].name] = to_dict(choice.plans[i]);
    else
      refusals[kAlgorithms[i].name] = choice.refusals[i];
  }
  d["plans"] = plans;
  d["refusals"] = refusals;
  d["runs"] = kAlgorithms[int(choice.runs)].name;
  d["fastest"] = kAlgorithms[int(choice.fastest)].name;
  d["why"] = choice.why;
  return d;
}

}  // namespace

void bind_plan(pybind11::module_& m) {
  m.def("plan", &plan, "The CUDA plan of one layer on a device, as fused_rnn.plan describes it.",
        py::kw_only(), py::arg("device"), py::arg("cell"), py::arg("arithmetic"), py::arg("T"),
        py::arg("N"), py::arg("H"), py::arg("P"), py::arg("backward"), py::arg("directions"),
        py::arg("layers"), py::arg("algorithm"), py::arg("proven_only"));
}

}  // namespace fused_rnn
