// From an op's operands to the arguments of a device: checks, allocation.
#pragma once

#include <string>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "ops.h"

namespace fused_rnn {

using Shape = std::vector<int64_t>;

std::string to_string(const int64_t* sizes, size_t dim);

// Where an operand lies for each model.
struct Placed {
  const void* data = nullptr;
  int64_t stride = 0;  // bytes from one model to the next

  bool operator!() const { return !data; }
  const void* at(int64_t model) const {
    return data ? static_cast<const char*>(data) + model * stride : nullptr;
  }
};

// A result, and where it lies for each model.
struct Made {
  Tensor tensor;
  void* data = nullptr;  // null where there is none: the tensor is empty
  int64_t stride = 0;

  void* at(int64_t model) const {
    return data ? static_cast<char*>(data) + model * stride : nullptr;
  }
};

// Checks one operand and makes it contiguous; empty stays empty. Where models are stacked, an
// operand has their dimension first, and one that is expanded there is not copied. Keeps what it
// gives alive.
class Operands {
  const char* name_;
  Tensor like_;
  ScalarType io_;
  std::vector<Tensor> alive_;

 public:
  std::optional<int64_t> models;

  // All must be where `like`, called `name`, is.
  Operands(const char* name, const Tensor& like, std::optional<int64_t> models = std::nullopt)
      : name_(name), like_(like), io_(like.scalar_type()), models(models) {}

  const Tensor& like() const { return like_; }

  // The shape of all models' together.
  Shape stacked(Shape shape) const {
    if (models) shape.insert(shape.begin(), *models);
    return shape;
  }

  // A state may come in the dtype of x or in the carry dtype, anything else only in its own.
  Placed get(const char* name, const OptionalTensor& x, const Shape& shape, ScalarType type,
             bool state = false);
};

Tensor allocate(const Tensor& like, const Shape& shape, ScalarType type);
const CellShape& shape_of(int64_t cell);
ScalarType io_type(const char* name, const Tensor& x);

// The sizes and operands that forward and backward read the same way.
struct Problem {
  CellShape cell;
  ScalarType io, carry;
  Shape lead;  // [T, N], or [M] with rows
  Layer sizes{};
  Operands operands;
  Placed x, w_ih, w_hh, w_hr, control, rows, h_mask, keep, keep_share;

  Problem(const Device& device, int64_t cell_id, const Direction& of);

  int64_t models() const { return operands.models.value_or(1); }
  int64_t gates() const { return cell.gates * sizes.H; }
  bool has_c() const { return cell.states == 2; }

  Shape rows_of(int64_t width) const {
    Shape shape = lead;
    shape.push_back(width);
    return shape;
  }

  // A result; empty where there is none. A batch of none has gradients too: zeros.
  Made make(bool exists, const Shape& shape, ScalarType type, bool zero = false) const;
  Layer layer(int64_t model) const;
};

// The arguments of a device for each model and the results behind them, and what keeps the operands
// alive.
template <class Args, class Result>
struct Call {
  Problem problem;
  std::vector<Args> models;
  Result result;
};

Call<ForwardArgs, ForwardResult> prepare(const Device& device, int64_t cell, const Direction& of,
                                         bool save);
Call<BackwardArgs, BackwardResult> prepare(const Device& device, int64_t cell,
                                           const DirectionBackward& back);

}  // namespace fused_rnn
