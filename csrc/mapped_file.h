// A mapped file that may shrink or fail while it is read.
#pragma once

#include <atomic>
#include <cstddef>

namespace arcmerge {

// The first `size` bytes of an open file, mapped read-only. The file may be closed afterwards.
//
// If a process reads mapped bytes that the disk cannot read, or that the file has lost, the system sends SIGBUS, which
// ends the process. A handler, installed with the first file, instead replaces the rest of that file by zeros, and
// `lost` tells that results are invalid. SIGBUS with another cause goes to the handler that was installed before.
class MappedFile {
 public:
  // Throws std::system_error if the system cannot map the file.
  MappedFile(int file, std::size_t size);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  char* address() const { return address_; }
  std::size_t size() const { return size_; }
  bool lost() const;

  // Unmaps the whole pages in [begin, end); they are mapped again when they are read.
  void forget(std::size_t begin, std::size_t end);

  struct Range;

 private:
  char* address_;
  std::size_t size_;
  Range* range_;
};

}  // namespace arcmerge
