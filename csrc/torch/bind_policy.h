// The launch policy (policy.h, policy_retract.h) as Python functions, so that tests can look at every decision with no
// GPU at hand.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "../cuda/policy_retract.h"

namespace fastreft {

inline void bind_policy(pybind11::module_& module) {
  namespace py = pybind11;
  py::module_ policy = module.def_submodule("policy", "CUDA launch policy: pure functions of shapes and device.");
  // `resident`: clusters of 1, 2, ... CTAs that run at once, [one, two CTAs a multiprocessor]; empty: never asked.
  const auto device = [](int major, int minor, int multiprocessors, int64_t shared, int largest_cluster,
                         const std::vector<std::vector<int>>& resident) {
    Device made{major, minor, multiprocessors, shared, largest_cluster, !resident.empty(), {}};
    for (size_t i = 0; i < resident.size() && i < 2; ++i)
      for (size_t c = 0; c < resident[i].size() && c < 16; ++c) made.resident[i][c + 1] = resident[i][c];
    return made;
  };
  py::class_<Device>(policy, "Device")
      .def(py::init(device), py::arg("major"), py::arg("minor"), py::arg("multiprocessors"), py::arg("shared"),
           py::arg("largest_cluster"), py::arg("resident") = std::vector<std::vector<int>>())
      .def_readonly("major", &Device::major)
      .def_readonly("multiprocessors", &Device::multiprocessors)
      .def_readonly("shared", &Device::shared)
      .def_readonly("largest_cluster", &Device::largest_cluster);
  policy.def("usable_major", &usable_major, py::arg("device_major"), py::arg("ptx"),
             "The compute capability's major number that plans may count on.");
  policy.def("padded_rank", &padded_rank, py::arg("r"), "r padded to 8, 16, 32 or 64; 0 beyond.");
  policy.def(
      "fused",
      [](int64_t n, int64_t d, int64_t r, int shrinks, int expands, bool both, const Device& device, bool streamed) {
        const FusedPlan plan = both       ? plan_both(n, d, r, expands, device)
                               : streamed ? plan_streamed(n, d, r, shrinks, expands, device)
                                          : plan_pass(n, d, r, shrinks, expands, device);
        py::dict out;
        out["fits"] = plan.fits;
        out["rank"] = plan.shape.rank;
        out["cluster"] = plan.shape.cluster;
        out["rows"] = plan.shape.rows;
        out["stages"] = plan.shape.stages;
        out["width"] = plan.shape.width;
        out["pieces"] = plan.shape.pieces;
        out["held"] = plan.shape.held;
        out["tiles"] = plan.tiles;
        out["clusters"] = plan.clusters;
        out["shared"] = plan.shared;
        out["per_sm"] = plan.per_sm;
        return out;
      },
      py::arg("n"), py::arg("d"), py::arg("r"), py::arg("shrinks"), py::arg("expands"), py::arg("both"),
      py::arg("device"), py::arg("streamed") = false,
      "A pass on tensor cores; `both`: the one-pass backward; `streamed`: with the matrices in pieces.");
  policy.def(
      "copy",
      [](int64_t total, int cluster, const Device& device) {
        const int rows = plan_copy(total, device);
        return py::make_tuple(rows, copy_blocks(total, rows, cluster));
      },
      py::arg("total"), py::arg("cluster"), py::arg("device"), "(rows a copying CTA owns, copying CTAs).");
  policy.def(
      "simple",
      [](int64_t n, int64_t r, int64_t size, const Device& device) {
        const SimplePlan plan = plan_simple(n, r, size, device);
        py::dict out;
        out["fits"] = plan.fits;
        out["blocks"] = plan.blocks;
        out["rows"] = kSimpleRows;
        out["shared"] = plan.shared;
        return out;
      },
      py::arg("n"), py::arg("r"), py::arg("size"), py::arg("device"), "A pass on CUDA cores; size: bytes of a sum.");
  policy.def(
      "sums",
      [](int64_t n, int64_t d, int64_t r, bool tensor_cores, const Device& device, bool three) {
        const int depth = both_depth(padded_rank(r)), columns = sums_columns(depth, three);
        const int stages = sums_stages(depth, three, device), per_sm = tensor_cores ? 1 : kGradPerSm;
        const GradPlan plan = tensor_cores ? plan_grad(n, d, r, columns, r, per_sm, device)
                                           : plan_grad(n, d, r, kGradThreads, kGradChunk, per_sm, device);
        py::dict out;
        out["range"] = plan.range;
        out["splits"] = plan.splits;
        out["column_blocks"] = plan.column_blocks;
        out["columns"] = tensor_cores ? columns : kGradThreads;
        out["chunks"] = plan.chunks;
        out["per_sm"] = per_sm;
        out["coordinates"] = tensor_cores ? r : kGradChunk;
        out["shared"] = tensor_cores ? sums_shared(depth, three, stages) : grad_shared(8);
        return out;
      },
      py::arg("n"), py::arg("d"), py::arg("r"), py::arg("tensor_cores"), py::arg("device"), py::arg("three") = false,
      "The sums over rows of the weights' gradients; three: with gz's.");
  policy.def(
      "retract",
      [](int64_t r, int64_t d, int64_t matrices, bool wide, const Device& device) {
        const RetractPlan plan = plan_retract(r, d, matrices, wide, device);
        py::dict out;
        out["cluster"] = plan.cluster;
        out["terms"] = plan.terms;
        out["in_shared"] = plan.shared_entries > 0;
        const int64_t slice = retract_chunks(r, retract_columns(d, plan.cluster), wide ? 8 : 4);
        out["resident"] = slice <= plan.room;
        const int64_t chunks = slice <= plan.room && slice > plan.chunk_bytes ? slice : plan.chunk_bytes;
        out["shared"] = retract_shared(plan.shared_entries, chunks);
        return out;
      },
      py::arg("r"), py::arg("d"), py::arg("matrices"), py::arg("wide"), py::arg("device"), "A retraction.");
}

}  // namespace fastreft
