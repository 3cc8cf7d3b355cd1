// A file for what does not fit into memory: private (0600), without a name from the start, so that nothing of it is left
// whatever ends the process, and allocated before it is used, so that a full disk is found before any data is moved.
#pragma once

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace pyfastpeft {

// A file operation that failed; `code` is the errno. The message says what, where and the way out.
struct SpillError : std::runtime_error {
  SpillError(int code, const std::string& text) : std::runtime_error(text), code(code) {}
  int code;
};

class SpillFile {
 public:
  static constexpr std::int64_t kAlignment =
      4096;  // of addresses, offsets and sizes, for transfers past the page cache

  // direct: past the operating system's page cache, where the file system can; it would hold every byte twice.
  SpillFile(std::string folder, bool direct);
  ~SpillFile();
  SpillFile(const SpillFile&) = delete;
  SpillFile& operator=(const SpillFile&) = delete;

  // Makes it `bytes` long with all of its space taken on the disk; as it was where that fails.
  void grow(std::int64_t bytes);
  void read(void* data, std::int64_t bytes, std::int64_t offset);
  void write(const void* data, std::int64_t bytes, std::int64_t offset);

  std::int64_t size() const { return size_; }
  bool direct() const { return direct_; }

 private:
  template <bool kWrite>
  void transfer(char* data, std::int64_t bytes, std::int64_t offset);
  void fill_with_zeros(std::int64_t begin, std::int64_t end);

  std::string folder_;
  int file_ = -1;
  std::int64_t size_ = 0;
  std::atomic<bool> direct_{false};
};

// Whether the folder's file system keeps files in memory (tmpfs): spilling there saves nothing.
bool is_in_memory(const std::string& folder);

// For tests: of the operations op ("open", "allocate", "read", "write"), the `after` next ones succeed and `times` after
// them fail with errno `error`, each `seconds` after it began; 0: they move only a part of what was asked.
void inject_spill_fault(const std::string& op, int error, std::int64_t after, std::int64_t times, double seconds);
void clear_spill_faults();

}  // namespace pyfastpeft
