// fxprune::conv_net for the CPU: a part of a graph of convolutions, computed on maps in lanes (maps.h, net.h).
#include "net.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <bit>
#include <cstdlib>

#include "crew.h"

namespace fxprune {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Bytes of sums that wait in L2 between K-blocks.
constexpr int64_t kSumBytes = 256 << 10;
// Tasks of a step for each thread, where there are that many: enough that none waits long for the last.
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kVersion = 1;
// What it costs to move a vector whose lanes lie apart, in vectors multiplied; and how often a plan is made better.
constexpr double kRelayWork = 30;
constexpr int kRounds = 4;

float float_of(int64_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits)); }

void (*apply_of(int64_t activation))(float*, int64_t) {
  switch (static_cast<Activation>(activation)) {
    case Activation::kNone:
    case Activation::kRelu: return nullptr;
    case Activation::kGelu: return apply_in_place<Activation::kGelu>;
    case Activation::kGeluTanh: return apply_in_place<Activation::kGeluTanh>;
    case Activation::kSilu: return apply_in_place<Activation::kSilu>;
    case Activation::kSigmoid: return apply_in_place<Activation::kSigmoid>;
    case Activation::kHardsigmoid: return apply_in_place<Activation::kHardsigmoid>;
    case Activation::kHardswish: return apply_in_place<Activation::kHardswish>;
  }
  throw std::runtime_error("conv_net: unknown activation");
}

// Channels or tiles, dealt out to tasks.
struct Share {
  int64_t size, tasks;

  Share(int64_t size, int64_t threads)
      : size(size), tasks(threads == 1 ? 1 : std::min(size, threads * kTasksPerThread)) {}
  int64_t begin(int64_t task) const { return size * task / tasks; }
  int64_t end(int64_t task) const { return size * (task + 1) / tasks; }
};

// The integers of a program, in order.
struct Reader {
  const std::vector<int64_t>& program;
  size_t at = 0;

  int64_t next() {
    require_net(at < program.size(), "the program ends too early");
    return program[at++];
  }
  int64_t size(int64_t least = 1, int64_t most = int64_t{1} << 31) {
    const int64_t value = next();
    require_net(value >= least && value <= most, "a number of the program is out of range");
    return value;
  }
  Taps taps() {
    constexpr int64_t kMost = INT16_MAX;
    Taps t;
    t.kh = size(1, kMost), t.kw = size(1, kMost), t.sh = size(1, kMost), t.sw = size(1, kMost);
    t.ph = size(0, kMost), t.ph_end = size(0, kMost), t.pw = size(0, kMost), t.pw_end = size(0, kMost);
    t.dh = size(1, kMost), t.dw = size(1, kMost);
    return t;
  }
  // An activation and its bounds.
  Finish finish() {
    Finish f;
    const int64_t activation = size(0, static_cast<int64_t>(Activation::kHardswish));
    f.clamps = activation == static_cast<int64_t>(Activation::kRelu);
    f.apply = apply_of(activation);
    f.low = float_of(next()), f.high = float_of(next());
    return f;
  }
};

struct Enter : Step {
  int64_t input, value;
  InputSize from;
  std::vector<int32_t> index;

  void prepare(Plan& plan) override {
    const Map& map = plan.maps[value];
    index = pixels(map);
    const int64_t plane = from.height * from.width;
    if (from.channels_last) {
      for (int32_t& i : index) i = i < 0 ? i : i * from.channels;
    } else {
      for (int32_t& i : index) i = i < 0 ? i : i / plane * plane * from.channels + i % plane;
    }
  }
  // Some rows of tiles, all channels: neighbours in the input are neighbours in time.
  int64_t tasks(int64_t threads) const override { return Share(tiles, threads).tasks; }
  void run(const Plan& plan, const Frame& f, int64_t task, int64_t threads, float*) const override {
    const Map& map = plan.maps[value];
    const int64_t channel = from.channels_last ? 1 : from.height * from.width;
    const float* x = f.inputs[input] + f.image * from.channels * from.height * from.width;
    const int64_t absent = f.images < plan.nb ? f.images * from.channels * from.height * from.width : INT32_MAX;
    const Share share(tiles, threads);
    for (int64_t t = share.begin(task); t < share.end(task); ++t) {
      float* out = f.arena + map.storage + map.tile_at(t);
      for (int64_t c = 0; c < map.channels; ++c)
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
  }
  int64_t tiles;
};

// A map with other sub-blocks, or another width of tiles; of each `sh` rows and `sw` columns the first, and each row
// `again_h` times and each column `again_w` times.
struct Relay : Step {
  int64_t from, to, sh = 1, sw = 1, again_h = 1, again_w = 1;
  std::vector<int32_t> index;

  void prepare(Plan& plan) override {
    const std::vector<int32_t> source = floats_of(plan.maps[from]);
    const Map &a = plan.maps[from], &b = plan.maps[to];
    index = pixels(b);
    for (int32_t& i : index) {
      if (i < 0) continue;
      const int64_t n = i / (b.height * b.width), y = i / b.width % b.height, x = i % b.width;
      i = source[(n * a.height + y * sh / again_h) * a.width + x * sw / again_w];
    }
  }
  int64_t channels;
  int64_t tasks(int64_t threads) const override { return Share(channels, threads).tasks; }
  void run(const Plan& plan, const Frame& f, int64_t task, int64_t threads, float*) const override {
    const Map &a = plan.maps[from], &b = plan.maps[to];
    const Share share(channels, threads);
    for (int64_t c = share.begin(task); c < share.end(task); ++c) {
      const float* x = f.arena + a.storage + c * a.channel_stride();
      for (int64_t t = 0; t < b.tiles(); ++t) {
        float* out = f.arena + b.storage + b.tile_at(t) + c * b.channel_stride();
        for (int64_t v = 0; v < b.tile; ++v)
          store(out + v * kLanes, gathered(x, index.data() + (t * b.tile + v) * kLanes, 0.0f));
      }
    }
  }
};

struct Conv : Step {
  int64_t x, residual, value;
  int64_t rows, channels, row_block, k_block;  // a K-block has k_block channels
  int64_t first_value, first_segment, first_start, bias;
  Taps taps;
  Finish finish;
  // From the maps.
  bool direct = false;
  int64_t tiles = 0, tile = 0, places = 0;
  std::vector<Window> reads;
  RowKernels kernels;

  void check(const Weights& w) const override {
    const int64_t blocks = row_blocks() * k_blocks();
    require_net(first_start + blocks < w.start_count, "a weight's blocks are not there");
    const int64_t* starts = w.starts + first_start;
    const bool rises = starts[0] == 0 && std::is_sorted(starts, starts + blocks + 1);
    require_net(rises && first_value + starts[blocks] <= w.value_count, "a weight's nonzeros are not there");
    require_net(first_segment + rows * k_blocks() <= w.segment_count, "a weight's segments are not there");
    require_net(bias < 0 || bias + rows <= w.dense_count, "a bias is not there");
  }
  std::pair<int64_t, int64_t> takes_over() const override {
    return {value, finish.apply && finish.adds_last ? -1 : residual};
  }
  int64_t row_blocks() const { return ceil_div(rows, row_block); }
  int64_t k_blocks() const { return ceil_div(channels, k_block); }

  void prepare(Plan& plan) override {
    const Map &in = plan.maps[x], &out = plan.maps[value];
    tile = out.tile, tiles = out.tiles();
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
  int64_t parts(int64_t threads) const {
    return threads == 1 || tiles >= threads * kTasksPerThread ? 1 : std::min(row_blocks(), threads * kTasksPerThread);
  }
  int64_t tasks(int64_t threads) const override { return Share(tiles, threads).tasks * parts(threads); }
  void run(const Plan& plan, const Frame& f, int64_t task, int64_t threads, float* scratch) const override {
    const int64_t n = parts(threads), part = task % n;
    const Share share(tiles, threads);
    const int64_t low = row_blocks() * part / n, high = row_blocks() * (part + 1) / n;
    for (int64_t t = share.begin(task / n); t < share.end(task / n); ++t)
      for (int64_t block = low; block < high; block += together())
        run_tile(plan, f, t, block, std::min(high, block + together()), scratch);
  }
  void run_tile(const Plan& plan, const Frame& f, int64_t t, int64_t low, int64_t high, float* scratch) const {
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
        };
        multiply(s, read, e);
      }
    }
  }
};

struct Depthwise : Step {
  int64_t x, residual, value, channels, weight, bias;
  Taps taps;
  Finish finish;
  std::vector<Window> reads;
  std::vector<uint16_t> offsets;
  RowKernels kernels;
  int64_t tiles = 0, places = 0;

  void check(const Weights& w) const override {
    require_net(weight + channels * taps.kh * taps.kw <= w.dense_count, "a weight is not there");
    require_net(bias < 0 || bias + channels <= w.dense_count, "a bias is not there");
  }
  void prepare(Plan& plan) override {
    const Map &in = plan.maps[x], &out = plan.maps[value];
    tiles = out.tiles();
    reads = windows(in, out, taps, plan.lanes);
    places = reads[0].entries.size();
    for (const int64_t offset : taps.offsets(out.tile)) offsets.push_back(offset);
    kernels = row_kernels(out.tile);
  }
  int64_t scratch() const override { return places * kLanes; }
  int64_t parts(int64_t threads) const { return threads == 1 || tiles >= threads * kTasksPerThread ? 1 : threads * 2; }
  int64_t tasks(int64_t threads) const override { return Share(tiles, threads).tasks * parts(threads); }
  void run(const Plan& plan, const Frame& f, int64_t task, int64_t threads, float* scratch) const override {
    const Map &in = plan.maps[x], &out = plan.maps[value];
    const Share share(tiles, threads);
    const int64_t n = parts(threads), part = task % n, stride = in.channel_stride(), step = out.channel_stride();
    const int16_t row = 0, count = taps.kh * taps.kw;
    const Map* const other = residual >= 0 ? &plan.maps[residual] : nullptr;
    for (int64_t t = share.begin(task / n); t < share.end(task / n); ++t)
      for (int64_t c = channels * part / n; c < channels * (part + 1) / n; ++c) {
        fill_block(reads[t], plan.lanes.data(), f.arena + in.storage + c * stride, stride, 1, 0.0f, scratch);
        const Segments s = {f.weights.dense + weight + c * count, offsets.data(), &row, &count, 1};
        const float* add = other ? f.arena + other->storage + other->tile_at(t) + c * step : nullptr;
        float* y = f.arena + out.storage + out.tile_at(t) + c * step;
        const float* b = bias >= 0 ? f.weights.dense + bias + c : nullptr;
        kernels.of[1][1](s, scratch, {b, nullptr, y, add, step, step, finish});
      }
  }
};

struct Pooling : Step {
  Pool kind;
  int64_t x, value, channels;
  Taps taps;
  std::vector<Window> reads;
  std::vector<int64_t> offsets;
  std::vector<float> shares;  // by tile, place and lane
  int64_t tiles = 0, places = 0;

  void prepare(Plan& plan) override {
    const Map &in = plan.maps[x], &out = plan.maps[value];
    tiles = out.tiles();
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
  int64_t parts(int64_t threads) const { return threads == 1 || tiles >= threads * kTasksPerThread ? 1 : threads * 2; }
  int64_t tasks(int64_t threads) const override { return Share(tiles, threads).tasks * parts(threads); }
  void run(const Plan& plan, const Frame& f, int64_t task, int64_t threads, float* scratch) const override {
    const Map &in = plan.maps[x], &out = plan.maps[value];
    const Share share(tiles, threads);
    const int64_t n = parts(threads), part = task % n, stride = in.channel_stride(), step = out.channel_stride();
    const float filling = kind == Pool::kMax ? -std::numeric_limits<float>::infinity() : 0.0f;
    for (int64_t t = share.begin(task / n); t < share.end(task / n); ++t)
      for (int64_t c = channels * part / n; c < channels * (part + 1) / n; ++c) {
        fill_block(reads[t], plan.lanes.data(), f.arena + in.storage + c * stride, stride, 1, filling, scratch);
        float* y = f.arena + out.storage + out.tile_at(t) + c * step;
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
          store(y + v * kLanes, best);
        }
      }
  }
};

void finish_floats(float* y, int64_t floats, const Finish& finish) {
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
struct Pointwise : Step {
  Op op;
  int64_t x, other, value;
  Finish finish;
  std::pair<int64_t, int64_t> takes_over() const override { return {value, x}; }
  bool spreads = false;  // `other` has one place, which all of its image's take
  Lanes image_of;
  int64_t tiles = 0;

  void prepare(Plan& plan) override {
    tiles = plan.maps[x].tiles();
    if (!spreads) return;
    const Grid& g = plan.maps[x].grid;
    for (int64_t l = 0; l < kLanes; ++l) image_of.from[l] = l / (g.ly * g.lx) < g.nb ? l / (g.ly * g.lx) : -1;
  }
  int64_t tasks(int64_t threads) const override { return Share(tiles, threads).tasks; }
  void run(const Plan& plan, const Frame& f, int64_t task, int64_t threads, float*) const override {
    const Map &a = plan.maps[x], &out = plan.maps[value];
    const Map* b = other >= 0 ? &plan.maps[other] : nullptr;
    const Share share(tiles, threads);
    const int64_t floats = a.channels * a.channel_stride();
    for (int64_t t = share.begin(task); t < share.end(task); ++t) {
      const float* p = f.arena + a.storage + a.tile_at(t);
      const float* q = !b ? nullptr : f.arena + b->storage + b->tile_at(spreads ? 0 : t);
      float* y = f.arena + out.storage + out.tile_at(t);
      for (int64_t n = 0; n < floats; n += kLanes) {
        Lane v = load<Lane>(p + n);
        if (spreads) {
          const Lane one = permuted(load<Lane>(q + n / a.channel_stride() * b->channel_stride()), image_of, 0.0f);
          v = op == Op::kMultiply ? v * one : v + one;
        } else if (q) {
          v = op == Op::kMultiply ? v * load<Lane>(q + n) : v + load<Lane>(q + n);
        }
        store(y + n, v);
      }
      finish_floats(y, floats, finish);
    }
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
      if (as.channels_last) {
        for (int64_t p = 0; p < plane; ++p)
          for (int64_t c = begin; c < end; ++c) to[p * as.channels + c] = from[at[p] + c * in.channel_stride()];
      } else {
        for (int64_t c = begin; c < end; ++c)
          for (int64_t p = 0; p < plane; ++p) to[c * plane + p] = from[at[p] + c * in.channel_stride()];
      }
    }
  }
};

// Makes the plan of a program for given sizes.
struct Planner {
  Plan plan;
  const std::vector<InputSize>& inputs;
  struct Storage {
    int64_t floats, first, last, at;
  };
  std::vector<Storage> storages;
  std::vector<int64_t> value_map;  // the map of each value; -1 for an output
  std::vector<std::pair<int64_t, int64_t>> reads;  // (step, map)
  // The grid in which each value was wanted elsewhere, and what another planner found so.
  std::map<int64_t, Grid> wanted;
  const std::map<int64_t, Grid>& wishes;

  Planner(const std::vector<InputSize>& inputs, int64_t images, int64_t nb, const std::map<int64_t, Grid>& wishes)
      : inputs(inputs), wishes(wishes) {
    plan.images = images, plan.nb = nb;
  }

  // The grid for the map of the value that is made next.
  Grid grid_of(int64_t h, int64_t w, int64_t tile, int64_t sh, int64_t sw, int64_t least_h, int64_t least_w, const Grid* like) {
    const auto wish = wishes.find(value_map.size());
    const Grid grid = grid_for(plan.nb, h, w, tile, sh, sw, least_h, least_w, like);
    if (wish == wishes.end()) return grid;
    const Grid& g = wish->second;
    const bool covers = g.bh * g.ly * sh >= std::max(h * sh, least_h) && g.bw * g.lx * sw >= std::max(w * sw, least_w);
    return covers && computed(g, tile) * 10 <= computed(grid, tile) * 11 ? g : grid;
  }

  int64_t add_map(int64_t channels, int64_t h, int64_t w, int64_t tile, const Grid& grid) {
    require_net(h >= 1 && w >= 1, "a map is empty");
    Map map;
    map.channels = map.all_channels = channels, map.height = h, map.width = w, map.tile = tile, map.grid = grid;
    fits(map.floats());
    map.storage = storages.size();
    storages.push_back({0, -1, -1, 0});
    plan.maps.push_back(map);
    return plan.maps.size() - 1;
  }
  const Map& at(int64_t map) const { return plan.maps[map]; }

  // Places in a map and in an input are 32-bit numbers. More images at once than one are only tried.
  struct TooLarge {};
  void fits(int64_t floats) const {
    if (floats < INT32_MAX) return;
    require_net(plan.nb > 1, "a map is too large");
    throw TooLarge();
  }

  void add_step(std::unique_ptr<Step> step, std::initializer_list<int64_t> reads_of, int64_t writes) {
    const int64_t now = plan.steps.size();
    for (const int64_t map : reads_of)
      if (map >= 0) reads.push_back({now, map});
    if (writes >= 0) reads.push_back({now, writes});
    plan.steps.push_back(std::move(step));
  }

  // A value that the program names.
  int64_t named(Reader& r) {
    const int64_t value = r.size(0, static_cast<int64_t>(value_map.size()) - 1);
    require_net(value_map[value] >= 0, "an output is read as a map");
    return value_map[value];
  }

  // By value, for what a grid is part of may move. The map itself, or a copy in this grid and, where `tile` is not 0, this width of tiles.
  int64_t in_grid(int64_t map, Grid grid, int64_t tile) {
    const Map& m = at(map);
    if (m.grid == grid && (tile == 0 || m.tile == tile)) return map;
    const auto value = std::find(value_map.begin(), value_map.end(), map);
    if (value != value_map.end()) wanted.emplace(value - value_map.begin(), grid);
    return relay(map, m.height, m.width, tile ? tile : m.tile, grid, 1, 1);
  }

  int64_t relay(int64_t map, int64_t h, int64_t w, int64_t tile, Grid grid, int64_t sh, int64_t sw,
                int64_t again_h = 1, int64_t again_w = 1) {
    auto step = std::make_unique<Relay>();
    step->again_h = again_h, step->again_w = again_w;
    const int64_t to = add_map(at(map).channels, h, w, tile, grid);
    step->from = map, step->to = to, step->channels = at(map).channels, step->sh = sh, step->sw = sw;
    plan.work += kRelayWork * computed(grid, tile) * step->channels;
    add_step(std::move(step), {map}, to);
    return to;
  }

  // The map that a kernel over `x` makes, and `x` in the sub-blocks that it reads.
  std::pair<int64_t, int64_t> through(int64_t x, Taps& taps, int64_t channels, int64_t tile) {
    const Map in = at(x);
    const int64_t h = taps.out_height(in.height), w = taps.out_width(in.width);
    require_net(in.height + taps.ph + taps.ph_end >= taps.dh * (taps.kh - 1) + 1 &&
                    in.width + taps.pw + taps.pw_end >= taps.dw * (taps.kw - 1) + 1,
                "a kernel is larger than its input");
    const bool same = taps.sh == 1 && taps.sw == 1 && h == in.height && w == in.width;
    const Grid grid = same && tile == in.tile
        ? in.grid : grid_of(h, w, tile, taps.sh, taps.sw, in.height, in.width, &in.grid);
    if (taps.kh * taps.kw == 1 && !taps.is_pointwise() && !taps.ph && !taps.pw && !taps.ph_end && !taps.pw_end) {
      // Of such a map most is never read.
      const int64_t less = relay(x, h, w, tile, grid, taps.sh, taps.sw);
      taps = Taps{};
      return {less, add_map(channels, h, w, tile, grid)};
    }
    Grid wanted = grid;
    wanted.bh *= taps.sh, wanted.bw *= taps.sw;
    const int64_t from = in_grid(x, wanted, 0);
    return {from, add_map(channels, h, w, tile, grid)};
  }

  int64_t residual_for(int64_t other, int64_t out) {
    if (other < 0) return other;
    const Map& m = at(out);
    require_net(at(other).channels == m.channels && at(other).height == m.height && at(other).width == m.width,
                "a residual has another size than what it is added to");
    return in_grid(other, m.grid, m.tile);
  }

  void read(Reader& r) {
    require_net(r.next() == kVersion, "the program is of another version");
    const int64_t count = r.size(1, 1 << 20);
    for (int64_t s = 0; s < count; ++s) {
      const int64_t op = r.size(0, static_cast<int64_t>(Op::kRepeat)), tile = r.size();
      require_net(std::find(std::begin(kTiles), std::end(kTiles), tile) != std::end(kTiles), "no kernel has such tiles");
      const size_t arguments = r.size(0), end = r.at + arguments;
      require_net(end <= r.program.size(), "the program ends too early");
      value_map.push_back(step(static_cast<Op>(op), tile, r, end));
      require_net(r.at == end, "a step has too many or too few arguments");
    }
    require_net(r.at == r.program.size(), "the program goes on after its last step");
  }

  int64_t step(Op op, int64_t tile, Reader& r, size_t end) {
    switch (op) {
      case Op::kEnter: return enter(tile, r);
      case Op::kConv: return conv(tile, r);
      case Op::kDepthwise: return depthwise(tile, r);
      case Op::kPool: return pool(tile, r);
      case Op::kAdd:
      case Op::kMultiply:
      case Op::kActivate: return pointwise(op, r);
      case Op::kConcat: return concat(r, end);
      case Op::kMean: return mean(r);
      case Op::kExit: return exit(r);
      case Op::kRepeat: return repeat(tile, r);
    }
    throw std::runtime_error("conv_net: unknown step");
  }

  int64_t enter(int64_t tile, Reader& r) {
    auto step = std::make_unique<Enter>();
    step->input = r.size(0, static_cast<int64_t>(inputs.size()) - 1);
    const InputSize& size = step->from = inputs[step->input];
    fits(plan.nb * size.channels * size.height * size.width);
    const Grid grid = grid_of(size.height, size.width, tile, 1, 1, 0, 0, nullptr);
    step->value = add_map(size.channels, size.height, size.width, tile, grid);
    step->tiles = at(step->value).tiles();
    const int64_t value = step->value;
    add_step(std::move(step), {}, value);
    return value;
  }

  int64_t conv(int64_t tile, Reader& r) {
    auto step = std::make_unique<Conv>();
    const int64_t x = named(r);
    const int64_t residual = r.next();
    require_net(residual < static_cast<int64_t>(value_map.size()) && (residual < 0 || value_map[residual] >= 0),
                "a residual is not there");
    step->rows = r.size(), step->channels = r.size();
    step->taps = r.taps();
    step->row_block = r.size(1, INT16_MAX), step->k_block = r.size();
    step->first_value = r.size(0), step->first_segment = r.size(0), step->first_start = r.size(0), step->bias = r.size(-1);
    step->finish = r.finish();
    step->finish.adds_last = r.size(0, 1);
    require_net(at(x).channels == step->channels, "a convolution has other channels than its input");
    const int64_t places = step->taps.kh * static_cast<int64_t>(step->taps.columns(tile).size());
    require_net(step->k_block <= (UINT16_MAX + 1) / places && step->k_block * step->taps.kh * step->taps.kw <= INT16_MAX,
                "a block is too large for 16-bit numbers");
    const auto [from, to] = through(x, step->taps, step->rows, tile);
    step->x = from, step->value = to;
    step->residual = residual_for(residual < 0 ? -1 : value_map[residual], to);
    plan.work += static_cast<double>(computed(at(to).grid, tile)) * step->rows * step->channels * step->taps.kh * step->taps.kw;
    const int64_t other = step->residual;
    add_step(std::move(step), {from, other}, to);
    return to;
  }

  int64_t depthwise(int64_t tile, Reader& r) {
    auto step = std::make_unique<Depthwise>();
    const int64_t x = named(r);
    const int64_t residual = r.next();
    require_net(residual < static_cast<int64_t>(value_map.size()) && (residual < 0 || value_map[residual] >= 0),
                "a residual is not there");
    step->channels = r.size();
    step->taps = r.taps();
    step->weight = r.size(0), step->bias = r.size(-1);
    step->finish = r.finish();
    step->finish.adds_last = r.size(0, 1);
    const int64_t taps = step->taps.kh * step->taps.kw;
    require_net(at(x).channels == step->channels, "a convolution has other channels than its input");
    require_net(taps <= INT16_MAX, "a kernel is too large");
    require_net(step->taps.kh * step->taps.columns(tile).size() <= UINT16_MAX, "a kernel is too large");
    const auto [from, to] = through(x, step->taps, step->channels, tile);
    step->x = from, step->value = to;
    step->residual = residual_for(residual < 0 ? -1 : value_map[residual], to);
    plan.work += 2.0 * computed(at(to).grid, tile) * step->channels * taps;
    const int64_t other = step->residual;
    add_step(std::move(step), {from, other}, to);
    return to;
  }

  int64_t pool(int64_t tile, Reader& r) {
    auto step = std::make_unique<Pooling>();
    step->kind = static_cast<Pool>(r.size(0, static_cast<int64_t>(Pool::kMeanInside)));
    const int64_t x = named(r);
    step->taps = r.taps();
    step->channels = at(x).channels;
    require_net(step->kind == Pool::kMax || (step->taps.dh == 1 && step->taps.dw == 1), "a mean has steps between its taps");
    const auto [from, to] = through(x, step->taps, step->channels, tile);
    step->x = from, step->value = to;
    plan.work += 2.0 * computed(at(to).grid, tile) * step->channels * step->taps.kh * step->taps.kw;
    add_step(std::move(step), {from}, to);
    return to;
  }

  int64_t pointwise(Op op, Reader& r) {
    auto step = std::make_unique<Pointwise>();
    step->op = op, step->x = named(r), step->other = -1;
    if (op != Op::kActivate) {
      const int64_t other = named(r);
      const Map &a = at(step->x), &b = at(other);
      require_net(a.channels == b.channels, "two maps have not the same channels");
      step->spreads = b.height == 1 && b.width == 1 && (a.height != 1 || a.width != 1);
      require_net(step->spreads || (a.height == b.height && a.width == b.width), "two maps have not the same size");
      step->other = step->spreads ? in_grid(other, Grid{plan.nb, 1, 1, 1, 1}, 1) : in_grid(other, a.grid, a.tile);
    }
    step->finish = r.finish();
    const Map in = at(step->x);
    step->value = add_map(in.channels, in.height, in.width, in.tile, in.grid);
    const int64_t x = step->x, other = step->other, value = step->value;
    add_step(std::move(step), {x, other}, value);
    return value;
  }

  int64_t concat(Reader& r, size_t end) {
    std::vector<int64_t> parts;
    int64_t channels = 0;
    while (r.at < end) {
      parts.push_back(named(r));
      channels += at(parts.back()).channels;
    }
    require_net(!parts.empty(), "nothing is joined");
    const Map like = at(parts[0]);
    const int64_t whole = add_map(channels, like.height, like.width, like.tile, like.grid);
    int64_t first = 0;
    for (const int64_t part : parts) {
      Map& m = plan.maps[part];
      require_net(m.height == like.height && m.width == like.width, "two maps have not the same size");
      if (m.grid == like.grid && m.tile == like.tile && m.storage != at(whole).storage && alone(part)) {
        // What makes this part writes it where it belongs.
        m.storage = at(whole).storage, m.all_channels = channels, m.first_channel = first;
      } else {
        const int64_t same = in_grid(part, like.grid, like.tile);
        auto copy = std::make_unique<Pointwise>();
        copy->op = Op::kActivate, copy->x = same, copy->other = -1;
        const int64_t to = add_map(at(same).channels, like.height, like.width, like.tile, like.grid);
        plan.maps[to].storage = at(whole).storage, plan.maps[to].all_channels = channels, plan.maps[to].first_channel = first;
        copy->value = to;
        add_step(std::move(copy), {same}, to);
      }
      first += at(part).channels;
    }
    reads.push_back({static_cast<int64_t>(plan.steps.size()), whole});
    return whole;
  }

  int64_t mean(Reader& r) {
    auto step = std::make_unique<Mean>();
    step->x = named(r);
    step->channels = at(step->x).channels;
    step->value = add_map(step->channels, 1, 1, 1, Grid{plan.nb, 1, 1, 1, 1});
    const int64_t x = step->x, value = step->value;
    add_step(std::move(step), {x}, value);
    return value;
  }

  int64_t repeat(int64_t tile, Reader& r) {
    const int64_t x = named(r), again_h = r.size(1, INT16_MAX), again_w = r.size(1, INT16_MAX);
    const int64_t h = at(x).height * again_h, w = at(x).width * again_w;
    return relay(x, h, w, tile, grid_of(h, w, tile, 1, 1, 0, 0, nullptr), 1, 1, again_h, again_w);
  }

  int64_t exit(Reader& r) {
    auto step = std::make_unique<Exit>();
    step->x = named(r);
    const Map& m = at(step->x);
    step->as = {m.channels, m.height, m.width, r.size(0, 1) == 1};
    step->output = plan.outputs.size();
    plan.outputs.push_back(step->as);
    const int64_t x = step->x;
    add_step(std::move(step), {x}, -1);
    return -1;
  }

  // Whether a map has its storage to itself.
  bool alone(int64_t map) const {
    return std::count_if(plan.maps.begin(), plan.maps.end(), [&](const Map& m) { return m.storage == at(map).storage; }) == 1;
  }

  bool is_whole(int64_t map) const { return at(map).all_channels == at(map).channels; }

  // Each map gets its place in the arena, where what is alive at the same time does not overlap.
  void place() {
    // What takes over the place of a map that nobody reads later lies where that lay.
    std::vector<int64_t> last(plan.maps.size(), -1);
    for (const auto& [now, map] : reads) last[map] = std::max(last[map], now);
    for (size_t now = 0; now < plan.steps.size(); ++now) {
      const auto [made, old] = plan.steps[now]->takes_over();
      if (made < 0 || old < 0 || !alone(made) || !is_whole(old) || last[old] != static_cast<int64_t>(now)) continue;
      bool others_live = false;
      for (size_t m = 0; m < plan.maps.size(); ++m)
        others_live |= static_cast<int64_t>(m) != old && at(m).storage == at(old).storage && last[m] >= last[old];
      if (others_live) continue;
      const auto times = std::count_if(reads.begin(), reads.end(), [&](const auto& read) {
        return read.first == static_cast<int64_t>(now) && read.second == old;
      });
      if (times == 1) plan.maps[made].storage = at(old).storage;
    }
    for (const auto& [now, map] : reads) {
      Storage& s = storages[at(map).storage];
      s.floats = std::max(s.floats, at(map).floats());
      s.first = s.first < 0 ? now : std::min(s.first, now), s.last = std::max(s.last, now);
    }
    std::vector<Storage*> order;
    for (Storage& s : storages)
      if (s.first >= 0) order.push_back(&s);
    std::stable_sort(order.begin(), order.end(), [](auto* a, auto* b) { return a->floats > b->floats; });
    std::vector<Storage*> placed;
    for (Storage* s : order) {
      std::vector<Storage*> alive;
      for (Storage* p : placed)
        if (p->first <= s->last && s->first <= p->last) alive.push_back(p);
      std::sort(alive.begin(), alive.end(), [](auto* a, auto* b) { return a->at < b->at; });
      s->at = 0;
      for (Storage* p : alive)
        if (p->at < s->at + s->floats && s->at < p->at + p->floats) s->at = p->at + p->floats;
      plan.arena = std::max(plan.arena, s->at + s->floats);
      placed.push_back(s);
    }
    for (Map& m : plan.maps) m.storage = storages[m.storage].at;
    for (const auto& step : plan.steps) step->prepare(plan);
    for (const auto& step : plan.steps) plan.scratch = std::max(plan.scratch, step->scratch());
    plan.scratch = ceil_div(plan.scratch, 1024) * 1024;
  }
};

std::shared_ptr<const Plan> make_plan(const std::vector<int64_t>& program, const std::vector<InputSize>& inputs) {
  std::unique_ptr<Planner> best;
  const int64_t images = inputs.empty() ? 0 : inputs[0].images;
  for (int64_t nb = 1; nb <= kLanes && nb < 2 * images; nb *= 2) {
    // What is read in another grid than it is made in is made in that, next time.
    std::map<int64_t, Grid> wishes;
    for (int round = 0; round < kRounds; ++round) {
      auto planner = std::make_unique<Planner>(inputs, images, nb, wishes);
      Reader reader{program};
      try {
        planner->read(reader);
      } catch (const Planner::TooLarge&) {
        break;
      }
      std::map<int64_t, Grid> wanted = planner->wanted;
      const auto cost = [](const Planner& p) { return p.plan.work * p.plan.passes(); };
      if (!best || cost(*planner) < cost(*best)) best = std::move(planner);
      if (wanted.empty()) break;
      wishes.merge(wanted);
    }
  }
  best->place();
  return std::make_shared<const Plan>(std::move(best->plan));
}

// Plans that were made, the last ones used; a plan depends on the program and the sizes, not on the weights.
std::shared_ptr<const Plan> plan_for(const std::vector<int64_t>& program, const std::vector<InputSize>& inputs) {
  struct Made {
    std::vector<int64_t> program;
    std::vector<InputSize> inputs;
    std::shared_ptr<const Plan> plan;
  };
  constexpr size_t kKept = 64;
  static std::mutex mutex;
  static std::vector<Made> made;
  const std::lock_guard<std::mutex> lock(mutex);
  for (size_t i = 0; i < made.size(); ++i) {
    if (made[i].inputs == inputs && made[i].program == program) {
      if (i > 0) std::rotate(made.begin(), made.begin() + i, made.begin() + i + 1);
      return made[0].plan;
    }
  }
  auto plan = make_plan(program, inputs);
  made.insert(made.begin(), {program, inputs, plan});
  if (made.size() > kKept) made.pop_back();
  return plan;
}

struct Memory {
  std::unique_ptr<float, decltype(&std::free)> floats{nullptr, &std::free};
  int64_t size = 0;

  float* of(int64_t wanted) {
    if (size < wanted) {
      const size_t bytes = ceil_div(wanted * sizeof(float), 4096) * 4096;
      floats.reset(static_cast<float*>(std::aligned_alloc(4096, bytes)));
      size = floats ? wanted : 0;
      if (!floats) throw std::bad_alloc();
      // What was never written is read in places that mean nothing: it shall at least be a number.
      std::memset(floats.get(), 0, bytes);
    }
    return floats.get();
  }
};

void run(const Plan& plan, const Weights& weights, const std::vector<const float*>& inputs, const std::vector<float*>& outputs) {
  static thread_local Memory memory;
  const int64_t threads = torch::stable::get_num_threads(), passes = plan.passes(), steps = plan.steps.size();
  const int64_t arena = ceil_div(plan.arena, 1024) * 1024;
  // Passes are shared where each thread has one; else the steps of a pass are.
  const bool apart = passes >= threads;
  float* const base = memory.of((apart ? threads : 1) * arena + threads * plan.scratch);
  float* const scratch = base + (apart ? threads : 1) * arena;
  const auto frame = [&](int64_t pass, int64_t thread) {
    return Frame{weights, inputs, outputs, pass * plan.nb, std::min(plan.nb, plan.images - pass * plan.nb), base + thread * arena};
  };
  if (apart) {
    in_steps(threads, 1, [&](int64_t) { return passes; }, [&](int64_t, int64_t pass, int64_t thread) {
      const Frame f = frame(pass, thread);
      for (const auto& step : plan.steps)
        for (int64_t t = 0, n = step->tasks(1); t < n; ++t) step->run(plan, f, t, 1, scratch + thread * plan.scratch);
    });
    return;
  }
  for (int64_t pass = 0; pass < passes; ++pass) {
    const Frame f = frame(pass, 0);
    in_steps(threads, steps, [&](int64_t s) { return plan.steps[s]->tasks(threads); },
             [&](int64_t s, int64_t task, int64_t thread) {
      plan.steps[s]->run(plan, f, task, threads, scratch + thread * plan.scratch);
    });
  }
}

template <class T>
const T* data(const Tensor& t, ScalarType type, const char* what) {
  require_net(t.is_cpu() && t.scalar_type() == type && t.is_contiguous(), what);
  return static_cast<const T*>(t.const_data_ptr());
}

bool is_channels_last(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t expected = 1;
  for (const int d : {1, 3, 2, 0}) {
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

std::vector<Tensor> conv_net(
    const std::vector<Tensor>& inputs, const Tensor& values, const Tensor& columns, const Tensor& order,
    const Tensor& counts, const Tensor& starts, const Tensor& dense, const std::vector<int64_t>& program) {
  Weights w = {};
  w.values = data<float>(values, ScalarType::Float, "values must be contiguous float32");
  w.columns = data<uint16_t>(columns, ScalarType::Short, "columns must be contiguous int16");
  w.order = data<int16_t>(order, ScalarType::Short, "order must be contiguous int16");
  w.counts = data<int16_t>(counts, ScalarType::Short, "counts must be contiguous int16");
  w.starts = data<int64_t>(starts, ScalarType::Long, "starts must be contiguous int64");
  w.dense = data<float>(dense, ScalarType::Float, "dense must be contiguous float32");
  require_net(values.numel() == columns.numel() && order.numel() == counts.numel(), "the packed tensors do not fit together");
  w.value_count = values.numel(), w.segment_count = order.numel(), w.start_count = starts.numel(), w.dense_count = dense.numel();

  require_net(!inputs.empty(), "there is no input");
  std::vector<Tensor> held;
  std::vector<InputSize> sizes;
  std::vector<const float*> pointers;
  for (const Tensor& input : inputs) {
    require_net(input.is_cpu() && input.scalar_type() == ScalarType::Float && input.dim() == 4,
                "inputs must be float32 [n, c, h, w] on the CPU");
    const bool last = !input.is_contiguous() && is_channels_last(input);
    held.push_back(last || input.is_contiguous() ? input : torch::stable::contiguous(input));
    const Tensor& x = held.back();
    sizes.push_back({x.size(0), x.size(1), x.size(2), x.size(3), last});
    require_net(sizes.back().images == sizes[0].images, "inputs have not the same number of images");
    pointers.push_back(static_cast<const float*>(x.const_data_ptr()));
  }
  // A net of no images has the plan of one, for its sizes.
  std::vector<InputSize> planned = sizes;
  for (InputSize& size : planned) size.images = std::max<int64_t>(1, size.images);
  const std::shared_ptr<const Plan> plan = plan_for(program, planned);
  for (const auto& step : plan->steps) step->check(w);
  std::vector<Tensor> results;
  std::vector<float*> written;
  for (const Plan::Output& o : plan->outputs) {
    const std::vector<int64_t> shape = o.channels_last
        ? std::vector<int64_t>{sizes[0].images, o.height, o.width, o.channels}
        : std::vector<int64_t>{sizes[0].images, o.channels, o.height, o.width};
    results.push_back(torch::stable::new_empty(held[0], shape));
    written.push_back(static_cast<float*>(results.back().mutable_data_ptr()));
  }
  if (sizes[0].images > 0) run(*plan, w, pointers, written);
  return results;
}

}  // namespace
}  // namespace fxprune

STABLE_TORCH_LIBRARY_IMPL(fxprune, CPU, m) { m.impl("conv_net", TORCH_BOX(&fxprune::conv_net)); }
