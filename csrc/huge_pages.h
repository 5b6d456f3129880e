// Fewer page faults on the output.
#ifndef JPK_HUGE_PAGES_H_
#define JPK_HUGE_PAGES_H_

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace jpk {

// Asks for 2 MiB pages under a large buffer that is about to be written. XLA allocates the results
// of every call afresh, and the first touch of each 4 KiB page costs about as much as the noise in
// it; where the system leaves the choice to programs this takes up to a fifth off a step. Only a
// hint: it changes no contents.
inline void prefer_huge_pages([[maybe_unused]] void* buffer, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(buffer) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(buffer) + bytes) / kPage * kPage;
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace jpk

#endif  // JPK_HUGE_PAGES_H_
