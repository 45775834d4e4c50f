// Attention of several heads, queries in the lanes: what all queries share, a key's or a value's number, is spread
// over a vector, so that scores, their greatest, their sum and the results need nothing from other lanes.
#pragma once

#include <array>

#include "net.h"
#include "net_attention_tiles.h"

namespace fxprune {

// One token of the keys or values: where its vector lies in a channel, and which of its lanes each lane takes.
struct Token {
  int32_t at;
  int32_t lanes;  // where one lane is for all: which; else a number of the step's Lanes
};

template <bool kOne>
FXPRUNE_INLINE Lane spread(const float* channel, const Token& token, const Lanes* lanes) {
  if constexpr (kOne) return Lane{} + channel[token.at + token.lanes];
  return permuted(load<Lane>(channel + token.at), lanes[token.lanes], 0.0f);
}

// N vectors of queries of one head. Scores are [key][N vectors].
struct Queries {
  const float *q, *k, *v;  // the head's first channels
  int64_t q_stride, k_stride, v_stride, size, v_size, keys;
  const Token *k_tokens, *v_tokens;
  const Lanes* lanes;
  float scale;
  const int32_t* number;  // of each query, by vector and lane, where later keys are not seen; else null
  const float* mask;      // what is added to each score, for the key 0; null for nothing
  const int32_t* mask_at;  // of each query, by vector and lane; null where it is the same for all
  int64_t mask_step;       // from key to key
  float* scores;
};

// Independent sums that fit the registers, in vectors of queries times others.
constexpr int kSums = kLanes == 8 ? 8 : 24;

// Scores of J keys.
template <int N, int J, bool kOne>
FXPRUNE_INLINE void score(const Queries& a, int64_t first, Lane* greatest) {
  Lane sum[J][N] = {};
  for (int64_t d = 0; d < a.size; ++d) {
    Lane q[N];
    FXPRUNE_UNROLL
    for (int n = 0; n < N; ++n) q[n] = load<Lane>(a.q + d * a.q_stride + n * kLanes);
    FXPRUNE_UNROLL
    for (int j = 0; j < J; ++j) {
      const Lane k = spread<kOne>(a.k + d * a.k_stride, a.k_tokens[first + j], a.lanes);
      FXPRUNE_UNROLL
      for (int n = 0; n < N; ++n) sum[j][n] += q[n] * k;
    }
  }
  FXPRUNE_UNROLL
  for (int j = 0; j < J; ++j) {
    FXPRUNE_UNROLL
    for (int n = 0; n < N; ++n) {
      Lane s = sum[j][n] * a.scale;
      constexpr float kNever = -std::numeric_limits<float>::infinity();
      if (a.mask) {
        const float* more = a.mask + (first + j) * a.mask_step;
        s += a.mask_at ? gathered(more, a.mask_at + n * kLanes, 0.0f) : Lane{} + *more;
      }
      if (a.number) {
        const LaneIndex query = load<LaneIndex>(reinterpret_cast<const float*>(a.number + n * kLanes));
        s = query < static_cast<int32_t>(first + j) ? Lane{} + kNever : s;
      }
      greatest[n] = s > greatest[n] ? s : greatest[n];
      store(a.scores + ((first + j) * N + n) * kLanes, s);
    }
  }
}

// D channels of the result.
template <int N, int D, bool kOne>
FXPRUNE_INLINE void weigh(const Queries& a, int64_t first, const Lane* share, float* out, int64_t stride) {
  Lane sum[D][N] = {};
  const float* v = a.v + first * a.v_stride;
  for (int64_t j = 0; j < a.keys; ++j) {
    Lane p[N];
    FXPRUNE_UNROLL
    for (int n = 0; n < N; ++n) p[n] = load<Lane>(a.scores + (j * N + n) * kLanes);
    FXPRUNE_UNROLL
    for (int d = 0; d < D; ++d) {
      const Lane value = spread<kOne>(v + d * a.v_stride, a.v_tokens[j], a.lanes);
      FXPRUNE_UNROLL
      for (int n = 0; n < N; ++n) sum[d][n] += p[n] * value;
    }
  }
  FXPRUNE_UNROLL
  for (int d = 0; d < D; ++d) {
    FXPRUNE_UNROLL
    for (int n = 0; n < N; ++n) store(out + (first + d) * stride + n * kLanes, sum[d][n] * share[n]);
  }
}

template <int N, bool kOne>
FXPRUNE_OUTLINE void attend(const Queries& a, float* out, int64_t stride) {
  constexpr int kMany = kSums / N;
  constexpr float kLeast = -std::numeric_limits<float>::infinity();
  Lane greatest[N], total[N] = {};
  for (int n = 0; n < N; ++n) greatest[n] = Lane{} + kLeast;
  int64_t j = 0;
  for (; j + kMany <= a.keys; j += kMany) score<N, kMany, kOne>(a, j, greatest);
  for (; j + 2 <= a.keys; j += 2) score<N, 2, kOne>(a, j, greatest);
  for (; j < a.keys; ++j) score<N, 1, kOne>(a, j, greatest);
  // Of a query that sees no key the result is zero, as torch has it.
  for (int n = 0; n < N; ++n) greatest[n] = greatest[n] == kLeast ? Lane{} : greatest[n];
  for (j = 0; j < a.keys; ++j) {
    Group<N, Lane> g;
    FXPRUNE_UNROLL
    for (int n = 0; n < N; ++n) g.part[n] = load<Lane>(a.scores + (j * N + n) * kLanes) - greatest[n];
    g = exponential(g);
    FXPRUNE_UNROLL
    for (int n = 0; n < N; ++n) {
      total[n] += g.part[n];
      store(a.scores + (j * N + n) * kLanes, g.part[n]);
    }
  }
  for (int n = 0; n < N; ++n) total[n] = total[n] == 0.0f ? Lane{} : 1.0f / total[n];
  int64_t d = 0;
  for (; d + kMany <= a.v_size; d += kMany) weigh<N, kMany, kOne>(a, d, total, out, stride);
  for (; d + 2 <= a.v_size; d += 2) weigh<N, 2, kOne>(a, d, total, out, stride);
  for (; d < a.v_size; ++d) weigh<N, 1, kOne>(a, d, total, out, stride);
}

// softmax(scale * q k^T + mask) v, head by head. Heads are `size` channels of the queries and the keys and `v_size` of
// the values, one after another from the first channels on that each is said to begin at.
struct Attention : Step {
  int64_t q, k, v, value;
  int64_t first_q, first_k, first_v, heads, size, v_size;
  int64_t mask;  // which input, [n or 1, heads or 1, queries or 1, keys or 1]; -1 for none
  bool causal;
  bool rounds;  // products may be of bfloat16 numbers
  float scale;
  std::array<int64_t, 4> mask_steps = {};  // floats from image to image, head to head, query to query, key to key
  std::vector<Token> k_tokens, v_tokens;
  std::vector<Lanes> lanes;
  std::vector<int32_t> number, mask_at;
  int64_t tiles = 0;
  bool one = true;
  bool by_tiles = false;
  std::vector<int32_t> k_at, v_at, keys;  // by vectors of keys, and their lanes

  // The tokens of a map of one row.
  std::vector<Token> tokens_of(const Map& map, const Map& queries) {
    const Grid &g = map.grid, &to = queries.grid;
    std::vector<Token> result;
    for (int64_t t = 0; t < map.width; ++t) {
      const int64_t ix = t / g.bw;
      const int32_t at = map.place_at(0, t % g.bw);
      if (one) {
        result.push_back({at, static_cast<int32_t>(ix)});
        continue;
      }
      Lanes each;
      for (int64_t l = 0; l < kLanes; ++l) {
        const int64_t image = l / (to.ly * to.lx);
        each.from[l] = image < to.nb ? image * g.ly * g.lx + ix : -1;
      }
      const auto found = std::find(lanes.begin(), lanes.end(), each);
      result.push_back({at, static_cast<int32_t>(found - lanes.begin())});
      if (found == lanes.end()) lanes.push_back(each);
    }
    return result;
  }

  void prepare(Plan& plan) override {
    const Map& queries = plan.maps[q];
    one = queries.grid.nb == 1;
    tiles = queries.tiles();
    k_tokens = tokens_of(plan.maps[k], queries), v_tokens = tokens_of(plan.maps[v], queries);
    for (const int32_t pixel : pixels(queries)) {
      // Places without a query see all keys: what they make means nothing, but costs less than a nan.
      number.push_back(pixel < 0 ? INT32_MAX : pixel % queries.width);
      mask_at.push_back(pixel < 0 ? -1 : pixel / queries.width * mask_steps[0] + pixel % queries.width * mask_steps[2]);
    }
#ifdef FXPRUNE_AMX
    const Map &mk = plan.maps[k], &mv = plan.maps[v];
    by_tiles = rounds && one && mk.grid == mv.grid && mk.tile == mv.tile && may_use_tiles();
    if (!by_tiles) return;
    keys = pixels(mk);
    for (int64_t n = 0; n < mk.tiles() * mk.tile; ++n) {
      k_at.push_back(mk.tile_at(n / mk.tile) + n % mk.tile * kLanes);
      v_at.push_back(mv.tile_at(n / mv.tile) + n % mv.tile * kLanes);
    }
#endif
  }
  int64_t scratch() const override {
#ifdef FXPRUNE_AMX
    if (by_tiles) return tiled_head().scratch();
#endif
    return k_tokens.size() * 4 * kLanes;
  }
  int64_t tasks(int64_t threads) const override { return Share(heads * tiles, threads).tasks; }

  void run(const Plan& plan, const Frame& f, int64_t task, int64_t threads, float* scratch) const override {
    const Map& queries = plan.maps[q];
    const Share share(heads * tiles, threads);
#ifdef FXPRUNE_AMX
    if (by_tiles) {
      for (int64_t now = share.begin(task); now < share.end(task); ++now) run_tiled(plan, f, now / tiles, now % tiles, scratch);
      return;
    }
#endif
    for (int64_t now = share.begin(task); now < share.end(task); ++now)
      for (int64_t first = 0, many; first < queries.tile; first += many) {
        const int64_t left = queries.tile - first;
        many = left >= 4 ? 4 : left;
        run_group(plan, f, now / tiles, now % tiles, first, many, scratch);
      }
  }

#ifdef FXPRUNE_AMX
  TiledHead tiled_head() const {
    TiledHead a = {};
    a.size = size, a.v_size = v_size;
    a.k_at = k_at.data(), a.v_at = v_at.data(), a.keys = keys.data(), a.vectors = k_at.size();
    a.scale = scale;
    return a;
  }

  void run_tiled(const Plan& plan, const Frame& f, int64_t head, int64_t tile, float* scratch) const {
    const Map &mq = plan.maps[q], &mk = plan.maps[k], &mv = plan.maps[v], &out = plan.maps[value];
    const int64_t place = tile * mq.tile * kLanes;
    TiledHead a = tiled_head();
    a.q = f.arena + mq.storage + mq.tile_at(tile) + (first_q + head * size) * mq.channel_stride();
    a.k = f.arena + mk.storage + (first_k + head * size) * mk.channel_stride();
    a.v = f.arena + mv.storage + (first_v + head * v_size) * mv.channel_stride();
    a.q_stride = mq.channel_stride(), a.k_stride = mk.channel_stride(), a.v_stride = mv.channel_stride();
    a.places = mq.tile;
    a.number = causal ? number.data() + place : nullptr;
    if (mask >= 0) {
      const auto [image, mask_head, query, key] = mask_steps;
      a.mask = f.inputs[mask] + f.image * image + head * mask_head;
      a.mask_step = key;
      a.mask_at = query ? mask_at.data() + place : nullptr;
    }
    a.run(scratch, f.arena + out.storage + out.tile_at(tile) + head * v_size * out.channel_stride(), out.channel_stride());
  }
#endif

  void run_group(const Plan& plan, const Frame& f, int64_t head, int64_t tile, int64_t first, int64_t many, float* scratch) const {
    const Map &mq = plan.maps[q], &mk = plan.maps[k], &mv = plan.maps[v], &out = plan.maps[value];
    const int64_t place = (tile * mq.tile + first) * kLanes;
    Queries a;
    a.q = f.arena + mq.storage + mq.tile_at(tile) + (first_q + head * size) * mq.channel_stride() + first * kLanes;
    // Of keys and values the tokens say the tile.
    a.k = f.arena + mk.storage + (first_k + head * size) * mk.channel_stride();
    a.v = f.arena + mv.storage + (first_v + head * v_size) * mv.channel_stride();
    a.q_stride = mq.channel_stride(), a.k_stride = mk.channel_stride(), a.v_stride = mv.channel_stride();
    a.size = size, a.v_size = v_size, a.keys = k_tokens.size();
    a.k_tokens = k_tokens.data(), a.v_tokens = v_tokens.data(), a.lanes = lanes.data();
    a.scale = scale, a.scores = scratch;
    a.number = causal ? number.data() + place : nullptr;
    a.mask = nullptr, a.mask_at = nullptr;
    int32_t asked[4 * kLanes];
    if (mask >= 0) {
      const auto [image, mask_head, query, key] = mask_steps;
      a.mask = f.inputs[mask] + f.image * image + head * mask_head;
      a.mask_step = key;
      if (query || (image && !one)) {
        // Of images that are not there the mask is not, either.
        for (int64_t l = 0; l < many * kLanes; ++l)
          asked[l] = one || !image || mask_at[place + l] < f.images * image ? mask_at[place + l] : -1;
        a.mask_at = asked;
      }
    }
    float* const y = f.arena + out.storage + out.tile_at(tile) + head * v_size * out.channel_stride() + first * kLanes;
    switch (many) {
      case 1: return one ? attend<1, true>(a, y, out.channel_stride()) : attend<1, false>(a, y, out.channel_stride());
      case 2: return one ? attend<2, true>(a, y, out.channel_stride()) : attend<2, false>(a, y, out.channel_stride());
      case 3: return one ? attend<3, true>(a, y, out.channel_stride()) : attend<3, false>(a, y, out.channel_stride());
      default: return one ? attend<4, true>(a, y, out.channel_stride()) : attend<4, false>(a, y, out.channel_stride());
    }
  }
};

}  // namespace fxprune
