// What the runtime of fake_runtime.cpp answers.
#pragma once

struct Fake {
  int major = 9;        // the device's compute capability
  int ptx = 90;         // the virtual architecture of the kernels' code
  int failure = 0;      // the error of the next call, once
  int left_behind = 0;  // what cudaGetLastError would say
};
extern Fake fake;
