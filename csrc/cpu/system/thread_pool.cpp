// ThreadPool: its workers spin for a moment while they wait for work, then sleep.
//
// A range is a share of the work that is left, so that ranges are long at first, to read memory in order, and short at
// the end, so that threads stop together. The caller does not wait for workers that have not started: a worker that
// wakes late finds no work left.
#include "cpu/system/thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "gemma2.h"

namespace arcmerge {
namespace {

// The time for which a worker spins. It is longer than Python takes from one operation to the next, and to wake a
// sleeping worker costs the next operation 50 us.
constexpr auto kSpinTime = std::chrono::microseconds(50);

void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <class Condition>
bool spin_until(const Condition& condition) {
  const auto end = std::chrono::steady_clock::now() + kSpinTime;
  do {
    for (int i = 0; i < 32; ++i) {
      if (condition()) return true;
      pause_cpu();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

class ThreadPool {
 public:
  int threads() const { return threads_; }

  void set_threads(int threads) {
    const std::lock_guard<std::mutex> lock(callers_mutex_);
    threads_ = threads;
  }

  void run(std::int64_t count, std::int64_t grain, const Range& body) {
    const std::lock_guard<std::mutex> lock(callers_mutex_);
    resize();
    count_ = count;
    grain_ = grain;
    body_ = &body;
    error_ = nullptr;
    next_.store(0, std::memory_order_relaxed);
    active_.store(0, std::memory_order_release);
    announce();
    work();
    close();
    if (error_) std::rethrow_exception(error_);
  }

 private:
  // ---- the caller

  // Starts as many workers as threads_ demands.
  void resize() {
    if (int(workers_.size()) == threads_ - 1) return;
    stopping_ = true;
    announce();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
    stopping_ = false;
    for (int i = 1; i < threads_; ++i) workers_.emplace_back(&ThreadPool::run_worker, this, generation_.load());
  }

  // Starts a new generation of work and wakes sleeping workers. Either a worker that is about to sleep sees the new
  // generation, or the caller sees the sleeper, because both write before they read.
  void announce() {
    generation_.fetch_add(1);
    if (sleepers_.load() == 0) return;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
    }
    wake_.notify_all();
  }

  // Waits for the workers that have entered, and lets no more enter.
  void close() {
    for (int none = 0; !active_.compare_exchange_weak(none, kClosed, std::memory_order_acquire); none = 0)
      if (!spin_until([this] { return active_.load(std::memory_order_relaxed) == 0; })) std::this_thread::yield();
  }

  // ---- a worker

  void run_worker(std::uint64_t seen) {
    for (;;) {
      const auto has_work = [&] { return generation_.load() != seen; };
      if (!spin_until(has_work)) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, has_work);
        sleepers_.fetch_sub(1);
      }
      seen = generation_.load();
      if (stopping_) return;
      if (!enter()) continue;
      work();
      active_.fetch_sub(1, std::memory_order_release);
    }
  }

  bool enter() {
    int active = active_.load(std::memory_order_relaxed);
    while (active != kClosed)
      if (active_.compare_exchange_weak(active, active + 1, std::memory_order_acquire)) return true;
    return false;
  }

  // ---- both

  void work() {
    std::int64_t first, last;
    while (take(first, last)) {
      try {
        (*body_)(first, last);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!error_) error_ = std::current_exception();
        next_.store(count_);
      }
    }
  }

  bool take(std::int64_t& first, std::int64_t& last) {
    first = next_.load(std::memory_order_relaxed);
    do {
      if (first >= count_) return false;
      const std::int64_t grains = std::max<std::int64_t>(1, (count_ - first) / grain_ / (2 * threads_));
      last = std::min(first + grains * grain_, count_);
    } while (!next_.compare_exchange_weak(first, last, std::memory_order_relaxed));
    return true;
  }

  static constexpr int kClosed = -1;

  std::mutex callers_mutex_;  // held by one caller at a time
  std::atomic<int> threads_{default_threads()};
  std::vector<std::thread> workers_;

  std::int64_t count_, grain_;
  const Range* body_;
  std::exception_ptr error_;
  alignas(64) std::atomic<std::int64_t> next_{0};  // the first index that no thread has taken
  alignas(64) std::atomic<int> active_{kClosed};   // workers that use the members above

  alignas(64) std::atomic<std::uint64_t> generation_{0};
  std::atomic<bool> stopping_{false};
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;  // protects error_ and the decision to sleep
  std::condition_variable wake_;
};

// The pool is never destroyed: at exit its threads sleep, and end with the process. A forked process has none of these
// threads and may inherit locked mutexes, so it gets a new pool.
ThreadPool* pool = new ThreadPool;
const int registered = pthread_atfork(nullptr, nullptr, [] {
  const int threads = pool->threads();
  pool = new ThreadPool;
  pool->set_threads(threads);
});

}  // namespace

void parallel(std::int64_t count, std::int64_t grain, const Range& body) {
  if (count <= grain || pool->threads() == 1) {
    if (count > 0) body(0, count);
  } else {
    pool->run(count, grain, body);
  }
}

int threads() { return pool->threads(); }

void set_threads(int threads) {
  if (threads < 1 || threads > kMaxThreads)
    throw std::invalid_argument("'threads' must be a whole number from 1 to " + std::to_string(kMaxThreads) + ", got " +
                                std::to_string(threads));
  pool->set_threads(threads);
}

}  // namespace arcmerge
