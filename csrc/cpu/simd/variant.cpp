// The list of variants, best first: their names and the instructions that they need.
#include "cpu/simd/variant.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "merge.h"

namespace arcmerge {
namespace {

struct Variant {
  const char* name;
  bool (*supported)();
};

bool always() { return true; }

#if ARCMERGE_WIDEST >= 256
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif
#if ARCMERGE_WIDEST == 512
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

#endif

constexpr Variant kVariants[] = {
#if ARCMERGE_WIDEST == 512
    {"avx512bf16", has_avx512bf16},
    {"avx512", has_avx512},
#endif
#if ARCMERGE_WIDEST >= 256
    {"avx2", has_avx2},
#endif
    {"baseline", always}};

constexpr int kVariantCount = sizeof(kVariants) / sizeof(kVariants[0]);

int best() {
  int index = 0;
  while (!kVariants[index].supported()) ++index;
  return index;
}

std::atomic<int> chosen{best()};

}  // namespace

int variant_index() { return chosen.load(std::memory_order_relaxed); }

std::string variant() { return kVariants[variant_index()].name; }

std::vector<std::string> variants() {
  std::vector<std::string> names;
  for (const Variant& candidate : kVariants)
    if (candidate.supported()) names.push_back(candidate.name);
  return names;
}

void use_variant(const std::string& name) {
  for (int index = 0; index < kVariantCount; ++index)
    if (kVariants[index].name == name && kVariants[index].supported()) return chosen.store(index);
  std::string known;
  for (const std::string& each : variants()) known += (known.empty() ? "" : ", ") + each;
  throw std::invalid_argument("'name' must be a variant that this processor can run (" + known + "), got '" + name +
                              "'");
}

}  // namespace arcmerge
