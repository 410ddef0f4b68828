// Workspace.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../cells.h"

namespace FUSED_RNN_NAMESPACE {

// Hands out pieces of one block of memory. Without a block it only adds up their sizes, so that
// the code that takes the pieces is the code that computes how much is needed.
struct Arena {
  char* base = nullptr;
  size_t used = 0;

  template <class X>
  X* take(int64_t count) {
    X* piece = base ? reinterpret_cast<X*>(base + used) : nullptr;
    used += (size_t(count) * sizeof(X) + 63) / 64 * 64;
    return piece;
  }
};

}  // namespace FUSED_RNN_NAMESPACE
