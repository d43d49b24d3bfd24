// What a function is called that runs on the host and, where nvcc compiles it, on the device.
#pragma once
#ifdef __CUDACC__
#define FASTREFT_HOST_DEVICE __host__ __device__
#else
#define FASTREFT_HOST_DEVICE
#endif
