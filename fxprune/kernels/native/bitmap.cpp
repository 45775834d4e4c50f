// fxprune::bitmap_linear for the CPU: y = activation(x @ W^T + bias), W stored by one bit an element and the values of
// those that are set; and bitmap_linear_split, which deals the rows of W out to several results.
//
// Stored format of W [o, i] (native/bitmap.py packs it): `bits` has a word for each 32 columns of a row, `values` the
// elements that have a bit, row after row, and kPast more; `rows` holds i, and then where each row begins in values.
// Words are expanded in registers and multiplied as if they were dense: sums are in float32 whatever is stored.
#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "expand.h"
#include "linear.h"
#include "microkernels.h"

namespace fxprune {
namespace {

// Tokens whose activations are kept at hand; rows whose words are read again for the next of these; and the work, in
// bytes of W, that a thread must have to be worth waking.
constexpr int64_t kTokens = 16;
constexpr int64_t kRows = 64;
constexpr int64_t kSerialBytes = 64 << 10;

using FinishRows = void (*)(const float*, int64_t, int64_t, const Epilogue&);

struct Problem {
  const void* values;
  const uint32_t* bits;
  const int64_t* starts;  // [o + 1] into values
  int64_t o, i, words;
  const void* x;
  const void* bias;
  int64_t tokens;
  std::vector<Part> parts;
  FinishRows finish;

  // Bytes of W before a row.
  int64_t before(int64_t row, int64_t size) const { return starts[row] * size + row * words * 4; }
};

// sums[t][r] = row r of W times token t, for R rows from `row` and T tokens. Expanding a word and multiplying it by
// tokens compete for the same ports, so that T tokens cost least where each word is expanded once for all; R rows
// share what comes of x from beyond L1.
template <class Stored, int T, int R>
FXPRUNE_OUTLINE void multiply(const Problem& p, int64_t row, const float* x, float* sums) {
  constexpr int kApart = T == 1 ? 2 : 1;
  const typename Stored::Type* values[R];
  const uint32_t* bits[R];
  Wide sum[R][T][kApart] = {};
  FXPRUNE_UNROLL
  for (int r = 0; r < R; ++r) {
    values[r] = static_cast<const typename Stored::Type*>(p.values) + p.starts[row + r];
    bits[r] = p.bits + (row + r) * p.words;
  }
  const int64_t stride = p.words * kWord;
  for (int64_t word = 0; word < p.words; ++word) {
    FXPRUNE_UNROLL
    for (int r = 0; r < R; ++r) {
      Wide parts[kParts];
      ask_ahead<kAhead>(values[r]);
      values[r] = expand_word<Stored>(bits[r][word], values[r], parts);
      FXPRUNE_UNROLL
      for (int part = 0; part < kParts; ++part) {
        const float* at = x + word * kWord + part * kLanes;
        FXPRUNE_UNROLL
        for (int t = 0; t < T; ++t) sum[r][t][part % kApart] += parts[part] * load<Wide>(at + t * stride);
      }
    }
  }
  FXPRUNE_UNROLL
  for (int r = 0; r < R; ++r) {
    FXPRUNE_UNROLL
    for (int t = 0; t < T; ++t) sums[t * kRows + r] = total(kApart == 2 ? sum[r][t][0] + sum[r][t][1] : sum[r][t][0]);
  }
}

// The same for `rows` rows, R at a time.
template <class Stored, int T, int R>
void multiply_rows(const Problem& p, int64_t row, int64_t rows, const float* x, float* sums) {
  int64_t r = 0;
  for (; r + R <= rows; r += R) multiply<Stored, T, R>(p, row + r, x, sums + r);
  for (; r < rows; ++r) multiply<Stored, T, 1>(p, row + r, x, sums + r);
}

// Tokens at a time: as many as the sums' registers allow, which are 32 with AVX-512 and else 16.
constexpr int kMost = kLanes == 16 ? 8 : 4;

template <class Stored>
int64_t multiply_some(const Problem& p, int64_t row, int64_t rows, int64_t tokens, const float* x, float* sums) {
  if (tokens == 1) {
    multiply_rows<Stored, 1, 1>(p, row, rows, x, sums);
    return 1;
  }
  if (tokens == 2) {
    multiply_rows<Stored, 2, 2>(p, row, rows, x, sums);
    return 2;
  }
  if (tokens <= 4 || kMost == 4) {
    multiply_rows<Stored, 4, 2>(p, row, rows, x, sums);
    return 4;
  }
  multiply_rows<Stored, kMost, 3>(p, row, rows, x, sums);
  return kMost;
}

// Rows [begin, end) of W for all tokens.
template <class Stored, class Given>
void run_rows(const Problem& p, int64_t begin, int64_t end) {
  using Type = typename Given::Type;
  const int64_t stride = p.words * kWord;
  const int64_t together = std::min(p.tokens, kTokens);
  // Filled up to whole groups of tokens, whose sums go nowhere.
  const int64_t held = (together + kMost - 1) / kMost * kMost;
  float* x = scratch(0, held * stride);
  float* sums = scratch(1, held * kRows + kBlock);
  for (int64_t token = 0; token < p.tokens; token += together) {
    const int64_t tokens = std::min(together, p.tokens - token);
    for (int64_t t = 0; t < tokens; ++t)
      in_order<Stored, Given>(static_cast<const Type*>(p.x) + (token + t) * p.i, p.i, x + t * stride);
    std::fill(x + tokens * stride, x + held * stride, 0.0f);
    for (int64_t row = begin; row < end; row += kRows) {
      const int64_t rows = std::min(kRows, end - row);
      for (int64_t t = 0; t < tokens;) t += multiply_some<Stored>(p, row, rows, tokens - t, x + t * stride, sums + t * kRows);
      for (const Part& part : p.parts) {
        const int64_t first = std::max(row, part.first), some = std::min(row + rows, part.first + part.rows) - first;
        if (some <= 0) continue;
        float bias[kRows], wide[kRows];
        if (p.bias)
          for (int64_t r = 0; r < some; ++r) bias[r] = widen(Given{}, static_cast<const Type*>(p.bias)[first + r]);
        for (int64_t t = 0; t < tokens; ++t) {
          Type* y = part.at<Type>(token + t, first);
          float* out = wide;
          if constexpr (std::is_same_v<Given, Single>) out = y;
          p.finish(sums + t * kRows + first - row, some, 1, Epilogue{p.bias ? bias : nullptr, out, 0});
          if constexpr (!std::is_same_v<Given, Single>)
            for (int64_t r = 0; r < some; ++r) y[r] = narrow(Given{}, wide[r]);
        }
      }
    }
  }
}

using RunRows = void (*)(const Problem&, int64_t, int64_t);

struct Finish {
  template <Activation kind>
  FinishRows of() const {
    return unpack<1, kind>;
  }
};

void run(const Problem& p, RunRows run_rows, int64_t size) {
  const int64_t bytes = p.before(p.o, size);
  const int64_t most = std::max<int64_t>(1, bytes * p.tokens / kSerialBytes);
  const int64_t threads = std::min({int64_t{torch::stable::get_num_threads()}, most, p.o});
  // Each thread has rows of about as many bytes.
  const auto first = [&](int64_t thread) {
    int64_t low = 0, high = p.o;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (p.before(middle, size) * threads < bytes * thread) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) { run_rows(p, first(begin), first(end)); });
}

constexpr Checks check{"bitmap_linear"};

RunRows choose(ScalarType given, ScalarType stored) {
  check.require(given == stored || given == ScalarType::Float, "x must be of the values' dtype, or float32");
  const bool wide = given == ScalarType::Float;
  if (stored == ScalarType::Float) return run_rows<Single, Single>;
  if (stored == ScalarType::BFloat16) return wide ? run_rows<Brain, Single> : run_rows<Brain, Brain>;
  check.require(stored == ScalarType::Half, "values must be float32, bfloat16 or float16");
  return wide ? run_rows<Half, Single> : run_rows<Half, Half>;
}

// The results for x, one for each number of rows in `out_features`, which add up to the weight's.
std::vector<Tensor> linear(
    const Tensor& input, const Tensor& bits, const Tensor& values, const Tensor& rows,
    const std::optional<Tensor>& bias, const std::vector<int64_t>& out_features, const std::string& activation) {
  const ScalarType given = input.scalar_type(), stored = values.scalar_type();
  const RunRows run_rows = choose(given, stored);
  const int64_t size = stored == ScalarType::Float ? 4 : 2;
  Problem p = {};
  p.finish = check.with_activation<FinishRows>(activation, Finish{});
  const int64_t* geometry = check.data<int64_t>(rows, ScalarType::Long, rows.numel(), "rows must be contiguous int64");
  check.require(rows.numel() >= 3 && geometry[0] >= 1, "rows must hold i, and where each row begins");
  p.o = rows.numel() - 2, p.i = geometry[0], p.starts = geometry + 1;
  p.words = (p.i + kWord - 1) / kWord;
  p.bits = check.data<uint32_t>(bits, ScalarType::Int, p.o * p.words, "bits must be int32, one for 32 columns of a row");
  // Not std::is_sorted: a loop without a way out of it is vectorised.
  bool rising = p.starts[0] == 0;
  for (int64_t row = 0; row < p.o; ++row) rising &= p.starts[row] <= p.starts[row + 1];
  check.require(rising, "rows must begin one after another");
  p.values = check.data<void>(values, stored, p.starts[p.o] + kPast, "values must be one for each bit, and 32 more");
  if (bias) p.bias = check.data<void>(*bias, given, p.o, "bias must be contiguous [o], of x's dtype");
  const Tensor x = check.rows_of(input, p.i);
  p.tokens = x.numel() / p.i;
  p.x = check.data<void>(x, given, x.numel(), "x must be on the CPU");
  std::vector<Tensor> results = check.results(x, p.o, out_features, p.parts);
  if (p.tokens > 0) run(p, run_rows, size);
  return results;
}

Tensor bitmap_linear(
    const Tensor& x, const Tensor& bits, const Tensor& values, const Tensor& rows, const std::optional<Tensor>& bias,
    int64_t out_features, const std::string& activation) {
  return linear(x, bits, values, rows, bias, {out_features}, activation)[0];
}

std::vector<Tensor> bitmap_linear_split(
    const Tensor& x, const Tensor& bits, const Tensor& values, const Tensor& rows, const std::optional<Tensor>& bias,
    const std::vector<int64_t>& out_features, const std::string& activation) {
  return linear(x, bits, values, rows, bias, out_features, activation);
}

}  // namespace
}  // namespace fxprune

STABLE_TORCH_LIBRARY_IMPL(fxprune, CPU, m) {
  m.impl("bitmap_linear", TORCH_BOX(&fxprune::bitmap_linear));
  m.impl("bitmap_linear_split", TORCH_BOX(&fxprune::bitmap_linear_split));
}
