// The inner loop of a depthwise convolution: what a tile reads of a channel is loaded once, row by row of the kernel.
#pragma once

#include "conv_rows.h"

namespace fxprune {

// A kernel of K x K taps and stride S over a tile of V places, as Taps lays out its block: the columns that a row of
// taps reads, by their remainder modulo the stride.
template <int V, int K, int S>
struct TapRow {
  static constexpr int reach(int phase) { return phase < K ? (K - 1 - phase) / S : -1; }
  // The vector of tap b, and, for b = S, how many there are.
  static constexpr int phase_at(int phase) {
    int at = 0;
    for (int p = 0; p < phase; ++p) at += reach(p) < 0 ? 0 : V + reach(p);
    return at;
  }
  static constexpr int kVectors = phase_at(S);
  static constexpr int tap_at(int b) { return phase_at(b % S) + b / S; }
};

template <int V, int K, int S>
FXPRUNE_OUTLINE void multiply_depthwise(
    const Window& window, const Lanes* lanes, const float* x, int64_t stride, int64_t channels, const float* weight,
    const Rows& e) {
  using Row = TapRow<V, K, S>;
  const Window::Entry* const entries = window.entries.data();
  // Rows of taps in which no lane moves.
  bool plain[K];
  for (int a = 0; a < K; ++a) {
    plain[a] = true;
    for (int p = 0; p < Row::kVectors; ++p) plain[a] = plain[a] && entries[a * Row::kVectors + p].lanes < 0;
  }
  for (int64_t c = 0; c < channels; ++c, x += stride, weight += K * K) {
    Lane sum[V];
    const Lane start = e.bias ? Lane{} + e.bias[c] : Lane{};
    FXPRUNE_UNROLL
    for (int v = 0; v < V; ++v) sum[v] = start;
    for (int a = 0; a < K; ++a) {
      const Window::Entry* const here = entries + a * Row::kVectors;
      Lane row[Row::kVectors];
      FXPRUNE_UNROLL
      for (int p = 0; p < Row::kVectors; ++p) row[p] = load<Lane>(x + here[p].source);
      if (!plain[a]) {
        FXPRUNE_UNROLL
        for (int p = 0; p < Row::kVectors; ++p)
          if (here[p].lanes >= 0) row[p] = permuted(row[p], lanes[here[p].lanes], 0.0f);
      }
      FXPRUNE_UNROLL
      for (int b = 0; b < K; ++b) {
        const float w = weight[a * K + b];
        FXPRUNE_UNROLL
        for (int v = 0; v < V; ++v) sum[v] += row[Row::tap_at(b) + v] * w;
      }
    }
    finish_row<V>(sum, e, c);
  }
}

using DepthwiseTile = void (*)(const Window&, const Lanes*, const float*, int64_t, int64_t, const float*, const Rows&);

template <int V>
inline DepthwiseTile depthwise_tile_of(int64_t kernel, int64_t stride) {
  if (kernel == 3 && stride == 1) return multiply_depthwise<V, 3, 1>;
  if (kernel == 3 && stride == 2) return multiply_depthwise<V, 3, 2>;
  if (kernel == 5 && stride == 1) return multiply_depthwise<V, 5, 1>;
  if (kernel == 5 && stride == 2) return multiply_depthwise<V, 5, 2>;
  return nullptr;
}

// The loop for tiles of this width; null where there is none.
inline DepthwiseTile depthwise_tile_for(int64_t tile, int64_t kernel, int64_t stride) {
  switch (tile) {
    case 1: return depthwise_tile_of<1>(kernel, stride);
    case 2: return depthwise_tile_of<2>(kernel, stride);
    case 4: return depthwise_tile_of<4>(kernel, stride);
    case 7: return depthwise_tile_of<7>(kernel, stride);
    default: return depthwise_tile_of<8>(kernel, stride);
  }
}

}  // namespace fxprune
