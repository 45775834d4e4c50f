// fxprune::nonzeros_linear for the CPU: y = activation(x @ W^T + bias), W stored by its nonzeros; and
// nonzeros_linear_split, which deals the rows of W out to several results.
//
// Stored format of W [o, i] (layouts/nonzeros.py packs it): row blocks of NB rows, K-blocks of Kb columns,
// blocks in the order (row block, K-block). In a block the rows are sorted by their number of nonzeros. Row r
// of row block b, K-block k has its `order` and `counts` at b * NB * nK + k * rows(b) + r. `blocks` holds o, i,
// NB, Kb, and then where each block begins in `values` and `columns`.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "dot.h"
#include "fingerprint.h"
#include "linear.h"

namespace fxprune {
namespace {

// Bytes of sums that wait in L2 (half of a common one); bytes up to which a block of activations serves best,
// measured: past L1, but its lines come from L2 in order of need; and the work, in nonzeros times eight
// tokens, that a thread must have to be worth waking.
constexpr int64_t kTileBytes = 512 << 10;
constexpr int64_t kBlockBytes = 96 << 10;
constexpr int64_t kSerialWork = 16 << 10;

// Entries of `blocks` before the first block's.
constexpr int64_t kGeometry = 4;

struct Problem {
  const float* values;
  const uint16_t* columns;
  const int16_t* order;
  const int16_t* counts;
  const int64_t* starts;  // [row blocks * K-blocks + 1] into values and columns
  int64_t o, i, row_block, k_block, row_blocks, k_blocks;
  const float* x;
  const float* bias;
  int64_t tokens;
  std::vector<Part> parts;
  bool gathers;

  int64_t first_row(int64_t block) const { return std::min(o, block * row_block); }

  Segments segments(int64_t block, int64_t k) const {
    const int64_t row = first_row(block), rows = first_row(block + 1) - row;
    const int64_t start = starts[block * k_blocks + k], at = row * k_blocks + k * rows;
    return {values + start, columns + start, order + at, counts + at, rows};
  }
};

// One tile of up to T tokens, from row block `begin` to `end`. Columns outside, rows inside: a block of
// activations is packed once, stays in L1 and meets every row, while the sums wait in L2.
template <int T, int InFlight, Activation kind>
void run_tile(const Problem& p, int64_t token, int64_t begin, int64_t end) {
  const int64_t tokens = std::min<int64_t>(T, p.tokens - token);
  const int64_t together = std::max<int64_t>(1, kTileBytes / (p.row_block * T * 4));
  float* block = T == 1 ? nullptr : scratch(0, p.k_block * T);
  float* tile = scratch(1, (std::min(together, p.row_blocks) * p.row_block + kBlock) * T);
  for (int64_t low = begin; low < end; low += together) {
    const int64_t high = std::min(end, low + together), first = p.first_row(low);
    for (int64_t k = 0; k < p.k_blocks; ++k) {
      const int64_t column = k * p.k_block;
      const float* x = p.x + token * p.i + column;
      if constexpr (T > 1) pack<T>(x, p.i, tokens, std::min(p.k_block, p.i - column), block);
      for (int64_t b = low; b < high; ++b) {
        const Segments s = p.segments(b, k);
        float* sums = tile + (p.first_row(b) - first) * T;
        if constexpr (T == 1) {
          if (p.gathers) {
            k ? dot<Gathered, true>(s, x, sums) : dot<Gathered, false>(s, x, sums);
          } else {
            k ? dot<OneByOne, true>(s, x, sums) : dot<OneByOne, false>(s, x, sums);
          }
        } else {
          k ? multiply<T, InFlight, true>(s, block, sums) : multiply<T, InFlight, false>(s, block, sums);
        }
      }
    }
    const int64_t last = p.first_row(high);
    for (const Part& part : p.parts) {
      const int64_t row = std::max(first, part.first), stop = std::min(last, part.first + part.rows);
      if (row >= stop) continue;
      const float* bias = p.bias ? p.bias + row : nullptr;
      const Epilogue e{bias, part.at<float>(token, row), part.rows};
      unpack<T, kind>(tile + (row - first) * T, stop - row, tokens, e);
    }
  }
}

template <Activation kind>
void run_tile(int64_t lanes, const Problem& p, int64_t token, int64_t begin, int64_t end) {
  switch (lanes) {
    case 1: return run_tile<1, 1, kind>(p, token, begin, end);
    case 4: return run_tile<4, 4, kind>(p, token, begin, end);
    case 8: return run_tile<8, 4, kind>(p, token, begin, end);
    case 16: return run_tile<16, 4, kind>(p, token, begin, end);
    case 32: return run_tile<32, 2, kind>(p, token, begin, end);
    default: return run_tile<64, 1, kind>(p, token, begin, end);
  }
}

using RunTile = void (*)(int64_t, const Problem&, int64_t, int64_t, int64_t);

struct Choose {
  template <Activation kind>
  RunTile of() const {
    return run_tile<kind>;
  }
};

// Lanes for the next tile: the smallest that holds all that is left, but no more than keep the block in L1.
int64_t lanes_for(int64_t left, int64_t k_block) {
  if (left == 1) return 1;
  int64_t lanes = left <= 4 ? 4 : left <= 8 ? 8 : left <= 16 ? 16 : left <= 32 ? 32 : 64;
  while (lanes > 16 && lanes * k_block * 4 > kBlockBytes) lanes /= 2;
  return lanes;
}

void run(const Problem& p, RunTile run_tile) {
  struct Tile {
    int64_t token, lanes;
  };
  std::vector<Tile> tiles;
  for (int64_t token = 0; token < p.tokens;) {
    const int64_t lanes = lanes_for(p.tokens - token, p.k_block);
    tiles.push_back({token, lanes});
    token += lanes;
  }
  // Tasks are (tile, row block), tile by tile; a thread takes a contiguous range and so packs few tiles'
  // activations.
  const int64_t tasks = static_cast<int64_t>(tiles.size()) * p.row_blocks;
  const int64_t work = p.starts[p.row_blocks * p.k_blocks] * ((p.tokens + 7) / 8);
  const int64_t grain = std::max<int64_t>(1, tasks * kSerialWork / std::max<int64_t>(work, 1));
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const Tile& tile = tiles[begin / p.row_blocks];
      const int64_t block = begin % p.row_blocks, stop = std::min(p.row_blocks, block + (end - begin));
      run_tile(tile.lanes, p, tile.token, block, stop);
      begin += stop - block;
    }
  });
}

constexpr Checks check{"nonzeros_linear"};

// The weight as its packed tensors describe it; throws where they do not fit together.
Problem weight_of(
    const Tensor& values, const Tensor& columns, const Tensor& order, const Tensor& counts,
    const Tensor& blocks, const std::optional<Tensor>& bias) {
  Problem p = {};
  const int64_t entries = blocks.numel();
  const int64_t* geometry = check.data<int64_t>(blocks, ScalarType::Long, entries, "blocks must be contiguous int64");
  check.require(entries > kGeometry, "blocks must begin with o, i, row block, K-block");
  p.o = geometry[0], p.i = geometry[1], p.row_block = geometry[2], p.k_block = geometry[3];
  check.require(p.o >= 1 && p.i >= 1 && p.row_block >= 1 && p.k_block >= 1, "o, i and the blocks must be positive");
  check.require(p.row_block <= INT16_MAX && p.k_block <= INT16_MAX, "a block is too large for 16-bit indices");
  p.row_blocks = (p.o + p.row_block - 1) / p.row_block;
  p.k_blocks = (p.i + p.k_block - 1) / p.k_block;

  const int64_t nonzeros = values.numel(), segments = p.o * p.k_blocks, count = p.row_blocks * p.k_blocks;
  p.values = check.data<float>(values, ScalarType::Float, nonzeros, "values must be a contiguous float32 tensor");
  p.columns = check.data<uint16_t>(columns, ScalarType::Short, nonzeros, "columns must be int16, one per value");
  p.order = check.data<int16_t>(order, ScalarType::Short, segments, "order must be int16, one per segment");
  p.counts = check.data<int16_t>(counts, ScalarType::Short, segments, "counts must be int16, one per segment");
  check.require(entries == kGeometry + count + 1, "blocks must be [4 + number of blocks + 1]");
  p.starts = geometry + kGeometry;
  check.require(p.starts[0] == 0 && p.starts[count] == nonzeros && std::is_sorted(p.starts, p.starts + count + 1),
          "blocks must begin from 0 to the number of values");
  if (bias) p.bias = check.data<float>(*bias, ScalarType::Float, p.o, "bias must be contiguous float32 [o]");
  return p;
}

// The results for x, one for each number of rows in `out_features`, which add up to the weight's.
std::vector<Tensor> linear(
    Problem p, const Tensor& input, const std::vector<int64_t>& out_features, const std::string& activation) {
  const RunTile run_tile = check.with_activation<RunTile>(activation, Choose{});
  check.require(input.scalar_type() == ScalarType::Float, "x must be float32");
  const Tensor x = check.rows_of(input, p.i);
  p.tokens = x.numel() / p.i;
  p.x = check.data<float>(x, ScalarType::Float, p.tokens * p.i, "x must be on the CPU");
  p.gathers = gathers_pay();
  std::vector<Tensor> results = check.results(x, p.o, out_features, p.parts);
  if (p.tokens > 0) run(p, run_tile);
  return results;
}

Tensor nonzeros_linear(
    const Tensor& x, const Tensor& values, const Tensor& columns, const Tensor& order, const Tensor& counts,
    const Tensor& blocks, const std::optional<Tensor>& bias, int64_t out_features, const std::string& activation) {
  return linear(weight_of(values, columns, order, counts, blocks, bias), x, {out_features}, activation)[0];
}

std::vector<Tensor> nonzeros_linear_split(
    const Tensor& x, const Tensor& values, const Tensor& columns, const Tensor& order, const Tensor& counts,
    const Tensor& blocks, const std::optional<Tensor>& bias, const std::vector<int64_t>& out_features,
    const std::string& activation) {
  return linear(weight_of(values, columns, order, counts, blocks, bias), x, out_features, activation);
}

}  // namespace
}  // namespace fxprune

// Which vector instructions this object was compiled for.
extern "C" const char* fxprune_isa() { return FXPRUNE_ISA; }

extern "C" uint64_t fxprune_fingerprint(const void* data, int64_t bytes) {
  return fxprune::fingerprint(data, bytes);
}

STABLE_TORCH_LIBRARY_IMPL(fxprune, CPU, m) {
  m.impl("nonzeros_linear", TORCH_BOX(&fxprune::nonzeros_linear));
  m.impl("nonzeros_linear_split", TORCH_BOX(&fxprune::nonzeros_linear_split));
}
