"""The thread layer of the CPU kernels (csrc/parallel.cpp), on PyTorch's OpenMP team and on its own pool."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).parents[2] / "csrc"
DRIVER = r"""
#include <pthread.h>
#include <atomic>
#include <chrono>
#include "vitkernels/parallel.h"
using namespace vitkernels;
struct Record { int64_t* ranges; uint64_t* threads; };
extern "C" void ranges(int64_t n, int threads, int64_t* found, uint64_t* ids) {
  Record record{found, ids};
  parallel_for(n, threads, [](void* c, int64_t begin, int64_t end, int slot) {
    Record& r = *static_cast<Record*>(c);
    r.ranges[2 * slot] = begin;
    r.ranges[2 * slot + 1] = end;
    r.threads[slot] = (uint64_t)pthread_self();
  }, &record);
}
// Of each item how often it came, in which slot, and how many its range had. Others wait for slot `slow`, which
// does not go on before all items but those of its first range have come; each for five seconds at most.
extern "C" int64_t chunks(int64_t n, int threads, int64_t chunk, int slow, int* times, int* slots, int64_t* sizes) {
  struct Record {
    int64_t n;
    int slow, *times, *slots;
    int64_t* sizes;
    std::atomic<int64_t> done;
    std::atomic<bool> begun;
  };
  Record record{n, slow, times, slots, sizes, {0}, {slow < 0}};
  parallel_for(n, threads, [](void* c, int64_t begin, int64_t end, int slot) {
    Record& r = *static_cast<Record*>(c);
    for (int64_t i = begin; i < end; ++i) ++r.times[i], r.slots[i] = slot, r.sizes[i] = end - begin;
    const auto start = std::chrono::steady_clock::now();
    if (slot == r.slow) r.begun = true;
    const auto ready = [&] { return slot == r.slow ? r.done >= r.n - (end - begin) : r.begun.load(); };
    while (!ready() && std::chrono::steady_clock::now() - start < std::chrono::seconds(5)) sched_yield();
    r.done += end - begin;
  }, &record, chunk);
  return record.done.load();
}
// sum[i] += 1 for i < n * n, an inner loop inside each step of an outer one
extern "C" void nested(int64_t n, int threads, int64_t* sum) {
  struct Outer { int64_t n; int threads; int64_t* sum; } outer{n, threads, sum};
  parallel_for(n, threads, [](void* c, int64_t begin, int64_t end, int) {
    Outer o = *static_cast<Outer*>(c);
    for (int64_t i = begin; i < end; ++i) {
      int64_t* row = o.sum + i * o.n;
      parallel_for(o.n, o.threads, [](void* r, int64_t b, int64_t e, int) {
        for (int64_t j = b; j < e; ++j) static_cast<int64_t*>(r)[j] += 1;
      }, row);
    }
  }, &outer);
}
extern "C" const char* runtime() { return openmp_runtime(); }
extern "C" void* scratch(uint64_t bytes) { return thread_scratch(bytes); }
extern "C" int worthwhile(double work, int64_t items, int threads) {
  return worthwhile_threads(work, items, threads);
}
extern "C" int64_t chunk(double work, int64_t items, int threads) { return worthwhile_chunk(work, items, threads); }
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C++ compiler and Linux")
    folder = tmp_path_factory.mktemp("parallel")
    (folder / "driver.cpp").write_text(DRIVER)
    sources = [str(CSRC / "parallel.cpp"), str(folder / "driver.cpp")]
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", f"-I{CSRC / 'include'}", "-ldl", "-pthread"]
    subprocess.run([compiler, *sources, *flags, "-o", str(folder / "parallel.so")], check=True)
    return folder / "parallel.so"


@pytest.fixture(params=["openmp", "pool"])
def library(request: pytest.FixtureRequest, built: Path, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """The choice is made once per loaded library, so each mode loads a copy of its own."""
    copy = built.with_name(f"{request.param}.so")
    if not copy.exists():
        shutil.copy(built, copy)
    monkeypatch.setenv("VITKERNELS_OPENMP", "1" if request.param == "openmp" else "0")
    library = ctypes.CDLL(str(copy))
    library.runtime.restype = ctypes.c_char_p
    library.scratch.restype = ctypes.c_void_p
    library.scratch.argtypes = [ctypes.c_uint64]
    library.worthwhile.argtypes = [ctypes.c_double, ctypes.c_int64, ctypes.c_int]
    library.chunk.argtypes = [ctypes.c_double, ctypes.c_int64, ctypes.c_int]
    library.chunk.restype = library.chunks.restype = ctypes.c_int64
    if request.param == "pool":
        assert library.runtime() == b""
    elif not library.runtime():
        pytest.skip("this PyTorch brings no OpenMP runtime")
    return library


def ranges(library: ctypes.CDLL, n: int, threads: int) -> tuple[list[tuple[int, int]], set[int]]:
    found, ids = (ctypes.c_int64 * (2 * threads))(*[-1] * (2 * threads)), (ctypes.c_uint64 * threads)()
    library.ranges(ctypes.c_int64(n), threads, found, ids)
    pairs = [(found[2 * i], found[2 * i + 1]) for i in range(threads) if found[2 * i] >= 0]
    return pairs, {i for i in ids if i}


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_ranges_partition_the_items(library: ctypes.CDLL, threads: int) -> None:
    for n in (0, 1, 2, 3, 7, 64, 1001):
        pairs, _ = ranges(library, n, threads)
        assert len(pairs) <= min(n, threads)
        assert [i for begin, end in pairs for i in range(begin, end)] == list(range(n))


def chunks(
    library: ctypes.CDLL, n: int, threads: int, chunk: int, slow: int = -1
) -> list[tuple[int, int, int]]:
    """(how often it came, its slot, the items of its range) of each item"""
    times, slots, sizes = (ctypes.c_int * n)(), (ctypes.c_int * n)(), (ctypes.c_int64 * n)()
    done = library.chunks(ctypes.c_int64(n), threads, ctypes.c_int64(chunk), slow, times, slots, sizes)
    assert done == n
    return list(zip(times, slots, sizes, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_chunks_partition_the_items(library: ctypes.CDLL, threads: int) -> None:
    for n in (0, 1, 2, 3, 7, 64, 1001):
        for chunk in (1, 3, 2000):
            for times, slot, size in chunks(library, n, threads, chunk):
                assert times == 1
                assert 0 <= slot < max(1, min(n, threads))
                assert size <= chunk or threads == 1 or n == 1  # nobody shares


def test_what_a_slow_thread_has_left_others_take(library: ctypes.CDLL) -> None:
    found = chunks(library, 100, 2, 3, slow=1)
    assert [slot for _, slot, _ in found].count(1) == 3
    assert all(times == 1 for times, _, _ in found)


def test_worthwhile_chunk(library: ctypes.CDLL) -> None:
    assert library.chunk(1e12, 1600, 2) == 100, "eight in a share"
    assert library.chunk(1e12, 4, 2) == 1
    assert library.chunk(3e6, 1000, 2) == 100, "none of less than 3e5 operations"
    assert library.chunk(0.0, 7, 2) == 7


def test_runs_on_several_threads(library: ctypes.CDLL) -> None:
    _, ids = ranges(library, 100, 2)
    assert len(ids) == 2
    _, again = ranges(library, 100, 2)
    assert again == ids, "the team is kept between loops"
    _, one = ranges(library, 100, 1)
    assert one == {threading.get_ident()}


@pytest.mark.parametrize("library", ["openmp"], indirect=True)
def test_openmp_runtime_is_the_one_of_pytorch(library: ctypes.CDLL) -> None:
    path = library.runtime().decode()
    assert path in Path("/proc/self/maps").read_text()
    torch_folder = Path(torch.__file__).parent
    bundled = [p.name for p in (torch_folder / "lib").glob("lib*omp*.so*")]
    if bundled:
        assert Path(path).name in bundled


def test_nested_loops(library: ctypes.CDLL) -> None:
    n = 40
    total = (ctypes.c_int64 * (n * n))()
    library.nested(ctypes.c_int64(n), 2, total)
    assert list(total) == [1] * (n * n)


def test_concurrent_callers(library: ctypes.CDLL) -> None:
    failures = []

    def call() -> None:
        for n in range(1, 60):
            pairs, _ = ranges(library, n, 2)
            if [i for begin, end in pairs for i in range(begin, end)] != list(range(n)):
                failures.append((n, pairs))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures


def test_pool_after_fork(built: Path) -> None:
    """As with PyTorch's own pool a forked child has no workers; ours starts new ones instead of hanging."""
    script = f"""
import ctypes, os
library = ctypes.CDLL({str(built)!r})
def run():
    found, ids = (ctypes.c_int64 * 4)(), (ctypes.c_uint64 * 2)()
    library.ranges(ctypes.c_int64(10), 2, found, ids)
    return list(found)
first = run()
child = os.fork()
if child == 0:
    os._exit(0 if run() == first == [0, 5, 5, 10] else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and run() == first
"""
    env = {**os.environ, "VITKERNELS_OPENMP": "0"}
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, env=env)


def test_pool_without_a_thread(built: Path) -> None:
    """Where the system refuses even the first worker, the caller takes all."""
    script = f"""
import ctypes, os, resource
library = ctypes.CDLL({str(built)!r})
found, ids = (ctypes.c_int64 * 4)(*[-1] * 4), (ctypes.c_uint64 * 2)()
library.runtime()
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
_, most = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (size + 0x40000, most))  # less than a stack
library.ranges(ctypes.c_int64(10), 2, found, ids)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
assert len(os.listdir("/proc/self/task")) == 1, "a worker after all"
assert list(found) == [0, 10, -1, -1], list(found)
"""
    env = {**os.environ, "VITKERNELS_OPENMP": "0"}
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, env=env)


def test_scratch_is_aligned_and_kept(library: ctypes.CDLL) -> None:
    first = library.scratch(1000)
    assert first % 64 == 0
    assert library.scratch(500) == first
    large = library.scratch(1 << 26)
    assert large % 64 == 0
    ctypes.memset(large, 1, 1 << 26)
    small = library.scratch(1 << 10)
    assert small != large, "a rare large problem pins its memory"
    ctypes.memset(small, 2, 1 << 10)


def test_small_work_stays_on_one_thread(library: ctypes.CDLL) -> None:
    assert library.worthwhile(1e4, 100, 8) == 1
    assert library.worthwhile(1e9, 100, 8) == 8
    assert library.worthwhile(1e9, 3, 8) == 3
    assert library.worthwhile(1e9, 3, 0) == 1
