// MappedFile, and the handler of SIGBUS that keeps the process alive if a mapped file cannot be read.
#include "mapped_file.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdint>
#include <mutex>
#include <system_error>

namespace arcmerge {

// An entry of the list of mapped ranges, which the signal handler reads. Ranges are reused but never freed, so that the
// handler can follow the list without a lock.
struct MappedFile::Range {
  std::atomic<std::uintptr_t> begin{0};  // 0: not in use
  std::atomic<std::uintptr_t> end{0};
  std::atomic<bool> lost{false};
  Range* next = nullptr;       // in the list of all ranges
  Range* free_next = nullptr;  // in the list of ranges that are not in use
};

namespace {

using Range = MappedFile::Range;

std::atomic<Range*> ranges{nullptr};
Range* free_ranges = nullptr;
std::mutex list_mutex;
struct sigaction previous_action;
std::atomic<bool> passed_on{false};
std::uintptr_t page_size;

bool fill_with_zeros(std::uintptr_t address) {
  for (Range* range = ranges.load(); range; range = range->next) {
    const std::uintptr_t begin = range->begin.load(), end = range->end.load();
    if (begin == 0 || address < begin || address >= end) continue;
    range->lost.store(true);
    const std::uintptr_t page = address / page_size * page_size;
    return mmap(reinterpret_cast<void*>(page), end - page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) !=
           MAP_FAILED;
  }
  return false;
}

void on_bus_error(int number, siginfo_t* info, void*) {
  const int error = errno;
  const bool is_fault = info->si_code > 0;  // otherwise a process has sent the signal
  if (!is_fault || !fill_with_zeros(reinterpret_cast<std::uintptr_t>(info->si_addr))) {
    // The previous handler may pass the signal back to this one, which then ends the process as the system would have.
    struct sigaction fatal = {};
    fatal.sa_handler = SIG_DFL;
    sigaction(number, passed_on.exchange(true) ? &fatal : &previous_action, nullptr);
    if (!is_fault) raise(number);  // the instruction of a fault is executed again anyway
  }
  errno = error;
}

// Installs the handler, again for every file, because other code (for example faulthandler) installs handlers too.
void install_handler() {
  struct sigaction current;
  sigaction(SIGBUS, nullptr, &current);
  if ((current.sa_flags & SA_SIGINFO) && current.sa_sigaction == &on_bus_error) return;
  previous_action = current;
  page_size = std::uintptr_t(sysconf(_SC_PAGESIZE));
  struct sigaction action = {};
  action.sa_sigaction = &on_bus_error;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&action.sa_mask);
  sigaction(SIGBUS, &action, nullptr);
  passed_on.store(false);
}

Range* add_range(std::uintptr_t begin, std::uintptr_t end) {
  const std::lock_guard<std::mutex> lock(list_mutex);
  install_handler();
  Range* range = free_ranges;
  if (range) {
    free_ranges = range->free_next;
  } else {
    range = new Range;
    range->next = ranges.load();
    ranges.store(range);
  }
  range->lost.store(false);
  range->end.store(end);
  range->begin.store(begin);
  return range;
}

void remove_range(Range* range) {
  const std::lock_guard<std::mutex> lock(list_mutex);
  range->begin.store(0);
  range->free_next = free_ranges;
  free_ranges = range;
}

}  // namespace

MappedFile::MappedFile(int file, std::size_t size) : size_(size) {
  void* mapped = mmap(nullptr, size, PROT_READ, MAP_SHARED, file, 0);
  if (mapped == MAP_FAILED) throw std::system_error(errno, std::generic_category());
  madvise(mapped, size, MADV_SEQUENTIAL);
  address_ = static_cast<char*>(mapped);
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(mapped);
  range_ = add_range(begin, begin + size);
}

MappedFile::~MappedFile() {
  remove_range(range_);
  munmap(address_, size_);
}

bool MappedFile::lost() const { return range_->lost.load(); }

void MappedFile::forget(std::size_t begin, std::size_t end) {
  begin = (begin + page_size - 1) / page_size * page_size;
  end = (end < size_ ? end : size_) / page_size * page_size;
  if (begin < end) madvise(address_ + begin, end - begin, MADV_DONTNEED);
}

}  // namespace arcmerge
