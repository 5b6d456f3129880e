// parallel_for on pools that are busy, small, late, inline or deaf. A deadlock shows as CTest's
// timeout, a race under ThreadSanitizer.
#include "parallel_for.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "thread_pool.h"

namespace {

// Runs a loop and checks the contract. What the body writes is not atomic, on purpose: two threads
// that share a chunk or a worker number, or a return before the last chunk is done, are data races.
template <typename Pool>
void check_loop(Pool& pool, int64_t chunks, int64_t workers) {
  const int64_t bound = std::max<int64_t>(std::min(workers, chunks), 1);
  std::vector<int> visits(chunks, 0);
  std::vector<std::thread::id> owner(bound);
  std::vector<int64_t> work(bound, 0);
  jpk::parallel_for(pool, chunks, workers, [&](int64_t chunk, int64_t worker) {
    CHECK(0 <= chunk && chunk < chunks, "chunk %ld", static_cast<long>(chunk));
    CHECK(0 <= worker && worker < bound, "worker %ld", static_cast<long>(worker));
    if (work[worker]++ == 0) owner[worker] = std::this_thread::get_id();
    CHECK(owner[worker] == std::this_thread::get_id(), "worker %ld", static_cast<long>(worker));
    if (chunk % 8 < 2) {  // long enough for others to come and take a share
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
    ++visits[chunk];
  });
  int64_t total = 0;
  for (int64_t done : work) total += done;
  CHECK(total == chunks, "%ld chunks", static_cast<long>(total));
  for (int count : visits) CHECK(count == 1, "%d visits", count);
}

void test_chunks_and_workers() {
  for (int threads : {1, 2, 3}) {
    ThreadPool pool(threads);
    for (int64_t chunks : {0, 1, 2, 3, 7, 64, 1000}) {
      for (int64_t workers : {-1, 0, 1, 2, 3, 8, 2000}) check_loop(pool, chunks, workers);
    }
  }
}

// Many loops at once, all from inside the pool's own tasks, so that every thread is in some loop.
void test_concurrent_loops() {
  constexpr int kLoops = 200;
  for (int threads : {1, 2}) {
    ThreadPool pool(threads);
    std::mutex mutex;
    std::condition_variable changed;
    int done = 0;
    for (int i = 0; i < kLoops; ++i) {
      pool.Schedule([&, i] {
        check_loop(pool, 1 + i % 17, 2 + i % 5);
        std::lock_guard<std::mutex> lock(mutex);
        if (++done == kLoops) changed.notify_one();
      });
    }
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return done == kLoops; });
  }
}

void test_nested_loops() {
  for (int threads : {1, 2}) {
    ThreadPool pool(threads);
    std::atomic<int> inner{0};
    jpk::parallel_for(pool, 20, 4, [&](int64_t, int64_t) {
      jpk::parallel_for(pool, 20, 4, [&](int64_t, int64_t) { ++inner; });
    });
    CHECK(inner == 400, "%d inner chunks", inner.load());
  }
}

struct LatePool {
  std::vector<std::function<void()>> tasks;
  void Schedule(std::function<void()> task) { tasks.push_back(std::move(task)); }
};

void test_late_tasks() {
  LatePool pool;
  {
    auto calls = std::make_unique<int>(0);  // on the heap, where AddressSanitizer sees a late use
    auto body = std::make_unique<std::function<void(int64_t, int64_t)>>(
        [&calls](int64_t, int64_t) { ++*calls; });
    jpk::parallel_for(pool, 10, 4, *body);
    CHECK(*calls == 10, "%d calls", *calls);
  }
  CHECK(pool.tasks.size() == 3, "%zu tasks", pool.tasks.size());
  for (auto& task : pool.tasks) task();

  // Late, and on other threads, while the next loop is on.
  LatePool late;
  check_loop(late, 10, 4);
  ThreadPool threads(2);
  for (auto& task : late.tasks) threads.Schedule(std::move(task));
  check_loop(threads, 1000, 3);
}

struct InlinePool {
  template <typename Task>
  void Schedule(Task task) {
    task();
  }
};

struct DeafPool {
  template <typename Task>
  void Schedule(Task&&) {}
};

// A helper that finds no chunk left takes a number all the same: the last may be workers - 1, no
// more.
template <typename Pool>
void test_degenerate_pool() {
  Pool pool;
  for (int64_t chunks : {0, 1, 2, 100}) {
    for (int64_t workers : {1, 2, 7}) {
      std::vector<int> visits(chunks, 0);
      jpk::parallel_for(pool, chunks, workers, [&](int64_t chunk, int64_t worker) {
        CHECK(0 <= worker && worker < workers, "worker %ld", static_cast<long>(worker));
        ++visits[chunk];
      });
      for (int count : visits) CHECK(count == 1, "%d visits", count);
    }
  }
}

}  // namespace

int main() {
  test_chunks_and_workers();
  test_concurrent_loops();
  test_nested_loops();
  test_late_tasks();
  test_degenerate_pool<InlinePool>();
  test_degenerate_pool<DeafPool>();
  return report();
}
