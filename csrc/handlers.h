// The XLA FFI handlers, one or more for every op.
#ifndef JPK_HANDLERS_H_
#define JPK_HANDLERS_H_

#include "xla/ffi/api/ffi.h"

XLA_FFI_DECLARE_HANDLER_SYMBOL(jpk_banded_error);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jpk_banded_error_gradients);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jpk_correlated_noise);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jpk_min_sep_norm);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jpk_participation_max);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jpk_privacy_loss_bins);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jpk_privacy_loss_steps);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jpk_toeplitz_finish);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jpk_toeplitz_multiply);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jpk_toeplitz_solve);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jpk_toeplitz_spectra);

#endif  // JPK_HANDLERS_H_
