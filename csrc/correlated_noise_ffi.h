#ifndef JPK_CORRELATED_NOISE_FFI_H_
#define JPK_CORRELATED_NOISE_FFI_H_

#include "xla/ffi/api/ffi.h"

XLA_FFI_DECLARE_HANDLER_SYMBOL(jpk_correlated_noise);

#endif  // JPK_CORRELATED_NOISE_FFI_H_
