// From a program to a plan: which grid each map has, what is moved between grids, and where everything lies.
#pragma once

#include <bit>
#include <map>
#include <mutex>

#include "net_attention.h"
#include "net_norm.h"
#include "net_place.h"
#include "net_product.h"

namespace fxprune {

constexpr int64_t kVersion = 2;
// What it costs to move a vector whose lanes lie apart, and to multiply one by tiles, in vectors multiplied.
constexpr double kRelayWork = 20, kProductWork = 1.0 / 16;
// How often a plan is made better.
constexpr int kRounds = 4;
// In percent: what more may be computed on a grid that is taken because its lanes are those of other maps.
constexpr int64_t kLikeOthers = 110, kPreferred = 120;

inline float float_of(int64_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits)); }

inline void (*apply_of(int64_t activation))(float*, int64_t) {
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
  throw std::runtime_error("net: unknown activation");
}

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
  // The same, and whether a residual comes after it.
  Finish epilogue() {
    Finish f = finish();
    f.adds_last = size(0, 1);
    return f;
  }
};

// Makes the plan of a program for given sizes.
struct Planner {
  Plan plan;
  const std::vector<InputSize>& inputs;
  int64_t storages = 0;
  Limits limits;
  double worked = 0;  // what of the plan's work is some step's
  std::vector<int64_t> value_map;  // the map of each value; -1 for an output
  std::vector<Use> uses;
  std::vector<int64_t> like;  // of each value, the one whose grid it takes over
  // The grid in which each value was wanted elsewhere, and what another planner found so.
  std::map<int64_t, Grid> wanted;
  const std::map<int64_t, Grid>& wishes;
  const int64_t prefers_y;  // sub-blocks down that are taken where little more is computed; 0 for none

  Planner(const std::vector<InputSize>& inputs, int64_t images, int64_t nb, const std::map<int64_t, Grid>& wishes, int64_t prefers_y)
      : inputs(inputs), wishes(wishes), prefers_y(prefers_y) {
    plan.images = images, plan.nb = nb;
  }

  // The grid for the map of the value that is made next; that of `in`, its input, where it is as good.
  Grid grid_of(const Cut& cut, const Grid* in) {
    const Grid best = cut.best();
    const auto wish = wishes.find(value_map.size());
    if (wish != wishes.end() && cut.covered_by(wish->second) && cut.within(kLikeOthers, wish->second, best)) return wish->second;
    if (in && in->bh % cut.stride_h == 0 && in->bw % cut.stride_w == 0) {
      const Grid g = {cut.nb, in->ly, in->lx, in->bh / cut.stride_h, in->bw / cut.stride_w};
      if (cut.covered_by(g) && cut.within(prefers_y ? kPreferred : kLikeOthers, g, best)) return g;
    }
    if (prefers_y) {
      const Grid g = cut.into(prefers_y, kLanes / cut.nb / prefers_y);
      if (cut.within(kPreferred, g, best)) return g;
    }
    return best;
  }

  int64_t add_map(int64_t channels, int64_t h, int64_t w, int64_t tile, const Grid& grid) {
    require_net(h >= 1 && w >= 1, "a map is empty");
    Map map;
    map.channels = map.all_channels = channels, map.height = h, map.width = w, map.tile = tile, map.grid = grid;
    fits(map.floats());
    map.storage = storages++;
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
      if (map >= 0) uses.push_back({now, map});
    if (writes >= 0) uses.push_back({now, writes});
    step->work = plan.work - worked;
    worked = plan.work;
    plan.steps.push_back(std::move(step));
  }

  // A value that the program names.
  int64_t named(Reader& r) {
    const int64_t value = r.size(0, static_cast<int64_t>(value_map.size()) - 1);
    require_net(value_map[value] >= 0, "an output is read as a map");
    return value_map[value];
  }

  // The map that is added to a convolution; -1 for none.
  int64_t named_residual(Reader& r) {
    const int64_t value = r.next();
    require_net(value < static_cast<int64_t>(value_map.size()), "a residual is not there");
    const int64_t map = value < 0 ? -1 : value_map[value];
    require_net(value < 0 || map >= 0, "a residual is not there");
    return map;
  }

  // By value, for what a grid is part of may move. The map itself, or a copy in this grid and, where `tile` is not 0, this width of tiles.
  int64_t in_grid(int64_t map, Grid grid, int64_t tile) {
    const Map& m = at(map);
    if (m.grid == grid && (tile == 0 || m.tile == tile)) return map;
    const auto value = std::find(value_map.begin(), value_map.end(), map);
    if (value != value_map.end()) wanted.emplace(like[value - value_map.begin()], grid);
    return relay(map, m.height, m.width, tile ? tile : m.tile, grid, 1, 1);
  }

  int64_t relay(int64_t map, int64_t h, int64_t w, int64_t tile, Grid grid, int64_t sh, int64_t sw,
                int64_t again_h = 1, int64_t again_w = 1) {
    auto step = std::make_unique<Relay>();
    step->again_h = again_h, step->again_w = again_w;
    const int64_t to = add_map(at(map).channels, h, w, tile, grid);
    step->from = map, step->value = to, step->channels = at(map).channels, step->sh = sh, step->sw = sw;
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
        ? in.grid : grid_of({plan.nb, h, w, tile, taps.sh, taps.sw, in.height, in.width}, &in.grid);
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
    const int64_t large = r.size(-1), near = r.size(-1);
    if (large >= 0) limits.large = large, limits.weighs_idle = false;
    if (near >= 0) limits.near = near;
    const int64_t count = r.size(1, 1 << 20);
    for (int64_t s = 0; s < count; ++s) {
      const int64_t op = r.size(0, static_cast<int64_t>(Op::kProduct)), tile = r.size();
      require_net(std::find(std::begin(kTiles), std::end(kTiles), tile) != std::end(kTiles), "no kernel has such tiles");
      const size_t arguments = r.size(0), end = r.at + arguments;
      require_net(end <= r.program.size(), "the program ends too early");
      const int64_t map = step(static_cast<Op>(op), tile, r, end);
      like.push_back(map < 0 ? value_map.size() : takes_grid_of(map));
      value_map.push_back(map);
      require_net(r.at == end, "a step has too many or too few arguments");
    }
    require_net(r.at == r.program.size(), "the program goes on after its last step");
  }

  // The value whose grid a new map has without having been asked: the first of the same grid and size that it is made of.
  int64_t takes_grid_of(int64_t map) const {
    const Map& m = at(map);
    const int64_t now = plan.steps.size() - 1;
    for (size_t value = 0; value < value_map.size(); ++value) {
      const int64_t other = value_map[value];
      if (other < 0 || !(at(other).grid == m.grid) || at(other).height != m.height || at(other).width != m.width) continue;
      for (auto use = uses.rbegin(); use != uses.rend() && use->step == now; ++use)
        if (use->map == other) return like[value];
    }
    return value_map.size();
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
      case Op::kLayerNorm: return layer_norm(r);
      case Op::kAttention: return attention(r);
      case Op::kShuffle: return shuffle(tile, r);
      case Op::kProduct: return product(r);
    }
    throw std::runtime_error("net: unknown step");
  }

  int64_t enter(int64_t tile, Reader& r) {
    auto step = std::make_unique<Enter>();
    step->input = r.size(0, static_cast<int64_t>(inputs.size()) - 1);
    const InputSize& size = step->from = inputs[step->input];
    require_net(size.images == plan.images || size.images == 1, "inputs have not the same number of images");
    fits((size.images == 1 ? 1 : plan.nb) * size.channels * size.height * size.width);
    const Grid grid = grid_of({plan.nb, size.height, size.width, tile, 1, 1, 0, 0}, nullptr);
    step->value = add_map(size.channels, size.height, size.width, tile, grid);
    const int64_t value = step->value;
    add_step(std::move(step), {}, value);
    return value;
  }

  int64_t conv(int64_t tile, Reader& r) {
    auto step = std::make_unique<Conv>();
    const int64_t x = named(r);
    const int64_t residual = named_residual(r);
    step->rows = r.size(), step->channels = r.size();
    step->taps = r.taps();
    step->row_block = r.size(1, INT16_MAX), step->k_block = r.size();
    step->first_value = r.size(0), step->values = r.size(0), step->first_segment = r.size(0), step->first_start = r.size(0), step->bias = r.size(-1);
    step->finish = r.epilogue();
    require_net(at(x).channels == step->channels, "a convolution has other channels than its input");
    const int64_t places = step->taps.kh * static_cast<int64_t>(step->taps.columns(tile).size());
    require_net(step->k_block <= (UINT16_MAX + 1) / places && step->k_block * step->taps.kh * step->taps.kw <= INT16_MAX,
                "a block is too large for 16-bit numbers");
    const auto [from, to] = through(x, step->taps, step->rows, tile);
    step->x = from, step->value = to;
    step->residual = residual_for(residual, to);
    plan.work += static_cast<double>(computed(at(to).grid, tile)) * step->values;
    const int64_t other = step->residual;
    add_step(std::move(step), {from, other}, to);
    return to;
  }

  int64_t product(Reader& r) {
    auto step = std::make_unique<Product>();
    const int64_t x = step->x = named(r);
    const int64_t residual = named_residual(r);
    step->rows = r.size(), step->channels = r.size();
    step->first_value = r.size(0), step->values = r.size(0), step->first_word = r.size(0), step->first_start = r.size(0);
    step->bias = r.size(-1);
    step->finish = r.epilogue();
    const Map in = at(x);
    require_net(in.channels == step->channels, "a product has other channels than its input");
    const int64_t to = step->value = add_map(step->rows, in.height, in.width, in.tile, in.grid);
    const int64_t other = step->residual = residual_for(residual, to);
    plan.work += kProductWork * static_cast<double>(computed(in.grid, in.tile)) * step->rows * step->channels;
    add_step(std::move(step), {x, other}, to);
    return to;
  }

  int64_t depthwise(int64_t tile, Reader& r) {
    auto step = std::make_unique<Depthwise>();
    const int64_t x = named(r);
    const int64_t residual = named_residual(r);
    step->channels = r.size();
    step->taps = r.taps();
    step->weight = r.size(0), step->bias = r.size(-1);
    step->finish = r.epilogue();
    const int64_t taps = step->taps.kh * step->taps.kw;
    require_net(at(x).channels == step->channels, "a convolution has other channels than its input");
    require_net(taps <= INT16_MAX, "a kernel is too large");
    require_net(step->taps.kh * step->taps.columns(tile).size() <= UINT16_MAX, "a kernel is too large");
    const auto [from, to] = through(x, step->taps, step->channels, tile);
    step->x = from, step->value = to;
    step->residual = residual_for(residual, to);
    plan.work += 1.2 * computed(at(to).grid, tile) * step->channels * taps;
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
      if (m.grid == like.grid && m.tile == like.tile && m.storage != at(whole).storage && plan.alone(part)) {
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
    uses.push_back({static_cast<int64_t>(plan.steps.size()), whole});
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
    return relay(x, h, w, tile, grid_of({plan.nb, h, w, tile, 1, 1, 0, 0}, nullptr), 1, 1, again_h, again_w);
  }

  int64_t shuffle(int64_t tile, Reader& r) {
    auto step = std::make_unique<Relay>();
    const int64_t x = step->from = named(r);
    step->shuffles = true;
    step->again_h = r.size(1, INT16_MAX), step->again_w = r.size(1, INT16_MAX);
    const int64_t cut_h = r.size(0, step->again_h - 1), cut_w = r.size(0, step->again_w - 1);
    const Map in = at(x);
    require_net(in.channels % (step->again_h * step->again_w) == 0, "channels cannot be shuffled into so many places");
    step->channels = in.channels / (step->again_h * step->again_w);
    const int64_t h = in.height * step->again_h - cut_h, w = in.width * step->again_w - cut_w;
    const int64_t to = step->value = add_map(step->channels, h, w, tile, grid_of({plan.nb, h, w, tile, 1, 1, 0, 0}, nullptr));
    plan.work += kRelayWork * computed(at(to).grid, tile) * step->channels;
    add_step(std::move(step), {x}, to);
    return to;
  }

  int64_t layer_norm(Reader& r) {
    auto step = std::make_unique<LayerNorm>();
    step->x = named(r);
    step->weight = r.size(-1), step->bias = r.size(-1), step->epsilon = float_of(r.next());
    const Map in = at(step->x);
    step->channels = in.channels;
    step->value = add_map(in.channels, in.height, in.width, in.tile, in.grid);
    const int64_t x = step->x, value = step->value;
    add_step(std::move(step), {x}, value);
    return value;
  }

  int64_t attention(Reader& r) {
    auto step = std::make_unique<Attention>();
    step->q = named(r), step->k = named(r), step->v = named(r);
    step->first_q = r.size(0), step->first_k = r.size(0), step->first_v = r.size(0);
    step->heads = r.size(), step->size = r.size(), step->v_size = r.size();
    step->mask = r.size(-1, static_cast<int64_t>(inputs.size()) - 1);
    step->causal = r.size(0, 1), step->rounds = r.size(0, 1), step->scale = float_of(r.next());
    const Map q = at(step->q), k = at(step->k), v = at(step->v);
    require_net(q.height == 1 && k.height == 1 && v.height == 1 && k.width == v.width, "attention is over tokens in one row");
    require_net(step->first_q + step->heads * step->size <= q.channels && step->first_k + step->heads * step->size <= k.channels &&
                    step->first_v + step->heads * step->v_size <= v.channels,
                "an attention has more heads than its maps");
    if (step->mask >= 0) {
      const InputSize& m = inputs[step->mask];
      const std::array<int64_t, 4> sizes = {m.images, m.channels, m.height, m.width};
      const std::array<int64_t, 4> most = {plan.images, step->heads, q.width, k.width};
      const int64_t row = m.width * (m.channels_last ? m.channels : 1);
      const std::array<int64_t, 4> steps = {
          m.channels * m.height * m.width, m.channels_last ? 1 : m.height * m.width, row, m.channels_last ? m.channels : 1};
      for (size_t d = 0; d < 4; ++d) {
        require_net(sizes[d] == 1 || sizes[d] == most[d], "a mask has another size than the scores");
        step->mask_steps[d] = sizes[d] == 1 ? 0 : steps[d];
      }
      fits((m.images > 1 ? plan.nb : 1) * m.channels * m.height * m.width);
    }
    step->value = add_map(step->heads * step->v_size, 1, q.width, q.tile, q.grid);
    // A key costs more where the lanes hold several images: it is moved instead of spread.
    plan.work += (plan.nb > 1 ? 1.5 : 1.0) * static_cast<double>(computed(q.grid, q.tile)) * k.width * step->heads * (step->size + step->v_size);
    const int64_t a = step->q, b = step->k, c = step->v, value = step->value;
    add_step(std::move(step), {a, b, c}, value);
    return value;
  }

  int64_t exit(Reader& r) {
    auto step = std::make_unique<Exit>();
    step->x = named(r);
    const Map& m = at(step->x);
    step->as = {m.channels, m.height, m.width, static_cast<Form>(r.size(0, static_cast<int64_t>(Form::kTokens)))};
    require_net(step->as.form != Form::kTokens || m.height == 1, "a map of several rows is no row of tokens");
    step->output = plan.outputs.size();
    plan.outputs.push_back(step->as);
    const int64_t x = step->x;
    add_step(std::move(step), {x}, -1);
    return -1;
  }
};

inline std::shared_ptr<const Plan> make_plan(
    const std::vector<int64_t>& program, const std::vector<InputSize>& inputs, int64_t threads) {
  std::unique_ptr<Planner> best;
  const int64_t images = inputs.empty() ? 0 : inputs[0].images;
  for (int64_t nb = 1; nb <= kLanes && nb < 2 * images; nb *= 2)
    for (int64_t prefers_y = 0; nb * prefers_y <= kLanes; prefers_y = std::max<int64_t>(1, 2 * prefers_y)) {
      // What is read in another grid than it is made in is made in that, next time.
      std::map<int64_t, Grid> wishes;
      for (int round = 0; round < kRounds; ++round) {
        auto planner = std::make_unique<Planner>(inputs, images, nb, wishes, prefers_y);
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
  Plan& plan = best->plan;
  const int64_t bands = plan.passes() >= threads ? 1 : threads;
  Placer(plan, std::move(best->uses), best->storages, bands, best->limits).place();
  return std::make_shared<const Plan>(std::move(plan));
}

// Plans that were made, the last ones used; a plan depends on the program and the sizes, not on the weights.
inline std::shared_ptr<const Plan> plan_for(
    const std::vector<int64_t>& program, const std::vector<InputSize>& inputs, int64_t threads) {
  struct Made {
    std::vector<int64_t> program;
    std::vector<InputSize> inputs;
    int64_t threads;
    std::shared_ptr<const Plan> plan;
  };
  constexpr size_t kKept = 64;
  static std::mutex mutex;
  static std::vector<Made> made;
  const std::lock_guard<std::mutex> lock(mutex);
  for (size_t i = 0; i < made.size(); ++i) {
    if (made[i].threads == threads && made[i].inputs == inputs && made[i].program == program) {
      if (i > 0) std::rotate(made.begin(), made.begin() + i, made.begin() + i + 1);
      return made[0].plan;
    }
  }
  auto plan = make_plan(program, inputs, threads);
  made.insert(made.begin(), {program, inputs, threads, plan});
  if (made.size() > kKept) made.pop_back();
  return plan;
}

}  // namespace fxprune
