// What planning a launch takes, with no CUDA in it: its shape, and what the device can do.
#pragma once
#include "policy.h"

namespace fastreft {

constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue

struct Grid {
  int64_t x = 1;  // CTAs, a multiple of `cluster`
  int y = 1, z = 1;
  int threads = 256;
  int cluster = 1;  // CTAs in a cluster, along x
  int64_t shared = 0;
  // Begins while the launch before it ends, from cc 9.0 on: for kernels that touch nothing in global memory before
  // wait_for_launch_before().
  bool early = false;
};

// What the policy needs to know of the current device, asked until it has answered; returns a cudaError_t.
int current_device(Device& device);

}  // namespace fastreft
