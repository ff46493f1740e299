// How many threads work unless somebody says otherwise: the one place where that is decided.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>
#include <thread>

#include "cpu/system/thread_pool.h"
#include "gemma2.h"

#if defined(__linux__)
#include <sched.h>
#endif

namespace arcmerge {
namespace {

// Not hardware_concurrency first: with older C libraries it counts processors that the process may not use.
int processors() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  return std::max(1, int(std::thread::hardware_concurrency()));
}

// The first number of the variable, which may be a list for nested regions; kMaxThreads if it is none.
int openmp_threads() {
  const char* text = std::getenv("OMP_NUM_THREADS");
  if (!text) return kMaxThreads;
  char* end = nullptr;
  const long count = std::strtol(text, &end, 10);
  while (*end == ' ') ++end;
  const bool valid = end != text && (*end == '\0' || *end == ',') && count >= 1 && count <= kMaxThreads;
  return valid ? int(count) : kMaxThreads;
}

// Processors that a control group may use: version 2 has "QUOTA PERIOD" or "max PERIOD" in one file, version 1 has two
// files, with -1 for no limit. 0 where the folder says nothing.
double quota_of(const std::string& folder) {
  std::string quota;
  double period = 0;
  if (!(std::ifstream(folder + "/cpu.max") >> quota >> period)) {
    std::ifstream(folder + "/cpu.cfs_quota_us") >> quota;
    std::ifstream(folder + "/cpu.cfs_period_us") >> period;
  }
  const double allowed = std::atof(quota.c_str());
  return allowed > 0 && period > 0 ? allowed / period : 0;
}

bool has_word(const std::string& list, const std::string& word) {
  return ("," + list + ",").find("," + word + ",") != std::string::npos;
}

// The path of this process in the group hierarchy that `line` of /proc/self/cgroup is about, if it is one of
// processors.
bool group_of(const std::string& line, bool& is_version_2, std::string& path) {
  const auto first = line.find(':'), second = line.find(':', first + 1);
  if (first == std::string::npos || second == std::string::npos) return false;
  const std::string controllers = line.substr(first + 1, second - first - 1);
  is_version_2 = controllers.empty();
  path = line.substr(second + 1);
  return is_version_2 || has_word(controllers, "cpu");
}

}  // namespace

int quota_threads(const std::string& root) {
  double least = kMaxThreads;
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string group; std::getline(groups, group);) {
    bool is_version_2;
    std::string path;
    if (!group_of(group, is_version_2, path)) continue;
    std::ifstream mounts(root + "/proc/self/mountinfo");
    for (std::string mount; std::getline(mounts, mount);) {
      std::istringstream words(mount);
      std::string skip, top, point, word, type, source, options;
      words >> skip >> skip >> skip >> top >> point;
      while (words >> word && word != "-") {
      }
      words >> type >> source >> options;
      if (type != (is_version_2 ? "cgroup2" : "cgroup") || !(is_version_2 || has_word(options, "cpu"))) continue;
      // In a container the mount may begin at the group itself, or at one below what the process is told.
      if (top != "/" && path.compare(0, top.size(), top) == 0) path.erase(0, top.size());
      for (;;) {
        if (const double quota = quota_of(root + point + path); quota > 0) least = std::min(least, quota);
        const auto slash = path.rfind('/');
        if (slash == std::string::npos) break;
        path.erase(slash);
      }
    }
  }
  return int(std::ceil(least));
}

int default_threads() { return std::max(1, std::min({processors(), openmp_threads(), quota_threads("")})); }

}  // namespace arcmerge
