#include "vitkernels/parallel.h"

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <string>
#include <system_error>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace vitkernels {
namespace {

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

// The items that a slot begins with, on a cache line of its own.
struct alignas(64) Share {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

struct Job {
  int64_t n;
  RangeFn fn;
  void* context;
  TeamFn team = nullptr;  // instead of fn
  TeamBarrier* barrier = nullptr;
  // Of fn in chunks. There may be fewer slots than shares.
  Share* shares = nullptr;
  int count = 0;
  int64_t chunk = 0;

  int64_t begin_of(int slot, int slots) const {
    return n / slots * slot + std::min<int64_t>(slot, n % slots);
  }

  void run(int slot, int slots) const {
    if (team) return team(context, slot, slots, *barrier);
    for (int i = 0; i < count; ++i) {
      Share& share = shares[(slot + i) % count];
      for (int64_t begin; (begin = share.next.fetch_add(chunk, std::memory_order_relaxed)) < share.end;)
        fn(context, begin, std::min(begin + chunk, share.end), slot);
    }
    if (shares) return;
    const int64_t begin = begin_of(slot, slots), end = begin_of(slot + 1, slots);
    if (begin < end) fn(context, begin, end, slot);
  }
};

// GOMP_parallel is the entry that GCC's, LLVM's and Intel's runtimes all export.
struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
  int (*in_parallel)() = nullptr;
  std::string path;

  explicit operator bool() const { return parallel != nullptr; }
};

#if defined(__linux__)
bool resolve(const char* library, OpenMp& openmp) {
  void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  if (!handle) return false;
  // The handle is kept: the functions must outlive every loop.
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(handle, name));
    return function != nullptr;
  };
  OpenMp found;
  if (!find(found.parallel, "GOMP_parallel") || !find(found.thread_num, "omp_get_thread_num") ||
      !find(found.num_threads, "omp_get_num_threads") || !find(found.in_parallel, "omp_in_parallel"))
    return false;
  Dl_info info;
  found.path = dladdr(reinterpret_cast<void*>(found.parallel), &info) ? info.dli_fname : library;
  openmp = found;
  return true;
}

OpenMp find_openmp() {
  std::vector<std::string> loaded;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* names) {
        static_cast<std::vector<std::string>*>(names)->emplace_back(info->dlpi_name ? info->dlpi_name : "");
        return 0;
      },
      &loaded);
  OpenMp openmp;
  // libtorch_cpu first: dlsym then searches its dependencies, which is where PyTorch's own calls go even
  // when other packages have brought more runtimes into the process.
  for (const char* wanted : {"libtorch_cpu.so", "libiomp5", "libgomp", "libomp"})
    for (const std::string& path : loaded)
      if (path.find(wanted) != std::string::npos && resolve(path.c_str(), openmp)) return openmp;
  return openmp;
}
#else
OpenMp find_openmp() {
  return {};
}
#endif

const OpenMp& openmp() {
  static const OpenMp found = [] {
    const char* setting = std::getenv("VITKERNELS_OPENMP");
    return setting && std::strcmp(setting, "0") == 0 ? OpenMp{} : find_openmp();
  }();
  return found;
}

// Workers wait for a job, each runs its slot. One job at a time: a second caller runs serially.
class Pool {
 public:
  void run(const Job& job, int threads) {
    if (busy_.test_and_set(std::memory_order_acquire)) return job.run(0, 1);
    int slots = threads;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      try {
        while (workers_ < threads - 1) {
          std::thread([this, slot = workers_ + 1] { work(slot); }).detach();
          ++workers_;
        }
      } catch (const std::system_error&) {
        slots = workers_ + 1;
      }
      job_ = job;
      slots_ = slots;
      pending_ = workers_;
      ++generation_;
    }
    wake_.notify_all();
    job.run(0, slots);
    {
      std::unique_lock<std::mutex> lock(mutex_);
      done_.wait(lock, [this] { return pending_ == 0; });
    }
    busy_.clear(std::memory_order_release);
  }

  static bool& inside_worker() {
    static thread_local bool value = false;
    return value;
  }

 private:
  void work(int slot) {
    inside_worker() = true;
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      const Job job = job_;
      const int slots = slots_;
      lock.unlock();
      if (slot < slots) job.run(slot, slots);
      lock.lock();
      if (--pending_ == 0) done_.notify_one();
    }
  }

  // No mutex: the thread that has it set asks again, in a loop within its own slot.
  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  Job job_{};
  int slots_ = 0, workers_ = 0, pending_ = 0;
  uint64_t generation_ = 0;
};

// Never destroyed: its workers may still wait when the process exits. A forked child has none of the
// workers and possibly a locked mutex, so it starts over with a new pool.
Pool* current_pool = nullptr;

Pool& pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    current_pool = new Pool;
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] { current_pool = new Pool; });
#endif
  });
  return *current_pool;
}

}  // namespace

namespace {

void run_job(Job job, int threads) {
  if (threads <= 1) return job.run(0, 1);
  if (const OpenMp& omp = openmp()) {
    if (omp.in_parallel()) return job.run(0, 1);
    const auto body = [](void* data) {
      const OpenMp& team = openmp();
      static_cast<const Job*>(data)->run(team.thread_num(), team.num_threads());
    };
    omp.parallel(body, &job, static_cast<unsigned>(threads), 0);
  } else if (Pool::inside_worker()) {
    job.run(0, 1);
  } else {
    pool().run(job, threads);
  }
}

}  // namespace

void parallel_for(int64_t n, int threads, RangeFn fn, void* context, int64_t chunk) {
  const int slots = static_cast<int>(std::min<int64_t>(threads, n));
  Job job{n, fn, context};
  if (chunk == 0 || slots <= 1) return run_job(job, slots);
  std::vector<Share> shares(slots);
  for (int slot = 0; slot < slots; ++slot) {
    shares[slot].next.store(job.begin_of(slot, slots), std::memory_order_relaxed);
    shares[slot].end = job.begin_of(slot + 1, slots);
  }
  job.shares = shares.data();
  job.count = slots;
  job.chunk = chunk;
  run_job(job, slots);
}

void parallel_team(int threads, TeamFn fn, void* context) {
  TeamBarrier barrier;
  run_job(Job{threads, nullptr, context, fn, &barrier}, threads);
}

void TeamBarrier::wait(int size) {
  if (size == 1) return;
  constexpr int kSpins = 4096;
  const int phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins)
    spins < kSpins ? pause() : std::this_thread::yield();
}

namespace {

// About the work of 10 us on one core: a fork and join of a spinning team costs 1-2 us.
constexpr double kGrain = 3e5;

}  // namespace

int64_t worthwhile_chunk(double work, int64_t items, int threads) {
  constexpr int kChunksInShare = 8;
  const int64_t least = static_cast<int64_t>(std::ceil(items * std::min(1.0, kGrain / work)));
  return std::max<int64_t>({items / threads / kChunksInShare, least, 1});
}

int worthwhile_threads(double work, int64_t items, int threads) {
  const double worth = std::min(work / kGrain, static_cast<double>(items));
  return std::max(1, static_cast<int>(std::min(worth, static_cast<double>(threads))));
}

void* thread_scratch(size_t bytes) {
  struct Block {
    void* data = nullptr;
    size_t size = 0;
    ~Block() { release(); }
    void release() {
      ::operator delete(data, std::align_val_t(64));
      data = nullptr;
      size = 0;
    }
  };
  static thread_local Block block;
  // A rare large problem must not pin its memory for good.
  constexpr size_t kKeep = size_t{16} << 20;
  if (block.size < bytes || block.size > std::max(bytes, kKeep)) {
    block.release();
    block.data = ::operator new(bytes, std::align_val_t(64));
    block.size = bytes;
  }
  return block.data;
}

const char* openmp_runtime() {
  return openmp().path.c_str();
}

}  // namespace vitkernels
