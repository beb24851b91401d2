#include "watch.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "lines.h"
#include "traffic.h"

namespace vitkernels::twin::watch {
namespace {

constexpr size_t PLACE = 2;  // bytes
constexpr size_t PAGE = 4096;
constexpr size_t WARPS = 32;
constexpr size_t RECENT = 64;  // pages found without a search

bool writing(Access access) {
  return access >= Access::write;
}

// One access: which interval between two sync_block, which between two of the warp's sync_warp.
struct Moment {
  Time interval = 0, warp_interval = 0;
  uint16_t thread = 0;
  uint32_t code = 0;

  int warp() const { return thread / 32; }
  bool same_time(const Moment& other) const {
    return interval == other.interval && warp_interval == other.warp_interval && thread == other.thread;
  }
};

// The last write and the last read of a place. Of earlier reads it is enough whether they were by others:
// all reads since the last write are ordered before the next, or there is a hazard.
struct Place {
  Moment write, read;
  bool lanes = false, warps = false;  // other lanes and other warps read in the last read's interval
  bool blocks = false;                // other blocks read in its launch
  bool by_engine = false;             // the last write is of the copy engine
  bool copying = false;               // the last write is a cp.async that has not been waited for
  uint32_t fences = 0;                // that its writer had called by then
};

// The calls of fence_async_proxy() by a thread: all, and those before the interval of the last.
struct Fences {
  uint32_t count = 0, before = 0;
  Time interval = 0;
};

struct Page {
  Place places[PAGE / PLACE];
};

struct Finding {
  bool found = false;
  Moment now, then;
  bool now_writes = false, then_writes = false, then_copies = false, other_block = false;
  bool shared = false;
  const char* lacking = nullptr;
  uintptr_t address = 0;
};

struct Watch {
  Time interval = 0, launch_start = 0, block_start = 0, warp_intervals = 0;
  Time warp_interval[WARPS] = {};
  uintptr_t shared = 0, host_stack = 0;
  size_t shared_bytes = 0, host_stack_bytes = 0;
  std::vector<Place> shared_places;
  Fences fences[32 * WARPS];
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
  struct Recent {
    uintptr_t number = 0;
    Page* page = nullptr;
  };
  Recent recently[RECENT];
  Finding finding;

  Place& place(uintptr_t address, bool in_shared) {
    if (in_shared) return shared_places[(address - shared) / PLACE];
    const uintptr_t page = address / PAGE;
    Recent& recent = recently[page % RECENT];
    if (page != recent.number || recent.page == nullptr) {
      std::unique_ptr<Page>& found = pages[page];
      if (!found) found = std::make_unique<Page>();
      recent = {page, found.get()};
    }
    return recent.page->places[address % PAGE / PLACE];
  }

  // Where a launch keeps the kernel's parameters, which are no memory to the device.
  void find_host_stack() {
    pthread_attr_t attributes;
    void* begin = nullptr;
    if (pthread_getattr_np(pthread_self(), &attributes) != 0) return;
    if (pthread_attr_getstack(&attributes, &begin, &host_stack_bytes) == 0)
      host_stack = reinterpret_cast<uintptr_t>(begin);
    pthread_attr_destroy(&attributes);
  }

  // Whether `then` is ordered before an access of now.
  bool ordered(const Moment& then, const Moment& now, bool in_shared) const {
    if (then.interval < block_start) return in_shared || then.interval < launch_start;
    return then.interval < now.interval || then.thread == now.thread ||
           (then.warp() == now.warp() && then.warp_interval < now.warp_interval);
  }
  bool reads_ordered(const Place& place, const Moment& now, bool in_shared) const {
    const Moment& then = place.read;
    if (!in_shared && place.blocks && then.interval >= launch_start) return false;
    if (!ordered(then, now, in_shared)) return false;
    if (then.interval < now.interval) return true;
    return !place.warps && !(place.lanes && then.warp_interval == now.warp_interval);
  }

  void report(const Place& place, const Moment& then, bool then_writes, const Moment& now, bool now_writes,
              uintptr_t address, bool in_shared, const char* lacking = "no barrier") {
    if (finding.found) return;
    finding = {true,
               now,
               then,
               now_writes,
               then_writes,
               then_writes && place.copying,
               then.interval < block_start,
               in_shared,
               lacking,
               address};
  }

  void note_place(uintptr_t address, bool in_shared, const Moment& now, Access access) {
    Place& at = place(address, in_shared);
    // Most accesses repeat the one before.
    const bool writes = writing(access);
    if (access == Access::product_read && at.write.interval >= block_start && !at.by_engine) {
      const Fences& of = fences[at.write.thread];
      if ((of.interval == now.interval ? of.before : of.count) <= at.fences)
        report(at, at.write, true, now, false, address, in_shared,
               "no fence_async_proxy by that thread and barrier");
    }
    if (!writes && at.read.same_time(now) && !at.lanes && !at.warps) return;
    if (access == Access::write && at.write.same_time(now) && at.read.interval == 0 && !at.copying &&
        !at.by_engine && at.fences == fences[now.thread].count)
      return;
    const bool landing = access == Access::copy_landed;
    const bool in_flight = at.copying && at.write.interval >= block_start && !landing;
    if (in_flight || !ordered(at.write, now, in_shared))
      report(at, at.write, true, now, writes, address, in_shared);
    if (!writes) {
      Moment& read = at.read;
      if (read.interval != now.interval) {
        at.blocks = read.interval >= launch_start && (at.blocks || read.interval < block_start);
        at.lanes = at.warps = false;
      } else if (read.warp() != now.warp()) {
        at.warps = true;
      } else if (read.warp_interval != now.warp_interval) {
        at.lanes = false;
      } else if (read.thread != now.thread) {
        at.lanes = true;
      }
      read = now;
      return;
    }
    if (!reads_ordered(at, now, in_shared)) report(at, at.read, false, now, true, address, in_shared);
    at.write = now;
    at.read = {};
    at.lanes = at.warps = at.blocks = false;
    at.copying = access == Access::copy_issued;
    at.by_engine = access == Access::engine_write;
    at.fences = fences[now.thread].count;
  }
};

std::atomic<bool> enabled{true};
std::mutex met_lock;  // of both
std::vector<uint32_t> ignored;
std::map<uint32_t, bool> met;  // barriers by code; whether of a warp

// Whether a barrier orders anything.
bool orders(const void* code, bool of_warp) {
  const uint32_t number = code_number(code);
  const std::lock_guard<std::mutex> lock(met_lock);
  met.emplace(number, of_warp);
  return std::find(ignored.begin(), ignored.end(), number) == ignored.end();
}

Watch& watched() {
  static thread_local const auto watch = std::make_unique<Watch>();
  return *watch;
}

// What every access looks at first, where it is found without a call. There is little room for such: the
// module's other objects of a thread are on the heap.
struct Running {
  uintptr_t stack;
  size_t stack_bytes;
  int thread;
  Watch* watch;
};
__attribute__((tls_model("initial-exec"))) thread_local Running running{};

}  // namespace

void begin_launch() {
  Watch& w = watched();
  w.launch_start = ++w.interval;
  w.finding = {};
  if (w.host_stack_bytes == 0) w.find_host_stack();
  // Tests make and free many tensors; the places of old ones are dead weight.
  if (w.pages.size() > 4096) {
    w.pages.clear();
    for (Watch::Recent& recent : w.recently) recent.page = nullptr;
  }
}

void begin_block(const char* shared, size_t bytes) {
  Watch& w = watched();
  w.block_start = ++w.interval;
  w.shared = reinterpret_cast<uintptr_t>(shared);
  w.shared_bytes = bytes;
  w.shared_places.resize(std::max(w.shared_places.size(), bytes / PLACE + 1));
  for (Time& interval : w.warp_interval) interval = w.warp_intervals;
}

void run_thread(int thread, const char* stack, size_t stack_bytes) {
  running = {reinterpret_cast<uintptr_t>(stack), stack_bytes, thread, enabled ? &watched() : nullptr};
}

void run_host() {
  running = {};
}

void order_warp(int warp, const void* code) {
  Watch& w = watched();
  if (orders(code, true)) w.warp_interval[warp] = ++w.warp_intervals;
}

void order_block(const std::vector<const void*>& codes) {
  bool ordering = true;
  const void* last = nullptr;
  for (const void* code : codes)
    if (code != nullptr && code != last) ordering &= orders(last = code, false);
  if (ordering) ++watched().interval;
}

void note(int thread, const void* address, size_t bytes, Access access, const void* code) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  if (running.watch == nullptr || at - running.stack < running.stack_bytes) return;
  Watch& w = *running.watch;
  if (at - w.host_stack < w.host_stack_bytes) return;
  const bool in_shared = at - w.shared < w.shared_bytes;
  if (traffic::enabled() && access != Access::copy_landed && access != Access::read_over)
    traffic::note(thread, at, bytes, writing(access), in_shared, code_number(code));
  const Moment now{w.interval, w.warp_interval[thread / 32], static_cast<uint16_t>(thread),
                   code_number(code)};
  for (uintptr_t place = at / PLACE * PLACE; place < at + bytes; place += PLACE)
    w.note_place(std::max(place, at), in_shared, now, access);
}

Time interval() {
  return watched().interval;
}

void note_read_over(int thread, const void* address, size_t bytes, Time since, const void* code) {
  if (running.watch == nullptr) return;
  Watch& w = *running.watch;
  const auto at = reinterpret_cast<uintptr_t>(address);
  const Moment now{w.interval, w.warp_interval[thread / 32], static_cast<uint16_t>(thread),
                   code_number(code)};
  for (uintptr_t place = at; place < at + bytes; place += PLACE) {
    const Place& found = w.place(place, true);
    if (found.write.interval > since)
      w.report(found, found.write, true, now, false, place, true, "no wait for the product");
    w.note_place(place, true, now, Access::read_over);
  }
}

void fence_writes(int thread) {
  Watch& w = watched();
  Fences& of = w.fences[thread];
  if (of.interval != w.interval) of.before = of.count;
  of.interval = w.interval;
  ++of.count;
}

std::string hazard() {
  const Watch& w = watched();
  const Finding& f = w.finding;
  if (!f.found) return {};
  const auto thread = [](const Moment& moment) { return "thread " + std::to_string(moment.thread); };
  const std::string where = f.shared ? "shared memory, byte " + std::to_string(f.address - w.shared) + ", "
                                     : std::string("global memory ");
  return "hazard: " + thread(f.now) + (f.now_writes ? " writes " : " reads ") + where + "at " +
         line_of(f.now.code) + ", which " + thread(f.then) + (f.other_block ? " of another block" : "") +
         (f.then_copies   ? " has not yet waited for the cp.async into"
          : f.then_writes ? " wrote"
                          : " read") +
         " at " + line_of(f.then.code) + ", with " + f.lacking + " in between";
}

void set_enabled(bool wanted) {
  enabled = wanted;
}

std::vector<Barrier> barriers() {
  const std::lock_guard<std::mutex> lock(met_lock);
  std::vector<uint32_t> codes;
  for (const auto& [code, of_warp] : met) codes.push_back(code);
  const std::vector<std::string> lines = lines_of(codes);
  std::vector<Barrier> result;
  for (size_t i = 0; i < codes.size(); ++i) result.push_back({codes[i], met[codes[i]], lines[i]});
  return result;
}

void ignore_barriers(const std::vector<uint32_t>& codes) {
  const std::lock_guard<std::mutex> lock(met_lock);
  ignored = codes;
}

static inline void note_running(const void* address, size_t bytes, Access access, const void* code) {
  // Most of what a thread reads and writes is its own: what registers are on the device.
  if (reinterpret_cast<uintptr_t>(address) - running.stack < running.stack_bytes) return;
  note(running.thread, address, bytes, access, code);
}

}  // namespace vitkernels::twin::watch

// ---- what -fsanitize=thread calls

using vitkernels::twin::watch::Access;

#define VITKERNELS_WATCH(name, bytes, access, ...)                                              \
  void __tsan_##name(void* address __VA_ARGS__) {                                               \
    vitkernels::twin::watch::note_running(address, bytes, access, __builtin_return_address(0)); \
  }

extern "C" {
void __tsan_init() {}
VITKERNELS_WATCH(read_range, static_cast<size_t>(bytes), Access::read, , long bytes)
VITKERNELS_WATCH(write_range, static_cast<size_t>(bytes), Access::write, , long bytes)
VITKERNELS_WATCH(read1, 1, Access::read)
VITKERNELS_WATCH(read2, 2, Access::read)
VITKERNELS_WATCH(read4, 4, Access::read)
VITKERNELS_WATCH(read8, 8, Access::read)
VITKERNELS_WATCH(read16, 16, Access::read)
VITKERNELS_WATCH(write1, 1, Access::write)
VITKERNELS_WATCH(write2, 2, Access::write)
VITKERNELS_WATCH(write4, 4, Access::write)
VITKERNELS_WATCH(write8, 8, Access::write)
VITKERNELS_WATCH(write16, 16, Access::write)
}
