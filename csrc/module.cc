// The Python extension: a table of XLA FFI handlers, and what it was compiled for.
#include <nanobind/nanobind.h>

#include "handlers.h"
#include "simd_target.h"

namespace nb = nanobind;

NB_MODULE(_jpk, m) {
  m.attr("__doc__") =
      "Compiled kernels of jax_privacy_kernels. Private: use jax_privacy_kernels.ops.";
  m.def("handlers", [] {
    nb::dict table;
    auto add = [&](const char* name, auto* handler) {
      table[name] = nb::capsule(reinterpret_cast<void*>(handler));
    };
    add("jpk_banded_error", jpk_banded_error);
    add("jpk_banded_error_gradients", jpk_banded_error_gradients);
    add("jpk_correlated_noise", jpk_correlated_noise);
    add("jpk_min_sep_norm", jpk_min_sep_norm);
    add("jpk_participation_max", jpk_participation_max);
    add("jpk_privacy_loss_bins", jpk_privacy_loss_bins);
    add("jpk_privacy_loss_steps", jpk_privacy_loss_steps);
    add("jpk_toeplitz_finish", jpk_toeplitz_finish);
    add("jpk_toeplitz_multiply", jpk_toeplitz_multiply);
    add("jpk_toeplitz_solve", jpk_toeplitz_solve);
    add("jpk_toeplitz_spectra", jpk_toeplitz_spectra);
    return table;
  });
  m.def("simd_target", &jpk::simd_target);
}
