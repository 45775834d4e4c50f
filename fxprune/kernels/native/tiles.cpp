// fxprune::tiles_linear for CPUs with AMX or AVX-512 VBMI2: y = activation(x @ W^T + bias) in bf16, W [o, i] stored by
// bits and values in the order of AMX tiles (tiles.h); and tiles_linear_split, which deals the rows of W out to several
// results. Sums, bias and activation are in fp32. What the CPU does not have is not registered: kernels/native/tiles.py
// then answers.
//
// Stored format (layouts/tiles.py packs it): `starts` holds o, i, and for each panel its first block and the first
// value of each of its two streams, and once more where they end; `columns` the column block of each block; `bits` 32
// words a block; `values` 32 more than there are, for they are read a vector at a time.
#include "tiles.h"

#ifdef FXPRUNE_TILES

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "crew.h"

namespace fxprune {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Blocks that are expanded at a time: two such buffers fill L1. Bytes of a task's activations, which stay in L2 while
// all panels pass. The work, in elements times tokens, that a thread must have to be worth waking.
constexpr int64_t kChunk = 12;
constexpr int64_t kTokenBytes = 1 << 20;
constexpr int64_t kSerialWork = 2 << 20;
// Tasks a thread, so that one that is late leaves the others something to do.
constexpr int64_t kTasks = 4;

constexpr int64_t kGeometry = 2;  // entries of `starts` before the first panel's
constexpr int64_t kStarts = 3;    // and of each panel

int64_t ceil_of(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of W that make one result: y [tokens, rows].
struct Part {
  int64_t first, rows;
  Brain* y;
};

struct Problem {
  const Brain* values;
  const uint32_t* bits;
  const uint16_t* columns;
  const int64_t* starts;
  int64_t o, i, panels, tail_column;
  const Brain* x;
  const Brain* bias;
  int64_t tokens;
  std::vector<Part> parts;

  int64_t first_block(int64_t panel) const { return starts[panel * kStarts]; }

  Stream stream(int64_t panel) const {
    const int64_t* at = starts + panel * kStarts;
    return {bits + at[0] * kBits, {values + at[1], values + at[2]}};
  }
};

// Tokens that follow one another, and their sums for a panel.
struct Run {
  const float* sums;
  int64_t token, tokens;
};

// Memory that a thread keeps between calls.
template <class T>
T* scratch(int which, int64_t count) {
  struct Buffer {
    std::unique_ptr<void, decltype(&std::free)> memory{nullptr, &std::free};
    size_t size = 0;
  };
  static thread_local Buffer buffers[3];
  Buffer& buffer = buffers[which];
  const size_t bytes = (count * sizeof(T) + 4095) / 4096 * 4096;
  if (buffer.size < bytes) {
    buffer.memory.reset(std::aligned_alloc(4096, bytes));
    buffer.size = buffer.memory ? bytes : 0;
    if (!buffer.memory) throw std::bad_alloc();
  }
  return static_cast<T*>(buffer.memory.get());
}

// Tells `finisher` to write the results of a panel for two runs of tokens. Where the rows go to several tensors it is
// told, and made to finish, one after the other but for the last.
template <Activation kind>
void finish_next(Finisher<kind>& finisher, const Problem& p, int64_t panel, const Run (&runs)[2]) {
  const int64_t first = panel * kPanel, last = std::min(first + kPanel, p.o);
  for (int64_t row = first; row < first + kPanel; ++row)
    finisher.bias[row - first] = p.bias && row < last ? widened(p.bias[row]) : 0.0f;
  for (const Part& part : p.parts) {
    const int64_t begin = std::max(first, part.first), end = std::min(last, part.first + part.rows);
    if (begin >= end) continue;
    finisher.finish();
    finisher.rows = (~0u >> (kPanel - (end - begin))) << (begin - first);
    const auto results = [&](const Run& run) {
      return Results{run.sums, part.y + run.token * part.rows + first - part.first, part.rows, run.tokens};
    };
    finisher.now = results(runs[0]), finisher.then = results(runs[1]);
  }
}

template <Activation kind, int T>
void run_few(const Problem& p, const float* x, int64_t stride, int64_t token, int64_t panel) {
  alignas(64) float sums[T * kPanel];
  const int64_t block = p.first_block(panel), blocks = p.first_block(panel + 1) - block;
  multiply_few<T>(p.stream(panel), p.columns + block, blocks, x, stride, sums);
  Finisher<kind> finisher;
  finish_next(finisher, p, panel, {{sums, token, T}, {}});
  finisher.finish();
}

template <Activation kind>
void run_few(const Problem& p, int64_t token, int64_t tokens, int64_t begin, int64_t end) {
  const int64_t stride = ceil_of(p.i, kColumns) * kColumns;
  float* x = scratch<float>(0, tokens * stride);
  for (int64_t n = 0; n < tokens; ++n) {
    const Brain* from = p.x + (token + n) * p.i;
    for (int64_t k = 0; k < stride; k += 16) {
      const __mmask16 there = k + 16 <= p.i ? 0xffff : (1 << std::max<int64_t>(0, p.i - k)) - 1;
      _mm512_store_ps(x + n * stride + k, widened(_mm256_maskz_loadu_epi16(there, from + k)));
    }
  }
  for (int64_t panel = begin; panel < end; ++panel) {
    int64_t n = 0;
    for (; n + 4 <= tokens; n += 4) run_few<kind, 4>(p, x + n * stride, stride, token + n, panel);
    for (; n + 2 <= tokens; n += 2) run_few<kind, 2>(p, x + n * stride, stride, token + n, panel);
    for (; n < tokens; ++n) run_few<kind, 1>(p, x + n * stride, stride, token + n, panel);
  }
}

#ifdef FXPRUNE_AMX

// The blocks of the panels [begin, end), so many at a time; a panel without blocks has one chunk, which is empty.
struct Chunks {
  const Problem& p;
  int64_t panel, end, done = 0;

  bool is_over() const { return panel == end; }
  int64_t left() const { return p.first_block(panel + 1) - p.first_block(panel) - done; }
  int64_t size() const { return is_over() ? 0 : std::min(kChunk, left()); }
  void advance() {
    done += size();
    if (left() == 0) ++panel, done = 0;
  }
};

// The last columns of x, fewer than a block, for some tokens: [tokens][32], the rest zeros.
const Brain* tail_of(const Problem& p, int64_t token, int64_t tokens) {
  if (p.tail_column < 0) return nullptr;
  Brain* tail = scratch<Brain>(0, tokens * kColumns);
  const int64_t column = p.tail_column * kColumns;
  std::memset(tail, 0, tokens * kColumns * sizeof(Brain));
  for (int64_t n = 0; n < tokens; ++n)
    std::memcpy(tail + n * kColumns, p.x + (token + n) * p.i + column, (p.i - column) * sizeof(Brain));
  return tail;
}

// Tokens lie in tiles of equal height, the last of which may have some in common with the one before it.
template <Activation kind>
void run_tiles(const Problem& p, int64_t token, int64_t tokens, int64_t begin, int64_t end) {
  const int64_t tiles = (tokens + kRows - 1) / kRows, height = (tokens + tiles - 1) / tiles, pairs = (tiles + 1) / 2;
  const Brain* tail = tail_of(p, token, tokens);
  Brain* buffers[2] = {scratch<Brain>(1, kChunk * 4 * kTile), nullptr};
  buffers[1] = buffers[0] + kChunk * 2 * kTile;
  // Sums that are never taken up again need no more room than two pairs, of which one is finished as the other is made.
  const int64_t kept = ceil_of(p.i, kColumns) <= kChunk ? std::min<int64_t>(2, pairs) : pairs;
  float* sums = scratch<float>(2, 2 * kept * kRows * kPanel);
  const auto start_of = [&](int64_t tile) { return std::min(tile * height, tokens - height); };
  const Tiles shapes(height);

  // With few tokens the next chunk is expanded while the first of them are multiplied; with many, bit by bit.
  const bool is_slow = pairs > 3;
  const auto two = is_slow ? multiply_tiles<true, 4, kind> : multiply_tiles<true, 16, kind>;
  const auto one = is_slow ? multiply_tiles<false, 4, kind> : multiply_tiles<false, 16, kind>;
  Chunks chunks{p, begin, end};
  Expander expander{p.stream(begin), buffers[0], chunks.size() * kLines};
  expander.finish();
  Finisher<kind> finisher;
  for (int turn = 0; !chunks.is_over(); turn ^= 1) {
    const int64_t panel = chunks.panel, first = p.first_block(panel) + chunks.done;
    const int64_t last = first + chunks.size() - 1;
    const bool accumulate = chunks.done > 0, has_tail = last >= first && p.columns[last] == p.tail_column;
    const Chunk chunk{buffers[turn], p.columns + first, chunks.size(), has_tail};
    chunks.advance();
    const bool is_last = chunks.panel != panel;
    expander.to = buffers[turn ^ 1], expander.left = chunks.size() * kLines;
    if (is_last && !chunks.is_over()) expander.stream = p.stream(chunks.panel);
    const int64_t tokens_a_block = ceil_of(2 * height, std::max<int64_t>(1, chunk.blocks - 1 - kLate));
    for (int64_t tile = 0; tile < tiles; tile += 2) {
      const bool is_pair = tile + 1 < tiles;
      TokenTiles t{{}, {}, p.i * 2, {}};
      Run runs[2] = {};
      for (int64_t j = 0; j < (is_pair ? 2 : 1); ++j) {
        const int64_t start = start_of(tile + j);
        t.x[j] = p.x + (token + start) * p.i;
        t.tail[j] = tail ? tail + start * kColumns : nullptr;
        t.sums[j] = sums + (tile / 2 % kept * 2 + j) * kRows * kPanel;
        runs[j] = {t.sums[j], token + start, height};
      }
      (is_pair ? two : one)(chunk, t, accumulate, expander, finisher, tokens_a_block);
      if (is_last) finish_next(finisher, p, panel, runs);
    }
    expander.finish();
  }
  finisher.finish();
}

// From this many tokens on tiles are faster.
constexpr int64_t kTilesFrom = 3;

#endif

template <Activation kind>
void run_task(const Problem& p, int64_t token, int64_t tokens, int64_t begin, int64_t end) {
#ifdef FXPRUNE_AMX
  if (tokens >= kTilesFrom && may_use_tiles()) return run_tiles<kind>(p, token, tokens, begin, end);
#endif
  run_few<kind>(p, token, tokens, begin, end);
}

using RunTask = void (*)(const Problem&, int64_t, int64_t, int64_t, int64_t);

RunTask choose(const std::string& activation) {
  if (activation.empty()) return run_task<Activation::kNone>;
  if (activation == "relu") return run_task<Activation::kRelu>;
  if (activation == "gelu") return run_task<Activation::kGelu>;
  if (activation == "gelu_tanh") return run_task<Activation::kGeluTanh>;
  if (activation == "silu") return run_task<Activation::kSilu>;
  throw std::runtime_error("tiles_linear: unknown activation '" + activation + "'");
}

void run(const Problem& p, RunTask run_task) {
  const int64_t most = std::max<int64_t>(2 * kRows, kTokenBytes / (p.i * 2) / (2 * kRows) * (2 * kRows));
  const int64_t groups = ceil_of(p.tokens, most), size = ceil_of(ceil_of(p.tokens, groups), kRows) * kRows;
  const int64_t blocks = p.first_block(p.panels);
  const int64_t worth = blocks * kTile * (p.tokens + 16) / kSerialWork;
  const int64_t threads = std::clamp<int64_t>(worth, 1, torch::stable::get_num_threads());
  const int64_t apart = threads == 1 ? 1 : std::min(p.panels, ceil_of(threads * kTasks, groups));
  in_steps(threads, 1, [&](int64_t) { return groups * apart; }, [&](int64_t, int64_t task, int64_t) {
    const int64_t token = task / apart * size, part = task % apart;
    if (token >= p.tokens) return;
    run_task(p, token, std::min(size, p.tokens - token), p.panels * part / apart, p.panels * (part + 1) / apart);
  });
}

void require(bool condition, const char* what) {
  if (!condition) throw std::runtime_error(std::string("tiles_linear: ") + what);
}

template <class T>
const T* data(const Tensor& t, ScalarType type, int64_t numel, const char* what) {
  require(t.is_cpu() && t.scalar_type() == type && t.numel() == numel && t.is_contiguous(), what);
  return static_cast<const T*>(t.const_data_ptr());
}

// The weight as its packed tensors describe it; throws where they do not fit together.
Problem weight_of(
    const Tensor& values, const Tensor& bits, const Tensor& columns, const Tensor& starts,
    const std::optional<Tensor>& bias) {
  Problem p = {};
  const int64_t entries = starts.numel(), blocks = columns.numel(), stored = values.numel();
  const int64_t* geometry = data<int64_t>(starts, ScalarType::Long, entries, "starts must be contiguous int64");
  require(entries > kGeometry, "starts must begin with o and i");
  p.o = geometry[0], p.i = geometry[1], p.starts = geometry + kGeometry;
  require(p.o >= 1 && p.i >= 1, "o and i must be positive");
  p.panels = ceil_of(p.o, kPanel);
  p.tail_column = p.i % kColumns ? p.i / kColumns : -1;
  require(entries == kGeometry + kStarts * (p.panels + 1), "starts must be [2 + 3 * (panels + 1)]");
  p.values = data<Brain>(values, ScalarType::BFloat16, stored, "values must be a contiguous bfloat16 tensor");
  p.bits = data<uint32_t>(bits, ScalarType::Int, blocks * kBits, "bits must be int32, 32 for each block");
  p.columns = data<uint16_t>(columns, ScalarType::Short, blocks, "columns must be contiguous int16");
  require(p.starts[0] == 0 && p.starts[1] == 0, "starts must begin from 0");
  for (int64_t n = 0; n < p.panels; ++n) {
    const int64_t* at = p.starts + n * kStarts;
    require(at[0] <= at[3] && at[1] <= at[2] && at[2] <= at[4], "starts must not fall");
  }
  const int64_t* ends = p.starts + p.panels * kStarts;
  require(ends[0] == blocks && ends[1] + 32 == stored, "starts must end with the number of blocks and of values");
  for (int64_t b = 0; b < blocks; ++b) require(p.columns[b] * kColumns < p.i, "columns must be in the weight");
  if (bias) p.bias = data<Brain>(*bias, ScalarType::BFloat16, p.o, "bias must be contiguous bfloat16 [o]");
  return p;
}

// The results for x, one for each number of rows in `out_features`, which add up to the weight's.
std::vector<Tensor> linear(
    Problem p, const Tensor& input, const std::vector<int64_t>& out_features, const std::string& activation) {
  const RunTask run_task = choose(activation);
  require(input.scalar_type() == ScalarType::BFloat16, "x must be bfloat16");
  require(input.dim() >= 1, "x must have at least one dimension");
  const Tensor x = input.is_contiguous() ? input : torch::stable::contiguous(input);
  const auto sizes = x.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  require(shape.back() == p.i, "the last dimension of x differs from the weight's in_features");
  p.tokens = x.numel() / p.i;
  p.x = data<Brain>(x, ScalarType::BFloat16, p.tokens * p.i, "x must be on the CPU");

  int64_t first = 0;
  for (const int64_t rows : out_features) {
    require(rows >= 0 && rows <= p.o - first, "out_features must add up to the packed weight's rows");
    p.parts.push_back({first, rows, nullptr});
    first += rows;
  }
  require(first == p.o, "out_features must add up to the packed weight's rows");
  std::vector<Tensor> results;
  results.reserve(p.parts.size());
  for (Part& part : p.parts) {
    shape.back() = part.rows;
    results.push_back(torch::stable::new_empty(x, shape));
    part.y = static_cast<Brain*>(results.back().mutable_data_ptr());
  }
  if (p.tokens > 0) run(p, run_task);
  return results;
}

Tensor tiles_linear(
    const Tensor& x, const Tensor& values, const Tensor& bits, const Tensor& columns, const Tensor& starts,
    const std::optional<Tensor>& bias, int64_t out_features, const std::string& activation) {
  return linear(weight_of(values, bits, columns, starts, bias), x, {out_features}, activation)[0];
}

std::vector<Tensor> tiles_linear_split(
    const Tensor& x, const Tensor& values, const Tensor& bits, const Tensor& columns, const Tensor& starts,
    const std::optional<Tensor>& bias, const std::vector<int64_t>& out_features, const std::string& activation) {
  return linear(weight_of(values, bits, columns, starts, bias), x, out_features, activation);
}

}  // namespace
}  // namespace fxprune

STABLE_TORCH_LIBRARY_IMPL(fxprune, CPU, m) {
  m.impl("tiles_linear", TORCH_BOX(&fxprune::tiles_linear));
  m.impl("tiles_linear_split", TORCH_BOX(&fxprune::tiles_linear_split));
}

#endif  // FXPRUNE_TILES

// With which instructions the ops of this file run: "AMX", "AVX-512", or "" where they do not.
extern "C" const char* fxprune_tiles() {
#if defined(FXPRUNE_AMX)
  return fxprune::may_use_tiles() ? "AMX" : "AVX-512";
#elif defined(FXPRUNE_TILES)
  return "AVX-512";
#else
  return "";
#endif
}
