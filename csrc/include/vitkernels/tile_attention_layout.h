// The shared memory of a group: a Layout of byte offsets, made on the host, and the same as pointers.
#pragma once
#include "vitkernels/tile_attention_engine.h"

namespace vitkernels::tile_attention {

template <class Engine>
struct ForwardLayout {
  using T = typename Engine::T;
  using Acc = typename Engine::Acc;
  int ld_head, ld_value;
  int q, k, v, scratch, key_codes, query_tokens, key_tokens, table;
  int64_t bytes;

  template <class Map>
  ForwardLayout(const Problem& problem, const Map& map)
      : ld_head(leading_dimension<T>(problem.head_dim)), ld_value(leading_dimension<T>(problem.value_dim)) {
    Carver carver;
    key_codes = carver.take<typename Map::KeyCode>(Engine::ROWS);
    query_tokens = carver.take<int>(SCATTERED<Map> ? Engine::ROWS : 0);
    key_tokens = carver.take<int>(SCATTERED<Map> ? Engine::ROWS : 0);
    scratch = carver.take<T>(Engine::SCRATCH);
    q = carver.take<T>(Engine::ROWS * ld_head);
    k = carver.take<T>(Engine::ROWS * ld_head);
    v = carver.take<T>(Engine::ROWS * ld_value);
    table = carver.take<Acc>(map.shared_elements());
    bytes = carver.used();
  }
};

template <class Engine>
struct ForwardShared {
  using T = typename Engine::T;
  using Acc = typename Engine::Acc;
  int ld_head, ld_value;
  T *q, *k, *v, *scratch;
  void* key_codes;                 // of the type that the map has for them
  int *query_tokens, *key_tokens;  // of a SCATTERED map
  Acc* table;

  VK_DEVICE ForwardShared(const ForwardLayout<Engine>& layout, char* base)
      : ld_head(layout.ld_head),
        ld_value(layout.ld_value),
        q(reinterpret_cast<T*>(base + layout.q)),
        k(reinterpret_cast<T*>(base + layout.k)),
        v(reinterpret_cast<T*>(base + layout.v)),
        scratch(reinterpret_cast<T*>(base + layout.scratch)),
        key_codes(base + layout.key_codes),
        query_tokens(reinterpret_cast<int*>(base + layout.query_tokens)),
        key_tokens(reinterpret_cast<int*>(base + layout.key_tokens)),
        table(reinterpret_cast<Acc*>(base + layout.table)) {}
};

template <class Engine>
struct BackwardLayout {
  using T = typename Engine::T;
  using Acc = typename Engine::Acc;
  static constexpr int ROWS = Engine::ROWS;
  static constexpr int LD_PAIR = ROWS + static_cast<int>(16 / sizeof(T));  // of P and D as operands
  static constexpr int LD_GRADIENT = ROWS + 8;                             // of D as GradientTile
  int ld_head, ld_value;
  int lse, delta, grad_lse, query_codes, key_codes, query_tokens, key_tokens;
  int q, k, v, grad_out;
  int turns;  // out, the GradientTile, and {P, D} take turns in the same memory
  int table, sums;
  int64_t bytes;

  template <class Map>
  BackwardLayout(const Problem& problem, const Map& map, bool with_sums)
      : ld_head(leading_dimension<T>(problem.head_dim)), ld_value(leading_dimension<T>(problem.value_dim)) {
    Carver carver;
    lse = carver.take<Acc>(ROWS);
    delta = carver.take<Acc>(ROWS);
    grad_lse = carver.take<Acc>(ROWS);
    query_codes = carver.take<int>(ROWS);
    key_codes = carver.take<typename Map::KeyCode>(ROWS);
    query_tokens = carver.take<int>(SCATTERED<Map> ? ROWS : 0);
    key_tokens = carver.take<int>(SCATTERED<Map> ? ROWS : 0);
    constexpr int PAIR = 2 * ROWS * LD_PAIR;
    constexpr int GRADIENT = ROWS * LD_GRADIENT * static_cast<int>(sizeof(Acc) / sizeof(T));
    const int longest = PAIR > GRADIENT ? PAIR : GRADIENT;
    turns = carver.take<T>(longest > ROWS * ld_value ? longest : ROWS * ld_value);
    q = carver.take<T>(ROWS * ld_head);
    k = carver.take<T>(ROWS * ld_head);
    v = carver.take<T>(ROWS * ld_value);
    grad_out = carver.take<T>(ROWS * ld_value);
    table = carver.take<Acc>(map.shared_elements());
    sums = carver.take<Acc>(with_sums ? map.gradient_elements() : 0);
    bytes = carver.used();
  }
};

template <class Engine>
struct BackwardShared {
  using T = typename Engine::T;
  using Acc = typename Engine::Acc;
  using Layout = BackwardLayout<Engine>;
  Acc *lse, *delta, *grad_lse;
  int* query_codes;
  void* key_codes;                 // of the type that the map has for them
  int *query_tokens, *key_tokens;  // of a SCATTERED map
  T *q, *k, *v, *grad_out;
  T *out, *p, *d;
  Acc *gradient, *table, *sums;

  VK_DEVICE BackwardShared(const Layout& layout, char* base)
      : lse(reinterpret_cast<Acc*>(base + layout.lse)),
        delta(reinterpret_cast<Acc*>(base + layout.delta)),
        grad_lse(reinterpret_cast<Acc*>(base + layout.grad_lse)),
        query_codes(reinterpret_cast<int*>(base + layout.query_codes)),
        key_codes(base + layout.key_codes),
        query_tokens(reinterpret_cast<int*>(base + layout.query_tokens)),
        key_tokens(reinterpret_cast<int*>(base + layout.key_tokens)),
        q(reinterpret_cast<T*>(base + layout.q)),
        k(reinterpret_cast<T*>(base + layout.k)),
        v(reinterpret_cast<T*>(base + layout.v)),
        grad_out(reinterpret_cast<T*>(base + layout.grad_out)),
        out(reinterpret_cast<T*>(base + layout.turns)),
        p(out),
        d(out + Layout::ROWS * Layout::LD_PAIR),
        gradient(reinterpret_cast<Acc*>(base + layout.turns)),
        table(reinterpret_cast<Acc*>(base + layout.table)),
        sums(reinterpret_cast<Acc*>(base + layout.sums)) {}
};

}  // namespace vitkernels::tile_attention
