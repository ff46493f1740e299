// A file in memory that may shrink or fail while it is read.
#pragma once

#include <atomic>
#include <cstddef>

namespace arcmerge {

// The first `size` bytes of an open file, read-only and shared with the page cache. The file may be closed.
//
// The system answers a read of what the disk cannot give, or of what the file no longer has, with SIGBUS, which ends
// the process. A handler, installed with the first file, puts zeros in place of the rest of the file that was read,
// and `lost` tells that what came of it is void. SIGBUS from anywhere else goes to the handler that was there before.
class MappedFile {
 public:
  // Throws std::system_error where the system cannot map the file.
  MappedFile(int file, std::size_t size);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  char* address() const { return address_; }
  std::size_t size() const { return size_; }
  bool lost() const;

  // Unmaps the whole pages between two bytes; they are mapped again when they are read.
  void forget(std::size_t begin, std::size_t end);

  struct Range;

 private:
  char* address_;
  std::size_t size_;
  Range* range_;
};

}  // namespace arcmerge
