// Products of a warpgroup, four warps in a row whose first is a multiple of four: sums += a b for 64 rows, 8
// to 256 columns and 16 features a call, b and perhaps a from shared memory. On Hopper (sm_90a) alone,
// asynchronous there; on the host twin at once. wgmma_available() says on which device a kernel may use them.
//
// Rows of an operand in shared memory are 64 or 128 bytes, in groups of eight side by side, and the 16-byte
// chunks of a row are exchanged so that neither their writers nor the product meet bank conflicts:
// chunk_of(). A matrix begins at a multiple of 1024 bytes (512 for rows of 64 bytes) of shared memory.
//
// sums, in a thread's registers: with g = lane / 4, t = lane % 4, sums[4 j ..] of columns 8 j + 2 t and the
// next, of rows g (two values) and g + 8 (two values) of the 16 rows of the warp. a in registers is laid out
// as in mma_m16n8k16.
//
// A call only begins the product. wgmma_fence() comes before the first one and wherever registers that it
// takes were written since; wgmma_commit() closes a group of calls; after wgmma_wait<n>() all but the newest
// n groups are done, and before it neither their sums and registers may be touched nor their shared memory be
// written. hold(sums) keeps the compiler from moving reads and writes of the sums past this place.
//
// What a thread writes to shared memory, cp.async included, the product sees after fence_async_proxy() by
// that thread and then a barrier.
#pragma once
#include "vitkernels/device.h"

namespace vitkernels {

#if defined(VITKERNELS_HOST_TWIN) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define VK_WGMMA 1
#endif

// Where the 16-byte chunk `chunk` of row `row` lies in its row of BYTES.
template <int BYTES>
VK_HOST_DEVICE int chunk_of(int row, int chunk) {
  static_assert(BYTES == 64 || BYTES == 128);
  return BYTES == 128 ? chunk ^ (row & 7) : chunk ^ (row >> 1 & 3);
}

// BY_FEATURES: a row of shared memory is a feature k, its columns are the matrix's 32 or 64 rows (of a) or
// columns (of b) side by side; more of them follow `next` bytes on. Otherwise a row of shared memory is a row
// of a or a column of b, its columns features, and advance() by 32 bytes goes on by 16 features.
enum class Major { FEATURES_SIDE_BY_SIDE, BY_FEATURES };

#if defined(VITKERNELS_HOST_TWIN)

template <int BYTES, Major MAJOR>
struct Operand {
  const char* data;
  int next;

  explicit Operand(const void* matrix, int next_ = 0) : data(static_cast<const char*>(matrix)), next(next_) {
    if ((data - shared_memory()) % (8 * BYTES) != 0)
      twin::fail("a matrix of wgmma needs to begin at a multiple of " + std::to_string(8 * BYTES) + " bytes");
  }
  Operand advance(int bytes) const {
    Operand result = *this;
    result.data += bytes;
    return result;
  }

  // Feature k of row (or column) i, in the name of a lane of the warp.
  template <class T>
  VK_UNWATCHED float element(int lane, int i, int k) const {
    constexpr int WIDTH = BYTES / 2;
    // The exchange goes by the address, so an advanced operand still finds its chunks.
    const ptrdiff_t begin = data - shared_memory();
    ptrdiff_t at = begin;
    if constexpr (MAJOR == Major::BY_FEATURES) {
      at += static_cast<ptrdiff_t>(i / WIDTH) * next + k * BYTES + i % WIDTH * 2;
    } else {
      at += static_cast<ptrdiff_t>(i) * BYTES + k * 2;
    }
    const int row = static_cast<int>(at / BYTES), inside = static_cast<int>(at % BYTES);
    const char* place = shared_memory() + static_cast<ptrdiff_t>(row) * BYTES +
                        chunk_of<BYTES>(row & 7, inside / 16) * 16 + inside % 16;
    if (inside % 16 == 0) {
      twin::check_shared(place, 16, "a matrix of wgmma");
      twin::note_product_read(lane, place);
    }
    T value;
    std::memcpy(&value, place, sizeof(value));
    return to_float(value);
  }
};

namespace twin {

template <class A, class B>
struct GroupOperands {
  float* sums;
  const uint32_t* registers;
  const A* a;
  const B* b;
};

// A warp has the 16 rows that begin at its own of its group; nothing passes between warps.
template <class T, int N, class A, class B>
VK_UNWATCHED void multiply_group(void* const* lanes) {
  using Operands = GroupOperands<A, B>;
  const auto* first = static_cast<const Operands*>(lanes[0]);
  float a[16][16], b[16][N];
  const int top = warp_id() % 4 * 16;
  for (int lane = 0; lane < 32; ++lane) {
    const auto* mine = static_cast<const Operands*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      for (int which = 0; which < 2; ++which) {
        const int row = g + 8 * (i % 2), k = 2 * t + which + 8 * (i / 2);
        if constexpr (std::is_same_v<A, void>) {
          a[row][k] = unpack<T>(mine->registers[i], which);
        } else {
          a[row][k] = first->a->template element<T>(lane, top + row, k);
        }
      }
    }
  }
  for (int column = 0; column < N; ++column)
    for (int k = 0; k < 16; ++k) b[k][column] = first->b->template element<T>(column % 32, column, k);
  for (int lane = 0; lane < 32; ++lane) {
    float* sums = static_cast<const Operands*>(lanes[lane])->sums;
    note_product_sums(lane, sums);
    for (int i = 0; i < N / 2; ++i) {
      const int row = lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
      float sum = sums[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      sums[i] = sum;
    }
  }
}

}  // namespace twin

inline bool wgmma_available() {
  return true;
}
inline void fence_async_proxy() {
  twin::fence_writes();
}
inline void wgmma_fence() {
  twin::fence_products();
}
VK_INLINE void wgmma_commit() {
  twin::commit_products();
}
template <int PENDING>
VK_INLINE void wgmma_wait() {
  twin::wait_products(PENDING);
}
template <int COUNT>
void hold(float (&sums)[COUNT]) {
  twin::touch_sums(sums);
}

template <class T, int N, int BYTES, Major MAJOR>
VK_INLINE void wgmma(float (&sums)[N / 2], const uint32_t (&a)[4], Operand<BYTES, MAJOR> b) {
  using B = Operand<BYTES, MAJOR>;
  twin::GroupOperands<void, B> mine{sums, a, nullptr, &b};
  twin::collective("wgmma", twin::multiply_group<T, N, void, B>, &mine);
}
template <class T, int N, int A_BYTES, Major A_MAJOR, int BYTES, Major MAJOR>
VK_INLINE void wgmma(float (&sums)[N / 2], Operand<A_BYTES, A_MAJOR> a, Operand<BYTES, MAJOR> b) {
  using A = Operand<A_BYTES, A_MAJOR>;
  using B = Operand<BYTES, MAJOR>;
  twin::GroupOperands<A, B> mine{sums, nullptr, &a, &b};
  twin::collective("wgmma", twin::multiply_group<T, N, A, B>, &mine);
}

#else

inline bool wgmma_available() {
#if defined(VITKERNELS_BUILT_FOR_SM90A)
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major == 9;
#else
  return false;  // built for other architectures: a Hopper device then runs code without these products
#endif
}

#if defined(VK_WGMMA)

// What the instruction takes for a matrix: address and strides in units of 16 bytes, and how chunks are
// exchanged. The half that is the same for all matrices is a constant, so that 32-bit arithmetic advances.
template <int BYTES, Major MAJOR>
struct Operand {
  uint32_t place;

  VK_DEVICE explicit Operand(const void* matrix, int next = 16)
      : place(shared_address(matrix) >> 4 | static_cast<uint32_t>(next >> 4) << 16) {}
  VK_DEVICE Operand advance(int bytes) const {
    Operand result = *this;
    result.place += static_cast<unsigned>(bytes) >> 4;
    return result;
  }
  VK_DEVICE uint64_t description() const {
    constexpr uint32_t EXCHANGE = BYTES == 128 ? 1 : 2, GROUP = 8 * BYTES / 16;
    uint64_t result;
    asm("mov.b64 %0, {%1, %2};" : "=l"(result) : "r"(place), "n"(GROUP | EXCHANGE << 30));
    return result;
  }
};

VK_DEVICE void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
VK_DEVICE void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
VK_DEVICE void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int PENDING>
VK_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
template <int COUNT>
VK_DEVICE void hold(float (&sums)[COUNT]) {
  VK_UNROLL
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

#define VK_NAMES_16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define VK_NAMES_32 VK_NAMES_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define VK_NAMES_64                                                                                       \
  VK_NAMES_32                                                                                             \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56," \
  "%57,%58,%59,%60,%61,%62,%63"
#define VK_NAMES_128                                                                                      \
  VK_NAMES_64                                                                                             \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88," \
  "%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,"   \
  "%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define VK_SUMS_4(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define VK_SUMS_16(i) VK_SUMS_4(i), VK_SUMS_4(i + 4), VK_SUMS_4(i + 8), VK_SUMS_4(i + 12)
#define VK_SUMS_32(i) VK_SUMS_16(i), VK_SUMS_16(i + 16)
#define VK_SUMS_64(i) VK_SUMS_32(i), VK_SUMS_32(i + 32)
#define VK_SUMS_128(i) VK_SUMS_64(i), VK_SUMS_64(i + 64)
// P0 to P5 are the operands after the sums.
#define VK_WGMMA_REGISTERS(TYPE, N, COUNT, P0, P1, P2, P3, P4, P5)                                          \
  asm volatile("{.reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE   \
               "." TYPE " {" VK_NAMES_##COUNT "}, {" P0 "," P1 "," P2 "," P3 "}, " P4 ", p, 1, 1, " P5 ";}" \
               : VK_SUMS_##COUNT(0)                                                                         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.description()),                          \
                 "n"(MAJOR == Major::BY_FEATURES))
#define VK_WGMMA_SHARED(TYPE, N, COUNT, P0, P1, P2, P3, P4, P5)                                           \
  asm volatile("{.reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE \
               "." TYPE " {" VK_NAMES_##COUNT "}, " P0 ", " P1 ", p, 1, 1, " P2 ", " P3 ";}"              \
               : VK_SUMS_##COUNT(0)                                                                       \
               : "l"(a.description()), "l"(b.description()), "n"(A_MAJOR == Major::BY_FEATURES),          \
                 "n"(MAJOR == Major::BY_FEATURES))
#define VK_WGMMA_WIDTHS(FORM, TYPE)                                       \
  if constexpr (N == 32) {                                                \
    FORM(TYPE, 32, 16, "%16", "%17", "%18", "%19", "%20", "%21");         \
  } else if constexpr (N == 64) {                                         \
    FORM(TYPE, 64, 32, "%32", "%33", "%34", "%35", "%36", "%37");         \
  } else if constexpr (N == 128) {                                        \
    FORM(TYPE, 128, 64, "%64", "%65", "%66", "%67", "%68", "%69");        \
  } else {                                                                \
    static_assert(N == 256, "32, 64, 128 or 256 columns");                \
    FORM(TYPE, 256, 128, "%128", "%129", "%130", "%131", "%132", "%133"); \
  }
#define VK_WGMMA_TYPES(FORM)                      \
  if constexpr (std::is_same_v<T, half_t>) {      \
    VK_WGMMA_WIDTHS(FORM, "f16")                  \
  } else {                                        \
    static_assert(std::is_same_v<T, bfloat16_t>); \
    VK_WGMMA_WIDTHS(FORM, "bf16")                 \
  }

template <class T, int N, int BYTES, Major MAJOR>
VK_DEVICE void wgmma(float (&sums)[N / 2], const uint32_t (&a)[4], Operand<BYTES, MAJOR> b) {
  VK_WGMMA_TYPES(VK_WGMMA_REGISTERS)
}
template <class T, int N, int A_BYTES, Major A_MAJOR, int BYTES, Major MAJOR>
VK_DEVICE void wgmma(float (&sums)[N / 2], Operand<A_BYTES, A_MAJOR> a, Operand<BYTES, MAJOR> b) {
  VK_WGMMA_TYPES(VK_WGMMA_SHARED)
}

#undef VK_NAMES_16
#undef VK_NAMES_32
#undef VK_NAMES_64
#undef VK_NAMES_128
#undef VK_SUMS_4
#undef VK_SUMS_16
#undef VK_SUMS_32
#undef VK_SUMS_64
#undef VK_SUMS_128
#undef VK_WGMMA_REGISTERS
#undef VK_WGMMA_SHARED
#undef VK_WGMMA_WIDTHS
#undef VK_WGMMA_TYPES

#endif  // VK_WGMMA
#endif

}  // namespace vitkernels
