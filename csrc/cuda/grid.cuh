// What forward and backward of the grid algorithm share: a team of blocks, all on the chip at the
// same time, holds a matrix of weights, and each turn every block multiplies its rows by what all
// of them have just made.
//
// A block's 8 warps all have its rows; each has a part of K. The sums of the parts meet in shared
// memory. There a thread takes the units that it owns, one row of the batch each: `granule`
// neighbouring lanes own as many neighbouring units. Backward a block's rows belong to all blocks
// of its line, which divide K; each sends the others the sums of their units.
//
// What a block makes reaches the others through L2 as words of 64 bits, each with some values and
// the number of the turn: the data is its own flag, so nothing has to be ordered, and a reader asks
// again until the number is right. There are two slots. A block that writes a turn has read all of
// the turn before, which every other block sent after it had read the one before that, the last to
// stand in the slot. To PTX those are relaxed accesses, in no order across threads; but a reader
// branches on the number it read before its block meets, and nothing is sent before that. Words are
// zero at the start of a launch and turns count from one; they may wrap, since a slot's turns
// differ by two.
#pragma once

#include "../grid_layout.h"
#include "layer.cuh"
#include "weights.cuh"

namespace fused_rnn::cuda {

struct GridTeam {
  GridCut cut;
  int directions;  // neighbouring groups run the same rows, each in its direction
  int64_t N, H;
  uint64_t* words;
};

template <class Cell, class T, bool kBackward, bool kExact, int kM, int kTiles>
struct GridBlock {
  using A = arithmetic_t<T>;
  static constexpr GridShape kShape = {Cell::kGates, Cell::kStates, Cell::kSaved, sizeof(T),
                                       kExact,       kBackward,     kM,           kTiles};
  static constexpr int kHeld = kShape.held(), kColumns = kShape.columns(), kRows = kShape.rows(),
                       kItems = kShape.items(), kOfUnit = kShape.values_of_unit(),
                       kValues = kShape.values_of_word(),
                       kMostWords = kShape.words(sizeof(T) == 2 ? 8 : 4);
  static constexpr int kThreads = 32 * kGridWarps;

  const GridTeam& team;
  const GridShared place;
  T* operand;
  float *sums, *others;  // [part of K][row][column]; [other part][row][unit]
  int part;              // of the units
  int chunks;            // that the block receives of a row
  int64_t row;           // the first of the tile
  GridUnits own;
  int columns[kItems], units[kItems];  // of the thread's items; a unit counts from own.begin
  Weights<T, kM, kHeld, kExact> weights;

  FUSED_RNN_DEVICE explicit GridBlock(const GridTeam& of)
      : team(of),
        place(kShape, of.cut),
        part(block_index().x % of.cut.team / lines()),
        own(units_of(part)) {
    char* const shared = shared_memory<char>();
    operand = reinterpret_cast<T*>(shared);
    sums = reinterpret_cast<float*>(shared + place.sums);
    others = reinterpret_cast<float*>(shared + place.others);
    const int granule = team.cut.granule;
    chunks = int((own.part_end - own.part_begin + granule - 1) / granule) * kOfUnit;
    FUSED_RNN_UNROLL
    for (int k = 0; k < kItems; ++k) {
      const int i = thread_index().x + k * kThreads;
      columns[k] = i / granule % kColumns;
      units[k] = i / granule / kColumns * granule + i % granule;
    }
  }

  // Asked for where they are needed: registers hold weights.
  FUSED_RNN_DEVICE int group() const { return block_index().x / team.cut.team; }
  FUSED_RNN_DEVICE int direction() const { return group() % team.directions; }
  // Where the group's first tile begins, and how far from one to the next. The loop over them is
  // written out: around a lambda some kernels kept the block in local memory.
  FUSED_RNN_DEVICE int64_t first_row() const {
    return int64_t(group() / team.directions) * kColumns;
  }
  FUSED_RNN_DEVICE int64_t row_stride() const {
    return int64_t(team.cut.groups / team.directions) * kColumns;
  }
  FUSED_RNN_DEVICE int lines() const { return team.cut.team / team.cut.line; }
  FUSED_RNN_DEVICE int line() const { return block_index().x % team.cut.team % lines(); }
  FUSED_RNN_DEVICE int words() const { return GridShape(kShape).words(team.cut.granule); }
  // Those of the block of another part in the same line.
  FUSED_RNN_DEVICE GridUnits units_of(int of_part) const {
    return GridUnits(team.H, team.cut.granule, team.cut.team, team.cut.line, line(), of_part);
  }
  FUSED_RNN_DEVICE bool has_row(int column) const { return row + column < team.N; }

  FUSED_RNN_DEVICE int live_rows() const {
    return team.N - row < kColumns ? int(team.N - row) : kColumns;
  }

  // run(item, n, unit) for those of the thread that exist.
  template <class Run>
  FUSED_RNN_DEVICE void each(Run run) const {
    FUSED_RNN_UNROLL
    for (int k = 0; k < kItems; ++k)
      if (has_row(columns[k]) && own.begin + units[k] < own.end)
        run(k, row + columns[k], own.begin + units[k]);
  }

  // weight(row_of(row of the block), k) of W_hh or its transpose; the caller knows what exists.
  template <class RowOf, class Weight>
  FUSED_RNN_DEVICE void load_weights(RowOf row_of, Weight weight) {
    if (warp() >= team.cut.parts) return;
    constexpr int kHalves = kExact ? 1 : 2;
    const int first = warp() * team.cut.part_tiles * weights.kDepth;
    int rows[kM][kHalves];
    FUSED_RNN_UNROLL
    for (int m = 0; m < kM; ++m) {
      FUSED_RNN_UNROLL
      for (int half = 0; half < kHalves; ++half)
        rows[m][half] = row_of(kExact ? 8 * m + lane() % 8 : 16 * m + 8 * half + lane() / 4);
    }
    char* const all = shared_memory<char>() + place.weights;
    const int64_t of_warp = GridShared::bytes_of_warp(kShape, team.cut.part_tiles);
    weights.load(reinterpret_cast<uint32_t*>(all + warp() * of_warp), team.cut.tiles_of(warp()),
                 [&](int m, int half, int k) { return weight(rows[m][half], first + k); });
  }

  // As the product reads it: the tensor cores would cut float off, not round it.
  FUSED_RNN_DEVICE static uint32_t bits_of(A x) {
    if constexpr (sizeof(T) == 2)
      return pack(from_float<T>(x), from_float<T>(0));
    else if constexpr (kExact)
      return float_bits(x);
    else
      return to_tf32(x);
  }
  FUSED_RNN_DEVICE void store_operand(int column, int k, A x) const {
    if constexpr (sizeof(T) == 2)
      store(operand + column * place.stride + k, from_float<T>(x));
    else
      store(reinterpret_cast<uint32_t*>(operand + column * place.stride + k), bits_of(x));
  }

  // Word 0 of a chunk of a turn; those of a number lie side by side.
  FUSED_RNN_DEVICE uint64_t* word(int64_t turn, int column, int chunk) const {
    const int64_t tile = ((turn & 1) * team.cut.groups + group()) * team.cut.line + part;
    return team.words + (tile * kColumns + column) * words() * team.cut.chunks + chunk;
  }
  FUSED_RNN_DEVICE static uint64_t number(int64_t turn) {
    return sizeof(T) == 2 ? uint64_t(turn % 65535 + 1) << 48 : uint64_t(uint32_t(turn + 1)) << 32;
  }
  FUSED_RNN_DEVICE static bool is_of(uint64_t value, int64_t turn) {
    constexpr int kShift = sizeof(T) == 2 ? 48 : 32;
    return value >> kShift == number(turn) >> kShift;
  }

  // Where sums and operand share a place, the operand's K ends in zeros again.
  FUSED_RNN_DEVICE void clear_sums() const {
    sync_block();  // others still read them
    const int first = chunks * team.cut.granule;
    const int rest = team.cut.tiles * weights.kDepth - first;
    for (int i = thread_index().x; i < kColumns * rest; i += kThreads)
      store_operand(i / rest, first + i % rest, A(0));
  }

  // The operand of a turn, from all blocks of the part, this one included.
  FUSED_RNN_DEVICE void gather(int64_t turn) const {
    if (team.cut.overlaid) clear_sums();
    receive<kMostWords>(
        live_rows() * chunks, words(), team.cut.chunks,
        [&](int i) { return word(turn, i / chunks, i % chunks); },
        [turn](uint64_t found) { return is_of(found, turn); },
        [&](int i, const auto& values) { place_chunk(i / chunks, i % chunks, values); });
  }

  // The sums of the other blocks' units, to those of the line, and what they have of this block's.
  FUSED_RNN_DEVICE void exchange_sums(int64_t turn) const {
    const int of_one = live_rows() * team.cut.units, all = (team.cut.line - 1) * of_one;
    const auto its_part = [&](int i) { return i / of_one + (i / of_one >= part); };
    for (int i = thread_index().x; i < all; i += kThreads) {
      const int unit = i % team.cut.units, column = i % of_one / team.cut.units;
      const float sum = sum_of(its_part(i) * team.cut.units + unit, column);
      store_relaxed(sum_words(turn, part, its_part(i)) + i % of_one,
                    uint64_t(uint32_t(turn + 1)) << 32 | float_bits(sum));
    }
    receive<1>(
        all, 1, 0, [&](int i) { return sum_words(turn, its_part(i), part) + i % of_one; },
        [turn](uint64_t found) { return found >> 32 == uint32_t(turn + 1); },
        [&](int i, const auto& found) { store(others + i, bits_float(uint32_t(found[0]))); });
  }
  // Of a unit of this block, in the order of the parts.
  FUSED_RNN_DEVICE float sum_of_line(int unit, int column) const {
    float sum = 0;
    for (int of = 0; of < team.cut.line; ++of) {
      const int other = of - (of > part);
      sum += of == part ? sum_of(part * team.cut.units + unit, column)
                        : load(others + (other * live_rows() + column) * team.cut.units + unit);
    }
    return sum;
  }

  // What a block has made of its items for a turn: values[item][gate].
  FUSED_RNN_DEVICE void send(int64_t turn, const A (&values)[kItems][kOfUnit]) const {
    const int granule = team.cut.granule, j = lane() % granule, base = lane() - j;
    FUSED_RNN_UNROLL
    for (int k = 0; k < kItems; ++k) {
      const int64_t unit = own.begin + units[k];
      const bool sends = j < words() && has_row(columns[k]) && unit - j < own.end;
      FUSED_RNN_UNROLL
      for (int gate = 0; gate < kOfUnit; ++gate) {
        const uint32_t bits = has_row(columns[k]) && unit < own.end ? bits_of(values[k][gate]) : 0;
        uint64_t value = bits;
        if constexpr (kValues == 3) {
          // Past the granule's last value there is nothing to read; no one looks at what stands
          // there.
          const auto other = [&](int i) -> uint64_t {
            const int at = kValues * j + i;
            return shuffle(bits, base + (at < granule ? at : granule - 1));
          };
          value = other(0) | other(1) << 16;
          value |= other(2) << 32;
        }
        const int chunk = int(unit - j - own.part_begin) / granule * kOfUnit + gate;
        if (sends)
          store_relaxed(word(turn, columns[k], chunk) + j * team.cut.chunks, value | number(turn));
      }
    }
  }

  // The block's rows times the operand: the sums of all parts of K into shared memory.
  FUSED_RNN_DEVICE void multiply() const {
    constexpr int kQuads = kExact ? 2 * kTiles : kTiles;
    float sum[kM][kQuads][4] = {};
    sync_warp();  // after lanes have waited for different words
    if (warp() < team.cut.parts)
      weights.template multiply<0>(operand + warp() * team.cut.part_tiles * weights.kDepth,
                                   place.stride, sum);
    if (team.cut.overlaid) sync_block();  // others still read the operand
    if (warp() >= team.cut.parts) return;
    float* const of_part = sums + warp() * kRows * kColumns;
    FUSED_RNN_UNROLL
    for (int m = 0; m < kM; ++m) {
      FUSED_RNN_UNROLL
      for (int q = 0; q < kQuads; ++q) {
        float (&s)[4] = sum[m][q];
        if constexpr (kExact) {
          FUSED_RNN_UNROLL
          for (int i = 0; i < 4; ++i) {  // of the four lanes with parts of K
            s[i] += shuffle_xor(s[i], 8);
            s[i] += shuffle_xor(s[i], 16);
          }
          if (lane() < 8)
            store_vector(of_part + (8 * m + lane()) * kColumns + 4 * q,
                         Vector<float, 4>{{s[0], s[1], s[2], s[3]}});
        } else {
          float* const to = of_part + (16 * m + lane() / 4) * kColumns + 8 * q + lane() % 4 * 2;
          store_vector(to, Vector<float, 2>{{s[0], s[1]}});
          store_vector(to + 8 * kColumns, Vector<float, 2>{{s[2], s[3]}});
        }
      }
    }
  }

  // Of a row of the block, in the order of the parts.
  FUSED_RNN_DEVICE float sum_of(int of_row, int column) const {
    float sum = 0;
    for (int part = 0; part < team.cut.parts; ++part)
      sum += load(sums + (part * kRows + of_row) * kColumns + column);
    return sum;
  }

 private:
  // What the block of a part sends that of another, in the same line: [row][unit].
  FUSED_RNN_DEVICE uint64_t* sum_words(int64_t turn, int from, int to) const {
    const int64_t receiver =
        ((turn & 1) * team.cut.groups + group()) * team.cut.team + to * lines() + line();
    return team.words + operand_words(kShape, team.cut) +
           (receiver * team.cut.line + from) * kColumns * team.cut.units;
  }

  // Asks for `count` things until each is there, and takes it. A thing has `of_one` words, `stride`
  // apart, the first at at(i).
  template <int kMost, class At, class IsThere, class Take>
  FUSED_RNN_DEVICE void receive(int count, int of_one, int64_t stride, At at, IsThere is_there,
                                Take take) const {
    constexpr int kAtOnce = 4;  // that a thread waits for together
    for (int next = thread_index().x; next < count; next += kAtOnce * kThreads) {
      uint64_t values[kAtOnce][kMost];
      const auto each_word = [&](auto run) {
        FUSED_RNN_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          if (next + i * kThreads >= count) continue;
          const uint64_t* const from = at(next + i * kThreads);
          FUSED_RNN_UNROLL
          for (int j = 0; j < kMost; ++j)
            if (j < of_one) run(values[i][j], from + j * stride);
        }
      };
      each_word([](uint64_t& value, const uint64_t* from) { value = load_relaxed(from); });
      each_word([&](uint64_t& value, const uint64_t* from) {
        if (!is_there(value)) value = poll_relaxed(from, is_there);
      });
      FUSED_RNN_UNROLL
      for (int i = 0; i < kAtOnce; ++i)
        if (next + i * kThreads < count) take(next + i * kThreads, values[i]);
    }
  }

  FUSED_RNN_DEVICE void place_chunk(int column, int chunk,
                                    const uint64_t (&values)[kMostWords]) const {
    T* const to = operand + column * place.stride + chunk * team.cut.granule;
    if constexpr (kValues == 3) {
      constexpr uint64_t kOfWord = (uint64_t(1) << 48) - 1;
      const uint64_t low = (values[0] & kOfWord) | values[1] << 48;
      if (words() == 2) return store(reinterpret_cast<uint64_t*>(to), low);
      const uint64_t high = (values[1] >> 16 & 0xffffffff) | values[2] << 32;
      store_vector(reinterpret_cast<uint64_t*>(to), Vector<uint64_t, 2>{{low, high}});
    } else {
      Vector<uint32_t, 4> bits;
      FUSED_RNN_UNROLL
      for (int j = 0; j < 4; ++j) bits[j] = uint32_t(values[j]);
      store_vector(reinterpret_cast<uint32_t*>(to), bits);
    }
  }
};

// Runs a kernel with the blocks of a cut, all at the same time, and its words cleared.
template <class Machine, class Kernel, class Argument>
void launch_grid(Machine& machine, GridShape shape, const GridCut& cut, Kernel* kernel,
                 Argument& argument) {
  machine.clear(argument.team.words, grid_words(shape, cut) * int64_t(sizeof(uint64_t)));
  machine.launch_together(kernel, cut.team * cut.groups, 32 * kGridWarps,
                          GridShared(shape, cut).bytes, argument);
}

}  // namespace fused_rnn::cuda
