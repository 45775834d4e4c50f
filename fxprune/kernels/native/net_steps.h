// The steps of a net: what each does for a task, on maps that the planner has placed.
#pragma once

#include <numeric>

#include "depthwise.h"
#include "net.h"

namespace fxprune {

// Bytes of sums that wait in L2 between K-blocks.
constexpr int64_t kSumBytes = 256 << 10;
// Rows that a task has at least where threads share them: a block of activations comes from further away for each task.
constexpr int64_t kRowsPerTask = 192;

// An input becomes a map; one image stands for all.
struct Enter : TileStep {
  int64_t input;
  InputSize from;
  std::vector<int32_t> index;

  void prepare(Plan& plan) override {
    TileStep::prepare(plan);
    const Map& map = plan.maps[value];
    index = pixels(map);
    const int64_t plane = from.height * from.width;
    if (from.images == 1)
      for (int32_t& i : index) i = i < 0 ? i : i % plane;
    if (from.channels_last) {
      for (int32_t& i : index) i = i < 0 ? i : i * from.channels;
    } else {
      for (int32_t& i : index) i = i < 0 ? i : i / plane * plane * from.channels + i % plane;
    }
  }
  void add_reads(const Plan&, int64_t, std::vector<Row>&) const override {}
  void make(const Plan& plan, const Frame& f, int64_t t, Part part, float*) const override {
    const Map& map = plan.maps[value];
    const int64_t channel = from.channels_last ? 1 : from.height * from.width, begin = part.begin(map.channels);
    const int64_t image = from.channels * from.height * from.width;
    const float* x = f.inputs[input] + (from.images == 1 ? 0 : f.image * image);
    const int64_t absent = f.images < plan.nb && from.images > 1 ? f.images * image : INT32_MAX;
    float* out = f.arena + map.storage + map.tile_at(t) + begin * map.channel_stride();
    for (int64_t c = begin; c < part.end(map.channels); ++c)
      for (int64_t v = 0; v < map.tile; ++v, out += kLanes) {
        const int32_t* from_here = index.data() + (t * map.tile + v) * kLanes;
        if (absent == INT32_MAX) {
          store(out, gathered(x + c * channel, from_here, 0.0f));
        } else {
          for (int64_t l = 0; l < kLanes; ++l)
            out[l] = from_here[l] >= 0 && from_here[l] < absent ? x[c * channel + from_here[l]] : 0.0f;
        }
      }
  }
};

// A map with other sub-blocks, or another width of tiles; of each `sh` rows and `sw` columns the first, and each row
// `again_h` times and each column `again_w` times. Where it shuffles, these times are by turns of different channels.
struct Relay : TileStep {
  int64_t from, channels, sh = 1, sw = 1, again_h = 1, again_w = 1;
  bool shuffles = false;
  std::vector<int32_t> index;

  void prepare(Plan& plan) override {
    TileStep::prepare(plan);
    const std::vector<int32_t> source = floats_of(plan.maps[from]);
    const Map &a = plan.maps[from], &b = plan.maps[value];
    index = pixels(b);
    for (int32_t& i : index) {
      if (i < 0) continue;
      const int64_t n = i / (b.height * b.width), y = i / b.width % b.height, x = i % b.width;
      const int64_t channel = shuffles ? y % again_h * again_w + x % again_w : 0;
      i = source[(n * a.height + y * sh / again_h) * a.width + x * sw / again_w] + channel * a.channel_stride();
    }
  }
  void add_reads(const Plan& plan, int64_t y, std::vector<Row>& rows) const override {
    const Map &a = plan.maps[from], &b = plan.maps[value];
    for (int64_t row = y; row < b.height; row += b.grid.bh) rows.push_back({from, row * sh / again_h % a.grid.bh});
  }
  void make(const Plan& plan, const Frame& f, int64_t t, Part part, float*) const override {
    const Map &a = plan.maps[from], &b = plan.maps[value];
    const float* x = f.arena + a.storage;
    float* out = f.arena + b.storage + b.tile_at(t);
    const int32_t* const places = index.data() + t * b.tile * kLanes;
    const int64_t stride = (shuffles ? again_h * again_w : 1) * a.channel_stride();
    for (int64_t c = part.begin(channels); c < part.end(channels); ++c)
      for (int64_t v = 0; v < b.tile; ++v)
        store(out + c * b.channel_stride() + v * kLanes, gathered(x + c * stride, places + v * kLanes, 0.0f));
  }
};

struct Conv : TileStep {
  int64_t x, residual;
  int64_t rows, channels, row_block, k_block;  // a K-block has k_block channels
  int64_t first_value, values, first_segment, first_start, bias;
  Taps taps;
  Finish finish;
  // From the maps.
  bool direct = false;
  int64_t tile = 0, places = 0;
  std::vector<Window> reads;
  RowKernels kernels;

  void check(const Weights& w) const override {
    const int64_t blocks = row_blocks() * k_blocks();
    require_net(first_start + blocks < w.start_count, "a weight's blocks are not there");
    const int64_t* starts = w.starts + first_start;
    const bool rises = starts[0] == 0 && std::is_sorted(starts, starts + blocks + 1);
    require_net(rises && starts[blocks] == values && first_value + values <= w.value_count, "a weight's nonzeros are not there");
    require_net(first_segment + rows * k_blocks() <= w.segment_count, "a weight's segments are not there");
    require_net(bias < 0 || bias + rows <= w.dense_count, "a bias is not there");
  }
  std::pair<int64_t, int64_t> takes_over() const override {
    return {value, finish.apply && finish.adds_last ? -1 : residual};
  }
  int64_t weight_bytes() const override { return values * (sizeof(float) + sizeof(uint16_t)); }
  int64_t row_blocks() const { return ceil_div(rows, row_block); }
  int64_t k_blocks() const { return ceil_div(channels, k_block); }

  void prepare(Plan& plan) override {
    TileStep::prepare(plan);
    const Map &in = plan.maps[x], &out = plan.maps[value];
    tile = out.tile;
    direct = taps.is_pointwise() && in.tile == tile;
    places = taps.kh * static_cast<int64_t>(taps.columns(tile).size());
    if (!direct) reads = windows(in, out, taps, plan.lanes);
    kernels = row_kernels(tile);
  }
  // Blocks of rows whose sums wait together.
  int64_t together() const { return std::max<int64_t>(1, kSumBytes / (row_block * tile * kLanes * 4)); }
  int64_t scratch() const override {
    const int64_t sums = k_blocks() > 1 ? std::min(together(), row_blocks()) * row_block * tile * kLanes : 0;
    return sums + (direct ? 0 : k_block * places * kLanes);
  }
  // Where a step has few tiles its rows are shared as well.
  int64_t most_parts(int64_t threads) const override {
    // A block that is filled first is filled anew for each part.
    const int64_t wanted = direct ? row_blocks() : std::clamp(ceil_div(rows, kRowsPerTask), threads, threads * kTilesPerThread);
    // As many tasks for each thread as for the others.
    const int64_t even = threads / std::gcd(threads, tiles);
    return std::min(row_blocks(), ceil_div(wanted, even) * even);
  }
  void add_reads(const Plan& plan, int64_t y, std::vector<Row>& rows) const override {
    add_rows(plan.maps[x], x, taps, y, rows);
    if (residual >= 0) rows.push_back({residual, y});
  }
  void make(const Plan& plan, const Frame& f, int64_t t, Part part, float* scratch) const override {
    const int64_t high = part.end(row_blocks());
    for (int64_t block = part.begin(row_blocks()); block < high; block += together())
      make_rows(plan, f, t, block, std::min(high, block + together()), scratch);
  }
  void make_rows(const Plan& plan, const Frame& f, int64_t t, int64_t low, int64_t high, float* scratch) const {
    const Map &in = plan.maps[x], &out = plan.maps[value];
    const Weights& w = f.weights;
    const int64_t stride = in.channel_stride(), last = k_blocks() - 1;
    float* const block = scratch;
    float* const sums = scratch + (direct ? 0 : k_block * places * kLanes);
    const float* const from = f.arena + in.storage;
    float* const to = f.arena + out.storage + out.tile_at(t);
    const Map* const other = residual >= 0 ? &plan.maps[residual] : nullptr;
    const float* const add = other ? f.arena + other->storage + other->tile_at(t) : nullptr;
    for (int64_t k = 0; k <= last; ++k) {
      const int64_t first = k * k_block, many = std::min(k_block, channels - first);
      const float* read = block;
      if (direct) {
        read = from + in.tile_at(t) + first * stride;
      } else {
        fill_block(reads[t], plan.lanes.data(), from + first * stride, stride, many, 0.0f, block);
      }
      // What another thread made lies in its cache.
      const bool asks = direct && f.shared && k < last;
      const int64_t next = std::min(k_block, channels - first - many) * stride / kLine;
      const int64_t lines = asks ? ceil_div(next, std::min(high * row_block, rows) - low * row_block) : 0;
      const MultiplyRows multiply = kernels.of[k == 0][k == last];
      for (int64_t b = low; b < high; ++b) {
        const int64_t row = b * row_block, here = std::min(row_block, rows - row);
        const int64_t start = first_value + w.starts[first_start + b * (last + 1) + k];
        const int64_t segment = first_segment + row * (last + 1) + k * here;
        const Segments s = {w.values + start, w.columns + start, w.order + segment, w.counts + segment, here};
        const Rows e = {
            bias >= 0 ? w.dense + bias + row : nullptr,
            sums + (row - low * row_block) * tile * kLanes,
            to + row * out.channel_stride(),
            add ? add + row * out.channel_stride() : nullptr,
            out.channel_stride(),
            out.channel_stride(),
            finish,
            asks ? read + many * stride + (row - low * row_block) * lines * kLine : nullptr,
            lines,
        };
        multiply(s, read, e);
      }
    }
  }
};

struct Depthwise : TileStep {
  int64_t x, residual, channels, weight, bias;
  Taps taps;
  Finish finish;
  std::vector<Window> reads;
  std::vector<uint16_t> offsets;
  RowKernels kernels;
  DepthwiseTile depthwise_tile = nullptr;  // for the usual kernels; the others go through a block
  int64_t places = 0;

  void check(const Weights& w) const override {
    require_net(weight + channels * taps.kh * taps.kw <= w.dense_count, "a weight is not there");
    require_net(bias < 0 || bias + channels <= w.dense_count, "a bias is not there");
  }
  void prepare(Plan& plan) override {
    TileStep::prepare(plan);
    const Map &in = plan.maps[x], &out = plan.maps[value];
    reads = windows(in, out, taps, plan.lanes);
    places = reads[0].entries.size();
    for (const int64_t offset : taps.offsets(out.tile)) offsets.push_back(offset);
    kernels = row_kernels(out.tile);
    const bool square = taps.kh == taps.kw && taps.sh == taps.sw && taps.dh == 1 && taps.dw == 1;
    if (square) depthwise_tile = depthwise_tile_for(out.tile, taps.kh, taps.sh);
  }
  int64_t scratch() const override { return places * kLanes; }
  void add_reads(const Plan& plan, int64_t y, std::vector<Row>& rows) const override {
    add_rows(plan.maps[x], x, taps, y, rows);
    if (residual >= 0) rows.push_back({residual, y});
  }
  void make(const Plan& plan, const Frame& f, int64_t t, Part part, float* scratch) const override {
    const Map &in = plan.maps[x], &out = plan.maps[value];
    const Map* const other = residual >= 0 ? &plan.maps[residual] : nullptr;
    const int64_t stride = in.channel_stride(), step = out.channel_stride();
    const int16_t row = 0, count = taps.kh * taps.kw;
    const float* const from = f.arena + in.storage;
    const float* const add = other ? f.arena + other->storage + other->tile_at(t) : nullptr;
    float* const to = f.arena + out.storage + out.tile_at(t);
    if (depthwise_tile) {
      const int64_t first = part.begin(channels);
      const Rows rows = {bias >= 0 ? f.weights.dense + bias + first : nullptr, nullptr, to + first * step,
                         add ? add + first * step : nullptr, step, step, finish};
      depthwise_tile(reads[t], plan.lanes.data(), from + first * stride, stride, part.end(channels) - first,
                     f.weights.dense + weight + first * count, rows);
      return;
    }
    for (int64_t c = part.begin(channels); c < part.end(channels); ++c) {
      fill_block(reads[t], plan.lanes.data(), from + c * stride, stride, 1, 0.0f, scratch);
      const Segments s = {f.weights.dense + weight + c * count, offsets.data(), &row, &count, 1};
      const float* const b = bias >= 0 ? f.weights.dense + bias + c : nullptr;
      kernels.of[1][1](s, scratch, {b, nullptr, to + c * step, add ? add + c * step : nullptr, step, step, finish});
    }
  }
};

struct Pooling : TileStep {
  Pool kind;
  int64_t x, channels;
  Taps taps;
  std::vector<Window> reads;
  std::vector<int64_t> offsets;
  std::vector<float> shares;  // by tile, place and lane
  int64_t places = 0;

  void prepare(Plan& plan) override {
    TileStep::prepare(plan);
    const Map &in = plan.maps[x], &out = plan.maps[value];
    reads = windows(in, out, taps, plan.lanes);
    places = reads[0].entries.size();
    offsets = taps.offsets(out.tile);
    if (kind == Pool::kMax) return;
    for (const int32_t pixel : pixels(out)) {
      float count = taps.kh * taps.kw;
      if (kind == Pool::kMeanInside && pixel >= 0) {
        const int64_t y = pixel / out.width % out.height * taps.sh - taps.ph, z = pixel % out.width * taps.sw - taps.pw;
        count = 0;
        for (int64_t a = 0; a < taps.kh; ++a)
          for (int64_t b = 0; b < taps.kw; ++b)
            count += y + a >= 0 && y + a < in.height && z + b >= 0 && z + b < in.width;
      }
      shares.push_back(1.0f / count);
    }
  }
  int64_t scratch() const override { return places * kLanes; }
  void add_reads(const Plan& plan, int64_t y, std::vector<Row>& rows) const override {
    add_rows(plan.maps[x], x, taps, y, rows);
  }
  void make(const Plan& plan, const Frame& f, int64_t t, Part part, float* scratch) const override {
    const Map &in = plan.maps[x], &out = plan.maps[value];
    const int64_t stride = in.channel_stride();
    const float filling = kind == Pool::kMax ? -std::numeric_limits<float>::infinity() : 0.0f;
    const float* const from = f.arena + in.storage;
    float* const to = f.arena + out.storage + out.tile_at(t);
    for (int64_t c = part.begin(channels); c < part.end(channels); ++c) {
      fill_block(reads[t], plan.lanes.data(), from + c * stride, stride, 1, filling, scratch);
      for (int64_t v = 0; v < out.tile; ++v) {
        Lane best = load<Lane>(scratch + (offsets[0] + v) * kLanes);
        for (size_t k = 1; k < offsets.size(); ++k) {
          const Lane next = load<Lane>(scratch + (offsets[k] + v) * kLanes);
          if (kind == Pool::kMax) {
            // As torch has it, nan is the greatest.
            best = (next > best) | (next != next) ? next : best;
          } else {
            best += next;
          }
        }
        if (kind != Pool::kMax) best *= load<Lane>(shares.data() + (t * out.tile + v) * kLanes);
        store(to + c * out.channel_stride() + v * kLanes, best);
      }
    }
  }
};

inline void finish_floats(float* y, int64_t floats, const Finish& finish) {
  if (finish.clamps) {
    for (int64_t n = 0; n < floats; n += kLanes) {
      Lane v = load<Lane>(y + n);
      v = v < finish.low ? Lane{} + finish.low : v;
      store(y + n, v > finish.high ? Lane{} + finish.high : v);
    }
  }
  if (finish.apply) finish.apply(y, floats);
}

// Addition, multiplication, an activation alone, and a copy: place by place.
struct Pointwise : TileStep {
  Op op;
  int64_t x, other;
  Finish finish;
  bool spreads = false;  // `other` has one place, which all of its image's take
  Lanes image_of;

  std::pair<int64_t, int64_t> takes_over() const override { return {value, x}; }
  void prepare(Plan& plan) override {
    TileStep::prepare(plan);
    if (!spreads) return;
    const Grid& g = plan.maps[x].grid;
    for (int64_t l = 0; l < kLanes; ++l) image_of.from[l] = l / (g.ly * g.lx) < g.nb ? l / (g.ly * g.lx) : -1;
  }
  void add_reads(const Plan&, int64_t y, std::vector<Row>& rows) const override {
    rows.push_back({x, y});
    if (other >= 0) rows.push_back({other, spreads ? 0 : y});
  }
  void make(const Plan& plan, const Frame& f, int64_t t, Part part, float*) const override {
    const Map &a = plan.maps[x], &out = plan.maps[value];
    const Map* b = other >= 0 ? &plan.maps[other] : nullptr;
    const float* const p = f.arena + a.storage + a.tile_at(t);
    const float* const q = !b ? nullptr : f.arena + b->storage + b->tile_at(spreads ? 0 : t);
    float* const y = f.arena + out.storage + out.tile_at(t);
    const int64_t stride = a.channel_stride(), begin = part.begin(a.channels) * stride, end = part.end(a.channels) * stride;
    for (int64_t n = begin; n < end; n += kLanes) {
      Lane v = load<Lane>(p + n);
      if (spreads) {
        const Lane one = permuted(load<Lane>(q + n / stride * b->channel_stride()), image_of, 0.0f);
        v = op == Op::kMultiply ? v * one : v + one;
      } else if (q) {
        v = op == Op::kMultiply ? v * load<Lane>(q + n) : v + load<Lane>(q + n);
      }
      store(y + n, v);
    }
    finish_floats(y + begin, end - begin, finish);
  }
};

// The mean of each channel of each image, as a map of one place whose lanes are images.
struct Mean : Step {
  int64_t x, value, channels;
  std::vector<int32_t> index;

  void prepare(Plan& plan) override { index = pixels(plan.maps[x]); }
  int64_t tasks(int64_t threads) const override { return Share(channels, threads).tasks; }
  void run(const Plan& plan, const Frame& f, int64_t task, int64_t threads, float*) const override {
    const Map &in = plan.maps[x], &out = plan.maps[value];
    const Share share(channels, threads);
    const int64_t group = in.grid.ly * in.grid.lx;
    for (int64_t c = share.begin(task); c < share.end(task); ++c) {
      Lane sum = {};
      for (int64_t t = 0; t < in.tiles(); ++t) {
        const float* p = f.arena + in.storage + in.tile_at(t) + c * in.channel_stride();
        for (int64_t v = 0; v < in.tile; ++v) {
          const LaneIndex at = load<LaneIndex>(reinterpret_cast<const float*>(index.data() + (t * in.tile + v) * kLanes));
          const Lane here = load<Lane>(p + v * kLanes);
          sum += at < 0 ? Lane{} : here;
        }
      }
      float* y = f.arena + out.storage + out.tile_at(0) + c * out.channel_stride();
      for (int64_t n = 0; n < in.grid.nb; ++n) {
        float all = 0;
        for (int64_t l = 0; l < group; ++l) all += sum[n * group + l];
        y[n] = all / static_cast<float>(in.height * in.width);
      }
    }
  }
};

struct Exit : Step {
  int64_t x, output;
  Plan::Output as;
  std::vector<int32_t> index;

  void prepare(Plan& plan) override { index = floats_of(plan.maps[x]); }
  int64_t tasks(int64_t threads) const override { return Share(as.channels, threads).tasks; }
  void run(const Plan& plan, const Frame& f, int64_t task, int64_t threads, float*) const override {
    const Map& in = plan.maps[x];
    const Share share(as.channels, threads);
    const int64_t plane = as.height * as.width, begin = share.begin(task), end = share.end(task);
    const float* from = f.arena + in.storage;
    float* to = f.outputs[output] + f.image * as.channels * plane;
    for (int64_t n = 0; n < f.images; ++n, to += as.channels * plane) {
      const int32_t* at = index.data() + n * plane;
      if (as.form != Form::kChannelsFirst) {
        for (int64_t p = 0; p < plane; ++p)
          for (int64_t c = begin; c < end; ++c) to[p * as.channels + c] = from[at[p] + c * in.channel_stride()];
      } else {
        for (int64_t c = begin; c < end; ++c)
          for (int64_t p = 0; p < plane; ++p) to[c * plane + p] = from[at[p] + c * in.channel_stride()];
      }
    }
  }
};

}  // namespace fxprune
