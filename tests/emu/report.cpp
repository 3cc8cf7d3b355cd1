// What was found, each report with the kernel, the block, the thread and the line of code.

#include <cstdarg>
#include <cstdio>
#include <set>

#include "emu/executor.h"

EMU_HIDDEN extern uint3 emu_block_index asm("emu_blockIdx");

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
  } else if (launch_is_here) {
    reports += " [kernel " + kernel_name(block.launch.entry) + "]";
  }
  reports += '\n';
}

}  // namespace

Code code_of(Site site) {
  for (std::size_t i = 0; i < sites.size(); ++i)
    if (sites[i].file == site.file && sites[i].line == site.line) return kSite | Code(i);
  sites.push_back(site);
  return kSite | Code(sites.size() - 1);
}

std::string describe(Code code) {
  if (code & kSite) {
    const Site site = sites[code & ~kSite];
    return short_path(site.file) + ":" + std::to_string(site.line);
  }
  const std::vector<std::string> lines = source_lines(code);
  if (lines.empty()) return "an unknown line";
  if (lines.front() == lines.back()) return lines.front();
  return lines.front() + " (called at " + lines.back() + ")";  // an inlined helper, and the kernel's own line
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
