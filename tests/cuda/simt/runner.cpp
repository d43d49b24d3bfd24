// Runs the project's host entry points on the simulated device. Reads commands from the standard input, a line each:
//     device MAJOR MINOR MULTIPROCESSORS SHARED LARGEST_CLUSTER          seed N
//     plant WHAT N [LAUNCH [FIRST LAST]]
//                                the N-th (WHAT: block, cluster, warp) barrier, copy wait (copy) or wait for arrivals
//                                (arrival) of every thread, or of those of some warps, is left out, in that launch or
//                                in all
//     load NAME FILE [SKEW]      a heap block of exactly the file's bytes (SKEW bytes past a 16-byte boundary)
//     make NAME BYTES            likewise, poisoned
//     save NAME FILE
//     set KEY VALUE              a field of the next call; the value of a pointer is a block's name
//     forward | backward | pooled | retract | step                the call; the block SCRATCH is its scratch
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <map>
#include <sstream>
#include <string>

#include "cuda_host.h"
#include "kernels.h"

namespace {

struct Memory {
  char* base = nullptr;
  char* p = nullptr;
  size_t bytes = 0;
};
std::map<std::string, Memory> memory;
std::map<std::string, std::string> fields;

[[noreturn]] void fail(const std::string& why) {
  std::cerr << "runner: " << why << std::endl;
  _Exit(4);
}

Memory& make(const std::string& name, size_t bytes, size_t skew) {
  Memory& block = memory[name];
  void* base = nullptr;
  if (posix_memalign(&base, 256, bytes + skew + (bytes + skew == 0)) != 0) fail("no memory");
  block = {static_cast<char*>(base), static_cast<char*>(base) + skew, bytes};
  memset(block.base, 0xff, bytes + skew);
  return block;
}

int64_t number(const std::string& key, int64_t otherwise = 0) {
  const auto at = fields.find(key);
  return at == fields.end() ? otherwise : std::stoll(at->second);
}
double real(const std::string& key, double otherwise = 0) {
  const auto at = fields.find(key);
  return at == fields.end() ? otherwise : std::stod(at->second);
}
char* pointer(const std::string& key) {
  const auto at = fields.find(key);
  if (at == fields.end()) return nullptr;
  const auto block = memory.find(at->second);
  if (block == memory.end()) fail("no block " + at->second);
  return block->second.p;
}
fastreft::DType type(const std::string& key) { return static_cast<fastreft::DType>(number(key)); }

fastreft::Rows rows(const std::string& key) {
  return {pointer(key), number(key + ".inner", 1), number(key + ".outer_stride", number("d")),
          number(key + ".inner_stride")};
}
fastreft::Weights weights() {
  fastreft::Weights w;
  w.U = {pointer("U"), type("U.type")};
  w.V = {pointer("V"), type("V.type")};
  w.P = {pointer("P"), type("P.type")};
  w.b = {pointer("b"), type("b.type")};
  w.c = {pointer("c"), type("c.type")};
  w.act = static_cast<fastreft::Act>(number("act"));
  w.tied = number("tied") != 0;
  return w;
}

int forward() {
  fastreft::EditArgs a;
  a.n = number("n");
  a.total = number("total");
  a.d = number("d");
  a.r = number("r");
  a.type = type("type");
  a.h = rows("h");
  a.out = rows("out");
  a.index = reinterpret_cast<const int64_t*>(pointer("index"));
  a.w = weights();
  a.saved = pointer("saved");
  a.z = pointer("z");
  return fastreft::edit_forward_cuda(a);
}

int backward() {
  fastreft::EditGradArgs a;
  a.n = number("n");
  a.total = number("total");
  a.d = number("d");
  a.r = number("r");
  a.type = type("type");
  a.g = rows("g");
  a.dh = rows("dh");
  a.h = rows("h");
  a.index = reinterpret_cast<const int64_t*>(pointer("index"));
  a.z = pointer("z");
  a.w = weights();
  a.dU = pointer("dU");
  a.dV = pointer("dV");
  a.dP = pointer("dP");
  a.db = pointer("db");
  a.dc = pointer("dc");
  const int64_t bytes = fastreft::edit_backward_scratch_bytes(a);
  if (bytes < 0) fail("scratch");
  a.scratch = make("SCRATCH", static_cast<size_t>(bytes), 0).p;
  return fastreft::edit_backward_cuda(a);
}

int pooled() {
  fastreft::PooledArgs a;
  a.n = number("n");
  a.total = number("total");
  a.d = number("d");
  a.type = type("type");
  a.h = rows("h");
  a.index = reinterpret_cast<const int64_t*>(pointer("index"));
  a.adapter = reinterpret_cast<const int64_t*>(pointer("adapter"));
  a.pool.A = {pointer("A"), type("A.type")};
  a.pool.U = {pointer("U"), type("U.type")};
  a.pool.b = {pointer("b"), type("b.type")};
  a.pool.c = {pointer("c"), type("c.type")};
  a.pool.table = reinterpret_cast<const int32_t*>(pointer("table"));
  a.pool.vectors = number("vectors");
  a.pool.adapters = number("adapters");
  a.most_r = number("most_r");
  return fastreft::edit_pooled_cuda(a);
}

std::vector<fastreft::StepItem> items() {
  std::vector<fastreft::StepItem> list(static_cast<size_t>(number("count")));
  for (size_t i = 0; i < list.size(); ++i) {
    const std::string n = "." + std::to_string(i);
    list[i].param = {pointer("param" + n), number("r" + n), number("d" + n), type("type" + n)};
    list[i].g = pointer("g" + n);
    list[i].m = pointer("m" + n);
    list[i].v = pointer("v" + n);
    list[i].age = reinterpret_cast<const float*>(pointer("age" + n));
    list[i].orthonormal = number("orthonormal" + n) != 0;
  }
  return list;
}

int retract() {
  std::vector<fastreft::Matrix> list;
  for (const auto& item : items()) list.push_back(item.param);
  const int count = static_cast<int>(list.size());
  char* scratch = make("SCRATCH", static_cast<size_t>(fastreft::retract_scratch_bytes(list.data(), count)), 0).p;
  return fastreft::retract_cuda(list.data(), count, scratch, nullptr);
}

int step() {
  const auto list = items();
  const int count = static_cast<int>(list.size());
  fastreft::StepArgs a;
  a.lr = real("lr");
  a.beta1 = real("beta1", 0.9);
  a.beta2 = real("beta2", 0.999);
  a.eps = real("eps", 1e-8);
  a.weight_decay = real("weight_decay");
  a.correction1 = real("correction1", 1);
  a.correction2 = real("correction2", 1);
  a.live_lr = {pointer("live_lr"), type("live_lr.type")};
  char* scratch = make("SCRATCH", static_cast<size_t>(fastreft::adamw_step_scratch_bytes(list.data(), count)), 0).p;
  return fastreft::adamw_step_cuda(list.data(), count, a, scratch, nullptr);
}

}  // namespace

int main() {
  std::string line;
  while (std::getline(std::cin, line)) {
    std::istringstream in(line);
    std::string word, a, b;
    in >> word;
    if (word == "device") {
      in >> simt::device.major >> simt::device.minor >> simt::device.multiprocessors >> simt::device.shared >>
          simt::device.largest_cluster;
    } else if (word == "seed") {
      uint64_t n = 0;
      in >> n;
      simt::seed(n);
    } else if (word == "plant") {
      const std::map<std::string, int*> faults = {{"block", &simt::plant.block_barrier},
                                                  {"cluster", &simt::plant.cluster_barrier},
                                                  {"warp", &simt::plant.warp_barrier},
                                                  {"copy", &simt::plant.copy_wait},
                                                  {"arrival", &simt::plant.arrival_wait}};
      in >> word;
      if (!faults.count(word) || !(in >> *faults.at(word))) fail("no such fault: " + line);
      if (!(in >> simt::plant.launch)) simt::plant.launch = -1;
      for (int end = 0; end < 2; ++end)
        if (!(in >> simt::plant.warps[end])) simt::plant.warps[end] = end == 0 ? 0 : 31;
    } else if (word == "load") {
      size_t skew = 0;
      in >> a >> b >> skew;
      std::ifstream file(b, std::ios::binary | std::ios::ate);
      if (!file) fail("no file " + b);
      const auto bytes = static_cast<size_t>(file.tellg());
      file.seekg(0);
      file.read(make(a, bytes, skew).p, static_cast<std::streamsize>(bytes));
    } else if (word == "make") {
      size_t bytes = 0;
      in >> a >> bytes;
      make(a, bytes, 0);
    } else if (word == "save") {
      in >> a >> b;
      std::ofstream(b, std::ios::binary).write(memory.at(a).p, static_cast<std::streamsize>(memory.at(a).bytes));
    } else if (word == "set") {
      in >> a >> b;
      fields[a] = b;
    } else if (!word.empty()) {
      const int error = word == "forward"    ? forward()
                        : word == "backward" ? backward()
                        : word == "pooled"   ? pooled()
                        : word == "retract"  ? retract()
                        : word == "step"     ? step()
                                             : -1;
      if (error != 0) fail(word + " returned " + std::to_string(error));
      fields.clear();
    }
  }
  for (auto& block : memory) free(block.second.base);
  return 0;
}
