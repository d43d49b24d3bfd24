// Asks about the current device, for each argument MAJOR,PTX,FAILURE once, all in one process; then launches a kernel,
// which fails. Prints a line a question: error, major, largest cluster, clusters of 8 at once, error left behind.
#include <cstdio>

#include "fake_runtime.h"
#include "launch.h"

__global__ void some_kernel(int) {}

int main(int count, char** questions) {
  for (int i = 1; i < count; ++i) {
    if (std::sscanf(questions[i], "%d,%d,%d", &fake.major, &fake.ptx, &fake.failure) != 3) return 2;
    fastreft::Device device;
    const int error = fastreft::current_device(device);
    std::printf("%d %d %d %d %d\n", error, device.major, device.largest_cluster, device.resident[0][8],
                fake.left_behind);
  }
  fastreft::Grid grid;
  grid.cluster = 2;
  grid.x = 2;
  const int error = fastreft::launch<some_kernel>(grid, nullptr, 1);
  std::printf("launch %d %d\n", error, fake.left_behind);
  return 0;
}
