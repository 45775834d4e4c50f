// The inner loops: rows of nonzeros times a block of activations, and the transposes around them.
//
// A segment is the part of one row that lies in one K-block. Activations stand in a block [Kb][T]: T tokens
// side by side for each column. Every nonzero is broadcast and multiplied with the T tokens of its column;
// sums go to a tile [rows][T].
#pragma once

#include "activations.h"

namespace fxprune {

// The segments of one row block in one K-block, in their stored order: rising number of nonzeros, so that the
// trip count of the inner loop hardly ever changes from one segment to the next and the branch predictor
// knows it.
struct Segments {
  const float* values;
  const uint16_t* columns;  // within the K-block
  const int16_t* order;     // which row of the row block a segment belongs to
  const int16_t* counts;    // its number of nonzeros
  int64_t rows;
};

// tile[row][0:T] (+)= segment @ block; InFlight independent sums hide the latency of the multiply-add.
template <int T, int InFlight, bool Accumulate>
FXPRUNE_OUTLINE void multiply(const Segments& s, const float* __restrict block, float* __restrict tile) {
  constexpr int kWidth = T < kLanes ? T : kLanes;
  constexpr int kVectors = T / kWidth;
  using Vector = Float<kWidth>;
  const float* values = s.values;
  const uint16_t* columns = s.columns;
  for (int64_t r = 0; r < s.rows; ++r) {
    const int64_t count = s.counts[r];
    float* out = tile + int64_t{s.order[r]} * T;
    Vector sum[InFlight][kVectors];
    FXPRUNE_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      sum[0][v] = Accumulate ? load<Vector>(out + v * kWidth) : Vector{};
      FXPRUNE_UNROLL
      for (int u = 1; u < InFlight; ++u) sum[u][v] = Vector{};
    }
    int64_t n = 0;
    for (; n + InFlight <= count; n += InFlight) {
      FXPRUNE_UNROLL
      for (int u = 0; u < InFlight; ++u) {
        const float* x = block + int64_t{columns[n + u]} * T;
        FXPRUNE_UNROLL
        for (int v = 0; v < kVectors; ++v) sum[u][v] += load<Vector>(x + v * kWidth) * values[n + u];
      }
    }
    if constexpr (InFlight > 1) {
      for (; n < count; ++n) {
        const float* x = block + int64_t{columns[n]} * T;
        FXPRUNE_UNROLL
        for (int v = 0; v < kVectors; ++v) sum[0][v] += load<Vector>(x + v * kWidth) * values[n];
      }
    }
    FXPRUNE_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      FXPRUNE_UNROLL
      for (int u = 1; u < InFlight; ++u) sum[0][v] += sum[u][v];
      store(out + v * kWidth, sum[0][v]);
    }
    values += count;
    columns += count;
  }
}

// block[k][m] = x[m][k] for `columns` columns and `tokens` <= T tokens; lanes past `tokens` become 0.
template <int T>
FXPRUNE_OUTLINE void pack(const float* x, int64_t stride, int64_t tokens, int64_t columns, float* __restrict block) {
  constexpr int kStep = T < kBlock ? T : kBlock;
  for (int m = 0; m < T; m += kStep) {
    const float* rows = x + m * stride;
    const int64_t valid = tokens - m < kStep ? (tokens > m ? tokens - m : 0) : kStep;
    int64_t k = 0;
    if constexpr (kStep == kBlock) {
      for (; k + kBlock <= columns; k += kBlock) {
        Block r[kBlock];
        FXPRUNE_UNROLL
        for (int j = 0; j < kBlock; ++j) r[j] = j < valid ? load<Block>(rows + j * stride + k) : Block{};
        transpose(r);
        FXPRUNE_UNROLL
        for (int j = 0; j < kBlock; ++j) store(block + (k + j) * T + m, r[j]);
      }
    }
    for (; k < columns; ++k) {
      float* out = block + k * T + m;
      for (int64_t j = 0; j < kStep; ++j) out[j] = j < valid ? rows[j * stride + k] : 0.0f;
    }
  }
}

// What happens to sums on their way out. Pointers stand at the first row that is written; they may be null
// but for y.
struct Epilogue {
  const float* bias;      // [rows]
  float* y;
  int64_t stride;
};

// y[token + n][row] = activation(sums[n] + bias[row]), for N tokens and kBlock rows.
template <Activation kind, int N>
FXPRUNE_INLINE void finish(const Epilogue& e, const Block* sums, int64_t token, int64_t row) {
  Group<N> g;
  const Block bias = e.bias ? load<Block>(e.bias + row) : Block{};
  FXPRUNE_UNROLL
  for (int n = 0; n < N; ++n) g.part[n] = sums[n] + bias;
  g = activate<kind>(g);
  const int64_t at = token * e.stride + row;
  FXPRUNE_UNROLL
  for (int n = 0; n < N; ++n) store(e.y + at + n * e.stride, g.part[n]);
}

// The same for one token and the last, fewer than kBlock rows.
template <Activation kind>
void finish_some(const Epilogue& e, Block sum, int64_t token, int64_t row, int64_t rows) {
  Group<1> g;
  g.part[0] = e.bias ? sum + load_some(e.bias + row, rows) : sum + Block{};
  g = activate<kind>(g);
  const int64_t at = token * e.stride + row;
  store_some(e.y + at, g.part[0], rows);
}

// kBlock rows of the tile, tokens [m, m + kBlock) of them, transposed: out[token] holds kBlock rows.
template <int T>
FXPRUNE_INLINE void columns_of(const float* tile, int64_t row, int64_t m, Block* out) {
  if constexpr (T >= kBlock) {
    FXPRUNE_UNROLL
    for (int j = 0; j < kBlock; ++j) out[j] = load<Block>(tile + (row + j) * T + m);
    transpose(out);
  } else if constexpr (T == 1) {
    out[0] = load<Block>(tile + row);
  } else {
    for (int64_t token = 0; token < T; ++token)
      for (int64_t j = 0; j < kBlock; ++j) out[token][j] = tile[(row + j) * T + token];
  }
}

// y[m][row] = activation(tile[row][m] + bias[row]). T is 1 for the tile that `dot` leaves.
// Reads up to kBlock - 1 tile rows past `rows`, whose sums go nowhere, so the tile must be that much larger.
template <int T, Activation kind>
void unpack(const float* tile, int64_t rows, int64_t tokens, const Epilogue& e) {
  constexpr int64_t kStep = T < kBlock ? T : kBlock;
  constexpr int kTogether = kStep < 4 ? kStep : 4;
  // A few rows at a time, so that what is read stays in L1 while whole cache lines of y are written: y's rows
  // are often a multiple of 2 KB apart and then compete for few places in L1.
  constexpr int64_t kRows = 32;
  for (int64_t low = 0; low < rows; low += kRows) {
    const int64_t high = low + kRows < rows ? low + kRows : rows;
    for (int64_t m = 0; m < tokens; m += kStep) {
      const int64_t valid = tokens - m < kStep ? tokens - m : kStep;
      for (int64_t row = low; row < high; row += kBlock) {
        const int64_t lanes = high - row < kBlock ? high - row : kBlock;
        Block sums[kBlock];
        columns_of<T>(tile, row, m, sums);
        if (valid == kStep && lanes == kBlock) {
          FXPRUNE_UNROLL
          for (int64_t j = 0; j < kStep; j += kTogether) finish<kind, kTogether>(e, sums + j, m + j, row);
        } else {
          for (int64_t j = 0; j < valid; ++j) finish_some<kind>(e, sums[j], m + j, row, lanes);
        }
      }
    }
  }
}

}  // namespace fxprune
