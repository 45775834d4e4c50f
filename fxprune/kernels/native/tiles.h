// bf16 weights by bits and values, multiplied with AMX tiles, or by AVX-512's bf16 products for few tokens.
//
// A panel is 32 rows of W, a block 32 columns of a panel, stored as two tiles of 16 rows of W each. A tile has 16 lines,
// one for each pair of columns: the pair's 2 elements for each of its 16 rows, which is the order of an AMX tile of
// weights (VNNI). A line is 32 bits, and a value for each bit that is set. A panel's blocks follow one another, those
// without a nonzero left out, and the values of its first tiles stand apart from those of its second ones: they are two
// streams that are expanded side by side, for a stream's next address waits for the count of its bits.
#pragma once

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VBMI2__) && \
    defined(__AVX512BF16__)
#define FXPRUNE_TILES 1
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define FXPRUNE_AMX 1
#endif
#endif

#ifdef FXPRUNE_TILES

#include <immintrin.h>

#include "activations.h"

namespace fxprune {

constexpr int kLines = 16;             // of a tile
constexpr int kRows = 16;              // rows of W in a tile; tokens in a tile of activations
constexpr int kPanel = 2 * kRows;      // rows of W in a panel
constexpr int kColumns = 2 * kLines;   // columns of W in a block
constexpr int kTile = kLines * 32;     // elements of a tile
constexpr int kBits = 2 * kLines;      // 32-bit words of a block

using Brain = uint16_t;  // the bits of a bfloat16

// Lines of a panel, in the order in which they are stored.
struct Stream {
  const uint32_t* bits;     // [blocks][2 tiles][16 lines]
  const Brain* values[2];   // of the first tiles, and of the second ones

  // The next line of each tile. Reads up to 32 values from where each stream stands.
  FXPRUNE_INLINE void next(int line, __m512i* w) {
    FXPRUNE_UNROLL
    for (int tile = 0; tile < 2; ++tile) {
      const uint32_t mask = bits[tile * kLines + line];
      w[tile] = _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values[tile]));
      values[tile] += _mm_popcnt_u32(mask);
    }
  }
};

FXPRUNE_INLINE __m512 dot_pairs(__m512 sum, __m512i w, __m512i x) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
}

// sums[t][0:32] = x[t] @ panel^T for T tokens. `columns` says which column block each block is; `tail` holds the
// last, narrower one, filled with zeros to 32 columns: [tokens][32].
template <int T>
FXPRUNE_OUTLINE void multiply_few(
    Stream s, const uint16_t* columns, int64_t blocks, const Brain* x, int64_t stride, const Brain* tail,
    int64_t tail_column, float* sums) {
  // Two sums in turn where there is one token, for a product takes longer than what it waits for.
  constexpr int kTurns = T == 1 ? 2 : 1;
  __m512 sum[kTurns][T][2];
  FXPRUNE_UNROLL
  for (int turn = 0; turn < kTurns; ++turn)
    for (int t = 0; t < T; ++t) sum[turn][t][0] = sum[turn][t][1] = _mm512_setzero_ps();
  for (int64_t b = 0; b < blocks; ++b, s.bits += kBits) {
    const bool is_tail = columns[b] == tail_column;
    const Brain* from = is_tail ? tail : x + columns[b] * kColumns;
    const int64_t step = is_tail ? kColumns : stride;
    FXPRUNE_UNROLL
    for (int line = 0; line < kLines; ++line) {
      __m512i w[2];
      s.next(line, w);
      FXPRUNE_UNROLL
      for (int t = 0; t < T; ++t) {
        int32_t pair;
        std::memcpy(&pair, from + t * step + 2 * line, sizeof pair);
        const __m512i both = _mm512_set1_epi32(pair);
        __m512* to = sum[line % kTurns][t];
        to[0] = dot_pairs(to[0], w[0], both);
        to[1] = dot_pairs(to[1], w[1], both);
      }
    }
  }
  FXPRUNE_UNROLL
  for (int t = 0; t < T; ++t) {
    FXPRUNE_UNROLL
    for (int tile = 0; tile < 2; ++tile) {
      __m512 all = sum[0][t][tile];
      if constexpr (kTurns == 2) all = _mm512_add_ps(all, sum[1][t][tile]);
      _mm512_storeu_ps(sums + t * kPanel + tile * kRows, all);
    }
  }
}

#ifdef FXPRUNE_AMX

// The compiler does not know what tile instructions read and write.
FXPRUNE_INLINE void settle() { asm volatile("" ::: "memory"); }

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles while it lives: 0 to 3 hold sums, 4 and 5 tokens, 6 and 7 weights. Other code of the thread has shapes of its
// own, so that they are set at the start of a task, and given back at its end.
class Tiles {
 public:
  explicit Tiles(int64_t tokens) {
    TileShapes shapes;
    for (int tile = 0; tile < 8; ++tile) {
      shapes.bytes[tile] = 64;
      shapes.rows[tile] = tile < 6 ? tokens : kLines;
    }
    _tile_loadconfig(&shapes);
  }
  Tiles(const Tiles&) = delete;
  ~Tiles() { _tile_release(); }
};

// Blocks that are expanded while others are multiplied.
struct Expander {
  Stream stream;
  Brain* to;
  int64_t left;  // lines
  int line = 0;

  // The next N lines of both tiles, for N a divisor of 16.
  template <int N>
  FXPRUNE_INLINE void advance() {
    if (left <= 0) return;
    FXPRUNE_UNROLL
    for (int n = 0; n < N; ++n) {
      __m512i w[2];
      stream.next(line + n, w);
      _mm512_store_si512(to + (line + n) * 32, w[0]);
      _mm512_store_si512(to + kTile + (line + n) * 32, w[1]);
    }
    left -= N;
    line += N;
    if (line == kLines) {
      line = 0;
      to += 2 * kTile;
      stream.bits += kBits;
    }
  }
  void finish() {
    while (left > 0) advance<1>();
  }
};

// Blocks, expanded, and where each finds its tokens.
struct Chunk {
  const Brain* weights;  // [blocks][2][kTile]
  const uint16_t* columns;
  int64_t blocks;
};

// Tokens of one or two tiles. sums [tokens][32]
struct TokenTiles {
  const Brain* x[2];
  const Brain* tail[2];
  int64_t stride, tail_column;
  float* sums[2];
};

// sums (+)= x @ chunk^T, meanwhile Lines lines a block of what comes next.
template <bool Two, int Lines>
FXPRUNE_OUTLINE void multiply_tiles(const Chunk& c, const TokenTiles& t, bool accumulate, Expander& next) {
  constexpr int64_t kSumBytes = kPanel * sizeof(float);
  settle();
  if (accumulate) {
    _tile_loadd(0, t.sums[0], kSumBytes);
    _tile_loadd(1, t.sums[0] + kRows, kSumBytes);
    if constexpr (Two) {
      _tile_loadd(2, t.sums[1], kSumBytes);
      _tile_loadd(3, t.sums[1] + kRows, kSumBytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (Two) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  const Brain* w = c.weights;
  for (int64_t b = 0; b < c.blocks; ++b, w += 2 * kTile) {
    const bool is_tail = c.columns[b] == t.tail_column;
    const int64_t at = is_tail ? 0 : c.columns[b] * kColumns, step = 2 * (is_tail ? kColumns : t.stride);
    _tile_loadd(4, (is_tail ? t.tail[0] : t.x[0]) + at, step);
    _tile_loadd(6, w, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + kTile, 64);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (Two) {
      _tile_loadd(5, (is_tail ? t.tail[1] : t.x[1]) + at, step);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    if constexpr (Lines > 0) next.advance<Lines>();
  }
  _tile_stored(0, t.sums[0], kSumBytes);
  _tile_stored(1, t.sums[0] + kRows, kSumBytes);
  if constexpr (Two) {
    _tile_stored(2, t.sums[1], kSumBytes);
    _tile_stored(3, t.sums[1] + kRows, kSumBytes);
  }
  settle();
}

#endif  // FXPRUNE_AMX

}  // namespace fxprune

#endif  // FXPRUNE_TILES
