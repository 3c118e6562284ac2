// The Python module askew_kernels._C. Importing it registers the operators (static initialisers of cpu/*.cpp,
// cuda/*.cpp); what it offers itself is information about the build and switches of the CPU implementation.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>

#include "cpu/loops.h"
#include "cpu/output_pool.h"
#include "tuning.h"

#ifndef ASKEW_CUDA_ARCHS
#define ASKEW_CUDA_ARCHS ""
#define ASKEW_CUDA_VERSION ""
#endif

namespace {
const std::map<std::string, int64_t askew::Tuning::*> kParameters = {
    {"prefetch_columns", &askew::Tuning::prefetch_columns}, {"piece_columns", &askew::Tuning::piece_columns},
    {"serial_elements", &askew::Tuning::serial_elements},   {"streaming_bytes", &askew::Tuning::streaming_bytes},
    {"pooled_bytes", &askew::Tuning::pooled_bytes},         {"slots", &askew::Tuning::slots},
};
}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operators of askew_kernels: build information and CPU switches.";
  m.attr("cuda_archs") = ASKEW_CUDA_ARCHS;      // as given to nvcc; empty: built without CUDA
  m.attr("cuda_version") = ASKEW_CUDA_VERSION;  // of nvcc; empty: built without CUDA
  m.attr("compiler") = __VERSION__;
  m.def("cpu_capability", &askew::capability, "Instruction set in use: baseline, avx2 or avx512.");
  m.def("packed_capability", &askew::packed_capability,
        "The same for products of packed weights: avx512_vnni where those with int8 activations use VNNI.");
  m.def(
      "bfloat16_products", [] { return askew::panel_loops(true) != nullptr; },
      "Whether products with bfloat16 inputs use AVX512_BF16.");
  m.def("best_cpu_capability", &askew::best_capability, "The best one that this CPU runs.");
  m.def(
      "force_cpu_capability",
      [](const char* name, bool vnni, bool bf16) {
        if (askew::force_capability(name, vnni, bf16)) return;
        const std::string expected =
            "cpu capability: expected baseline, avx2 or avx512, built and supported by this CPU";
        throw std::invalid_argument(expected + " (best here: " + askew::best_capability() + "), got " + name);
      },
      pybind11::arg("name"), pybind11::arg("vnni") = true, pybind11::arg("bf16") = true,
      "Use this instruction set from now on.");
  m.def(
      "tuning",
      [] {
        std::map<std::string, int64_t> found;
        for (const auto& [name, member] : kParameters) found[name] = askew::tuning.*member;
        return found;
      },
      "The launch parameters in use (csrc/tuning.h).");
  m.def(
      "set_tuning",
      [](const std::map<std::string, int64_t>& values) {
        for (const auto& [name, value] : values) askew::tuning.*kParameters.at(name) = value;
      },
      "Changes these launch parameters, which Python has checked, while no operator runs.");
  m.def("output_pool_bytes", &askew::output_pool_bytes, "Bytes that the CPU output pool holds for reuse.");
  m.def("set_output_pool_limit", &askew::set_output_pool_limit, "Most bytes the pool may hold; 0 switches it off.");
}
