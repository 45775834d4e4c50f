// bf16 weights by bits and values: expanded into AMX tiles, or for few tokens into fp32 vectors.
//
// A panel is 32 rows of W, a block 32 columns of a panel, stored as two tiles of 16 rows of W each. A tile has 16
// lines, one for each pair of columns: the pair's 2 elements for each of its 16 rows, which is the order of an AMX tile
// of weights (VNNI). A line is 32 bits, and a value for each bit that is set. A panel's blocks follow one another,
// those without a nonzero left out, and the values of its first tiles stand apart from those of its second ones: they
// are two streams that are expanded side by side, for a stream's next address waits for the count of its bits.
#pragma once

#include "activations.h"

#if FXPRUNE_LANES == 16 && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VBMI2__)
#define FXPRUNE_TILES 1
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define FXPRUNE_AMX 1
#endif
#endif

#ifdef FXPRUNE_TILES

#include <immintrin.h>

#ifdef FXPRUNE_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
      __m512i packed = _mm512_loadu_si512(values[tile]);
      asm("" : "+v"(packed));  // For expanding from memory is slow on some CPUs.
      w[tile] = _mm512_maskz_expand_epi16(mask, packed);
      values[tile] += _mm_popcnt_u32(mask);
    }
  }
};

// sums[t][0:32] = x[t] @ panel^T for T tokens, x [T, whole blocks] in fp32; columns[b] says which columns block b has.
// By fp32 vectors: these take less time than AVX-512's products of bf16, and are exact.
template <int T>
FXPRUNE_OUTLINE void multiply_few(
    Stream s, const uint16_t* columns, int64_t blocks, const float* x, int64_t stride, float* sums) {
  const __m512i upper = _mm512_set1_epi32(0xffff0000);
  __m512 sum[T][2][2];
  FXPRUNE_UNROLL
  for (int t = 0; t < T; ++t)
    for (int tile = 0; tile < 2; ++tile) sum[t][tile][0] = sum[t][tile][1] = _mm512_setzero_ps();
  for (int64_t b = 0; b < blocks; ++b, s.bits += kBits) {
    const float* from = x + columns[b] * kColumns;
    FXPRUNE_UNROLL
    for (int line = 0; line < kLines; ++line) {
      __m512i w[2];
      s.next(line, w);
      FXPRUNE_UNROLL
      for (int tile = 0; tile < 2; ++tile) {
        const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(w[tile], 16));
        const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(w[tile], upper));
        FXPRUNE_UNROLL
        for (int t = 0; t < T; ++t) {
          const float* pair = from + t * stride + 2 * line;
          sum[t][tile][0] = _mm512_fmadd_ps(even, _mm512_set1_ps(pair[0]), sum[t][tile][0]);
          sum[t][tile][1] = _mm512_fmadd_ps(odd, _mm512_set1_ps(pair[1]), sum[t][tile][1]);
        }
      }
    }
  }
  FXPRUNE_UNROLL
  for (int t = 0; t < T; ++t) {
    FXPRUNE_UNROLL
    for (int tile = 0; tile < 2; ++tile)
      _mm512_storeu_ps(sums + t * kPanel + tile * kRows, _mm512_add_ps(sum[t][tile][0], sum[t][tile][1]));
  }
}

inline float widened(Brain value) {
  const uint32_t bits = uint32_t{value} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

FXPRUNE_INLINE __m512 widened(__m256i values) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}

// 32 numbers as bf16, rounded to nearest, ties to even; nan stays nan.
FXPRUNE_INLINE __m512i narrowed(__m512 low, __m512 high) {
#ifdef __AVX512BF16__
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
#else
  const auto half = [](__m512 v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __m512i either = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(either, 16));
  };
  return _mm512_inserti64x4(_mm512_castsi256_si512(half(low)), half(high), 1);
#endif
}

// The results of some tokens for a panel, or for those of its rows that go to one tensor.
struct Results {
  const float* sums;  // [tokens][32]
  Brain* y;           // at the panel's first row, which is written only where `rows` has its bit
  int64_t stride, tokens;
};

// y = activation(sums + bias) for a panel, some tokens at a time.
template <Activation kind>
struct Finisher {
  alignas(64) float bias[kPanel];
  __mmask32 rows = 0;
  Results now = {}, then = {};

  FXPRUNE_INLINE void advance(int64_t tokens) {
    for (; tokens > 0; --tokens) {
      if (now.tokens == 0) {
        if (then.tokens == 0) return;
        now = then, then.tokens = 0;
      }
      Group<2, Float<kRows>> g;
      FXPRUNE_UNROLL
      for (int tile = 0; tile < 2; ++tile)
        g.part[tile] = load<Float<kRows>>(now.sums + tile * kRows) + load<Float<kRows>>(bias + tile * kRows);
      g = activate<kind>(g);
      const __m512i y = narrowed(reinterpret_cast<__m512>(g.part[0]), reinterpret_cast<__m512>(g.part[1]));
      if (rows == ~0u) {
        _mm512_storeu_si512(now.y, y);
      } else {
        _mm512_mask_storeu_epi16(now.y, rows, y);
      }
      now.sums += kPanel, now.y += now.stride, --now.tokens;
    }
  }
  void finish() { advance(now.tokens + then.tokens); }
};

#ifdef FXPRUNE_AMX

// Linux keeps tiles from processes that have not asked for them.
inline bool may_use_tiles() {
  constexpr long kRequest = 0x1023, kTileData = 18;
  static const bool may = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return may;
}

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
    settle();
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

// Blocks, expanded, and the columns of x that each is multiplied with.
struct Chunk {
  const Brain* weights;  // [blocks][2][kTile]
  const uint16_t* columns;
  int64_t blocks;
  bool has_tail;  // the last block's columns are in the tail
};

// Tokens of one or two tiles. sums [tokens][32]
struct TokenTiles {
  const Brain* x[2];
  const Brain* tail[2];
  int64_t bytes;  // from a token to the next
  float* sums[2];
};

#define FXPRUNE_PRODUCTS()                    \
  _tile_dpbf16ps(0, 4, 6);                    \
  _tile_dpbf16ps(1, 4, 7);                    \
  if constexpr (Two) _tile_dpbf16ps(2, 5, 6); \
  if constexpr (Two) _tile_dpbf16ps(3, 5, 7);

// Blocks after whose products sums are there to be finished.
constexpr int64_t kLate = 2;

// sums (+)= x @ chunk^T; meanwhile, with each block, `Lines` lines of what comes next are expanded, and `tokens` tokens
// of what came before are finished. Where another thread shares the core tile instructions hardly overlap, and what is
// done beside them is free; x is loaded past L1 (stream), for there the expanded weights must stay.
template <bool Two, int Lines, Activation kind>
FXPRUNE_OUTLINE void multiply_tiles(
    const Chunk& c, const TokenTiles& t, bool accumulate, Expander& rest, Finisher<kind>& made, int64_t tokens) {
  // In registers.
  Expander next = rest;
  Finisher<kind> before = made;
  constexpr int64_t kSumBytes = kPanel * sizeof(float);
  settle();
  if (accumulate) {
    _tile_loadd(0, t.sums[0], kSumBytes);
    _tile_loadd(1, t.sums[0] + kRows, kSumBytes);
    if constexpr (Two) _tile_loadd(2, t.sums[1], kSumBytes);
    if constexpr (Two) _tile_loadd(3, t.sums[1] + kRows, kSumBytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (Two) _tile_zero(2);
    if constexpr (Two) _tile_zero(3);
  }
  const Brain* w = c.weights;
  const auto load_block = [&](const Brain* first, const Brain* second, int64_t bytes) {
    _tile_stream_loadd(4, first, bytes);
    _tile_loadd(6, w, 64);
    _tile_loadd(7, w + kTile, 64);
    if constexpr (Two) _tile_stream_loadd(5, second, bytes);
    w += 2 * kTile;
  };
  const int64_t blocks = c.blocks - c.has_tail;
  if (blocks > 0) {
    load_block(t.x[0] + c.columns[0] * kColumns, t.x[1] + c.columns[0] * kColumns, t.bytes);
    for (int64_t b = 1; b < blocks; ++b, w += 2 * kTile) {
      // What is loaded next overwrites what the products before it have read.
      const int64_t at = c.columns[b] * kColumns;
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (!Two) _tile_loadd(6, w, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_stream_loadd(4, t.x[0] + at, t.bytes);
      if constexpr (Two) {
        _tile_dpbf16ps(2, 5, 6);
        _tile_loadd(6, w, 64);
        _tile_dpbf16ps(3, 5, 7);
        _tile_stream_loadd(5, t.x[1] + at, t.bytes);
      }
      _tile_loadd(7, w + kTile, 64);
      next.advance<Lines>();
      if (b > kLate) before.advance(tokens);
    }
    FXPRUNE_PRODUCTS()
    next.advance<Lines>();
  }
  if (c.has_tail) {
    load_block(t.tail[0], t.tail[1], kColumns * sizeof(Brain));
    FXPRUNE_PRODUCTS()
    next.advance<Lines>();
  }
  before.finish();
  made.now.tokens = made.then.tokens = 0;
  settle();
  _tile_stored(0, t.sums[0], kSumBytes);
  _tile_stored(1, t.sums[0] + kRows, kSumBytes);
  if constexpr (Two) _tile_stored(2, t.sums[1], kSumBytes);
  if constexpr (Two) _tile_stored(3, t.sums[1] + kRows, kSumBytes);
  rest = next;
  settle();
}

#undef FXPRUNE_PRODUCTS

#endif  // FXPRUNE_AMX

}  // namespace fxprune

#endif  // FXPRUNE_TILES
