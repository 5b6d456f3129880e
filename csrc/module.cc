// The Python extension: a table of XLA FFI handlers, and what it was compiled for.
#include <nanobind/nanobind.h>

#include "registry.h"
#include "simd_target.h"

namespace nb = nanobind;

NB_MODULE(_jpk, m) {
  m.attr("__doc__") =
      "Compiled kernels of jax_privacy_kernels. Private: use jax_privacy_kernels.ops.";
  m.def("handlers", [] {
    nb::dict table;
    for (const auto& [name, handler] : jpk::handlers()) {
      table[name] = nb::capsule(reinterpret_cast<void*>(handler));
    }
    return table;
  });
  m.def("simd_target", &jpk::simd_target);
}
