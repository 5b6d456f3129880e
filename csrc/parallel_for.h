// Shares a loop out over a thread pool that other callers use at the same time.
#ifndef JPK_PARALLEL_FOR_H_
#define JPK_PARALLEL_FOR_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <utility>

namespace jpk {

// Calls body(chunk, worker) once for every chunk in [0, chunks), in any order, from up to `workers`
// threads at a time, each under a worker number of its own in [0, workers). Returns when all are
// done. What body throws is thrown on, the first if there are several; whether chunks after it are
// run is not said.
//
// Pool has Schedule(task), which runs task() on some thread sooner or later. The calling thread
// works too and never waits for a task that has not started, so a pool all of whose threads are
// inside parallel_for makes progress: helpers that come late find no chunk left and leave.
template <typename Pool, typename Body>
void parallel_for(Pool& pool, int64_t chunks, int64_t workers, const Body& body) {
  workers = std::min(workers, chunks);
  if (workers <= 1) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) body(chunk, 0);
    return;
  }

  struct Job {
    std::atomic<int64_t> next_chunk{0}, next_worker{0};
    std::mutex mutex;
    std::condition_variable finished;
    int64_t done = 0;
    std::exception_ptr error;
  };
  // Owned by the tasks as well: a late one outlives this call, and then touches nothing but the
  // counters.
  auto job = std::make_shared<Job>();

  auto work = [job, chunks, &body] {
    const int64_t worker = job->next_worker.fetch_add(1);
    int64_t mine = 0;
    for (int64_t chunk; (chunk = job->next_chunk.fetch_add(1)) < chunks; ++mine) {
      try {
        body(chunk, worker);
      } catch (...) {
        std::lock_guard<std::mutex> lock(job->mutex);
        if (!job->error) job->error = std::current_exception();
      }
    }
    if (mine == 0) return;
    std::lock_guard<std::mutex> lock(job->mutex);
    job->done += mine;
    if (job->done == chunks) job->finished.notify_one();
  };

  try {
    for (int64_t helper = 1; helper < workers; ++helper) {
      auto task = work;
      pool.Schedule(std::move(task));
    }
  } catch (...) {  // Out of memory: this thread and those scheduled already do it all.
  }
  work();
  std::unique_lock<std::mutex> lock(job->mutex);
  job->finished.wait(lock, [&] { return job->done == chunks; });
  // Taken out of the job, which a late task may be the last to hold.
  if (std::exception_ptr error = std::move(job->error)) std::rethrow_exception(error);
}

}  // namespace jpk

#endif  // JPK_PARALLEL_FOR_H_
