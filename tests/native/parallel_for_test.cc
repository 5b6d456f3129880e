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
#include <new>
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

// A body that throws, on the thread that calls, on others or on all.
struct Failure {
  int64_t chunk;
};

enum class Thrower { kCaller, kHelper, kAny };

void test_exceptions_by_thread() {
  const std::thread::id caller = std::this_thread::get_id();
  for (int threads : {1, 2, 3}) {
    ThreadPool pool(threads);
    for (Thrower thrower : {Thrower::kCaller, Thrower::kHelper, Thrower::kAny}) {
      for (int repeat = 0; repeat < 20; ++repeat) {
        std::mutex mutex;
        std::condition_variable changed;
        bool thrown = false;
        int64_t visits[2] = {0, 0};
        int64_t caught = -1;
        try {
          jpk::parallel_for(pool, 2, 2, [&](int64_t chunk, int64_t) {
            ++visits[chunk];
            const bool is_caller = std::this_thread::get_id() == caller;
            std::unique_lock<std::mutex> lock(mutex);
            if (thrower == Thrower::kAny || is_caller == (thrower == Thrower::kCaller)) {
              thrown = true;
              changed.notify_all();
              throw Failure{chunk};
            }
            changed.wait(lock, [&] { return thrown; });  // for the other, which has a chunk left
          });
          CHECK(false, "%d threads: nothing is thrown", threads);
        } catch (const Failure& failure) {
          caught = failure.chunk;
        }
        CHECK(caught == 0 || caught == 1, "chunk %ld", static_cast<long>(caught));
        CHECK(visits[0] == 1 && visits[1] == 1, "%ld and %ld visits", long(visits[0]),
              long(visits[1]));
        check_loop(pool, 5, 1 + threads);
      }
    }
  }
}

template <typename Pool>
void check_exceptions(Pool& pool) {
  for (int64_t chunks : {1, 2, 3, 50}) {
    for (int64_t workers : {1, 2, 4}) {
      for (int64_t every : {int64_t{1}, int64_t{2}, chunks}) {  // the last chunk is one of them
        std::vector<int> visits(chunks, 0);
        int64_t caught = -1;
        try {
          jpk::parallel_for(pool, chunks, workers, [&](int64_t chunk, int64_t) {
            ++visits[chunk];
            if ((chunks - 1 - chunk) % every == 0) throw Failure{chunk};
          });
        } catch (const Failure& failure) {
          caught = failure.chunk;
        }
        CHECK(caught >= 0 && (chunks - 1 - caught) % every == 0, "chunk %ld",
              static_cast<long>(caught));
        if (workers == 1) continue;  // the caller has seen it before the next chunk
        for (int count : visits) CHECK(count == 1, "%d visits", count);
      }
    }
  }
  check_loop(pool, 100, 3);
}

void test_exceptions() {
  test_exceptions_by_thread();
  for (int threads : {1, 3}) {
    ThreadPool pool(threads);
    check_exceptions(pool);
  }
  DeafPool deaf;
  check_exceptions(deaf);
  LatePool late;  // its tasks find that all is over, also the exception
  check_exceptions(late);
  for (auto& task : late.tasks) task();
}

// In nested loops, through both.
void test_nested_exceptions() {
  ThreadPool pool(2);
  std::atomic<int> inner{0}, caught{0};
  try {
    jpk::parallel_for(pool, 10, 3, [&](int64_t, int64_t) {
      jpk::parallel_for(pool, 10, 3, [&](int64_t chunk, int64_t) {
        ++inner;
        if (chunk == 7) throw Failure{chunk};
      });
    });
  } catch (const Failure& failure) {
    caught = static_cast<int>(failure.chunk);
  }
  CHECK(inner == 100, "%d inner chunks", inner.load());
  CHECK(caught == 7, "chunk %d", caught.load());
}

// A pool that has no memory for another task.
struct FullPool {
  explicit FullPool(int64_t room) : room(room) {}
  ThreadPool pool{2};
  int64_t room;
  void Schedule(std::function<void()> task) {
    if (room-- <= 0) throw std::bad_alloc();
    pool.Schedule(std::move(task));
  }
};

void test_full_pool() {
  for (int64_t room : {0, 1, 2}) {
    FullPool pool(room);
    check_loop(pool, 40, 5);
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
  test_exceptions();
  test_nested_exceptions();
  test_full_pool();
  return report();
}
