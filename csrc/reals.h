// Vectors of float or double in memory, which kernels read and write as double.
#ifndef JPK_REALS_H_
#define JPK_REALS_H_

#include <cstdint>
#include <type_traits>

namespace jpk {

struct Reals {
  void* data;
  bool wide;  // double, not float
};

// Elements at, at + stride, ...; count of them. The stride may be negative.
inline void read(const Reals& from, int64_t at, int64_t stride, int64_t count, double* to) {
  auto copy = [=](const auto* p) {
    for (int64_t i = 0; i < count; ++i) to[i] = p[i * stride];
  };
  if (from.wide) {
    copy(static_cast<const double*>(from.data) + at);
  } else {
    copy(static_cast<const float*>(from.data) + at);
  }
}

inline void write(const double* from, int64_t at, int64_t stride, int64_t count, const Reals& to) {
  auto copy = [=](auto* p) {
    for (int64_t i = 0; i < count; ++i) {
      p[i * stride] = static_cast<std::remove_reference_t<decltype(*p)>>(from[i]);
    }
  };
  if (to.wide) {
    copy(static_cast<double*>(to.data) + at);
  } else {
    copy(static_cast<float*>(to.data) + at);
  }
}

}  // namespace jpk

#endif  // JPK_REALS_H_
