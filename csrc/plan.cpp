#include "plan.h"

#include <stdio.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <utility>

#include "layer.h"

namespace fused_rnn {

namespace {

// ---- Constants of the cost model. None was measured by this project yet; "published" names the
// ---- source, "assumed" has none. Cycles are an H100's and are taken for the others as well.

// Published: 32 banks of 4 bytes (CUDA C++ Programming Guide).
constexpr double kSharedBytesPerCycle = 128;
// Published: a store to a cluster peer's shared memory, H800 (arXiv 2402.13499, 2501.12084).
constexpr double kPeerCycles = 180;
// Published: what an SM moves to or from its peers, 13 to 16 there (same papers).
constexpr double kPeerBytesPerCycle = 14;
// Published: an L2 hit costs 258 cycles near and 414 far (same papers). A word is written near and
// read far, and a poll that just missed it reads again; the average wait is left out.
constexpr double kL2Cycles = 258 + 414;
// Published: what an SM reads from L2, about (same papers).
constexpr double kL2BytesPerCycle = 30;
// Published: mma.sync m16n8k16, from one to the next that adds to it; the share of the tensor
// cores' peak that mma.sync reaches on Hopper (same papers).
constexpr double kMmaCycles = 24, kMmaShare = 0.63;
// Assumed: gates, two block barriers, sums over the parts of K, the address arithmetic of a step.
constexpr double kPointwiseCycles = 250;
// Assumed: one more block barrier.
constexpr double kBarrierCycles = 30;
// Published: from the end of a kernel to the start of the next in a CUDA graph, 1.24 to 1.40 us on
// an H100 (one unreviewed repository).
constexpr double kKernelUs = 1.3;

// Assumed: predictions nearer than this are a tie, which the simpler launch wins: clusters wait for
// nobody outside, the grid needs all of its CTAs at once beside whatever else runs.
constexpr double kTie = 0.9;

// ---- Limits of the kernels' own making.

constexpr int64_t kThreads = 256;
// mma's M; rows of the batch are its N, of which a warp keeps two tiles of 8 at a time.
constexpr int64_t kM = 16, kColumns = 16;
// The host launches every chunk of every layer.
constexpr int64_t kMostChunks = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

std::string number(double x, const char* unit) {
  char text[64];
  snprintf(text, sizeof text, x < 10 ? "%.2f %s" : "%.0f %s", x, unit);
  return text;
}
std::string kilobytes(double bytes) { return number(bytes / 1024, "KB"); }

// Multiply-adds a cycle of one SM: published peak rates (data sheets) / (2 * SMs * clock).
double multiply_adds(Arithmetic arithmetic, int capability) {
  const bool blackwell = capability / 10 == 10;
  const bool accelerator = capability == 80 || capability == 90 || blackwell;
  if (arithmetic == Arithmetic::kFp64) return accelerator ? 64 : 2;
  // Of these three, Turing's tensor cores know fp16 alone.
  const bool tensor =
      capability >= 80 ? arithmetic != Arithmetic::kFp32 : arithmetic == Arithmetic::kFp16;
  if (!tensor) return capability <= 80 ? 64 : 128;
  const double half = blackwell          ? 4096
                      : capability == 90 ? 2048
                      : capability == 80 ? 1024
                      : capability == 75 ? 512
                                         : 256;
  return arithmetic == Arithmetic::kTf32 ? half / 2 : half;
}

struct Planner {
  const PlanProblem& problem;
  const Gpu& device;
  const CellShape& cell = kCellShapes[problem.cell];
  const int64_t bytes = kArithmetics[int(problem.arithmetic)].bytes;
  const int64_t R = problem.P ? problem.P : problem.H;
  const double us = 1e-3 / device.clock_ghz;  // of a cycle

  int64_t registers_of_thread() const {
    const int64_t of_cta = std::min(device.registers_per_block, device.registers_per_sm);
    return std::min(int64_t(kMostRegisters), of_cta / kThreads);
  }
  double fma_per_cycle() const { return multiply_adds(problem.arithmetic, device.capability); }

  Plan stepwise() const;
  std::string cannot_persist(bool exact) const;
  std::string cluster(Plan* best) const;
  std::string grid(Plan* best) const;

 private:
  // One way to cut the problem up: `team` CTAs hold W_hh, `active` teams fit the device.
  struct Cut {
    Algorithm algorithm;
    int64_t team, granule, batch_tile, active;
    int64_t directions;  // of a launch
    int64_t line = 1;
    bool overlaid = false;
  };
  // W_hh's part on a CTA as a matrix of M by K: it sums over K. Forward it is the CTA's gates by
  // all of h. Backward the cluster's is all units by the CTA's gates, whose gradients it has:
  // partial sums of dh travel; the grid's the units of the CTA's line by the gates of a part of all
  // units, whose gradients travel, and then sums within the line.
  struct Product {
    int64_t M, K;
    bool reduces;
  };

  Plan lay_out(const Cut& cut) const;
  void place_forward(const Cut& cut, Plan* plan) const;
  BackwardShape shape_of_backward(int64_t batch_tile) const;
  void place_backward(const Cut& cut, Plan* plan) const;
  Product product(const Cut& cut, int64_t units) const;
  GridShape shape_of_grid(const Cut& cut, int64_t units) const;
  GridCut cut_of_grid(const Cut& cut, GridShape shape, int64_t groups) const;
  void place_grid(const Cut& cut, Plan* plan) const;
  void predict(const Cut& cut, const Product& part, Plan* plan) const;
  void predict_stack(const Cut& cut, Plan* plan) const;
  double exchanged_bytes(const Cut& cut, const Product& part, int64_t units) const;
  double product_cycles(const Product& part, int64_t k_split, int64_t columns) const;
  std::string misfit(const Plan& plan) const;
  void consider(const Cut& cut, Plan* best, Plan* nearest) const;
  std::string verdict(const Plan& best, const Plan& nearest) const;
};

Plan Planner::stepwise() const {
  Plan plan;
  plan.batch_tile = problem.N;
  plan.tiles = problem.N > 0;
  plan.units = problem.H;
  plan.rows = cell.gates * problem.H;
  plan.unit_bounds = {0, problem.H};
  const int64_t projection = problem.P * problem.H;
  plan.weight_bytes = (plan.rows * R + projection) * bytes;
  const double from_l2 = plan.weight_bytes / (kL2BytesPerCycle * device.sms) * us;
  const double from_dram = plan.weight_bytes / (device.dram_gb_s * 1e3);
  const bool cached = plan.weight_bytes <= device.l2_bytes;
  const double multiply =
      double(plan.rows * R + projection) * problem.N / (fma_per_cycle() * device.sms) * us;
  const int64_t directions = problem.directions, kernels = directions * (problem.P ? 3 : 2);
  plan.costs = {
      {std::to_string(kernels) + " kernels a step", kernels * kKernelUs},
      {kilobytes(plan.weight_bytes) + " of weights read from " + (cached ? "L2" : "DRAM"),
       double(directions) * (cached ? from_l2 : from_dram)},
      {"multiplication", double(directions) * multiply},
  };
  // A GEMM reads while it multiplies.
  plan.us_per_step = plan.costs[0].us + std::max(plan.costs[1].us, plan.costs[2].us);
  plan.stack_us = double(problem.layers) * plan.total_us(problem.T);
  return plan;
}

// Why no kernel that keeps W_hh on the chip runs this, whatever its size.
std::string Planner::cannot_persist(bool exact) const {
  if (device.capability < 80)
    return "it needs sm_80, and this is sm_" + std::to_string(device.capability);
  if (device.threads_per_block < kThreads || registers_of_thread() < kMostRegisters)
    return "its kernels want 255 registers for each of 256 threads";
  if (problem.arithmetic == Arithmetic::kFp64) return "it does not compute in fp64";
  if (problem.arithmetic == Arithmetic::kFp32 && !exact)
    return "it multiplies on tensor cores, which have no exact fp32; TF32 is not allowed here";
  if (problem.P) return "it has no projection (proj_size)";
  if (problem.T == 0 || problem.N == 0) return "there is no step to run";
  return "";
}

Planner::Product Planner::product(const Cut& cut, int64_t units) const {
  const int64_t G = cell.gates, H = problem.H;
  if (!problem.backward) return {G * units, R, false};
  if (cut.algorithm == Algorithm::kGrid)
    return {cut.line * units, G * most_units(H, cut.granule, cut.line), false};
  return {R, G * units, true};
}

double Planner::product_cycles(const Product& part, int64_t k_split, int64_t columns) const {
  if (problem.arithmetic == Arithmetic::kFp32)
    return double(part.M * part.K * columns) / fma_per_cycle();
  const int64_t k = 32 / bytes;  // mma's K: 16 halves or 8 TF32 are 32 bytes
  const double chain = kMmaCycles * ceil_div(part.K, k * k_split) * ceil_div(columns, kColumns);
  const double tiles = double(ceil_div(part.M, kM)) * ceil_div(part.K, k) * ceil_div(columns, 8);
  return std::max(chain, tiles * kM * 8 * k / (fma_per_cycle() * kMmaShare));
}

// What a CTA receives for one row of the batch in one step.
double Planner::exchanged_bytes(const Cut& cut, const Product& part, int64_t units) const {
  const int64_t values = part.reduces ? cut.team * units : part.K;
  if (cut.algorithm == Algorithm::kGrid) {  // words of 8 bytes
    const GridShape shape = shape_of_grid(cut, units);
    const GridCut warps = cut_of_grid(cut, shape, 1);
    return 8.0 * (warps.chunks * shape.words(warps.granule) + (cut.line - 1) * units);
  }
  const double of_peers = double(cut.team - 1) / cut.team;
  return of_peers * values * (part.reduces ? 4 : bytes);
}

void Planner::predict(const Cut& cut, const Product& part, Plan* plan) const {
  const bool grid = cut.algorithm == Algorithm::kGrid;
  const int64_t tile = std::min(cut.batch_tile, problem.N);
  const int64_t launches = problem.directions / cut.directions;
  const double cycle = us * double(plan->waves * launches);
  const double arrives = exchanged_bytes(cut, part, plan->units) * tile;
  const double reads = double(plan->shared_weight_bytes) * ceil_div(tile, kColumns);
  const double rate = grid ? kL2BytesPerCycle : kPeerBytesPerCycle;
  const double product = product_cycles(part, plan->k_split, tile);
  const auto add = [&](std::string what, double cycles) {
    if (cycles > 0) plan->costs.push_back({std::move(what), cycles * cycle});
  };
  add(problem.arithmetic == Arithmetic::kFp32 ? "multiplication" : "tensor-core multiplication",
      product);
  add(kilobytes(reads) + " of weights read from shared memory at 128 B a cycle",
      reads / kSharedBytesPerCycle);
  add("gates and barriers",
      kPointwiseCycles + kBarrierCycles * (2 * cut.overlaid + (cut.line > 1)));
  if (grid || cut.team > 1) {  // a grid's CTA reads its own words, too
    const char* const through = cut.line > 1 ? "latency through L2, twice" : "latency through L2";
    add(grid ? through : "latency of a peer's shared memory",
        grid ? (cut.line > 1 ? 2 : 1) * kL2Cycles : kPeerCycles);
    add(kilobytes(arrives) + " exchanged at " + number(rate, "B a cycle"), arrives / rate);
  }
  for (const Cost& cost : plan->costs) plan->us_per_step += cost.us;
  // Weights in shared memory are read while the tensor cores work on the ones before.
  plan->us_per_step -= std::min(product, reads / kSharedBytesPerCycle) * cycle;
  // A cluster of a later wave loads the weights again, a group of the grid keeps them.
  const double loads = double(plan->weight_bytes) * (grid ? 1 : plan->waves);
  plan->setup_us = double(launches) * (kKernelUs + loads / kL2BytesPerCycle * us);
}

// Layers side by side, where clusters have room for more than one layer's tiles: as many at a time
// as there is room for, each a chunk behind the one before it.
void Planner::predict_stack(const Cut& cut, Plan* plan) const {
  const int64_t T = problem.T, layers = problem.layers;
  const double one_by_one = double(layers) * plan->total_us(T);
  plan->stack_us = one_by_one;
  const int64_t at_once = std::min(layers, cut.active / plan->tiles);
  if (cut.algorithm != Algorithm::kCluster || problem.directions > 1 || at_once < 2) return;
  const int64_t rest = layers % at_once;
  const int64_t least = std::max(int64_t(2), ceil_div(T * problem.N, kInputRows));
  for (int64_t chunks = least; chunks <= std::min(T, std::max(least, kMostChunks)); ++chunks) {
    const int64_t turns =
        layers / at_once * (chunks + at_once - 1) + (rest ? chunks + rest - 1 : 0);
    // A chunk's product with the weights of the input is one more kernel.
    const int64_t chunk = ceil_div(T, chunks);
    const double us = double(turns) * (kKernelUs + plan->total_us(chunk));
    if (us < kTie * one_by_one && us < plan->stack_us) plan->chunk = chunk, plan->stack_us = us;
  }
}

// `cluster` is built: cluster_layout.h says how.
void Planner::place_forward(const Cut& cut, Plan* plan) const {
  const WarpShape shape = warp_shape(int(cell.gates), int(cell.states), int(cell.saved), int(bytes),
                                     problem.H, cut.team, cut.batch_tile);
  const ClusterCut warps = cluster_cut(shape, problem.H, cut.team, device.shared_of_cta());
  const int64_t tile_bytes = 32 * 16, tiles = warps.part_tiles * shape.m_tiles();
  plan->k_split = warps.parts;
  plan->threads = 32 * warps.warps();
  plan->weight_bytes = warps.warps() * tiles * tile_bytes;
  plan->shared_weight_bytes = ClusterShared::weight_bytes(shape, warps.warps(), warps.part_tiles);
  plan->register_bytes = plan->weight_bytes - plan->shared_weight_bytes;
  plan->registers =
      shape.other_registers() + 4 * shape.m_tiles() * std::min(shape.held(), warps.part_tiles);
  plan->shared_bytes = ClusterShared(shape, warps).bytes;
}

BackwardShape Planner::shape_of_backward(int64_t batch_tile) const {
  return backward_shape(int(cell.gates), int(cell.states), int(cell.saved), int(bytes), problem.H,
                        batch_tile);
}

void Planner::place_backward(const Cut& cut, Plan* plan) const {
  const BackwardShape shape = shape_of_backward(cut.batch_tile);
  if (shape.m_tiles == 0) return;  // more units than its kernels take: misfit says so
  const BackwardCut warps = backward_cut(shape, problem.H, cut.team);
  const int64_t tile_bytes = 32 * 16;
  plan->threads = 32 * warps.warps;
  plan->weight_bytes = warps.multiply * warps.k_tiles * shape.m_tiles * tile_bytes;
  plan->shared_weight_bytes = BackwardShared::weight_bytes(shape, warps.multiply, warps.k_tiles);
  plan->register_bytes = plan->weight_bytes - plan->shared_weight_bytes;
  plan->registers =
      shape.other_registers() + 4 * shape.m_tiles * std::min(shape.held(), warps.k_tiles);
  plan->shared_bytes = BackwardShared(shape, warps).bytes;
}

// grid_layout.h says how.
GridShape Planner::shape_of_grid(const Cut& cut, int64_t units) const {
  GridShape shape = grid_shape(int(cell.gates), int(cell.states), int(cell.saved), int(bytes),
                               problem.arithmetic == Arithmetic::kFp32, problem.backward, units,
                               cut.line, cut.batch_tile);
  if (shape.m_tiles == 5 && device.capability < 90) shape.m_tiles = 0;  // not compiled there
  return shape;
}
GridCut Planner::cut_of_grid(const Cut& cut, GridShape shape, int64_t groups) const {
  return grid_cut(shape, problem.H, cut.team, groups, cut.line, cut.overlaid, cut.granule);
}

void Planner::place_grid(const Cut& cut, Plan* plan) const {
  const GridShape shape = shape_of_grid(cut, plan->units);
  if (shape.m_tiles == 0) return;  // more units than its kernels take: misfit says so
  const GridCut warps = cut_of_grid(cut, shape, plan->teams);
  const int64_t tile_bytes = 32 * 16;
  plan->k_split = warps.parts;
  plan->threads = kThreads;
  plan->weight_bytes = warps.tiles * shape.m_tiles * tile_bytes;
  plan->shared_weight_bytes = GridShared::weight_bytes(shape, warps);
  plan->register_bytes = plan->weight_bytes - plan->shared_weight_bytes;
  plan->registers =
      shape.other_registers() + 4 * shape.m_tiles * std::min(shape.held(), warps.part_tiles);
  plan->shared_bytes = GridShared(shape, warps).bytes;
  plan->workspace_bytes = 8 * grid_words(shape, warps);
}

Plan Planner::lay_out(const Cut& cut) const {
  Plan plan;
  plan.algorithm = cut.algorithm;
  plan.team = cut.team;
  plan.batch_tile = cut.batch_tile;
  plan.line = cut.line;
  plan.overlaid = cut.overlaid;
  plan.granule = cut.granule;
  plan.directions = cut.directions;
  plan.tiles = cut.directions * ceil_div(problem.N, cut.batch_tile);
  plan.teams = std::min(cut.active, plan.tiles);
  plan.waves = ceil_div(plan.tiles, plan.teams);
  // Clusters wait for nobody else, so later waves may start when earlier ones end; the grid's CTAs
  // wait for each other and take their tiles in turn.
  plan.ctas = cut.team * (cut.algorithm == Algorithm::kGrid ? plan.teams : plan.tiles);
  const int64_t lines = cut.team / cut.line;
  for (int64_t i = 0; i < cut.team; ++i)
    plan.unit_bounds.push_back(
        GridUnits(problem.H, cut.granule, cut.team, cut.line, i % lines, i / lines).begin);
  plan.unit_bounds.push_back(problem.H);
  for (int64_t i = 0; i < cut.team; ++i)
    plan.units = std::max(plan.units, plan.unit_bounds[i + 1] - plan.unit_bounds[i]);
  plan.rows = cell.gates * plan.units;
  const Product part = product(cut, plan.units);
  if (cut.algorithm == Algorithm::kGrid)
    place_grid(cut, &plan);
  else
    problem.backward ? place_backward(cut, &plan) : place_forward(cut, &plan);
  predict(cut, part, &plan);
  predict_stack(cut, &plan);
  return plan;
}

std::string Planner::misfit(const Plan& plan) const {
  if (plan.weight_bytes == 0 && plan.algorithm == Algorithm::kGrid)
    return std::to_string(plan.units) + " units of a CTA are more than its warps take";
  if (plan.weight_bytes == 0)
    return std::to_string(problem.H) + " units are more than its warps take back";
  const std::string size = std::to_string(plan.team) +
                           (plan.team == 1 ? " CTA holds " : " CTAs each hold ") +
                           kilobytes(plan.weight_bytes) + " of W_hh";
  if (plan.threads > kThreads)
    return size + ": its " + std::to_string(plan.units) + " units are more than its warps take";
  if (plan.shared_bytes > device.shared_of_cta())
    return size + ": beside registers that takes " + kilobytes(plan.shared_bytes) +
           " of shared memory, and a CTA has " + kilobytes(device.shared_per_block);
  if (plan.workspace_bytes > device.l2_bytes)
    return size + ": what they exchange takes " + kilobytes(plan.workspace_bytes) +
           ", more than L2's " + kilobytes(device.l2_bytes);
  return "";
}

void Planner::consider(const Cut& cut, Plan* best, Plan* nearest) const {
  const Plan plan = lay_out(cut);
  // Side by side has to win clearly against any cut for one layer after the other.
  const auto us = [](const Plan& p) { return p.chunk ? p.stack_us / kTie : p.stack_us; };
  if (!misfit(plan).empty()) {
    // Without weights there is no kernel for it: anything else is nearer.
    const bool nearer = nearest->weight_bytes == 0 ||
                        (plan.weight_bytes && plan.shared_bytes < nearest->shared_bytes);
    if (nearer) *nearest = plan;
  } else if (best->ctas == 0 || us(plan) < us(*best)) {
    *best = plan;
  }
}

std::string Planner::verdict(const Plan& best, const Plan& nearest) const {
  if (best.ctas) return "";
  return nearest.ctas ? "it does not fit: " + misfit(nearest)
                      : "no cluster fits the device and has a unit for each of its CTAs";
}

std::string Planner::cluster(Plan* best) const {
  const std::string reason = cannot_persist(false);
  if (!reason.empty()) return reason;
  // New h goes to the peers in messages of 16 bytes: 8 units of half types, 4 of TF32. Sums of dh
  // go in whole tiles.
  const int64_t granule = problem.backward ? BackwardShape::kUnits : 16 / bytes;
  Plan nearest;
  for (int i = 0; i < (device.capability >= 90 ? kClusterSizes : 1); ++i) {
    const int64_t team = int64_t(1) << i;
    if (device.clusters[i] < 1 || ceil_div(problem.H, granule) < team) continue;
    for (int64_t tile = 8; tile <= 16 && (tile == 8 || tile / 2 < problem.N); tile *= 2)
      if (tile == 8 || !problem.backward || shape_of_backward(tile).m_tiles)
        consider({Algorithm::kCluster, team, granule, tile, device.clusters[i], problem.directions},
                 best, &nearest);
  }
  return verdict(*best, nearest);
}

std::string Planner::grid(Plan* best) const {
  const std::string reason = cannot_persist(true);
  if (!reason.empty()) return reason;
  const bool exact = problem.arithmetic == Arithmetic::kFp32;
  Plan nearest;
  // Of a launch, `groups` for each of its directions.
  const auto deal = [&](int64_t directions, int64_t groups, int64_t granule, int64_t line) {
    const int64_t active = directions * groups;
    const int64_t blocks = ceil_div(problem.H, granule), most = device.sms / active / line;
    const int64_t of_part = ceil_div(blocks, line);
    if (most == 0) return;
    const int64_t lines = ceil_div(of_part, ceil_div(of_part, most));
    if (blocks / line < lines) return;  // a CTA would have no unit
    for (int64_t tile = 8; tile <= (exact ? 8 : 16) && (tile == 8 || 8 < problem.N); tile *= 2)
      for (const bool overlaid : {false, true})
        if (groups <= ceil_div(problem.N, tile))
          consider(
              {Algorithm::kGrid, lines * line, granule, tile, active, directions, line, overlaid},
              best, &nearest);
  };
  for (int64_t directions = 1; directions <= problem.directions; ++directions)
    for (int64_t groups = 1; groups <= device.sms; groups *= 2)
      // Four halves take two words of three; eight take three.
      for (int64_t granule = 4; granule <= 16 / bytes; granule *= 2)
        for (int64_t line = 1; line <= (problem.backward ? kMostOfLine : 1); line *= 2)
          deal(directions, groups, granule, line);
  return verdict(*best, nearest);
}

void check(const PlanProblem& problem, const Gpu& device) {
  const auto need = [](bool holds, const char* sentence) {
    if (!holds) throw std::invalid_argument(sentence);
  };
  need(problem.cell >= 0 && problem.cell < kCellCount, "there is no cell of that number");
  need(problem.T >= 0 && problem.N >= 0, "T and N must not be negative");
  need(problem.H > 0 && problem.H <= 1 << 24, "H must be from 1 to 2^24");
  need(problem.P >= 0 && problem.P < problem.H, "P must be from 0 (no projection) to H - 1");
  need(problem.directions == 1 || problem.directions == 2, "a layer has one direction or two");
  need(problem.layers > 0, "there is at least one layer");
  need(problem.P == 0 || problem.cell == kLstm, "only the LSTM has a projection");
  need(device.capability >= 75, "CUDA devices before sm_75 are not supported");
  need(device.sms > 0 && device.clock_ghz > 0 && device.dram_gb_s > 0,
       "a device needs at least one SM, a clock and a memory bandwidth");
}

}  // namespace

const Cost& Plan::limit() const {
  return *std::max_element(costs.begin(), costs.end(),
                           [](const Cost& a, const Cost& b) { return a.us < b.us; });
}

Choice make_plan(const PlanProblem& problem, const Gpu& device, const std::string& algorithm,
                 bool proven_only) {
  check(problem, device);
  const Planner planner{problem, device};
  Choice choice;
  choice.plans[0] = planner.stepwise();
  choice.refusals[1] = planner.cluster(&choice.plans[1]);
  choice.refusals[2] = planner.grid(&choice.plans[2]);

  const auto total = [&](int i) { return choice.plans[i].stack_us; };
  int runs = 0, fastest = 0, least = 0;
  for (int i = 1; i < 3; ++i) {
    if (!choice.refusals[i].empty()) continue;
    if (total(i) < total(least)) least = i;
    if (total(i) < kTie * total(fastest)) fastest = i;
    if ((!proven_only || kAlgorithms[i].proven) && total(i) < kTie * total(runs)) runs = i;
  }

  if (algorithm != "auto") {
    for (runs = 0; runs < 3 && algorithm != kAlgorithms[runs].name;) ++runs;
    if (runs == 3)
      throw std::invalid_argument("unknown algorithm '" + algorithm +
                                  "': expected 'auto', 'stepwise', 'cluster' or 'grid'");
    const std::string& reason = choice.refusals[runs];
    if (!reason.empty())
      throw std::runtime_error("algorithm '" + algorithm + "' cannot run this: " + reason);
    choice.why = "asked for";
  } else if (runs != fastest) {
    choice.why = std::string(kAlgorithms[fastest].name) + " is predicted to be faster, " +
                 number(choice.plans[fastest].us_per_step, "µs") +
                 " a step, but has not run on a GPU yet: ask for it by name";
  } else if (runs == 0 && !choice.refusals[1].empty() && !choice.refusals[2].empty()) {
    choice.why = "nothing else can run this";
  } else if (runs != least) {
    choice.why = std::string("as fast as ") + kAlgorithms[least].name +
                 " to within what can be predicted, and simpler to launch";
  } else {
    choice.why = "predicted to be the fastest";
  }
  choice.runs = Algorithm(runs);
  choice.fastest = Algorithm(fastest);
  return choice;
}

std::shared_ptr<const Choice> remembered_plan(const PlanProblem& p, const Gpu& device,
                                              const std::string& algorithm) {
  const auto key =
      std::make_tuple(p.cell, p.arithmetic, p.T, p.N, p.H, p.P, p.backward, p.directions, p.layers,
                      algorithm, std::string(device.name), device.sms,
                      std::vector<int64_t>(device.clusters, device.clusters + kClusterSizes));
  static std::mutex mutex;
  static std::map<std::decay_t<decltype(key)>, std::shared_ptr<const Choice>> plans;
  constexpr size_t kMost = 4096;
  const std::lock_guard lock(mutex);
  const auto found = plans.find(key);
  if (found != plans.end()) return found->second;
  if (plans.size() == kMost) plans.clear();
  return plans[key] = std::make_shared<const Choice>(make_plan(p, device, algorithm, true));
}

}  // namespace fused_rnn
