#include "traffic.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>

#include "lines.h"

namespace vitkernels::twin::traffic {
namespace {

constexpr size_t WORD = 4, BANKS = 32, SECTOR = 32, WAVEFRONT = BANKS * WORD;

struct Access {
  uint32_t code;
  uint32_t bytes;
  uintptr_t address;
  bool writes, shared;
};

struct Count {
  int64_t requests = 0, taken = 0, least = 0;
};
using Key = std::tuple<uint32_t, uint32_t, bool, bool>;  // kernel, code, shared, writes

std::atomic<bool> counting{false};
std::mutex lock;  // of what follows
std::map<Key, Count> counts;

struct Launch {
  uint32_t kernel = 0;
  std::vector<Access> lanes[1024];
};
Launch& launch() {
  static thread_local const auto launch = std::make_unique<Launch>();
  return *launch;
}

// Different numbers of `size` bytes that the accesses touch.
std::vector<uintptr_t> touched(const Access* const* first, const Access* const* last, size_t size) {
  std::vector<uintptr_t> numbers;
  for (; first != last; ++first)
    for (uintptr_t n = (*first)->address / size; n * size < (*first)->address + (*first)->bytes; ++n)
      numbers.push_back(n);
  std::sort(numbers.begin(), numbers.end());
  numbers.erase(std::unique(numbers.begin(), numbers.end()), numbers.end());
  return numbers;
}

// One access of a warp, by the lanes that take part; null for the others.
void count(const Access* const (&lanes)[32], Count* into) {
  std::vector<const Access*> active;
  for (const Access* lane : lanes)
    if (lane) active.push_back(lane);
  const size_t bytes = active[0]->bytes;
  ++into->requests;
  if (!active[0]->shared) {
    const auto sectors = touched(active.data(), active.data() + active.size(), SECTOR);
    const auto halves = touched(active.data(), active.data() + active.size(), 2);
    into->taken += static_cast<int64_t>(sectors.size());
    into->least += static_cast<int64_t>((2 * halves.size() + SECTOR - 1) / SECTOR);
    return;
  }
  const size_t together = bytes <= WORD ? 32 : std::max<size_t>(WAVEFRONT / bytes, 1);
  for (size_t begin = 0; begin < 32; begin += together) {
    active.clear();
    for (size_t i = begin; i < std::min<size_t>(begin + together, 32); ++i)
      if (lanes[i]) active.push_back(lanes[i]);
    if (active.empty()) continue;
    const auto words = touched(active.data(), active.data() + active.size(), WORD);
    int64_t in_bank[BANKS] = {};
    for (const uintptr_t word : words) ++in_bank[word % BANKS];
    into->taken += *std::max_element(in_bank, in_bank + BANKS);
    into->least += static_cast<int64_t>((words.size() + BANKS - 1) / BANKS);
  }
}

}  // namespace

bool enabled() {
  return counting;
}

void set_enabled(bool enabled) {
  const std::lock_guard<std::mutex> guard(lock);
  counting = enabled;
  counts.clear();
}

void begin_launch(const void* kernel) {
  launch().kernel = code_number(kernel);
  for (auto& lane : launch().lanes) lane.clear();
}

void note(int thread, uintptr_t address, size_t bytes, bool writes, bool shared, uint32_t code) {
  launch().lanes[thread].push_back({code, static_cast<uint32_t>(bytes), address, writes, shared});
}

void meet(int warp) {
  std::vector<Access>* lanes = launch().lanes + 32 * warp;
  // By place in the code, and how often the lane has been there.
  std::map<std::tuple<uint32_t, bool, bool, int>, const Access* [32]> together;
  for (int lane = 0; lane < 32; ++lane) {
    std::map<std::tuple<uint32_t, bool, bool>, int> times;
    for (const Access& access : lanes[lane]) {
      const int time = times[{access.code, access.writes, access.shared}]++;
      together[{access.code, access.writes, access.shared, time}][lane] = &access;
    }
  }
  if (!together.empty()) {
    const std::lock_guard<std::mutex> guard(lock);
    for (const auto& [place, accesses] : together)
      count(accesses, &counts[{launch().kernel, std::get<0>(place), std::get<2>(place), std::get<1>(place)}]);
  }
  for (int lane = 0; lane < 32; ++lane) lanes[lane].clear();
}

std::vector<Row> rows() {
  const std::lock_guard<std::mutex> guard(lock);
  std::vector<uint32_t> codes;
  std::map<uint32_t, std::string> kernels;
  for (const auto& [key, count] : counts) {
    codes.push_back(std::get<1>(key));
    std::string& name = kernels[std::get<0>(key)];
    if (name.empty()) name = function_at(std::get<0>(key));
  }
  const std::vector<std::string> lines = lines_of(codes);
  std::vector<Row> result;
  for (const auto& [key, count] : counts) {
    const auto& [kernel, code, shared, writes] = key;
    result.push_back(
        {kernels[kernel], lines[result.size()], shared, writes, count.requests, count.taken, count.least});
  }
  return result;
}

}  // namespace vitkernels::twin::traffic
