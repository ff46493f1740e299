// A program for ThreadSanitizer. Several threads call the operations at once, while others change the number of threads
// and fork; then the process ends while a thread still computes. Every result must be that of a call alone.
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu/system/thread_pool.h"
#include "gemma2.h"
#include "merge.h"

namespace {

using namespace arcmerge;

constexpr int kTimes = 20;
constexpr std::int64_t kRows = 512, kLength = 256, kTokens = 40, kHeads = 2, kHeadDim = 128;

void require(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::_Exit(1);
}

std::vector<float> numbers(std::int64_t count, std::uint32_t state) {
  std::vector<float> made(count);
  for (float& one : made) one = float(std::int32_t(state = state * 1664525 + 1013904223)) * 0x1p-31f;
  return made;
}

const char* bytes(const std::vector<float>& numbers) { return reinterpret_cast<const char*>(numbers.data()); }

using Result = std::vector<float>;

// Never destroyed, because a thread still reads them at exit.
const Result &kX = *new Result(numbers(kTokens * kLength, 1)), &kWeight = *new Result(numbers(kRows * kLength, 2)),
             &kUp = *new Result(numbers(kRows * kLength, 3));

Result merged() {
  const std::vector<Operand> operands{{bytes(kWeight), DType::f32}, {bytes(kUp), DType::f32}};
  const std::int64_t count = kRows * kLength;
  double products[4];
  gram(operands, nullptr, 0, count, products);
  Result out(count);
  require(combine(out.data(), DType::f32, operands, {0.25f, float(products[1] / products[0])}, 0, count) == 0,
          "a sum is not finite");
  return out;
}

Result multiplied() {
  Result out(kTokens * kRows);
  linear(out.data(), kX.data(), kTokens, kLength, {{bytes(kWeight), kRows}}, DType::f32);
  return out;
}

Result one_row() {
  Result out(kRows);
  linear_geglu(out.data(), kX.data(), 1, kLength, kWeight.data(), kUp.data(), kRows, DType::f32);
  return out;
}

Result attended() {
  std::vector<float> key = kWeight, value = kUp;  // [1, 1, slots, head_dim]
  KvCache cache;
  cache.key = reinterpret_cast<char*>(key.data());
  cache.value = reinterpret_cast<char*>(value.data());
  cache.sequences = cache.heads = 1;
  cache.slots = std::int64_t(key.size()) / kHeadDim;
  cache.head_dim = kHeadDim;
  cache.dtype = DType::f32;
  const std::int32_t starts[] = {0, kTokens}, lengths[] = {kTokens + 100};
  Result out(kTokens * kHeads * kHeadDim);
  attention(out.data(), kX.data(), kHeads, cache, starts, lengths, 0.1, 50, 64);
  return out;
}

Result scored() {
  LmHead head;
  head.x = bytes(kX);
  head.weight = bytes(kWeight);
  head.count = kTokens;
  head.ids = kRows;
  head.length = kLength;
  head.dtype = DType::f32;
  head.softcap = 30;
  const std::vector<std::int64_t> ids(kTokens, 7);
  std::vector<std::int64_t> best(kTokens);
  Result out(kTokens);
  lm_head_logprob(out.data(), best.data(), head, ids.data());
  out.insert(out.end(), best.begin(), best.end());
  return out;
}

Result failed() {
  try {
    parallel(1000, 1, [](std::int64_t first, std::int64_t last) {
      if (first <= 500 && 500 < last) throw std::runtime_error("in a range");
    });
  } catch (const std::runtime_error&) {
    return {1};
  }
  return {0};
}

const std::vector<std::function<Result()>> kCalls{merged, multiplied, one_row, attended, scored, failed};

void all_at_once(const std::vector<Result>& alone, int times) {
  std::vector<std::thread> callers;
  for (std::size_t number = 0; number < kCalls.size(); ++number)
    callers.emplace_back([&, number] {
      for (int i = 0; i < times; ++i)
        require(kCalls[number]() == alone[number], "a result differs from that of a call alone");
    });
  callers.emplace_back([&] {
    for (int i = 0; i < times; ++i) {
      set_threads(1 + i % 4);
      require(threads() <= 4, "the number of threads");
    }
    set_threads(3);
  });
  for (std::thread& caller : callers) caller.join();
}

void forked(const std::vector<Result>& alone) {
  const pid_t child = fork();
  if (child == 0) {
    for (std::size_t number = 0; number < kCalls.size(); ++number)
      require(kCalls[number]() == alone[number], "a result in a forked process");
    std::_Exit(0);
  }
  int status = 0;
  require(child > 0 && waitpid(child, &status, 0) == child && status == 0, "a forked process fails");
}

}  // namespace

int main() {
  std::vector<Result> alone;
  set_threads(1);
  for (const auto& call : kCalls) alone.push_back(call());
  set_threads(3);
  for (std::size_t number = 0; number < kCalls.size(); ++number)
    require(kCalls[number]() == alone[number], "a result depends on the number of threads");
  all_at_once(alone, kTimes);
  forked(alone);  // while the workers wait
  std::thread busy([&] { all_at_once(alone, kTimes); });
  for (int i = 0; i < 5; ++i) forked(alone);  // while other threads work
  busy.join();
  std::thread([&] {
    for (;;) multiplied();
  }).detach();
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  std::puts("threads: clean");
  return 0;
}
