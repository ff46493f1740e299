// The default number of threads.
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

// The affinity mask comes first, because hardware_concurrency of older C libraries counts processors that the process
// may not use.
int processors() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  return std::max(1, int(std::thread::hardware_concurrency()));
}

// The first number of OMP_NUM_THREADS, which may be a list for nested regions; kMaxThreads if it is not valid.
int openmp_threads() {
  const char* text = std::getenv("OMP_NUM_THREADS");
  if (!text) return kMaxThreads;
  char* end = nullptr;
  const long count = std::strtol(text, &end, 10);
  while (*end == ' ') ++end;
  const bool valid = end != text && (*end == '\0' || *end == ',') && count >= 1 && count <= kMaxThreads;
  return valid ? int(count) : kMaxThreads;
}

// The number of processors that a control group may use, 0 without a limit. Version 2 has a file with "QUOTA PERIOD" or
// "max PERIOD"; version 1 has two files, with a quota of -1 for no limit.
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

// Parses a line of /proc/self/cgroup into the path of this process in a hierarchy of control groups. Returns whether
// the hierarchy controls processors.
bool parse_group(const std::string& line, bool& is_version_2, std::string& path) {
  const auto first = line.find(':'), second = line.find(':', first + 1);
  if (first == std::string::npos || second == std::string::npos) return false;
  const std::string controllers = line.substr(first + 1, second - first - 1);
  is_version_2 = controllers.empty();
  path = line.substr(second + 1);
  return is_version_2 || has_word(controllers, "cpu");
}

}  // namespace

int quota_threads(const std::string& root) {
  double limit = kMaxThreads;
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string group; std::getline(groups, group);) {
    bool is_version_2;
    std::string path;
    if (!parse_group(group, is_version_2, path)) continue;
    std::ifstream mounts(root + "/proc/self/mountinfo");
    for (std::string mount; std::getline(mounts, mount);) {
      std::istringstream words(mount);
      std::string skip, mount_root, mount_point, word, type, source, options;
      words >> skip >> skip >> skip >> mount_root >> mount_point;
      while (words >> word && word != "-") {
      }
      words >> type >> source >> options;
      if (type != (is_version_2 ? "cgroup2" : "cgroup") || !(is_version_2 || has_word(options, "cpu"))) continue;
      // In a container the root of the mount may be the group itself, or a parent of it.
      if (mount_root != "/" && path.compare(0, mount_root.size(), mount_root) == 0) path.erase(0, mount_root.size());
      for (;;) {
        if (const double quota = quota_of(root + mount_point + path); quota > 0) limit = std::min(limit, quota);
        const auto slash = path.rfind('/');
        if (slash == std::string::npos) break;
        path.erase(slash);
      }
    }
  }
  return int(std::ceil(limit));
}

int default_threads() { return std::max(1, std::min({processors(), openmp_threads(), quota_threads("")})); }

}  // namespace arcmerge
