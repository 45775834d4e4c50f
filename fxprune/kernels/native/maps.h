// Feature maps whose pixels stand in the lanes of vectors, so that a convolution moves by whole vectors.
//
// The pixels of nb images [H, W] are dealt out to the lanes of a vector: each image is cut into ly * lx sub-blocks of
// bh * bw pixels, and lane (n * ly + iy) * lx + ix holds sub-block (iy, ix) of image n. A vector is one place (y, x) of
// all sub-blocks. Places stand in tiles of T along x: a map is [bh][tiles along x][C][T][lanes]. What a tile has
// beyond the sub-block, and a sub-block beyond the image, holds numbers of no meaning.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "vectors.h"

#if FXPRUNE_LANES >= 8
#include <immintrin.h>
#endif

namespace fxprune {

using Lane = Float<kLanes>;
using LaneIndex = Vectors<kLanes>::Int;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); }

// How places of images become lanes.
struct Grid {
  int64_t nb = 1, ly = 1, lx = 1, bh = 0, bw = 0;

  bool same_lanes(const Grid& g) const { return nb == g.nb && ly == g.ly && lx == g.lx; }
  bool operator==(const Grid&) const = default;
};

struct Map {
  int64_t channels = 0, height = 0, width = 0, tile = 1;
  Grid grid;
  int64_t storage = 0;                        // floats from the start of the arena
  int64_t all_channels = 0, first_channel = 0;  // of the storage, which several maps may share
  // Where each row of tiles begins, in floats from the start of the storage; empty where they follow one another.
  std::vector<int64_t> rows = {};

  int64_t tiles_x() const { return ceil_div(grid.bw, tile); }
  int64_t tiles() const { return grid.bh * tiles_x(); }
  int64_t row_floats() const { return tiles_x() * all_channels * channel_stride(); }
  int64_t floats() const { return grid.bh * row_floats(); }
  // Floats from one channel of a tile to the next.
  int64_t channel_stride() const { return tile * kLanes; }
  int64_t row_at(int64_t y) const { return rows.empty() ? y * row_floats() : rows[y]; }
  // The first channel of a tile, and of one place, in floats from the start of the storage.
  int64_t tile_at(int64_t t) const {
    return row_at(t / tiles_x()) + (t % tiles_x() * all_channels + first_channel) * channel_stride();
  }
  int64_t place_at(int64_t y, int64_t x) const {
    return tile_at(y * tiles_x() + x / tile) + x % tile * kLanes;
  }
};

// Places of a row of sub-blocks that are computed, tiles filled up.
inline int64_t computed(const Grid& g, int64_t tile) { return g.bh * ceil_div(g.bw, tile) * tile; }

// A map that is cut into sub-blocks: its size, the width of its tiles, and what its sub-blocks must cover, times a
// stride, of what it is made of.
struct Cut {
  int64_t nb, h, w, tile, stride_h, stride_w, least_h, least_w;

  Grid into(int64_t ly, int64_t lx) const {
    return {nb, ly, lx, std::max(ceil_div(h, ly), ceil_div(least_h, ly * stride_h)),
            std::max(ceil_div(w, lx), ceil_div(least_w, lx * stride_w))};
  }
  bool covered_by(const Grid& g) const {
    return g.bh * g.ly >= h && g.bw * g.lx >= w && g.bh * g.ly * stride_h >= least_h && g.bw * g.lx * stride_w >= least_w;
  }
  // Whether no more than `percent` of what is computed on another grid is computed on this one.
  bool within(int64_t percent, const Grid& g, const Grid& other) const {
    return computed(g, tile) * 100 <= computed(other, tile) * percent;
  }
  // The grid on which the least is computed.
  Grid best() const {
    Grid best = into(1, 1);
    for (int64_t ly = 1; nb * ly <= kLanes; ++ly)
      for (int64_t lx = 1; nb * ly * lx <= kLanes; ++lx) {
        const Grid g = into(ly, lx);
        if (computed(g, tile) < computed(best, tile)) best = g;
      }
    return best;
  }
};

// Where each lane of a vector comes from: the lane of another vector, or the filling where it is below zero.
struct Lanes {
  int32_t from[kLanes];

  bool operator==(const Lanes&) const = default;
};

FXPRUNE_INLINE Lane permuted(Lane v, const Lanes& lanes, float filling) {
  const LaneIndex from = load<LaneIndex>(reinterpret_cast<const float*>(lanes.from));
#if defined(__clang__)
  Lane moved = {};
  for (int l = 0; l < kLanes; ++l) moved[l] = v[from[l] & (kLanes - 1)];
#else
  const Lane moved = __builtin_shuffle(v, from & (kLanes - 1));
#endif
  return from < 0 ? Lane{} + filling : moved;
}

// The vector whose lanes stand at these floats from `base`; the filling where the index is below zero.
FXPRUNE_INLINE Lane gathered(const float* base, const int32_t* index, float filling) {
#if FXPRUNE_LANES == 16
  const __m512i at = _mm512_loadu_si512(index);
  const __mmask16 there = _mm512_cmpge_epi32_mask(at, _mm512_setzero_si512());
  return (Lane)_mm512_mask_i32gather_ps(_mm512_set1_ps(filling), there, at, base, 4);
#elif FXPRUNE_LANES == 8
  const __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index));
  const __m256 there = _mm256_castsi256_ps(_mm256_cmpgt_epi32(at, _mm256_set1_epi32(-1)));
  return (Lane)_mm256_mask_i32gather_ps(_mm256_set1_ps(filling), base, at, there, 4);
#else
  Lane v;
  for (int l = 0; l < kLanes; ++l) v[l] = index[l] < 0 ? filling : base[index[l]];
  return v;
#endif
}

// What one tile of a convolution or a pooling reads of each channel: `places` vectors, side by side in its block.
struct Window {
  struct Entry {
    int64_t source;  // floats from the map's first channel
    int32_t lanes;   // -1: as it is; else which Lanes
  };
  std::vector<Entry> entries;
};

// A kernel over maps: how the block of one channel is laid out. Rows of the kernel stand one after another; in each
// stand the columns of the input by their remainder modulo the stride, so that a step to the next output is a step
// to the next vector. `offsets` has the vector of each tap (kh, kw); places(tile) vectors make the block.
struct Taps {
  int64_t kh = 1, kw = 1, sh = 1, sw = 1, ph = 0, ph_end = 0, pw = 0, pw_end = 0, dh = 1, dw = 1;

  int64_t out_height(int64_t h) const { return (h + ph + ph_end - dh * (kh - 1) - 1) / sh + 1; }
  int64_t out_width(int64_t w) const { return (w + pw + pw_end - dw * (kw - 1) - 1) / sw + 1; }
  bool is_pointwise() const { return kh * kw == 1 && sh == 1 && sw == 1 && !ph && !ph_end && !pw && !pw_end; }

  // Columns of the block's rows: the input column, from the first output's, of each vector.
  std::vector<int64_t> columns(int64_t tile) const {
    std::vector<int64_t> result;
    for (int64_t phase = 0; phase < sw; ++phase) {
      int64_t most = -1;
      for (int64_t k = 0; k < kw; ++k)
        if (k * dw % sw == phase) most = k * dw / sw;
      for (int64_t q = 0; most >= 0 && q < tile + most; ++q) result.push_back(q * sw + phase);
    }
    return result;
  }
  std::vector<int64_t> offsets(int64_t tile) const {
    const std::vector<int64_t> all = columns(tile);
    std::vector<int64_t> result;
    for (int64_t a = 0; a < kh; ++a)
      for (int64_t b = 0; b < kw; ++b)
        result.push_back(a * all.size() + (std::find(all.begin(), all.end(), b * dw) - all.begin()));
    return result;
  }
};

// For each tile of `out` what it reads of `in`, whose grid is `out`'s with sub-blocks larger by the stride; appends to
// `lanes` what it needs. `images` of the nb are there.
inline std::vector<Window> windows(const Map& in, const Map& out, const Taps& taps, std::vector<Lanes>& lanes) {
  const Grid& g = in.grid;
  const std::vector<int64_t> columns = taps.columns(out.tile);
  std::vector<Window> result;
  for (int64_t y = 0; y < out.grid.bh; ++y)
    for (int64_t tx = 0; tx < out.tiles_x(); ++tx) {
      Window window;
      for (int64_t a = 0; a < taps.kh; ++a)
        for (const int64_t column : columns) {
          const int64_t r = y * taps.sh + a * taps.dh - taps.ph;
          const int64_t c = tx * out.tile * taps.sw + column - taps.pw;
          const int64_t down = floor_div(r, g.bh), right = floor_div(c, g.bw);
          Lanes each;
          bool plain = true;
          for (int64_t l = 0; l < kLanes; ++l) {
            const int64_t image = l / (g.ly * g.lx), iy = l / g.lx % g.ly, ix = l % g.lx;
            const int64_t row = iy * g.bh + r, col = ix * g.bw + c;
            const bool inside = image < g.nb && row >= 0 && row < in.height && col >= 0 && col < in.width;
            each.from[l] = inside ? (image * g.ly + iy + down) * g.lx + ix + right : -1;
            plain = plain && each.from[l] == l;
          }
          int32_t which = -1;
          if (!plain) {
            which = std::find(lanes.begin(), lanes.end(), each) - lanes.begin();
            if (which == static_cast<int32_t>(lanes.size())) lanes.push_back(each);
          }
          window.entries.push_back({in.place_at(r - down * g.bh, c - right * g.bw), which});
        }
      result.push_back(std::move(window));
    }
  return result;
}

// The row of tiles of a map.
struct Row {
  int64_t map, y;
};

// The rows of map number `map`, which is `in`, that row y of tiles reads through a kernel.
inline void add_rows(const Map& in, int64_t map, const Taps& taps, int64_t y, std::vector<Row>& rows) {
  const Grid& g = in.grid;
  for (int64_t a = 0; a < taps.kh; ++a) {
    const int64_t r = y * taps.sh + a * taps.dh - taps.ph;
    for (int64_t iy = 0; iy < g.ly; ++iy) {
      if (iy * g.bh + r < 0 || iy * g.bh + r >= in.height) continue;
      rows.push_back({map, r - floor_div(r, g.bh) * g.bh});
      break;
    }
  }
}

// The block of `channels` channels from the map at `x` on.
FXPRUNE_OUTLINE inline void fill_block(
    const Window& window, const Lanes* lanes, const float* x, int64_t stride, int64_t channels, float filling,
    float* __restrict block) {
  const Window::Entry* const entries = window.entries.data();
  const int64_t places = window.entries.size();
  for (int64_t c = 0; c < channels; ++c, x += stride) {
    for (int64_t p = 0; p < places; ++p, block += kLanes) {
      Lane v = load<Lane>(x + entries[p].source);
      if (entries[p].lanes >= 0) v = permuted(v, lanes[entries[p].lanes], filling);
      store(block, v);
    }
  }
}

// For each place of a map and each lane: which pixel (image, y, x) it is, as n * H * W + y * W + x; -1 for none.
inline std::vector<int32_t> pixels(const Map& map) {
  const Grid& g = map.grid;
  std::vector<int32_t> result;
  for (int64_t y = 0; y < g.bh; ++y)
    for (int64_t x = 0; x < map.tiles_x() * map.tile; ++x)
      for (int64_t l = 0; l < kLanes; ++l) {
        const int64_t image = l / (g.ly * g.lx), row = l / g.lx % g.ly * g.bh + y, col = l % g.lx * g.bw + x;
        const bool inside = image < g.nb && x < g.bw && row < map.height && col < map.width;
        result.push_back(inside ? (image * map.height + row) * map.width + col : -1);
      }
  return result;
}

// For each pixel of nb images in order: its float in the map's first channel.
inline std::vector<int32_t> floats_of(const Map& map) {
  const Grid& g = map.grid;
  std::vector<int32_t> result;
  for (int64_t n = 0; n < g.nb; ++n)
    for (int64_t row = 0; row < map.height; ++row)
      for (int64_t col = 0; col < map.width; ++col) {
        const int64_t lane = (n * g.ly + row / g.bh) * g.lx + col / g.bw;
        result.push_back(map.place_at(row % g.bh, col % g.bw) + lane);
      }
  return result;
}

}  // namespace fxprune
