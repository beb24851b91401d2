// Windows of a map, to and from rows of channels with the tokens of several windows in the lanes:
// scratch[channel][g * tokens + token]. Partition, zero padding and crop are address arithmetic here.
#pragma once
#include "cascaded_group_attention.h"
#include "vitkernels/matrix_cpu.h"

namespace vitkernels::cascaded_group_attention {
namespace VITKERNELS_ISA {

using namespace vitkernels::VITKERNELS_ISA;

// Where a window lies in a map, and how much of it lies inside.
struct Window {
  int64_t offset;
  int rows, columns;

  Window(const Params& p, const View& map, int64_t window) {
    const int64_t across = p.window_columns(), down = p.window_rows();
    const int64_t x = window % across * p.window_w, y = window / across % down * p.window_h;
    offset = window / (across * down) * map.stride[0] + y * map.stride[2] + x * map.stride[3];
    rows = static_cast<int>(p.height - y < p.window_h ? p.height - y : p.window_h);
    columns = static_cast<int>(p.width - x < p.window_w ? p.width - x : p.window_w);
  }
};

// Windows [first, first + count) of a map; `place` has an entry for every lane, padded to whole vectors.
template <class E>
struct WindowGroup {
  using T = Compute<E>;
  const Params& p;
  int64_t first;
  int count;
  int64_t* place;

  static constexpr int64_t kNowhere = INT64_MIN;

  int lanes() const { return count * p.tokens(); }

  void find_places(const View& map) const {
    int lane = 0;
    for (int g = 0; g < count; ++g) {
      const Window w(p, map, first + g);
      for (int y = 0; y < p.window_h; ++y)
        for (int x = 0; x < p.window_w; ++x)
          place[lane++] =
              y < w.rows && x < w.columns ? w.offset + y * map.stride[2] + x * map.stride[3] : kNowhere;
    }
    for (const int padded = round_up_lanes<T>(lane); lane < padded; ++lane) place[lane] = kNowhere;
  }

  // to[c][lane] = map channels [from, from + channels); lanes up to the next whole vector become 0. Every row
  // has a vector of slack.
  void load_channels(const View& map, int from, int channels, T* to, ptrdiff_t row) const {
    const E* data = static_cast<const E*>(map.data) + from * map.stride[1];
    if (map.stride[3] == 1)
      load_rows(map, data, channels, to, row);
    else if (map.stride[1] == 1)
      load_tokens(map, data, channels, to, row);
    else
      load_scattered(map, data, channels, to, row);
  }

  // map channels [from, from + channels) = rows (+ the same of `add`)
  void store_channels(const View& map, const View& add, int from, int channels, const T* rows,
                      ptrdiff_t row) const {
    E* data = static_cast<E*>(map.data) + from * map.stride[1];
    const E* more = add ? static_cast<const E*>(add.data) + from * add.stride[1] : nullptr;
    bool alike = true;
    for (int i = 0; i < 4 && add; ++i) alike = alike && add.stride[i] == map.stride[i];
    if (alike && map.stride[3] == 1)
      store_rows(map, data, more, channels, rows, row);
    else if (alike && map.stride[1] == 1)
      store_tokens(map, data, more, channels, rows, row);
    else
      store_scattered(map, data, add, more, channels, rows, row);
  }

 private:
  void load_rows(const View& map, const E* data, int channels, T* to, ptrdiff_t row) const {
    constexpr int L = kLanes<T>;
    const int n = p.tokens(), total = lanes();
    for (int g = 0; g < count; ++g) {
      const Window w(p, map, first + g);
      // A window that is the whole map is one long row.
      const bool dense = w.rows == p.window_h && w.columns == p.window_w && map.stride[2] == p.window_w;
      const int length = dense ? n : p.window_w, height = dense ? 1 : p.window_h;
      const int inside = dense ? n : w.columns, rows = dense ? 1 : w.rows;
      // A short row may be read whole, into the row below it.
      const int whole = length <= L && inside == length && map.stride[2] + length >= L ? rows - 1 : 0;
      for (int c = 0; c < channels; ++c) {
        const E* from = data + w.offset + c * map.stride[1];
        T* dst = to + c * row + static_cast<ptrdiff_t>(g) * n;
        for (int y = 0; y < whole; ++y, from += map.stride[2], dst += length) store(dst, load(from));
        for (int y = whole; y < height; ++y, from += map.stride[2], dst += length) {
          const int live = y < rows ? inside : 0;
          for (int i = 0; i < length; i += L)
            store(dst + i, i + L <= live ? load(from + i)
                           : i < live    ? load_first(from + i, live - i)
                                         : Vec<T>{});
        }
      }
    }
    for (int c = 0; c < channels; ++c) store(to + c * row + total, Vec<T>{});
  }

  void load_tokens(const View& map, const E* data, int channels, T* to, ptrdiff_t row) const {
    constexpr int L = kLanes<T>;
    find_places(map);
    const int padded = round_up_lanes<T>(lanes());
    for (int i = 0; i < padded; i += L)
      for (int c = 0; c < channels; c += L) {
        const int some = imin(L, channels - c);
        Vec<T> block[L];
#pragma GCC unroll 16
        for (int j = 0; j < L; ++j) {
          const E* from = data + place[i + j] + c;
          block[j] = place[i + j] == kNowhere ? Vec<T>{} : some == L ? load(from) : load_first(from, some);
        }
        transpose<T>(block);
#pragma GCC unroll 16
        for (int j = 0; j < L; ++j)
          if (j < some) store(to + (c + j) * row + i, block[j]);
      }
  }

  void load_scattered(const View& map, const E* data, int channels, T* to, ptrdiff_t row) const {
    find_places(map);
    const int padded = round_up_lanes<T>(lanes());
    for (int c = 0; c < channels; ++c)
      for (int i = 0; i < padded; ++i)
        to[c * row + i] = place[i] == kNowhere ? T(0) : load_one(data + place[i] + c * map.stride[1]);
  }

  void store_rows(const View& map, E* data, const E* more, int channels, const T* from, ptrdiff_t row) const {
    constexpr int L = kLanes<T>;
    const int n = p.tokens();
    for (int g = 0; g < count; ++g) {
      const Window w(p, map, first + g);
      const bool dense = w.columns == p.window_w && map.stride[2] == p.window_w;
      const int length = dense ? w.rows * p.window_w : w.columns, height = dense ? 1 : w.rows;
      if (2 * length >= L && length < L) {
        short_rows(map, w, data, more, channels, from + static_cast<ptrdiff_t>(g) * n, row, length, height);
        continue;
      }
      for (int c = 0; c < channels; ++c) {
        const ptrdiff_t offset = w.offset + c * map.stride[1];
        const T* src = from + c * row + static_cast<ptrdiff_t>(g) * n;
        for (int y = 0; y < height; ++y, src += p.window_w) {
          E* to = data + offset + y * map.stride[2];
          const E* x = more ? more + offset + y * map.stride[2] : nullptr;
          int i = 0;
          for (; i + L <= length; i += L) store(to + i, x ? load(x + i) + load(src + i) : load(src + i));
          if (i < length) {
            const Vec<T> last = load(src + i);
            store_first(to + i, x ? load_first(x + i, length - i) + last : last, length - i);
          }
        }
      }
    }
  }

  // Rows of half a vector to a vector: two halves that overlap, which needs no mask.
  void short_rows(const View& map, const Window& w, E* data, const E* more, int channels, const T* from,
                  ptrdiff_t row, int length, int height) const {
    constexpr int H = kLanes<T> / 2;
    const int second = length - H;
    const ptrdiff_t line = static_cast<ptrdiff_t>(map.stride[2]);
    for (int c = 0; c < channels; ++c) {
      E* to = data + w.offset + c * map.stride[1];
      const E* x = more ? more + w.offset + c * map.stride[1] : nullptr;
      const T* src = from + c * row;
      for (int y = 0; y < height; ++y, src += p.window_w, to += line) {
        if constexpr (kSame<E, T>) {
          using Half = typename VectorOf<T, H>::type;
          Half a = load_bytes<Half>(src), b = load_bytes<Half>(src + second);
          if (x) {
            a += load_bytes<Half>(x);
            b += load_bytes<Half>(x + second);
            x += line;
          }
          store_bytes(to, a);
          store_bytes(to + second, b);
        } else {
          const Vec<T> last = load(src);
          store_first(to, x ? load_first(x, length) + last : last, length);
          if (x) x += line;
        }
      }
    }
  }

  void store_tokens(const View& map, E* data, const E* more, int channels, const T* from,
                    ptrdiff_t row) const {
    constexpr int L = kLanes<T>;
    find_places(map);
    const int total = lanes();
    for (int i = 0; i < total; i += L)
      for (int c = 0; c < channels; c += L) {
        const int some = imin(L, channels - c);
        Vec<T> block[L];
#pragma GCC unroll 16
        for (int j = 0; j < L; ++j) block[j] = j < some ? load(from + (c + j) * row + i) : Vec<T>{};
        transpose<T>(block);
#pragma GCC unroll 16
        for (int j = 0; j < L; ++j) {
          if (place[i + j] == kNowhere) continue;
          E* to = data + place[i + j] + c;
          const E* x = more + place[i + j] + c;
          if (some == L)
            store(to, more ? load(x) + block[j] : block[j]);
          else
            store_first(to, more ? load_first(x, some) + block[j] : block[j], some);
        }
      }
  }

  void store_scattered(const View& map, E* data, const View& add, const E* more, int channels, const T* from,
                       ptrdiff_t row) const {
    const int n = p.tokens();
    for (int g = 0; g < count; ++g) {
      const Window w(p, map, first + g);
      const int64_t other = add ? Window(p, add, first + g).offset : 0;
      for (int c = 0; c < channels; ++c)
        for (int y = 0; y < w.rows; ++y)
          for (int x = 0; x < w.columns; ++x) {
            T value = from[c * row + static_cast<ptrdiff_t>(g) * n + y * p.window_w + x];
            if (more)
              value += load_one(more + other + c * add.stride[1] + y * add.stride[2] + x * add.stride[3]);
            store_one(data + w.offset + c * map.stride[1] + y * map.stride[2] + x * map.stride[3], value);
          }
    }
  }
};

}  // namespace VITKERNELS_ISA
}  // namespace vitkernels::cascaded_group_attention
