// The whole of the native tests' framework.
#ifndef JPK_TESTS_CHECK_H_
#define JPK_TESTS_CHECK_H_

#include <atomic>
#include <cstdio>

inline std::atomic<long> checks{0}, failures{0};

// CHECK(condition, "what %d", value): counts, and prints the first failures.
#define CHECK(condition, ...)                                         \
  do {                                                                \
    ++checks;                                                         \
    if (!(condition) && ++failures <= 20) {                           \
      std::printf("%s:%d: not %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                       \
      std::printf("\n");                                              \
    }                                                                 \
  } while (false)

// What main() returns.
inline int report() {
  std::printf("%ld checks, %ld failures\n", checks.load(), failures.load());
  return failures != 0 || checks == 0;
}

#endif  // JPK_TESTS_CHECK_H_
