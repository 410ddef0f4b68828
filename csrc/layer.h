// One layer, one direction: what a backend is asked to run. Plain data, no torch in it; the
// meaning of each tensor is in docs/architecture.md. Every tensor is contiguous. Pointers that may
// be null say so.
#pragma once

#include <stdint.h>

namespace fused_rnn {

// Rows whose products with the input's weights are made at a time on a GPU: enough for a product to
// run at full speed, few enough that they do not double the memory of a long sequence.
inline constexpr int64_t kInputRows = 8192;

enum CellId : int { kRnnTanh = 0, kRnnRelu = 1, kLstm = 2, kGru = 3, kCellCount = 4 };

enum ControlBits : uint8_t { kClear = 1, kHold = 2, kCut = 4 };

struct CellShape {
  const char* name;
  int64_t gates, states, saved;
  bool splits_gates;
};

inline constexpr CellShape kCellShapes[kCellCount] = {
    {"rnn_tanh", 1, 1, 0, false},
    {"rnn_relu", 1, 1, 0, false},
    {"lstm", 4, 2, 4, false},
    {"gru", 3, 1, 4, true},
};

// Cells with layer norms.
enum NormCellId : int { kNormLstm = 0, kNormGru = 1, kNormGruJoint = 2, kNormCellCount = 3 };

// `stats`: of each step, 1 / deviation of each group of gates, then (LSTM) of c.
struct NormCellShape : CellShape {
  int64_t stats;
};

inline constexpr NormCellShape kNormCellShapes[kNormCellCount] = {
    {{"layer_norm_lstm", 4, 2, 9, false}, 2},
    {{"layer_norm_gru", 3, 1, 6, false}, 2},
    {{"layer_norm_gru_joint", 3, 1, 6, false}, 1},
};

// What forward and backward share.
struct Layer {
  int cell;
  bool reverse;
  int64_t T, N, I, H, R;   // R = P with a projection, else H; I = G*H without w_ih
  int64_t M;               // rows of x: T*N, or with `rows` the live ones
  const void* x;           // io [M, I]
  const void* w_ih;        // [G*H, I], or null: x is gx, the product itself
  const void* w_hh;        // [G*H, R]
  const void* w_hr;        // [P, H] or null
  const uint8_t* control;  // [T, N] or null
  const int32_t* rows;     // [T, N] or null
  const void* h_mask;      // io [N, R] or null: what h is multiplied by on its way into the product
  const uint8_t* keep;     // [T, N, R + (S-1)*H] or null: where not 0, a state stays as it was
  const void* keep_share;  // carry [R + (S-1)*H] or null: how much of a state stays as it was
  int64_t algorithm;       // that has to run, by its number in plan.h; 0: the device chooses
  bool tf32;               // float32 may be multiplied in TF32
  int64_t chunk;           // steps that may run before all others of the layer; 0: device's choice
  int64_t layers;          // of its stack, which are planned together; 0: it is alone
  // In a stack, above dropout.
  void* dropped;          // io [M, I] or null: what forward makes of x, and multiplies
  const uint8_t* passed;  // [M, I] or null: 0 where an element was dropped
  double passed_scale;    // of the others
};

// What one call runs: a layer in one direction, or both directions of a layer, which have all
// sizes, x and rows in common.
inline constexpr int kMostDirections = 2;
template <class Args>
struct Directions {
  const Args* first;
  int count;

  Directions(const Args& only) : first(&only), count(1) {}
  Directions(const Args* first, int count) : first(first), count(count) {}
  const Args* begin() const { return first; }
  const Args* end() const { return first + count; }
  const Args& operator[](int i) const { return first[i]; }
};

// Layers one above the other in the order in which they run: forward from the lowest. The h of each
// is what the x of the next is, or is made of; backward the dx of each is the dh of the next.
template <class Args>
struct Stack {
  const Args* first;
  int count;
  bool side_by_side;  // a layer starts its next chunk when the one before it has ended that

  const Args& operator[](int i) const { return first[i]; }
};

// io: the dtype of x. carry: float for the half types, else io.
struct ForwardArgs : Layer {
  bool save;
  const void* b_ih;  // io [G*H] or null
  const void* b_hh;  // io [G*H] or null
  const void* h0;    // carry [N, R] or null
  const void* c0;    // carry [N, H] or null
  void* h;           // io [M, R]
  void* c;           // io [M, H] or null
  void* h_n;         // carry [N, R]
  void* c_n;         // carry [N, H] or null
  void* saved;       // io [M, kSaved*H] or null
};

struct BackwardArgs : Layer {
  const void* dh;     // io [M, R] or null
  const void* dc;     // io [M, H] or null
  const void* dh_n;   // carry [N, R] or null
  const void* dc_n;   // carry [N, H] or null
  const void* h;      // io [M, R]
  const void* c;      // io [M, H] or null
  const void* saved;  // io [M, kSaved*H] or null
  const void* h0;     // io [N, R] or null
  const void* c0;     // io [N, H] or null
  void* dh0;          // carry [N, R]
  void* dc0;          // carry [N, H] or null
  // Of io, and null where nobody asks.
  void* dx;     // [M, I]
  void* dw_ih;  // [G*H, I]
  void* db_ih;  // [G*H]
  void* dw_hh;  // [G*H, R]
  void* db_hh;  // [G*H]
  void* dw_hr;  // [P, H]
  // The norm of each step's dL/dh, through the output and all later steps; of the carry dtype, null
  // where nobody asks. Rows that hold have 0.
  void* dh_norm;  // [M]
};

// The same with layer norms, x being gx. There is no b_hh: what is added is the norm's bias.
struct NormForwardArgs : ForwardArgs {
  double eps;
  const void* gain;    // io [G*H]
  const void* bias;    // io [G*H] or null
  const void* c_gain;  // io [H], or null: c has no norm
  const void* c_bias;  // io [H] or null
  void* stats;         // carry [M, stats] or null
};

struct NormBackwardArgs : BackwardArgs {
  const void* gain;
  const void* bias;
  const void* c_gain;
  const void* c_bias;
  const void* stats;
  // Of io, and null where nobody asks.
  void* dgain;    // [G*H]
  void* dbias;    // [G*H]
  void* dc_gain;  // [H]
  void* dc_bias;  // [H]
};

// One step with both products given. Every tensor is io; backward reads what forward wrote.
struct StepArgs {
  int cell;
  int64_t N, H;
  const void* gx;   // [N, G*H]
  const void* gh;   // [N, G*H]
  const void* h;    // [N, H]
  const void* c;    // [N, H] or null
  void* h1;         // [N, H]
  void* c1;         // [N, H] or null
  void* saved;      // [N, kSaved*H], or null: no backward follows
  const void* dh1;  // [N, H] or null
  const void* dc1;  // [N, H] or null
  void* dgx;        // [N, G*H]
  void* dgh;        // [N, G*H], or null where it equals dgx
  void* dh;         // [N, H] or null: what does not pass through gh
  void* dc;         // [N, H] or null
};

// A whole step of a cell, products included. Every tensor is io.
struct CellArgs {
  int64_t N, I, H;
  const void* x;     // [N, I]
  const void* h;     // [N, H]
  const void* c;     // [N, H] or null
  const void* w_ih;  // [G*H, I]
  const void* w_hh;  // [G*H, H]
  const void* b_ih;  // [G*H] or null
  const void* b_hh;  // [G*H] or null
  void* h1;          // [N, H]
  void* c1;          // [N, H] or null
};

}  // namespace fused_rnn
