// Scores of even tokens with odd ones on one core, one instruction set.
//
// Floor: the FLOPs of the scores; the tokens of an image fit in the caches. Every token is widened and
// brought to length 1 once, as the definition says: dividing, so that equal directions stay equal. A tile of
// even tokens meets a panel of odd ones in registers, and what remains of its scores is the highest of each
// lane and where that was. A score is one chain of multiply-adds over the channels whatever its place in a
// tile, so it depends on its two tokens alone.
#include "cpu_kernel.h"

#include "vitkernels/simd.h"
#include "vitkernels/token_groups_cpu.h"

namespace vitkernels::bipartite_match {
namespace VITKERNELS_ISA {

using namespace vitkernels::VITKERNELS_ISA;

namespace {

// Accumulators take most of the registers, beside a panel's vectors and one number of an even token.
constexpr int kPanelVecs = 2, kTileRows = kVectorRegisters == 32 ? 12 : 6;
// Tiles that go along all panels together: a panel is read from L1 that many times.
constexpr int kBlockTiles = 8;

template <class T>
constexpr int kPanelWidth = kPanelVecs * kLanes<T>;

template <class E>
VITKERNELS_INLINE const E* token_of(const Params& p, int64_t image, int64_t token) {
  return static_cast<const E*>(p.metric.data) + image * p.metric.stride[0] + token * p.metric.stride[1];
}

// The length of a token, 1 in the place of 0.
template <class E>
Compute<E> length_of(const E* token, int channels) {
  using T = Compute<E>;
  constexpr int L = kLanes<T>;
  Vec<T> sum[2] = {};
  int c = 0;
  for (; c + 2 * L <= channels; c += 2 * L) {
    const Vec<T> x = load(token + c), y = load(token + c + L);
    sum[0] += x * x;
    sum[1] += y * y;
  }
  for (; c < channels; c += L) {
    const Vec<T> x = load_first(token + c, imin(L, channels - c));
    sum[0] += x * x;
  }
  const T squares = across<T>(sum[0] + sum[1]);
  T length;
  if constexpr (kSame<T, float>)
    length = __builtin_sqrtf(squares);
  else
    length = __builtin_sqrt(squares);
  return length == 0 ? T(1) : length;
}

// panel[channel][lane]. Lanes without a token, or of one that nothing may merge into, are not numbers: such
// a score is never the highest.
template <class E>
void pack_panel(const Params& p, int64_t image, int64_t first, Compute<E>* panel) {
  using T = Compute<E>;
  constexpr int L = kLanes<T>, W = kPanelWidth<T>;
  const int64_t odds = p.tokens / 2;
  const Vec<T> nothing = broadcast(static_cast<T>(__builtin_nan("")));
  for (int v = 0; v < kPanelVecs; ++v) {
    const E* tokens[L];
    T lengths[L];
    for (int j = 0; j < L; ++j) {
      const int64_t b = first + v * L + j;
      const bool there = b < odds && !(p.distill_token && b == 0);
      tokens[j] = there ? token_of<E>(p, image, 2 * b + 1) : nullptr;
      lengths[j] = there ? length_of(tokens[j], p.channels) : T(1);
    }
    for (int c = 0; c < p.channels; c += L) {
      const int channels = imin(L, p.channels - c);
      Vec<T> block[L];
#pragma GCC unroll 16
      for (int j = 0; j < L; ++j)
        block[j] = tokens[j] ? load_first(tokens[j] + c, channels) / lengths[j] : nothing;
      transpose<T>(block);
      T* to = panel + static_cast<ptrdiff_t>(c) * W + v * L;
#pragma GCC unroll 16
      for (int k = 0; k < L; ++k)
        if (k < channels) store(to + k * W, block[k]);
    }
  }
}

// The highest scores of a block's tokens so far, lane by lane, and the vectors of odd tokens they were in.
template <class T>
struct Highest {
  static constexpr int kRows = kBlockTiles * kTileRows;
  static_assert(kRows % kLanes<T> == 0);
  Vec<T> score[kRows];
  IntVec<T> vec[kRows];
};

template <class T>
__attribute__((noinline)) void score_tile(const T* evens, const T* panel, int channels, int64_t panel_number,
                                          int row, Highest<T>* highest) {
  constexpr int L = kLanes<T>, W = kPanelWidth<T>;
  Vec<T> acc[kTileRows][kPanelVecs] = {};
  const ptrdiff_t stride = channels;
  for (int k = 0; k < channels; ++k) {
    Vec<T> b[kPanelVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kPanelVecs; ++v) b[v] = load(panel + v * L);
#pragma GCC unroll 12
    for (int r = 0; r < kTileRows; ++r) {
      const Vec<T> a = broadcast(evens[r * stride]);
#pragma GCC unroll 2
      for (int v = 0; v < kPanelVecs; ++v) acc[r][v] += a * b[v];
    }
    ++evens;
    panel += W;
  }
#pragma GCC unroll 12
  for (int r = 0; r < kTileRows; ++r) {
    Vec<T> score = highest->score[row + r];
    IntVec<T> vec = highest->vec[row + r];
#pragma GCC unroll 2
    for (int v = 0; v < kPanelVecs; ++v) {
      const IntVec<T> number =
          IntVec<T>{} + static_cast<typename Bits<T>::type>(panel_number * kPanelVecs + v);
      vec = acc[r][v] > score ? number : vec;
      score = vmax(acc[r][v], score);  // the old one where the new one is not a number
    }
    highest->score[row + r] = score;
    highest->vec[row + r] = vec;
  }
}

// Of the lanes' highest scores the highest, the lowest token's among equals; as many tokens at a time as
// there are lanes.
template <class T>
void choose(const Params& p, const Highest<T>& highest, int rows, T* best, int32_t* choice) {
  constexpr int L = kLanes<T>;
  using Int = typename Bits<T>::type;
  for (int first = 0; first < rows; first += L) {
    Vec<T> scores[L], vecs[L];
    for (int j = 0; j < L; ++j) {
      scores[j] = highest.score[first + j];
      vecs[j] = bit_cast<Vec<T>>(highest.vec[first + j]);
    }
    transpose<T>(scores);
    transpose<T>(vecs);
    Vec<T> score = scores[0];
    IntVec<T> token = bit_cast<IntVec<T>>(vecs[0]) * Int(L);
    for (int j = 1; j < L; ++j) {
      const IntVec<T> candidate = bit_cast<IntVec<T>>(vecs[j]) * Int(L) + Int(j);
      const IntVec<T> better = (scores[j] > score) | ((scores[j] == score) & (candidate < token));
      score = better ? scores[j] : score;
      token = better ? candidate : token;
    }
    token = score == broadcast(T(-2)) ? IntVec<T>{} + Int(p.distill_token) : token;
    const int count = imin(L, rows - first);
    store_first(best + first, score, count);
    for (int i = 0; i < count; ++i) choice[first + i] = static_cast<int32_t>(token[i]);
  }
}

template <class E>
void score_block(const Params& p, const Image& image, int64_t first, int tiles, Compute<E>* evens,
                 Highest<Compute<E>>* highest) {
  using T = Compute<E>;
  constexpr int L = kLanes<T>;
  const int64_t count = (p.tokens + 1) / 2, panels = ceil_div(static_cast<int>(p.tokens / 2), kPanelWidth<T>);
  const ptrdiff_t tile_size = static_cast<ptrdiff_t>(kTileRows) * p.channels;
  for (int row = 0; row < tiles * kTileRows; ++row) {
    T* to = evens + static_cast<ptrdiff_t>(row) * p.channels;
    if (first + row >= count) {
      for (int c = 0; c < p.channels; ++c) to[c] = 0;
      continue;
    }
    const E* token = token_of<E>(p, image.number, 2 * (first + row));
    const T length = length_of(token, p.channels);
    int c = 0;
    for (; c + L <= p.channels; c += L) store(to + c, load(token + c) / length);
    if (c < p.channels) store_first(to + c, load_first(token + c, p.channels - c) / length, p.channels - c);
  }
  for (int row = 0; row < Highest<T>::kRows; ++row) {
    highest->score[row] = broadcast(T(-2));
    highest->vec[row] = IntVec<T>{};
  }
  const T* panel = static_cast<const T*>(image.odds);
  for (int64_t i = 0; i < panels; ++i, panel += static_cast<ptrdiff_t>(kPanelWidth<T>) * p.channels)
    for (int tile = 0; tile < tiles; ++tile)
      score_tile<T>(evens + tile * tile_size, panel, p.channels, i, tile * kTileRows, highest);
  const int64_t left = count - first;
  choose<T>(p, *highest, left < tiles * kTileRows ? static_cast<int>(left) : tiles * kTileRows,
            static_cast<T*>(image.best) + first, image.choice + first);
}

// ---- by dtype

template <class T>
size_t odds_bytes(const Params& p) {
  return static_cast<size_t>(ceil_div(static_cast<int>(p.tokens / 2), kPanelWidth<T>)) * kPanelWidth<T> *
         p.channels * sizeof(T);
}
template <class T>
size_t evens_bytes(const Params& p) {
  return sizeof(Highest<T>) + static_cast<size_t>(Highest<T>::kRows) * p.channels * sizeof(T);
}

template <class T>
void pack_panels(const Params& p, const Image& image, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto element) {
    using E = decltype(element);
    if constexpr (kSame<Compute<E>, T>) {
      T* panels = static_cast<T*>(image.odds);
      for (int64_t i = begin; i < end; ++i)
        pack_panel<E>(p, image.number, i * kPanelWidth<T>, panels + i * kPanelWidth<T> * p.channels);
    }
  });
}

template <class T>
void score_tiles(const Params& p, const Image& image, int64_t begin, int64_t end, void* memory) {
  with_dtype(p.dtype, [&](auto element) {
    using E = decltype(element);
    if constexpr (kSame<Compute<E>, T>) {
      Highest<T>* highest = static_cast<Highest<T>*>(memory);
      T* evens = reinterpret_cast<T*>(highest + 1);
      for (int64_t tile = begin; tile < end; tile += kBlockTiles)
        score_block<E>(p, image, tile * kTileRows, imin(kBlockTiles, static_cast<int>(end - tile)), evens,
                       highest);
    }
  });
}

}  // namespace

extern const CpuKernels kKernels;
const CpuKernels kKernels = {{kPanelWidth<float>, kTileRows, odds_bytes<float>, evens_bytes<float>,
                              pack_panels<float>, score_tiles<float>},
                             {kPanelWidth<double>, kTileRows, odds_bytes<double>, evens_bytes<double>,
                              pack_panels<double>, score_tiles<double>}};

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::bipartite_match
