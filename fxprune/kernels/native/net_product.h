// A linear, or a convolution of one tap, in bfloat16 by AMX tiles: places stand in the lanes, so that 16 places are the
// columns of a tile of activations, 16 rows of the weight those of a tile of weights, and sums come out as a map.
//
// A panel is 32 rows of the weight, a block 32 columns of a panel, stored as two tiles of 16 rows. A line is one row of
// a tile: 32 bits, and a value for each bit that is set. A panel's blocks follow one another; the values of its first
// tiles stand before those of its second ones. (A panel of tiles.h has other lines, for there tokens are rows.)
#pragma once

#include "net.h"
#include "tiles.h"

namespace fxprune {

// To the nearest bfloat16, ties to even; nan stays nan.
FXPRUNE_INLINE Lane rounded(Lane v) {
  const LaneIndex bits = reinterpret_cast<LaneIndex>(v);
  const LaneIndex up = bits + ((bits >> 16) & 1) + 0x7fff;
  return v == v ? reinterpret_cast<Lane>(up & static_cast<int32_t>(0xffff0000)) : v;
}

template <int V>
FXPRUNE_OUTLINE void finish_rows(const float* sums, int64_t rows, const Rows& e) {
  for (int64_t r = 0; r < rows; ++r, sums += V * kLanes) {
    Lane sum[V];
    FXPRUNE_UNROLL
    for (int v = 0; v < V; ++v) sum[v] = load<Lane>(sums + v * kLanes) + (e.bias ? e.bias[r] : 0.0f);
    finish_row<V>(sum, e, r);
  }
}

using FinishRows = void (*)(const float*, int64_t, const Rows&);

inline FinishRows finish_rows_for(int64_t tile) {
  switch (tile) {
    case 1: return finish_rows<1>;
    case 2: return finish_rows<2>;
    case 4: return finish_rows<4>;
    case 7: return finish_rows<7>;
    default: return finish_rows<8>;
  }
}

// Rows of a panel, and columns of a block.
constexpr int64_t kPanelRows = 32, kBlockColumns = 32;

#ifdef FXPRUNE_AMX

// Blocks that are expanded at a time: two such buffers fill L1.
constexpr int64_t kBlocksAtOnce = 12;

// sums (+)= a chunk of a panel times one place or two of the activations; meanwhile `Lines` lines of the next chunk are
// expanded with each block. Activations are loaded past L1, for there the expanded weights must stay.
template <bool Two, int Lines>
FXPRUNE_OUTLINE void multiply_places(
    const uint16_t* w, const uint16_t* x, int64_t blocks, int64_t x_step, float* sums, int64_t places, bool accumulate,
    Expander& rest) {
  Expander next = rest;
  const int64_t bytes = places * kLanes * sizeof(float);
  float* const low = sums + kLines * places * kLanes;
  settle();
  if (accumulate) {
    _tile_loadd(0, sums, bytes);
    _tile_loadd(1, low, bytes);
    if constexpr (Two) _tile_loadd(2, sums + kLanes, bytes);
    if constexpr (Two) _tile_loadd(3, low + kLanes, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (Two) _tile_zero(2);
    if constexpr (Two) _tile_zero(3);
  }
  for (int64_t b = 0; b < blocks; ++b, w += 2 * kTile, x += x_step) {
    _tile_stream_loadd(4, x, 64);
    _tile_loadd(6, w, 64);
    _tile_loadd(7, w + kTile, 64);
    if constexpr (Two) _tile_stream_loadd(5, x + kTile, 64);
    _tile_dpbf16ps(0, 6, 4);
    _tile_dpbf16ps(1, 7, 4);
    if constexpr (Two) _tile_dpbf16ps(2, 6, 5);
    if constexpr (Two) _tile_dpbf16ps(3, 7, 5);
    next.advance<Lines>();
  }
  _tile_stored(0, sums, bytes);
  _tile_stored(1, low, bytes);
  if constexpr (Two) _tile_stored(2, sums + kLanes, bytes);
  if constexpr (Two) _tile_stored(3, low + kLanes, bytes);
  rest = next;
  settle();
}

#endif  // FXPRUNE_AMX

struct Product : TileStep {
  int64_t x, residual, rows, channels;
  int64_t first_value, values, first_word, first_start, bias;
  Finish finish;
  int64_t tile = 0;
  FinishRows finish_rows = nullptr;

  int64_t panels() const { return ceil_div(rows, kPanelRows); }
  int64_t blocks() const { return ceil_div(channels, kBlockColumns); }
  int64_t words() const { return blocks() * kBlockColumns; }  // of a panel

  void check(const Weights& w) const override {
    require_net(first_start + 2 * panels() < w.start_count, "a product's panels are not there");
    const int64_t* starts = w.starts + first_start;
    const bool rises = starts[0] == 0 && std::is_sorted(starts, starts + 2 * panels() + 1);
    require_net(rises && starts[2 * panels()] == values, "a product's values are not there");
    // Lines are read a vector at a time.
    require_net(first_value + values + kBlockColumns <= w.brain_count, "a product's values are not there");
    require_net(first_word + panels() * words() <= w.word_count, "a product's bits are not there");
    require_net(bias < 0 || bias + rows <= w.dense_count, "a bias is not there");
  }
  std::pair<int64_t, int64_t> takes_over() const override {
    return {value, finish.apply && finish.adds_last ? -1 : residual};
  }
  int64_t weight_bytes() const override { return values * sizeof(uint16_t) + panels() * words() * sizeof(uint32_t); }
  void prepare(Plan& plan) override {
    TileStep::prepare(plan);
    tile = plan.maps[value].tile;
    finish_rows = finish_rows_for(tile);
  }
  // Activations are rounded for each task anew.
  int64_t most_parts(int64_t threads) const override { return std::min(panels(), threads * 2); }
  void add_reads(const Plan&, int64_t y, std::vector<Row>& rows) const override {
    rows.push_back({x, y});
    if (residual >= 0) rows.push_back({residual, y});
  }
  int64_t sum_floats() const { return kPanelRows * tile * kLanes; }
  int64_t scratch() const override {
    int64_t buffers = 0;
#ifdef FXPRUNE_AMX
    buffers = 2 * kBlocksAtOnce * kTile;  // two of two tiles a block, two elements a float
#endif
    return sum_floats() + buffers + words() * tile * kLanes;
  }

  void make(const Plan& plan, const Frame& f, int64_t t, Part part, float* scratch) const override {
    const Map &in = plan.maps[x], &out = plan.maps[value];
    const Map* const other = residual >= 0 ? &plan.maps[residual] : nullptr;
    const float* const from = f.arena + in.storage + in.tile_at(t);
    float* const to = f.arena + out.storage + out.tile_at(t);
    const float* const add = other ? f.arena + other->storage + other->tile_at(t) : nullptr;
    const auto finish_panel = [&](int64_t panel, const float* sums) {
      const int64_t row = panel * kPanelRows, stride = out.channel_stride();
      const Rows e = {bias >= 0 ? f.weights.dense + bias + row : nullptr, nullptr, to + row * stride,
                      add ? add + row * stride : nullptr, stride, stride, finish};
      finish_rows(sums, std::min(kPanelRows, rows - row), e);
    };
    const int64_t begin = part.begin(panels()), end = part.end(panels());
#ifdef FXPRUNE_AMX
    if (may_use_tiles()) return by_tiles(f.weights, from, begin, end, scratch, finish_panel);
#endif
    plainly(f.weights, from, begin, end, scratch, finish_panel);
  }

  template <class FinishPanel>
  void plainly(const Weights& w, const float* from, int64_t begin, int64_t end, float* sums, const FinishPanel& finish_panel) const {
    float* const x = sums + sum_floats();
    const int64_t width = tile * kLanes;
    for (int64_t n = 0; n < channels * width; n += kLanes) store(x + n, rounded(load<Lane>(from + n)));
    for (int64_t panel = begin; panel < end; ++panel) {
      std::fill_n(sums, sum_floats(), 0.0f);
      for (int64_t half = 0; half < 2; ++half) {
        const uint16_t* value = w.brains + first_value + w.starts[first_start + 2 * panel + half];
        for (int64_t b = 0; b < blocks(); ++b)
          for (int64_t line = 0; line < kPanelRows / 2; ++line) {
            float* const sum = sums + (half * kPanelRows / 2 + line) * width;
            uint32_t bits = w.words[first_word + panel * words() + (2 * b + half) * kPanelRows / 2 + line];
            for (; bits; bits &= bits - 1) {
              const float by = std::bit_cast<float>(uint32_t{*value++} << 16);
              const float* const column = x + (b * kBlockColumns + std::countr_zero(bits)) * width;
              for (int64_t n = 0; n < width; n += kLanes) store(sum + n, load<Lane>(sum + n) + load<Lane>(column + n) * by);
            }
          }
      }
      finish_panel(panel, sums);
    }
  }

#ifdef FXPRUNE_AMX
  // The activations as tiles [block][place]: a row of a tile has two channels of 16 places.
  void fill_tiles(const float* from, uint16_t* to) const {
    const int64_t width = tile * kLanes;
    alignas(64) uint16_t order[32];
    for (int n = 0; n < 32; ++n) order[n] = n / 2 + n % 2 * 16;
    const __m512i pairs = _mm512_load_si512(order);
    for (int64_t c = 0; c < words(); c += 2)
      for (int64_t v = 0; v < tile; ++v) {
        const float* const at = from + c * width + v * kLanes;
        const __m512 a = c < channels ? _mm512_loadu_ps(at) : _mm512_setzero_ps();
        const __m512 b = c + 1 < channels ? _mm512_loadu_ps(at + width) : _mm512_setzero_ps();
        uint16_t* const row = to + (c / kBlockColumns * tile + v) * kTile + c % kBlockColumns * kLanes;
        _mm512_store_si512(row, _mm512_permutexvar_epi16(pairs, narrowed(a, b)));
      }
  }

  template <class FinishPanel>
  void by_tiles(const Weights& w, const float* from, int64_t begin, int64_t end, float* sums, const FinishPanel& finish_panel) const {
    uint16_t* const buffers = reinterpret_cast<uint16_t*>(sums + sum_floats());
    uint16_t* const activations = buffers + 4 * kBlocksAtOnce * kTile;
    fill_tiles(from, activations);
    const auto buffer = [&](int64_t turn) { return buffers + turn % 2 * 2 * kBlocksAtOnce * kTile; };
    const auto stream = [&](int64_t panel) {
      const int64_t* at = w.starts + first_start + 2 * panel;
      return Stream{w.words + first_word + panel * words(), {w.brains + first_value + at[0], w.brains + first_value + at[1]}};
    };
    const auto size = [&](int64_t block) { return std::min(kBlocksAtOnce, blocks() - block); };
    const Tiles shapes(kRows);
    const auto two = tile > 2 ? multiply_places<true, 4> : multiply_places<true, 16>;
    const auto one = tile > 2 ? multiply_places<false, 4> : multiply_places<false, 16>;
    Expander expander{stream(begin), buffer(0), size(0) * kLines};
    expander.finish();
    int64_t turn = 0;
    for (int64_t panel = begin; panel < end; ++panel)
      for (int64_t block = 0; block < blocks(); block += kBlocksAtOnce, ++turn) {
        const int64_t next = block + kBlocksAtOnce < blocks() ? block + kBlocksAtOnce : 0;
        const bool is_last = next == 0;
        if (is_last && panel + 1 < end) expander.stream = stream(panel + 1);
        expander.to = buffer(turn + 1), expander.line = 0;
        expander.left = is_last && panel + 1 == end ? 0 : size(next) * kLines;
        for (int64_t v = 0; v < tile; v += 2)
          (v + 1 < tile ? two : one)(
              buffer(turn), activations + (block * tile + v) * kTile, size(block), tile * kTile, sums + v * kLanes, tile,
              block > 0, expander);
        expander.finish();
        if (is_last) finish_panel(panel, sums);
      }
  }
#endif
};

}  // namespace fxprune
