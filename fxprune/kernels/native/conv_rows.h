// The inner loop of a sparse convolution: rows of nonzeros times a block of activations in lanes.
#pragma once

#include "activations.h"
#include "maps.h"
#include "microkernels.h"

namespace fxprune {

// What becomes of a sum on its way out: clamped to [low, high] or, by `apply`, anything else.
struct Finish {
  bool clamps = false;
  float low = 0, high = 0;
  void (*apply)(float* y, int64_t floats) = nullptr;
  bool adds_last = false;  // the residual comes after the activation
};

// Where the rows of a tile begin and end. Pointers stand at the first row of the block; null where there is none.
struct Rows {
  const float* bias;
  float* sums;  // [rows][V][lanes], between K-blocks
  float* out;
  const float* residual;
  int64_t out_stride, residual_stride;  // from one row to the next
  Finish finish;
  // What is read next, and how many cache lines of it are asked for with each row; null for nothing.
  const float* ahead = nullptr;
  int64_t ahead_lines = 0;
};

constexpr int64_t kLine = 64 / sizeof(float);

template <int V>
FXPRUNE_INLINE void finish_row(Lane* sum, const Rows& e, int64_t row) {
  float* out = e.out + row * e.out_stride;
  const float* residual = e.residual ? e.residual + row * e.residual_stride : nullptr;
  if (residual && !e.finish.adds_last) {
    FXPRUNE_UNROLL
    for (int v = 0; v < V; ++v) sum[v] += load<Lane>(residual + v * kLanes);
  }
  if (e.finish.clamps) {
    // In this order nan stays nan.
    FXPRUNE_UNROLL
    for (int v = 0; v < V; ++v) {
      sum[v] = sum[v] < e.finish.low ? Lane{} + e.finish.low : sum[v];
      sum[v] = sum[v] > e.finish.high ? Lane{} + e.finish.high : sum[v];
    }
  }
  const bool adds_last = residual && e.finish.adds_last;
  if (adds_last && !e.finish.apply) {
    FXPRUNE_UNROLL
    for (int v = 0; v < V; ++v) sum[v] += load<Lane>(residual + v * kLanes);
  }
  FXPRUNE_UNROLL
  for (int v = 0; v < V; ++v) store(out + v * kLanes, sum[v]);
  if (e.finish.apply) e.finish.apply(out, V * kLanes);
  if (adds_last && e.finish.apply) {
    FXPRUNE_UNROLL
    for (int v = 0; v < V; ++v) store(out + v * kLanes, load<Lane>(out + v * kLanes) + load<Lane>(residual + v * kLanes));
  }
}

// One block of rows on one tile of V places. The first K-block begins at the bias, the last one writes the map.
template <int V, bool First, bool Last>
FXPRUNE_OUTLINE void multiply_rows(const Segments& s, const float* __restrict block, const Rows& e) {
  // Enough independent sums to hide the latency of the multiply-add.
  constexpr int kInFlight = V >= 6 ? 1 : V >= 3 ? 2 : V == 2 ? 4 : 8;
  const float* values = s.values;
  const uint16_t* offsets = s.columns;
  for (int64_t r = 0; r < s.rows; ++r) {
    const int64_t count = s.counts[r], row = s.order[r];
    if (e.ahead)
      for (int64_t n = r * e.ahead_lines; n < (r + 1) * e.ahead_lines; ++n) __builtin_prefetch(e.ahead + n * kLine, 0, 2);
    float* sums = e.sums + row * V * kLanes;
    Lane sum[kInFlight][V];
    const Lane start = First && e.bias ? Lane{} + e.bias[row] : Lane{};
    FXPRUNE_UNROLL
    for (int v = 0; v < V; ++v) {
      sum[0][v] = First ? start : load<Lane>(sums + v * kLanes);
      FXPRUNE_UNROLL
      for (int u = 1; u < kInFlight; ++u) sum[u][v] = Lane{};
    }
    int64_t n = 0;
    for (; n + kInFlight <= count; n += kInFlight) {
      FXPRUNE_UNROLL
      for (int u = 0; u < kInFlight; ++u) {
        const float* x = block + int64_t{offsets[n + u]} * kLanes;
        FXPRUNE_UNROLL
        for (int v = 0; v < V; ++v) sum[u][v] += load<Lane>(x + v * kLanes) * values[n + u];
      }
    }
    if constexpr (kInFlight > 1) {
      for (; n < count; ++n) {
        const float* x = block + int64_t{offsets[n]} * kLanes;
        FXPRUNE_UNROLL
        for (int v = 0; v < V; ++v) sum[0][v] += load<Lane>(x + v * kLanes) * values[n];
      }
    }
    FXPRUNE_UNROLL
    for (int v = 0; v < V; ++v) {
      FXPRUNE_UNROLL
      for (int u = 1; u < kInFlight; ++u) sum[0][v] += sum[u][v];
    }
    if constexpr (Last) {
      finish_row<V>(sum[0], e, row);
    } else {
      FXPRUNE_UNROLL
      for (int v = 0; v < V; ++v) store(sums + v * kLanes, sum[0][v]);
    }
    values += count;
    offsets += count;
  }
}

using MultiplyRows = void (*)(const Segments&, const float*, const Rows&);

// [first][last]
struct RowKernels {
  MultiplyRows of[2][2];
};

template <int V>
inline RowKernels row_kernels_of() {
  return {{{multiply_rows<V, false, false>, multiply_rows<V, false, true>},
           {multiply_rows<V, true, false>, multiply_rows<V, true, true>}}};
}

// Widths of tiles that there are kernels for.
constexpr int64_t kTiles[] = {1, 2, 4, 7, 8};

inline RowKernels row_kernels(int64_t tile) {
  switch (tile) {
    case 1: return row_kernels_of<1>();
    case 2: return row_kernels_of<2>();
    case 4: return row_kernels_of<4>();
    case 7: return row_kernels_of<7>();
    default: return row_kernels_of<8>();
  }
}

template <Activation kind>
void apply_in_place(float* y, int64_t floats) {
  for (int64_t n = 0; n < floats; n += kLanes) {
    store(y + n, activate<kind>(Group<1, Lane>{{load<Lane>(y + n)}}).part[0]);
  }
}

}  // namespace fxprune
