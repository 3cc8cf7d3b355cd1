#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "common/check.h"
#include "paged_memory/spill_file.h"

namespace pyfastpeft {
namespace {

struct Fault {
  std::string op;
  int error;
  std::int64_t after, times;
  double seconds;
};
std::atomic<bool> g_faulty{false};  // the mutex is taken only where a test has set faults
std::mutex g_faults_mutex;
std::vector<Fault> g_faults;

// -1: no fault now; 0: a short transfer; else the errno to fail with.
int fault(const char* op) {
  if (!g_faulty.load(std::memory_order_acquire)) return -1;
  std::unique_lock<std::mutex> lock(g_faults_mutex);
  for (Fault& f : g_faults) {
    if (f.op != op || f.times == 0) continue;
    if (f.after > 0) {
      --f.after;
      continue;
    }
    --f.times;
    const Fault found = f;
    lock.unlock();
    std::this_thread::sleep_for(std::chrono::duration<double>(found.seconds));
    return found.error;
  }
  return -1;
}

std::string size_text(std::int64_t bytes) {
  if (bytes >= std::int64_t(1) << 30) return message(double(bytes >> 20) / 1024, " GiB");
  return message(double(bytes >> 10) / 1024, " MiB");
}

[[noreturn]] void fail(int code, const std::string& what, const std::string& folder, const char* way_out) {
  throw SpillError(code, message("paged memory: ", what, " in ", folder, ": ",
                                 std::error_code(code, std::generic_category()).message(), "; ", way_out));
}

constexpr const char* kChooseFolder = "choose another folder with spill_dir=, or raise resident_bytes=";

int open_without_name(const std::string& folder) {
  const int injected = fault("open");
  if (injected > 0) fail(injected, "the spill file cannot be made", folder, kChooseFolder);
#if defined(O_TMPFILE)
  int file;
  do file = open(folder.c_str(), O_TMPFILE | O_RDWR | O_EXCL | O_CLOEXEC, 0600);
  while (file < 0 && errno == EINTR);
  if (file >= 0) return file;
  // file systems and kernels that do not know the flag
  if (errno != EOPNOTSUPP && errno != EISDIR && errno != EINVAL)
    fail(errno, "the spill file cannot be made", folder, kChooseFolder);
#endif
  std::string name = folder + "/.pyfastpeft-spill-XXXXXX";
  const int named = mkostemp(&name[0], O_CLOEXEC);  // 0600
  if (named < 0) fail(errno, "the spill file cannot be made", folder, kChooseFolder);
  unlink(name.c_str());
  return named;
}

}  // namespace

SpillFile::SpillFile(std::string folder, bool direct) : folder_(std::move(folder)) {
  file_ = open_without_name(folder_);
#if defined(O_DIRECT)
  if (direct) direct_ = fcntl(file_, F_SETFL, fcntl(file_, F_GETFL) | O_DIRECT) == 0;
#else
  (void)direct;
#endif
}

SpillFile::~SpillFile() { close(file_); }

void SpillFile::grow(std::int64_t bytes) {
  if (bytes <= size_) return;
  int code = 0;
  const int injected = fault("allocate");
  if (injected > 0) {
    code = injected;
  } else {
#if defined(__linux__)
    do code = fallocate(file_, 0, size_, bytes - size_) == 0 ? 0 : errno;
    while (code == EINTR);
#else
    code = EOPNOTSUPP;
#endif
  }
  if (code == EOPNOTSUPP || code == ENOSYS) {
    try {
      fill_with_zeros(size_, bytes);
      code = 0;
    } catch (const SpillError& error) {
      code = error.code;
    }
  }
  if (code != 0) {
    if (ftruncate(file_, size_) != 0) errno = 0;  // a longer file than needed does no harm
    fail(code, message("no room for a spill file of ", size_text(bytes)), folder_, kChooseFolder);
  }
  size_ = bytes;
}

void SpillFile::fill_with_zeros(std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t kChunk = 1 << 20;
  void* memory = nullptr;
  if (posix_memalign(&memory, kAlignment, kChunk) != 0) throw std::bad_alloc();
  const std::unique_ptr<void, decltype(&std::free)> zeros(memory, &std::free);
  std::memset(memory, 0, kChunk);
  for (; begin < end; begin += kChunk) write(memory, std::min(kChunk, end - begin), begin);
}

template <bool kWrite>
void SpillFile::transfer(char* data, std::int64_t bytes, std::int64_t offset) {
  constexpr const char* kOp = kWrite ? "write" : "read";
  while (bytes > 0) {
    const int injected = fault(kOp);
    const std::int64_t ask = injected == 0 ? std::max(bytes / 2 / kAlignment * kAlignment, kAlignment) : bytes;
    ssize_t moved;
    if (injected > 0) {
      errno = injected;
      moved = -1;
    } else {
      moved = kWrite ? pwrite(file_, data, std::size_t(ask), offset) : pread(file_, data, std::size_t(ask), offset);
    }
    if (moved > 0) {
      data += moved;
      offset += moved;
      bytes -= moved;
      continue;
    }
    const int code = moved == 0 ? EIO : errno;  // 0: the end of a file that was allocated
    if (code == EINTR) continue;
#if defined(O_DIRECT)
    const int flags = fcntl(file_, F_GETFL);
    if (code == EINVAL && (flags & O_DIRECT)) {  // taken when the file was opened, but not by transfers
      direct_ = false;
      if (fcntl(file_, F_SETFL, flags & ~O_DIRECT) == 0) continue;
    }
#endif
    fail(code, message(kWrite ? "writing " : "reading ", size_text(bytes), " at ", offset, " of the spill file failed"),
         folder_, "nothing was changed by it; see the system's log for the disk's state");
  }
}

void SpillFile::read(void* data, std::int64_t bytes, std::int64_t offset) {
  transfer<false>(static_cast<char*>(data), bytes, offset);
}

void SpillFile::write(const void* data, std::int64_t bytes, std::int64_t offset) {
  transfer<true>(const_cast<char*>(static_cast<const char*>(data)), bytes, offset);
}

bool is_in_memory(const std::string& folder) {
#if defined(__linux__)
  struct statfs status;
  constexpr long kTmpfs = 0x01021994, kRamfs = 0x858458f6;
  return statfs(folder.c_str(), &status) == 0 && (status.f_type == kTmpfs || status.f_type == kRamfs);
#else
  return false;
#endif
}

void inject_spill_fault(const std::string& op, int error, std::int64_t after, std::int64_t times, double seconds) {
  check(op == "open" || op == "allocate" || op == "read" || op == "write", "inject_spill_fault: op is ", op,
        ", expected open, allocate, read or write");
  const std::lock_guard<std::mutex> lock(g_faults_mutex);
  g_faults.push_back({op, error, after, times, seconds});
  g_faulty = true;
}

void clear_spill_faults() {
  const std::lock_guard<std::mutex> lock(g_faults_mutex);
  g_faults.clear();
  g_faulty = false;
}

}  // namespace pyfastpeft
