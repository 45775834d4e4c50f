// fxprune::attention for the CPU: attention of few queries over keys and values that lie in several tensors, as a
// decoder's step has them: those of the tokens before, and the token's own. They are read once, where they lie.
#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <vector>

#include "crew.h"
#include "linear.h"

namespace fxprune {
namespace {

// Bytes of keys and values that a thread must have to be worth waking.
constexpr int64_t kSerialBytes = 64 << 10;
// Queries for which a key or a value is read once.
constexpr int kTogether = 4;

using Lane = Float<kLanes>;

constexpr Checks check{"attention"};

// x [n, heads, tokens, size], whose channels lie side by side.
struct Heads {
  const float* data;
  std::array<int64_t, 4> sizes, steps;

  const float* row(int64_t n, int64_t head, int64_t token) const {
    return data + n * steps[0] + head * steps[1] + token * steps[2];
  }
};

// The keys and the values of some tokens.
struct Tokens {
  Heads keys, values;
};

struct Problem {
  Heads query;
  std::vector<Tokens> parts;
  Heads mask;  // added to the scores; data is null for nothing
  float scale;
  float* y;  // [n, queries, heads, v_size]
  int64_t n, heads, queries, size, v_size, kv_heads, keys;

  int64_t group() const { return heads / kv_heads; }
};

// The first `lanes` lanes from memory, the others zero.
FXPRUNE_INLINE Lane load_lanes(const float* from, int64_t lanes) {
  Lane value = {};
  std::memcpy(&value, from, lanes * sizeof(float));
  return value;
}

// Scores of N queries, that lie `q_stride` apart and are zero past their size, with one key.
template <int N>
FXPRUNE_INLINE void score(const float* q, int64_t q_stride, const float* key, int64_t size, float scale, float* scores, int64_t stride) {
  Lane sum[N] = {};
  int64_t d = 0;
  const auto add = [&](Lane k) {
    FXPRUNE_UNROLL
    for (int n = 0; n < N; ++n) sum[n] += k * load<Lane>(q + n * q_stride + d);
  };
  for (; d + kLanes <= size; d += kLanes) add(load<Lane>(key + d));
  if (d < size) add(load_lanes(key + d, size - d));
  FXPRUNE_UNROLL
  for (int n = 0; n < N; ++n) scores[n * stride] = total(sum[n]) * scale;
}

// softmax of `keys` scores but for the division, in place, up to whole vectors; returns what to multiply by. Of a query
// that sees no key that is zero, as torch has it.
inline float soften(float* scores, int64_t keys) {
  constexpr float kNever = -std::numeric_limits<float>::infinity();
  const int64_t whole = (keys + kLanes - 1) / kLanes * kLanes;
  std::fill(scores + keys, scores + whole, kNever);
  Lane most = Lane{} + kNever;
  for (int64_t j = 0; j < whole; j += kLanes) {
    const Lane s = load<Lane>(scores + j);
    most = s > most ? s : most;
  }
  float greatest = kNever;
  for (int l = 0; l < kLanes; ++l) greatest = most[l] > greatest ? most[l] : greatest;
  if (greatest == kNever) greatest = 0.0f;
  Lane sum = {};
  for (int64_t j = 0; j < whole; j += kLanes) {
    Group<1, Lane> g;
    g.part[0] = load<Lane>(scores + j) - greatest;
    g = exponential(g);
    sum += g.part[0];
    store(scores + j, g.part[0]);
  }
  const float all = total(sum);
  return all == 0.0f ? 0.0f : 1.0f / all;
}

// V vectors of the results of N queries, from channel d on.
template <int N, int V>
FXPRUNE_INLINE void weigh(
    const Problem& p, int64_t image, int64_t head, const float* scores, int64_t stride, int64_t d, int64_t lanes,
    const float* share, float* const* out) {
  Lane sum[N][V] = {};
  int64_t j = 0;
  for (const Tokens& part : p.parts) {
    const float* value = part.values.row(image, head, 0) + d;
    for (int64_t t = 0; t < part.values.sizes[2]; ++t, ++j, value += part.values.steps[2]) {
      Lane v[V];
      FXPRUNE_UNROLL
      for (int i = 0; i < V; ++i) v[i] = lanes ? load_lanes(value, lanes) : load<Lane>(value + i * kLanes);
      FXPRUNE_UNROLL
      for (int n = 0; n < N; ++n) {
        FXPRUNE_UNROLL
        for (int i = 0; i < V; ++i) sum[n][i] += scores[n * stride + j] * v[i];
      }
    }
  }
  FXPRUNE_UNROLL
  for (int n = 0; n < N; ++n) {
    FXPRUNE_UNROLL
    for (int i = 0; i < V; ++i) {
      const Lane y = sum[n][i] * share[n];
      std::memcpy(out[n] + d + i * kLanes, &y, (lanes ? lanes : kLanes) * sizeof(float));
    }
  }
}

// N of the queries that share a head of the keys and values: of the heads and, within a head, of the tokens.
template <int N>
FXPRUNE_OUTLINE void attend(const Problem& p, int64_t image, int64_t kv_head, int64_t first, float* scratch) {
  const int64_t q_stride = (p.size + kLanes - 1) / kLanes * kLanes;
  const int64_t stride = (p.keys + kLanes - 1) / kLanes * kLanes;
  float *q = scratch, *scores = scratch + N * q_stride;
  float* out[N];
  float share[N];
  for (int n = 0; n < N; ++n) {
    const int64_t head = kv_head * p.group() + (first + n) / p.queries, token = (first + n) % p.queries;
    const float* from = p.query.row(image, head, token);
    std::copy(from, from + p.size, q + n * q_stride);
    std::fill(q + n * q_stride + p.size, q + (n + 1) * q_stride, 0.0f);
    out[n] = p.y + ((image * p.queries + token) * p.heads + head) * p.v_size;
  }
  int64_t j = 0;
  for (const Tokens& part : p.parts) {
    const float* key = part.keys.row(image, kv_head, 0);
    for (int64_t t = 0; t < part.keys.sizes[2]; ++t, ++j, key += part.keys.steps[2])
      score<N>(q, q_stride, key, p.size, p.scale, scores + j, stride);
  }
  for (int n = 0; n < N; ++n) {
    if (p.mask.data) {
      const float* more = p.mask.row(image, kv_head * p.group() + (first + n) / p.queries, (first + n) % p.queries);
      for (int64_t k = 0; k < p.keys; ++k) scores[n * stride + k] += more[k * p.mask.steps[3]];
    }
    share[n] = soften(scores + n * stride, p.keys);
  }
  int64_t d = 0;
  for (; d + 4 * kLanes <= p.v_size; d += 4 * kLanes) weigh<N, 4>(p, image, kv_head, scores, stride, d, 0, share, out);
  for (; d + kLanes <= p.v_size; d += kLanes) weigh<N, 1>(p, image, kv_head, scores, stride, d, 0, share, out);
  if (d < p.v_size) weigh<N, 1>(p, image, kv_head, scores, stride, d, p.v_size - d, share, out);
}

void run(const Problem& p) {
  const int64_t tasks = p.n * p.kv_heads, bytes = tasks * p.keys * (p.size + p.v_size) * 4;
  const int64_t threads = std::min({int64_t{torch::stable::get_num_threads()}, bytes / kSerialBytes + 1, tasks});
  const int64_t padded = (p.size + kLanes - 1) / kLanes * kLanes + (p.keys + kLanes - 1) / kLanes * kLanes;
  in_steps(
      threads, 1, [&](int64_t) { return tasks; },
      [&](int64_t, int64_t task, int64_t) {
        float* memory = scratch(0, kTogether * padded);
        const int64_t image = task / p.kv_heads, head = task % p.kv_heads, many = p.group() * p.queries;
        int64_t first = 0;
        for (; first + kTogether <= many; first += kTogether) attend<kTogether>(p, image, head, first, memory);
        for (; first < many; ++first) attend<1>(p, image, head, first, memory);
      });
}

Heads heads_of(const Tensor& x) {
  Heads heads = {static_cast<const float*>(x.const_data_ptr()), {}, {}};
  for (int64_t d = 0; d < 4; ++d) heads.sizes[d] = x.size(d), heads.steps[d] = x.stride(d);
  return heads;
}

// x as it is where its channels lie side by side, else a copy, which is `kept`.
Heads side_by_side(const Tensor& x, const char* what, std::vector<Tensor>& kept) {
  check.require(x.is_cpu() && x.scalar_type() == ScalarType::Float && x.dim() == 4, what);
  if (x.stride(3) == 1 || x.size(3) <= 1) return heads_of(x);
  kept.push_back(torch::stable::contiguous(x));
  return heads_of(kept.back());
}

Tensor attention(
    const Tensor& query, const std::vector<Tensor>& keys, const std::vector<Tensor>& values,
    const std::optional<Tensor>& mask, double scale) {
  Problem p = {};
  std::vector<Tensor> kept;
  p.query = side_by_side(query, "the query must be float32 [n, heads, queries, size] on the CPU", kept);
  p.n = query.size(0), p.heads = query.size(1), p.queries = query.size(2), p.size = query.size(3);
  p.scale = static_cast<float>(scale);
  check.require(!keys.empty() && keys.size() == values.size(), "there must be as many keys as values, and one at least");
  p.kv_heads = keys[0].dim() == 4 ? keys[0].size(1) : 0, p.v_size = values[0].dim() == 4 ? values[0].size(3) : 0;
  for (size_t j = 0; j < keys.size(); ++j) {
    const Tokens part = {
        side_by_side(keys[j], "keys must be float32 [n, heads, tokens, size] on the CPU", kept),
        side_by_side(values[j], "values must be float32 [n, heads, tokens, size] on the CPU", kept),
    };
    const auto &k = part.keys.sizes, &v = part.values.sizes;
    check.require(k[0] == p.n && k[1] == p.kv_heads && k[3] == p.size, "keys have other sizes than the query");
    check.require(v[0] == p.n && v[1] == p.kv_heads && v[2] == k[2] && v[3] == p.v_size, "values have other sizes than keys");
    p.keys += k[2];
    p.parts.push_back(part);
  }
  check.require(p.heads == 0 || (p.kv_heads > 0 && p.heads % p.kv_heads == 0), "heads must be a multiple of the keys'");
  if (mask) {
    check.require(
        mask->is_cpu() && mask->scalar_type() == ScalarType::Float && mask->dim() == 4,
        "the mask must be float32 in four dimensions on the CPU");
    p.mask = heads_of(*mask);
    const std::array<int64_t, 4> wanted = {p.n, p.heads, p.queries, p.keys};
    for (int d = 0; d < 4; ++d) {
      check.require(p.mask.sizes[d] == wanted[d] || p.mask.sizes[d] == 1, "the mask has other sizes than the scores");
      if (p.mask.sizes[d] == 1) p.mask.steps[d] = 0;
    }
  }
  const std::vector<int64_t> shape = {p.n, p.queries, p.heads, p.v_size};
  Tensor y = torch::stable::new_empty(query, shape);
  p.y = static_cast<float*>(y.mutable_data_ptr());
  if (y.numel() > 0) run(p);
  return y;
}

}  // namespace
}  // namespace fxprune

STABLE_TORCH_LIBRARY_IMPL(fxprune, CPU, m) { m.impl("attention", TORCH_BOX(&fxprune::attention)); }
