// The list of XLA FFI handlers. Each *_ffi.cc adds its own; module.cc hands all of them to Python.
#ifndef JPK_REGISTRY_H_
#define JPK_REGISTRY_H_

#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace jpk {

using Handler = XLA_FFI_Error*(XLA_FFI_CallFrame*);

inline std::vector<std::pair<const char*, Handler*>>& handlers() {
  static std::vector<std::pair<const char*, Handler*>> all;
  return all;
}

struct Registration {
  Registration(const char* name, Handler* handler) { handlers().emplace_back(name, handler); }
};

}  // namespace jpk

// Defines the handler `name` that calls `function` with what `binding` decodes, and lists it.
#define JPK_HANDLER(name, function, binding)              \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, function, binding); \
  static const jpk::Registration name##_registration(#name, &name)

#endif  // JPK_REGISTRY_H_
