// The host twin's scheduler: one fiber per CUDA thread, blocks one after another (see
// vitkernels/host_twin.h).
#include <algorithm>
#include <array>
#include <atomic>
#include <memory>
#include <numeric>
#include <vector>

#include "fiber.h"
#include "traffic.h"
#include "vitkernels/device.h"
#include "watch.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace vitkernels::twin {
namespace {

constexpr size_t RED_ZONE = 1024;
constexpr unsigned char POISON = 0xff;  // NaN in every float type

std::atomic<uint64_t> global_seed{0};
std::atomic<int> global_processors{1};

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 0xd1b54a32d192ed03u) {}
  uint32_t below(uint32_t bound) {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<uint32_t>((state_ >> 32) * bound >> 32);
  }

 private:
  uint64_t state_;
};

// Shared memory of one block between two red zones. Aligned to 16 bytes and, so that a kernel cannot come to
// rely on more than shared_memory() promises, never to 32.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes) : bytes_(bytes), storage_(bytes + 2 * RED_ZONE + 48, POISON) {
    const uintptr_t start = reinterpret_cast<uintptr_t>(storage_.data()) + RED_ZONE;
    data_ = storage_.data() + RED_ZONE + ((start + 15) / 32 * 32 + 16 - start);
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(storage_.data(), data_ - storage_.data());
    ASAN_POISON_MEMORY_REGION(data_ + bytes_, storage_.data() + storage_.size() - data_ - bytes_);
#endif
  }
  ~SharedMemory() {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(storage_.data(), storage_.size());
#endif
  }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  char* data() const { return reinterpret_cast<char*>(data_); }
  size_t bytes() const { return bytes_; }
  void poison() { std::fill(data_, data_ + bytes_, POISON); }
  bool red_zones_intact() const {
#if defined(__SANITIZE_ADDRESS__)
    return true;
#else
    const auto poisoned = [](unsigned char byte) { return byte == POISON; };
    return std::all_of(storage_.data(), static_cast<const unsigned char*>(data_), poisoned) &&
           std::all_of(static_cast<const unsigned char*>(data_ + bytes_), storage_.data() + storage_.size(),
                       poisoned);
#endif
  }

 private:
  size_t bytes_;
  std::vector<unsigned char> storage_;
  unsigned char* data_;
};

struct Copy {
  void* target;
  const void* source;
  int bytes;
  bool valid;
  int group;
};

// What a wgmma that is not waited for reads.
struct ProductRead {
  const void* place;
  int group;
  watch::Time since = 0;
};

// 16 bytes on their way, whoever began the copy.
struct EngineCopy {
  void* target;
  std::array<char, 16> bytes;
  const void* arrival;
};

enum class State { ready, at_collective, at_barrier, done };

struct Thread {
  Fiber fiber;
  Position position{};
  State state = State::done;
  const char* collective = nullptr;
  CollectiveBody body = nullptr;
  void* operands = nullptr;
  const void* barrier = nullptr;  // where it waits
  std::vector<Copy> copies;
  int open_group = 0;
  std::vector<ProductRead> product_reads;
  int open_products = 0;
  std::vector<ProductRead> product_sums;  // place: the sums
  bool products_fenced = false;
};

std::string lane_list(const std::vector<int>& lanes) {
  std::string text = lanes.size() == 1 ? "lane " : "lanes ";
  for (size_t i = 0; i < lanes.size();) {
    size_t last = i;
    while (last + 1 < lanes.size() && lanes[last + 1] == lanes[last] + 1) ++last;
    if (i > 0) text += ", ";
    text += std::to_string(lanes[i]);
    if (last > i) text += "-" + std::to_string(lanes[last]);
    i = last + 1;
  }
  return text;
}

class Scheduler {
 public:
  void run(const void* kernel, GridSize grid, int threads, size_t shared_bytes, ThreadBody body);

  Thread& current() {
    if (current_ == nullptr)
      throw std::runtime_error("host twin: a device function was called outside a launch");
    return *current_;
  }
  void collective(const char* name, CollectiveBody body, void* mine, const void* code);
  const void* collective_code() const { return collective_code_; }
  Thread& lane(int number) { return *threads_[current().position.thread / 32 * 32 + number]; }
  void wait_block(const void* code);
  std::vector<EngineCopy>& engine_copies() { return engine_copies_; }

 private:
  void prepare(int threads);
  void run_block();
  void run_interval();
  void step(int warp);
  void resume(Thread& thread);
  void thread_main(Thread& thread);
  [[noreturn]] void fail_diverged(int warp);
  int lanes_of(int warp) const { return std::min(32, count_ - 32 * warp); }
  Thread& lane(int warp, int index) { return *threads_[static_cast<size_t>(32 * warp + index)]; }

  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<int> arrived_;               // per warp, at the collective now gathering
  std::vector<const void*> barriers_;      // per thread, the one it has waited in
  std::vector<EngineCopy> engine_copies_;  // of the block, not waited for
  int count_ = 0;
  ThreadBody body_{};
  Thread* current_ = nullptr;
  const void* collective_code_ = nullptr;  // of the one that runs
  std::exception_ptr error_;
  Random random_{0};
};

Scheduler& scheduler() {
  static thread_local const auto scheduler = std::make_unique<Scheduler>();
  return *scheduler;
}

// Fibers outlive the launch, each waiting for the next block's thread of its number.
void Scheduler::prepare(int threads) {
  while (static_cast<int>(threads_.size()) < threads) {
    threads_.push_back(std::make_unique<Thread>());
    Thread* thread = threads_.back().get();
    thread->fiber.start([this, thread] {
      for (;;) {
        thread_main(*thread);
        thread->fiber.suspend();
      }
    });
  }
  count_ = threads;
  arrived_.assign(static_cast<size_t>((threads + 31) / 32), 0);
  barriers_.assign(static_cast<size_t>(threads), nullptr);
}

void Scheduler::thread_main(Thread& thread) {
  try {
    body_.call(body_.closure);
  } catch (...) {
    error_ = std::current_exception();
  }
  thread.state = State::done;
}

void Scheduler::resume(Thread& thread) {
  current_ = &thread;
  watch::run_thread(thread.position.thread, thread.fiber.stack(), Fiber::STACK_BYTES);
  thread.fiber.resume();
  watch::run_host();
  current_ = nullptr;
  if (error_) std::rethrow_exception(error_);
}

void Scheduler::collective(const char* name, CollectiveBody body, void* mine, const void* code) {
  Thread& self = current();
  const int warp = self.position.thread / 32;
  self.state = State::at_collective;
  self.collective = name;
  self.body = body;
  self.operands = mine;
  if (++arrived_[static_cast<size_t>(warp)] < 32) {
    self.fiber.suspend();
    return;
  }
  void* operands[32];
  for (int i = 0; i < 32; ++i) {
    const Thread& other = lane(warp, i);
    // shfl and shfl_down share a body, hence the names
    if (other.body != body || std::strcmp(other.collective, name) != 0) fail_diverged(warp);
    operands[i] = lane(warp, i).operands;
  }
  collective_code_ = code;
  body(operands);
  if (traffic::enabled()) traffic::meet(warp);
  if (std::strcmp(name, SYNC_WARP) == 0) watch::order_warp(warp, code);
  arrived_[static_cast<size_t>(warp)] = 0;
  for (int i = 0; i < 32; ++i) lane(warp, i).state = State::ready;
  if (random_.below(2) != 0) self.fiber.suspend();
}

void Scheduler::wait_block(const void* code) {
  Thread& self = current();
  self.barrier = code;
  self.state = State::at_barrier;
  self.fiber.suspend();
}

void Scheduler::fail_diverged(int warp) {
  std::vector<std::pair<std::string, std::vector<int>>> places;
  for (int i = 0; i < 32; ++i) {
    std::string place = "absent from the block";
    if (i < lanes_of(warp)) {
      const Thread& thread = lane(warp, i);
      if (thread.state == State::at_collective) place = std::string("at ") + thread.collective;
      if (thread.state == State::at_barrier) place = "at sync_block";
      if (thread.state == State::done) place = "exited";
    }
    auto found =
        std::find_if(places.begin(), places.end(), [&](const auto& entry) { return entry.first == place; });
    if (found == places.end()) found = places.insert(places.end(), {place, {}});
    found->second.push_back(i);
  }
  std::string text = "diverged warp " + std::to_string(warp) + ": a warp collective needs all 32 lanes, but ";
  for (size_t i = 0; i < places.size(); ++i)
    text += (i > 0 ? "; " : "") + lane_list(places[i].second) + " " + places[i].first;
  throw std::runtime_error(text);
}

// Every lane that can run does so once, up to its next collective or barrier, in a shuffled order.
void Scheduler::step(int warp) {
  const uint32_t start = random_.below(32), stride = 2 * random_.below(16) + 1;
  for (uint32_t i = 0; i < 32; ++i) {
    const int index = static_cast<int>((start + i * stride) % 32);
    if (index < lanes_of(warp) && lane(warp, index).state == State::ready) resume(lane(warp, index));
  }
}

// From one barrier to the next. Half the time a warp runs all the way before another starts, which shows the
// hazards of one warp far ahead; the other half they interleave.
void Scheduler::run_interval() {
  std::vector<int> warps(arrived_.size());
  std::iota(warps.begin(), warps.end(), 0);
  const bool interleave = random_.below(2) != 0;
  size_t chosen = random_.below(static_cast<uint32_t>(warps.size()));
  while (!warps.empty()) {
    const int warp = warps[chosen];
    step(warp);
    bool ready = false;
    for (int i = 0; i < lanes_of(warp); ++i) ready |= lane(warp, i).state == State::ready;
    if (!ready) {
      if (arrived_[static_cast<size_t>(warp)] > 0) fail_diverged(warp);
      warps.erase(warps.begin() + static_cast<std::ptrdiff_t>(chosen));
    }
    if (!warps.empty() && (!ready || (interleave && random_.below(4) == 0)))
      chosen = random_.below(static_cast<uint32_t>(warps.size()));
  }
}

void Scheduler::run_block() {
  for (bool alive = true; alive;) {
    run_interval();
    for (int warp = 0; traffic::enabled() && 32 * warp < count_; ++warp) traffic::meet(warp);
    alive = false;
    for (int i = 0; i < count_; ++i) {
      Thread& thread = *threads_[static_cast<size_t>(i)];
      const bool waits = thread.state == State::at_barrier;
      barriers_[static_cast<size_t>(i)] = waits ? thread.barrier : nullptr;
      if (waits) thread.state = State::ready;
      alive |= waits;
    }
    watch::order_block(barriers_);
  }
}

void Scheduler::run(const void* kernel, GridSize grid, int threads, size_t shared_bytes, ThreadBody body) {
  if (current_ != nullptr) throw std::runtime_error("host twin: a kernel launched a kernel");
  prepare(threads);
  body_ = body;
  random_ = Random(global_seed);
  SharedMemory shared(shared_bytes);
  watch::begin_launch();
  traffic::begin_launch(kernel);

  const int64_t blocks = grid.x * grid.y * grid.z;
  const int64_t start = random_.below(static_cast<uint32_t>(std::min<int64_t>(blocks, 1 << 30)));
  int64_t stride = 1 + random_.below(static_cast<uint32_t>(std::min<int64_t>(blocks, 1 << 20)));
  while (std::gcd(stride, blocks) != 1) ++stride;
  int64_t block = start;
  for (int64_t i = 0; i < blocks; ++i, block = (block + stride) % blocks) {
    shared.poison();
    watch::begin_block(shared.data(), shared_bytes);
    const Position position{0,
                            threads,
                            static_cast<int>(block % grid.x),
                            static_cast<int>(block / grid.x % grid.y),
                            static_cast<int>(block / grid.x / grid.y),
                            static_cast<int>(grid.x),
                            shared.data(),
                            shared_bytes};
    for (int thread = 0; thread < threads; ++thread) {
      Thread& slot = *threads_[static_cast<size_t>(thread)];
      slot.position = position;
      slot.position.thread = thread;
      slot.state = State::ready;
      slot.copies.clear();
      slot.product_reads.clear();
      slot.open_group = 0;
      slot.open_products = 0;
      slot.product_sums.clear();
      slot.products_fenced = false;
    }
    engine_copies_.clear();
    try {
      run_block();
      if (!shared.red_zones_intact()) throw std::runtime_error("a write outside shared memory");
      if (const std::string hazard = watch::hazard(); !hazard.empty()) throw std::runtime_error(hazard);
    } catch (const std::exception& error) {
      const std::string what = error.what();
      error_ = nullptr;
      current_ = nullptr;
      threads_.clear();  // the other fibers are stuck in the middle of the block
      throw std::runtime_error("host twin: " + what + " [block (" + std::to_string(position.block_x) + ", " +
                               std::to_string(position.block_y) + ", " + std::to_string(position.block_z) +
                               "), " + describe_launch({grid.x, grid.y, grid.z}, threads, shared_bytes) +
                               "]");
    }
  }
}

}  // namespace

const Position& here() {
  return scheduler().current().position;
}
void set_seed(uint64_t seed) {
  global_seed = seed;
}
int processors() {
  return global_processors;
}
void set_processors(int count) {
  global_processors = count;
}
void run_grid(const void* kernel, GridSize grid, int threads, size_t shared_bytes, ThreadBody thread) {
  scheduler().run(kernel, grid, threads, shared_bytes, thread);
}
void collective(const char* name, CollectiveBody body, void* mine) {
  scheduler().collective(name, body, mine, __builtin_return_address(0));
}
void wait_block() {
  scheduler().wait_block(__builtin_return_address(0));
}

void fail(const std::string& what) {
  throw std::runtime_error(what + " (thread " + std::to_string(here().thread) + ")");
}

void check_aligned(const void* pointer, size_t bytes, const char* what) {
  const size_t off = reinterpret_cast<uintptr_t>(pointer) % bytes;
  if (off != 0)
    fail(std::string(what) + " needs an address aligned to " + std::to_string(bytes) + " bytes; it is " +
         std::to_string(off) + " past one");
}

void note_row(int lane, const void* row) {
  watch::note(here().thread / 32 * 32 + lane, row, 16, watch::Access::read, scheduler().collective_code());
}

void note_product_read(int lane, const void* place) {
  watch::note(here().thread / 32 * 32 + lane, place, 16, watch::Access::product_read,
              scheduler().collective_code());
  Thread& reader = scheduler().lane(lane);
  reader.product_reads.push_back({place, reader.open_products, watch::interval()});
}
void note_product_sums(int lane, const float* sums) {
  Thread& thread = scheduler().lane(lane);
  if (!thread.products_fenced) fail("a wgmma without a wgmma_fence() after its sums were written");
  thread.product_sums.push_back({sums, thread.open_products, 0});
}
void fence_products() {
  scheduler().current().products_fenced = true;
}
void touch_sums(const float* sums) {
  Thread& self = scheduler().current();
  for (const ProductRead& product : self.product_sums)
    if (product.place == sums) fail("the sums of a wgmma are used before it has been waited for");
  self.products_fenced = false;
}
void fence_writes() {
  watch::fence_writes(here().thread);
}
void commit_products() {
  ++scheduler().current().open_products;
}
void wait_products(int in_flight) {
  Thread& self = scheduler().current();
  const void* code = __builtin_return_address(0);
  const auto is_over = [&](const ProductRead& read) {
    if (read.group >= self.open_products - in_flight) return false;
    watch::note_read_over(self.position.thread, read.place, 16, read.since, code);
    return true;
  };
  self.product_reads.erase(std::remove_if(self.product_reads.begin(), self.product_reads.end(), is_over),
                           self.product_reads.end());
  const auto is_done = [&](const ProductRead& product) {
    return product.group < self.open_products - in_flight;
  };
  self.product_sums.erase(std::remove_if(self.product_sums.begin(), self.product_sums.end(), is_done),
                          self.product_sums.end());
}

void check_shared(const void* pointer, size_t bytes, const char* what) {
  const Position& position = here();
  const auto* byte = static_cast<const char*>(pointer);
  if (byte < position.shared || byte + bytes > position.shared + position.shared_bytes)
    fail(std::string(what) + " is outside the block's " + std::to_string(position.shared_bytes) +
         " bytes of shared memory: offset " + std::to_string(byte - position.shared));
}

// The device may write the target any time from here to the wait, so what it held is lost at once.
void copy_async(void* smem, const void* gmem, int bytes, bool valid) {
  const std::string name = "cp_async" + std::to_string(bytes);
  check_aligned(smem, bytes, ("the target of " + name).c_str());
  check_shared(smem, bytes, ("the target of " + name).c_str());
  if (valid) check_aligned(gmem, bytes, ("the source of " + name).c_str());
  Thread& self = scheduler().current();
  const void* code = __builtin_return_address(0);
  if (valid) watch::note(self.position.thread, gmem, bytes, watch::Access::read, code);
  watch::note(self.position.thread, smem, bytes, watch::Access::copy_issued, code);
  std::memset(smem, POISON, bytes);
  self.copies.push_back({smem, gmem, bytes, valid, self.open_group});
}

void copy_by_engine(void* smem, const void* bytes, const void* arrival) {
  check_shared(smem, 16, "the target of the copy engine");
  watch::note(here().thread, smem, 16, watch::Access::engine_write, __builtin_return_address(0));
  std::memset(smem, POISON, 16);
  EngineCopy copy{smem, {}, arrival};
  std::memcpy(copy.bytes.data(), bytes, 16);
  scheduler().engine_copies().push_back(copy);
}
void land_copies_of_engine(const void* arrival) {
  auto& copies = scheduler().engine_copies();
  const auto lands = [&](const EngineCopy& copy) {
    if (copy.arrival != arrival) return false;
    std::memcpy(copy.target, copy.bytes.data(), 16);
    return true;
  };
  copies.erase(std::remove_if(copies.begin(), copies.end(), lands), copies.end());
}

void commit_copies() {
  ++scheduler().current().open_group;
}

void wait_copies(int in_flight) {
  Thread& self = scheduler().current();
  const void* code = __builtin_return_address(0);
  const int finished = self.open_group - in_flight;
  const auto lands = [&](const Copy& copy) {
    if (copy.group >= finished) return false;
    watch::note(self.position.thread, copy.target, copy.bytes, watch::Access::copy_landed, code);
    if (copy.valid) {
      std::memcpy(copy.target, copy.source, copy.bytes);
    } else {
      std::memset(copy.target, 0, copy.bytes);
    }
    return true;
  };
  self.copies.erase(std::remove_if(self.copies.begin(), self.copies.end(), lands), self.copies.end());
}

}  // namespace vitkernels::twin
