// The pool: workers look for work for a moment, then sleep.
//
// A range is a share of what is left, so that ranges are long at first (memory is read in order) and short at the end
// (threads stop together). A worker that wakes late finds nothing left and nobody waiting for it.
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

// Longer than Python takes from one operation to the next; a sleeper costs the next operation 50 us.
constexpr auto kPatience = std::chrono::microseconds(50);

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <class Condition>
bool spin_until(const Condition& condition) {
  const auto end = std::chrono::steady_clock::now() + kPatience;
  do {
    for (int i = 0; i < 32; ++i) {
      if (condition()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

class Pool {
 public:
  int threads() const { return threads_; }

  void set_threads(int threads) {
    const std::lock_guard<std::mutex> turn(turn_);
    threads_ = threads;
  }

  void run(std::int64_t count, std::int64_t grain, const Range& body) {
    const std::lock_guard<std::mutex> turn(turn_);
    hire();
    count_ = count;
    grain_ = grain;
    body_ = &body;
    error_ = nullptr;
    next_.store(0, std::memory_order_relaxed);
    inside_.store(0, std::memory_order_release);
    announce();
    work();
    close();
    if (error_) std::rethrow_exception(error_);
  }

 private:
  // ---- the caller

  void hire() {
    if (int(workers_.size()) == threads_ - 1) return;
    leaving_ = true;
    announce();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
    leaving_ = false;
    for (int i = 1; i < threads_; ++i) workers_.emplace_back(&Pool::serve, this, news_.load());
  }

  // Either a worker that is about to sleep sees the news, or the caller sees the sleeper: both write before they read.
  void announce() {
    news_.fetch_add(1);
    if (sleepers_.load() == 0) return;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
    }
    wake_.notify_all();
  }

  void close() {
    for (int nobody = 0; !inside_.compare_exchange_weak(nobody, kClosed, std::memory_order_acquire); nobody = 0)
      if (!spin_until([this] { return inside_.load(std::memory_order_relaxed) == 0; })) std::this_thread::yield();
  }

  // ---- a worker

  void serve(std::uint64_t seen) {
    for (;;) {
      const auto is_new = [&] { return news_.load() != seen; };
      if (!spin_until(is_new)) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, is_new);
        sleepers_.fetch_sub(1);
      }
      seen = news_.load();
      if (leaving_) return;
      if (!enter()) continue;
      work();
      inside_.fetch_sub(1, std::memory_order_release);
    }
  }

  bool enter() {
    int inside = inside_.load(std::memory_order_relaxed);
    while (inside != kClosed)
      if (inside_.compare_exchange_weak(inside, inside + 1, std::memory_order_acquire)) return true;
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

  std::mutex turn_;  // of the callers
  std::atomic<int> threads_{default_threads()};
  std::vector<std::thread> workers_;

  std::int64_t count_, grain_;
  const Range* body_;
  std::exception_ptr error_;
  alignas(64) std::atomic<std::int64_t> next_{0};  // index that nobody has taken
  alignas(64) std::atomic<int> inside_{kClosed};   // workers that may still touch the members above

  alignas(64) std::atomic<std::uint64_t> news_{0};
  std::atomic<bool> leaving_{false};
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;  // of error_ and of going to sleep
  std::condition_variable wake_;
};

// Never destroyed: at exit its threads sleep, and end with the process. A forked process has none of them and may have
// inherited locked mutexes, so it gets a pool of its own.
Pool* pool = new Pool;
const int registered = pthread_atfork(nullptr, nullptr, [] {
  const int threads = pool->threads();
  pool = new Pool;
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
    throw std::invalid_argument("'threads' must be 1 to " + std::to_string(kMaxThreads) + ", got " +
                                std::to_string(threads));
  pool->set_threads(threads);
}

}  // namespace arcmerge
