// What this module's own file knows: where its code and tables lie, their names and lines.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <map>

#include "emu/executor.h"

extern "C" {
EMU_HIDDEN extern const char __ehdr_start[];
EMU_HIDDEN extern const char _end[];
// the linker's, where there are such sections
EMU_HIDDEN extern const char __start_emu_constant[] __attribute__((weak));
EMU_HIDDEN extern const char __stop_emu_constant[] __attribute__((weak));
EMU_HIDDEN extern const unsigned char* const __start___patchable_function_entries[] __attribute__((weak));
EMU_HIDDEN extern const unsigned char* const __stop___patchable_function_entries[] __attribute__((weak));
}

namespace emu {

namespace {

constexpr int kConstantAlignment = 64;  // as __constant__ in cuda_emu.h says

std::vector<std::string> run_on_this_file(const char* tool, const std::string& arguments) {
  Dl_info info;
  if (dladdr(__ehdr_start, &info) == 0) return {};
  const std::string command = std::string(tool) + " '" + info.dli_fname + "' " + arguments + " 2>/dev/null";
  std::vector<std::string> lines;
  if (FILE* pipe = popen(command.c_str(), "r")) {
    char line[4096];
    while (std::fgets(line, sizeof line, pipe)) lines.emplace_back(line, std::strcspn(line, "\n"));
    pclose(pipe);
  }
  return lines;
}

std::uintptr_t offset_of(const void* address) {
  return std::uintptr_t(static_cast<const char*>(address) - __ehdr_start);
}

std::string hexadecimal(std::uintptr_t value) {
  char text[32];
  std::snprintf(text, sizeof text, "%#lx", static_cast<unsigned long>(value));
  return text;
}

struct Symbol {
  std::uintptr_t end;
  std::string name;
};
// Functions and tables by their beginning.
const std::map<std::uintptr_t, Symbol>& symbols() {
  static const std::map<std::uintptr_t, Symbol> all = [] {
    std::map<std::uintptr_t, Symbol> found;
    for (const std::string& line : run_on_this_file("nm -SC --defined-only", "")) {
      unsigned long begin = 0, size = 0;  // "address size kind name", of some symbols without the size
      if (line.size() > 36 && line[33] == ' ' && std::sscanf(line.c_str(), "%16lx %16lx", &begin, &size) == 2)
        found[begin] = {begin + size, line.substr(36)};
    }
    return found;
  }();
  return all;
}

}  // namespace

std::string short_path(const std::string& path) {
  for (const char* folder : {"/csrc/", "/tests/"})
    if (const auto at = path.rfind(folder); at != std::string::npos) return path.substr(at + 1);
  return path;
}

Code code_of_return(const void* return_address) { return Code(offset_of(return_address)); }

bool in_module(std::uintptr_t address) {
  return address >= reinterpret_cast<std::uintptr_t>(__ehdr_start) && address < reinterpret_cast<std::uintptr_t>(_end);
}

bool in_constants(std::uintptr_t address) {
  return address - reinterpret_cast<std::uintptr_t>(__start_emu_constant) <
         std::uintptr_t(__stop_emu_constant - __start_emu_constant + kConstantAlignment);
}

bool beyond_constant(const void* address, std::size_t bytes) {
  static std::uintptr_t begin = 0, end = 0;  // of the table asked for last
  const std::uintptr_t at = offset_of(address);
  if (at < begin || at >= end) {
    auto table = symbols().upper_bound(at);
    if (table == symbols().begin()) return true;
    begin = (--table)->first;
    end = table->second.end;
  }
  return at < begin || at + bytes > end;
}

int launch_bound(const void* entry) {
#if defined(__x86_64__)
  const auto* code = static_cast<const unsigned char*>(entry);
  for (auto first = __start___patchable_function_entries; first != __stop___patchable_function_entries; ++first) {
    const std::ptrdiff_t distance = code - *first;
    if (distance <= 0 || distance > kMaxThreads) continue;
    bool only_nops = true;
    for (const unsigned char* p = *first; p < code; ++p) only_nops &= *p == 0x90;
    if (only_nops) return int(distance);
  }
#else
  (void)entry;
#endif
  return kMaxThreads;
}

// The lines an instruction comes from, innermost first, without the executor's own.
std::vector<std::string> source_lines(Code code) {
  std::vector<std::string> lines;
  for (std::string line : run_on_this_file("addr2line -i -e", hexadecimal(code - 1))) {
    line = line.substr(0, line.find(' '));  // " (discriminator 2)"
    if (line.find("_emu.h:") == std::string::npos && line.find("??") == std::string::npos)
      lines.push_back(short_path(line));
  }
  return lines;
}

std::string kernel_name(const void* entry) {
  const auto symbol = symbols().find(offset_of(entry));
  std::string name = symbol == symbols().end() ? "?" : symbol->second.name;
  for (const char* noise : {"pyfastpeft::", "(anonymous namespace)::", "void "})
    for (auto at = name.find(noise); at != std::string::npos; at = name.find(noise)) name.erase(at, std::strlen(noise));
  const auto parameters = name.rfind('(');
  return parameters == std::string::npos ? name : name.substr(0, parameters);
}

}  // namespace emu
