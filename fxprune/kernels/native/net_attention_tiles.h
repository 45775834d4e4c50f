// Attention of one head by AMX tiles: keys, queries, shares and values are rounded to bfloat16, sums are in float32.
//
// Queries are the columns of all tiles that change, so that their greatest and their sums run down vectors. Scores are
// [keys][16 queries]: a tile of 16 keys is their vectors of channels, turned. A result is [16 channels][16 queries]: a
// tile of values has 16 channels of two vectors of keys, as these lie. Keys go by vectors, then by lanes.
#pragma once

#include "activations.h"
#include "maps.h"
#include "tiles.h"

#ifdef FXPRUNE_AMX

namespace fxprune {

// A tile of pairs of channels: row p has channels 2 p and 2 p + 1 of 16 places, side by side; x is the first channel.
FXPRUNE_INLINE void fill_pairs(const float* x, int64_t stride, int64_t channels, uint16_t* to) {
  alignas(64) uint16_t order[32];
  for (int n = 0; n < 32; ++n) order[n] = n / 2 + n % 2 * 16;
  const __m512i pairs = _mm512_load_si512(order);
  for (int64_t c = 0; c < kColumns; c += 2, to += 32) {
    const __m512 a = c < channels ? _mm512_loadu_ps(x + c * stride) : _mm512_setzero_ps();
    const __m512 b = c + 1 < channels ? _mm512_loadu_ps(x + (c + 1) * stride) : _mm512_setzero_ps();
    _mm512_store_si512(to, _mm512_permutexvar_epi16(pairs, narrowed(a, b)));
  }
}

// Rows and columns of a tile of pairs changed: row l has all channels of place l.
FXPRUNE_INLINE void turn(const uint16_t* from, uint16_t* to) {
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 2; ++j) {
      Block r[kBlock];
      FXPRUNE_UNROLL
      for (int n = 0; n < kBlock; ++n) std::memcpy(&r[n], from + (i * kBlock + n) * 32 + j * 16, sizeof(Block));
      transpose(r);
      FXPRUNE_UNROLL
      for (int n = 0; n < kBlock; ++n) std::memcpy(to + (j * kBlock + n) * 32 + i * 16, &r[n], sizeof(Block));
    }
}

// One head, and all queries of a tile of places. Pointers stand at the head's first channels.
struct TiledHead {
  const float *q, *k, *v;
  int64_t q_stride, k_stride, v_stride, size, v_size, places;
  const int32_t *k_at, *v_at;  // by vector of keys: where it lies in a channel
  const int32_t* keys;         // by vector and lane: the key's number, -1 for none
  int64_t vectors;             // of keys
  float scale;
  const int32_t* number;   // of each query, by place and lane, where later keys are not seen; else null
  const float* mask;       // what is added to each score, for the key 0; null for nothing
  const int32_t* mask_at;  // of each query, by place and lane; null where it is the same for all
  int64_t mask_step;       // from key to key

  int64_t pairs() const { return ceil_div(vectors, 2); }  // of vectors of keys
  int64_t chunks() const { return ceil_div(size, kColumns); }
  int64_t rows() const { return ceil_div(v_size, kRows); }

  // Elements of bfloat16 of each part of the scratch, and its floats.
  int64_t of_keys() const { return 2 * pairs() * chunks() * kTile; }
  int64_t of_values() const { return rows() * pairs() * kTile; }
  int64_t of_queries() const { return 2 * chunks() * kTile; }
  int64_t of_shares() const { return pairs() * kTile; }  // of a place
  int64_t of_scores() const { return 2 * pairs() * kRows * kLanes; }
  int64_t scratch() const {
    return (of_keys() + of_values() + of_queries() + 2 * of_shares()) / 2 + 2 * of_scores() + 4 * kRows * kLanes;
  }

  void run(float* scratch, float* out, int64_t stride) const {
    uint16_t* const kt = reinterpret_cast<uint16_t*>(scratch);
    uint16_t* const vt = kt + of_keys();
    uint16_t* const qt = vt + of_values();
    uint16_t* const shares = qt + of_queries();
    float* const scores = reinterpret_cast<float*>(shares + 2 * of_shares());
    float* const sums = scores + 2 * of_scores();
    fill_keys(kt);
    fill_values(vt);
    const Tiles shapes(kRows);
    for (int64_t n = 0; n < places; n += 2) {
      // The last one of an odd number is there twice.
      const int64_t both[2] = {n, std::min(n + 1, places - 1)};
      for (int64_t j = 0; j < 2; ++j)
        for (int64_t c = 0; c < chunks(); ++c)
          fill_pairs(q + c * kColumns * q_stride + both[j] * kLanes, q_stride, size - c * kColumns, qt + (j * chunks() + c) * kTile);
      score(kt, qt, scores);
      Lane share[2];
      for (int64_t j = 0; j < 2; ++j) share[j] = soften(scores + j * of_scores(), shares + j * of_shares(), both[j]);
      weigh(vt, shares, sums, share, both, out, stride);
    }
  }

  void fill_keys(uint16_t* kt) const {
    alignas(64) uint16_t pairs_of[kTile];
    for (int64_t n = 0; n < 2 * pairs(); ++n)
      for (int64_t c = 0; c < chunks(); ++c, kt += kTile) {
        if (n >= vectors) {
          std::fill_n(kt, kTile, 0);
          continue;
        }
        fill_pairs(k + c * kColumns * k_stride + k_at[n], k_stride, size - c * kColumns, pairs_of);
        turn(pairs_of, kt);
      }
  }

  void fill_values(uint16_t* vt) const {
    // A share of nothing is zero, and what is no key may be no number.
    const auto there = [&](int64_t n) {
      __mmask16 lanes = 0;
      for (int l = 0; n < vectors && l < kLanes; ++l) lanes |= (keys[n * kLanes + l] >= 0) << l;
      return lanes;
    };
    for (int64_t p = 0; p < pairs(); ++p) {
      const __mmask16 low = there(2 * p), high = there(2 * p + 1);
      const float* const a = v + v_at[2 * p];
      const float* const b = high ? v + v_at[2 * p + 1] : a;
      for (int64_t c = 0; c < rows() * kRows; ++c) {
        const bool is = c < v_size;
        const __m512 x = _mm512_maskz_loadu_ps(is ? low : 0, a + (is ? c * v_stride : 0));
        const __m512 y = _mm512_maskz_loadu_ps(is ? high : 0, b + (is ? c * v_stride : 0));
        _mm512_store_si512(vt + (c / kRows * pairs() + p) * kTile + c % kRows * 32, narrowed(x, y));
      }
    }
  }

  void score(const uint16_t* kt, const uint16_t* qt, float* scores) const {
    const int64_t step = chunks() * kTile;
    settle();
    for (int64_t n = 0; n < 2 * pairs(); n += 2) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t c = 0; c < chunks(); ++c) {
        _tile_loadd(4, qt + c * kTile, 64);
        _tile_loadd(5, qt + step + c * kTile, 64);
        _tile_loadd(6, kt + n * step + c * kTile, 64);
        _tile_loadd(7, kt + (n + 1) * step + c * kTile, 64);
        _tile_dpbf16ps(0, 6, 4);
        _tile_dpbf16ps(1, 7, 4);
        _tile_dpbf16ps(2, 6, 5);
        _tile_dpbf16ps(3, 7, 5);
      }
      float* const at = scores + n * kRows * kLanes;
      _tile_stored(0, at, 64);
      _tile_stored(1, at + kRows * kLanes, 64);
      _tile_stored(2, at + of_scores(), 64);
      _tile_stored(3, at + of_scores() + kRows * kLanes, 64);
    }
    settle();
  }

  // Scores of a place become shares, but for the sum of each query, one over which is returned.
  Lane soften(float* scores, uint16_t* shares, int64_t place) const {
    constexpr float kNever = -std::numeric_limits<float>::infinity();
    const int64_t many = 2 * pairs() * kRows, there = vectors * kRows;
    Lane greatest = Lane{} + kNever;
    for (int64_t r = 0; r < many; ++r) {
      const int32_t key = r < there ? keys[r] : -1;
      Lane s = load<Lane>(scores + r * kLanes) * scale;
      if (mask && key >= 0) {
        const float* more = mask + key * mask_step;
        s += mask_at ? gathered(more, mask_at + place * kLanes, 0.0f) : Lane{} + *more;
      }
      if (number) {
        const LaneIndex query = load<LaneIndex>(reinterpret_cast<const float*>(number + place * kLanes));
        s = query < key ? Lane{} + kNever : s;
      }
      s = key < 0 ? Lane{} + kNever : s;
      greatest = s > greatest ? s : greatest;
      store(scores + r * kLanes, s);
    }
    // Of a query that sees no key the result is zero, as torch has it.
    greatest = greatest == kNever ? Lane{} : greatest;
    alignas(64) uint16_t order[32];
    for (int n = 0; n < 32; ++n) order[n] = n / 2 + n % 2 * 16;
    const __m512i sides = _mm512_load_si512(order);
    constexpr int kTogether = 4;
    Lane total[kTogether] = {};
    for (int64_t r = 0; r < many; r += kTogether) {
      Group<kTogether, Lane> g;
      FXPRUNE_UNROLL
      for (int n = 0; n < kTogether; ++n) g.part[n] = load<Lane>(scores + (r + n) * kLanes) - greatest;
      g = exponential(g);
      FXPRUNE_UNROLL
      for (int n = 0; n < kTogether; ++n) total[n] += g.part[n];
      FXPRUNE_UNROLL
      for (int n = 0; n < kTogether; n += 2) {
        const __m512i both = narrowed((__m512)g.part[n], (__m512)g.part[n + 1]);
        _mm512_store_si512(shares + (r + n) * kLanes, _mm512_permutexvar_epi16(sides, both));
      }
    }
    const Lane sum = (total[0] + total[1]) + (total[2] + total[3]);
    return sum == 0.0f ? Lane{} : 1.0f / sum;
  }

  void weigh(
      const uint16_t* vt, const uint16_t* shares, float* sums, const Lane* share, const int64_t* both, float* out,
      int64_t stride) const {
    const int64_t step = pairs() * kTile;
    for (int64_t r = 0; r < rows(); r += 2) {
      const uint16_t* const low = vt + r * step;
      const uint16_t* const high = r + 1 < rows() ? low + step : low;
      settle();
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t p = 0; p < pairs(); ++p) {
        _tile_loadd(4, shares + p * kTile, 64);
        _tile_loadd(5, shares + of_shares() + p * kTile, 64);
        _tile_loadd(6, low + p * kTile, 64);
        _tile_loadd(7, high + p * kTile, 64);
        _tile_dpbf16ps(0, 6, 4);
        _tile_dpbf16ps(1, 7, 4);
        _tile_dpbf16ps(2, 6, 5);
        _tile_dpbf16ps(3, 7, 5);
      }
      _tile_stored(0, sums, 64);
      _tile_stored(1, sums + kRows * kLanes, 64);
      _tile_stored(2, sums + 2 * kRows * kLanes, 64);
      _tile_stored(3, sums + 3 * kRows * kLanes, 64);
      settle();
      for (int64_t j = 0; j < 2; ++j)
        for (int64_t c = r * kRows; c < std::min(v_size, (r + 2) * kRows); ++c)
          store(out + c * stride + both[j] * kLanes,
                load<Lane>(sums + (j * 2 * kRows + c - r * kRows) * kLanes) * share[j]);
    }
  }
};

}  // namespace fxprune

#endif  // FXPRUNE_AMX
