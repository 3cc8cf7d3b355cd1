// What was found, each report with the kernel, the block, the thread and the line of code.
#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>

#include "emu/executor.h"

EMU_HIDDEN extern uint3 emu_block_index asm("emu_blockIdx");

extern "C" {
EMU_HIDDEN extern const char __ehdr_start[];
EMU_HIDDEN extern const char _end[];
}

namespace emu {

void give_up();  // scheduler.cpp

namespace {

constexpr int kKeep = 20;  // reports of a launch; one fault often gives many
constexpr Code kSite = 0x80000000u;
std::vector<Site> sites;
std::set<std::pair<Code, Code>> pairs;
std::string reports;
int kept = 0;

void add(const char* format, va_list arguments) {
  if (++kept > kKeep) return;
  char text[4096];
  std::vsnprintf(text, sizeof text, format, arguments);
  reports += text;
  if (in_kernel()) {
    const uint3 b = emu_block_index, t = current->thread;
    std::snprintf(text, sizeof text, " [kernel %s, block (%u, %u, %u), thread (%u, %u, %u)]",
                  kernel_name(block.launch.entry).c_str(), b.x, b.y, b.z, t.x, t.y, t.z);
    reports += text;
  } else if (current != nullptr) {
    reports += " [kernel " + kernel_name(block.launch.entry) + "]";
  }
  reports += '\n';
}

std::string short_path(std::string path) {
  for (const char* folder : {"/csrc/", "/tests/"})
    if (const auto at = path.rfind(folder); at != std::string::npos) return path.substr(at + 1);
  return path;
}

std::vector<std::string> addr2line(const char* options, std::uintptr_t offset) {
  Dl_info info;
  if (dladdr(__ehdr_start, &info) == 0) return {};
  char command[4096];
  std::snprintf(command, sizeof command, "addr2line %s -e '%s' %#lx 2>/dev/null", options, info.dli_fname,
                static_cast<unsigned long>(offset));
  std::vector<std::string> lines;
  if (FILE* pipe = popen(command, "r")) {
    char line[4096];
    while (std::fgets(line, sizeof line, pipe)) lines.push_back(std::string(line, std::strcspn(line, "\n")));
    pclose(pipe);
  }
  return lines;
}

// The lines an instruction comes from, innermost first, without the executor's own.
std::vector<std::string> source_lines(std::uintptr_t offset) {
  std::vector<std::string> lines;
  for (std::string line : addr2line("-i", offset)) {
    line = line.substr(0, line.find(' '));  // " (discriminator 2)"
    if (line.find("_emu.h:") == std::string::npos && line.find("??") == std::string::npos)
      lines.push_back(short_path(line));
  }
  return lines;
}

}  // namespace

Code code_of(Site site) {
  for (std::size_t i = 0; i < sites.size(); ++i)
    if (sites[i].file == site.file && sites[i].line == site.line) return kSite | Code(i);
  sites.push_back(site);
  return kSite | Code(sites.size() - 1);
}

Code code_of_return(const void* return_address) {
  return Code(static_cast<const char*>(return_address) - __ehdr_start);
}

std::string kernel_name(const void* entry) {
  const std::vector<std::string> lines = addr2line("-Cf", code_of_return(entry));
  std::string name = lines.empty() ? "?" : lines.front();
  for (const char* noise : {"pyfastpeft::", "(anonymous namespace)::", "void "})
    for (auto at = name.find(noise); at != std::string::npos; at = name.find(noise)) name.erase(at, std::strlen(noise));
  const auto parameters = name.rfind('(');
  return parameters == std::string::npos ? name : name.substr(0, parameters);
}

bool in_module(std::uintptr_t address) {
  return address >= reinterpret_cast<std::uintptr_t>(__ehdr_start) && address < reinterpret_cast<std::uintptr_t>(_end);
}

std::string describe(Code code) {
  if (code & kSite) {
    const Site site = sites[code & ~kSite];
    return short_path(site.file) + ":" + std::to_string(site.line);
  }
  const std::vector<std::string> lines = source_lines(code - 1);
  if (lines.empty()) return "an unknown line";
  // A helper of a header says little alone: the kernel's own line follows.
  if (lines.front() == lines.back() || lines.front().find(".cu:") != std::string::npos) return lines.front();
  for (const std::string& line : lines)
    if (line.find(".cu:") != std::string::npos) return lines.front() + " (called at " + line + ")";
  return lines.front();
}

void note(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  add(format, arguments);
  va_end(arguments);
}

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  add(format, arguments);
  va_end(arguments);
  give_up();
}

bool first_time(Code a, Code b) { return pairs.insert({a, b}).second; }

std::string take_reports() {
  if (kept > kKeep) reports += "… and " + std::to_string(kept - kKeep) + " more\n";
  if (!reports.empty() && config.seed != 0)
    reports += "seed " + std::to_string(config.seed) + ", preempt " + std::to_string(config.preempt) + "\n";
  std::string result;
  std::swap(result, reports);
  kept = 0;
  pairs.clear();
  return result;
}

}  // namespace emu
