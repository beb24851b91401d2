#include "lines.h"

#include <dlfcn.h>
#include <stdio.h>

#include <vector>

namespace vitkernels::twin {
namespace {

Dl_info module_info() {
  Dl_info info{};
  dladdr(reinterpret_cast<void*>(&code_number), &info);
  return info;
}

std::vector<std::string> addr2line(const std::string& options, const std::vector<uint32_t>& codes) {
  std::string command = "addr2line " + options + " -e '" + module_info().dli_fname + "'";
  for (const uint32_t code : codes) {
    char offset[24];
    snprintf(offset, sizeof(offset), " 0x%x", code);
    command += offset;
  }
  std::vector<std::string> lines;
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return lines;
  char line[4096];
  while (fgets(line, sizeof(line), pipe) != nullptr) {
    lines.emplace_back(line);
    lines.back().pop_back();
  }
  pclose(pipe);
  return lines;
}

}  // namespace

uint32_t code_number(const void* code) {
  static const auto start = reinterpret_cast<uintptr_t>(module_info().dli_fbase);
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(code) - start);
}

std::vector<std::string> lines_of(const std::vector<uint32_t>& codes) {
  std::vector<uint32_t> calls;
  for (const uint32_t code : codes) calls.push_back(code == 0 ? 0 : code - 1);
  std::vector<std::string> texts;
  // -a: each address stands before its lines.
  for (const std::string& line : addr2line("-sia", calls)) {
    if (line.compare(0, 2, "0x") == 0) {
      texts.emplace_back();
      continue;
    }
    const std::string place = line.substr(0, line.find(' '));
    if (texts.empty() || place.compare(0, 12, "host_twin.h:") == 0) continue;
    texts.back() += (texts.back().empty() ? "" : " < ") + place;
  }
  texts.resize(codes.size());
  for (std::string& text : texts)
    if (text.empty()) text = "unknown";
  return texts;
}

std::string line_of(uint32_t code) {
  return lines_of({code})[0];
}

std::string function_at(uint32_t code) {
  const std::vector<std::string> lines = addr2line("-fC", {code});
  if (lines.empty()) return "unknown";
  // "void vitkernels::op::(anonymous namespace)::kernel<T, 7>(...)": the last name before the arguments.
  std::string name = lines[0];
  const std::string anonymous = "(anonymous namespace)::";
  for (size_t at; (at = name.find(anonymous)) != std::string::npos;) name.erase(at, anonymous.size());
  const size_t end = name.find_first_of("<(");
  name = name.substr(0, end);
  const size_t begin = name.find_last_of(": ");
  return begin == std::string::npos ? name : name.substr(begin + 1);
}

}  // namespace vitkernels::twin
