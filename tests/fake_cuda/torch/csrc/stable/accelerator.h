// torch's guard of the current device, over the run time of cuda_runtime.h beside this folder.
#pragma once

#include "cuda_runtime.h"

namespace torch::stable::accelerator {

class DeviceGuard {
  const int before_ = fake.device;

 public:
  explicit DeviceGuard(int index) { fake.device = index; }
  ~DeviceGuard() { fake.device = before_; }
};

}  // namespace torch::stable::accelerator
