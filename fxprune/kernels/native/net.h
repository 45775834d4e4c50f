// A part of a graph that is computed on maps in lanes: its program, and the plan made of it for given sizes.
//
// A program is a list of integers (fxprune/kernels/native/net/program.py writes it): a version, the number of steps, and each
// step as its op, the width of its map's tiles, the number of its arguments, and these. A step makes one value, which
// later steps name by the step's number.
#pragma once

#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "conv_rows.h"

namespace fxprune {

enum class Op : int64_t { kEnter, kConv, kDepthwise, kPool, kAdd, kMultiply, kActivate, kConcat, kMean, kExit, kRepeat,
                         kLayerNorm, kAttention, kShuffle, kProduct };
enum class Pool : int64_t { kMax, kMean, kMeanInside };
// How an output stands in memory: [n, c, h, w], [n, h, w, c], or, where there is one row, [n, w, c].
enum class Form : int64_t { kChannelsFirst, kChannelsLast, kTokens };

// Of a mask: images, heads, queries and keys.
struct InputSize {
  int64_t images, channels, height, width;
  bool channels_last;

  bool operator==(const InputSize&) const = default;
  auto operator<=>(const InputSize&) const = default;
};

inline void require_net(bool condition, const char* what) {
  if (!condition) throw std::runtime_error(std::string("net: ") + what);
}

// The packed weights of all convolutions and linears of a net, one after another, and what is dense.
struct Weights {
  const float* values;
  const uint16_t* columns;
  const int16_t* order;
  const int16_t* counts;
  const int64_t* starts;
  const float* dense;  // biases, weights of norms, and the taps of depthwise convolutions
  const uint32_t* words;   // of products, the bits
  const uint16_t* brains;  // and the values, bfloat16
  int64_t value_count, segment_count, start_count, dense_count, word_count, brain_count;
};

// A call: what its steps read and write.
struct Frame {
  const Weights& weights;
  const std::vector<const float*>& inputs;
  const std::vector<float*>& outputs;
  int64_t image, images;  // the first image of the pass, and how many there are
  float* arena;
  bool shared;  // several threads make each map
  std::atomic<int>* flags;  // of what several threads may do, whether one does, or it is done
};

struct Plan;

struct Step {
  double work = 0;  // in vectors multiplied and added

  virtual ~Step() = default;
  // Raises where the weights that it reads are not there.
  virtual void check(const Weights& weights) const {}
  // After all maps have their places.
  virtual void prepare(Plan& plan) {}
  virtual int64_t tasks(int64_t threads) const = 0;
  virtual void run(const Plan& plan, const Frame& frame, int64_t task, int64_t threads, float* scratch) const = 0;
  // The map that a step makes and the one whose place it may take, if nothing reads that later; -1 for none.
  virtual std::pair<int64_t, int64_t> takes_over() const { return {-1, -1}; }
  // Of the weights that it reads for each tile.
  virtual int64_t weight_bytes() const { return 0; }
  // Floats that a thread needs for a task.
  virtual int64_t scratch() const { return 0; }
};

struct Plan {
  std::vector<Map> maps;  // by value, then those that lie between
  std::vector<std::unique_ptr<Step>> steps;
  std::vector<Lanes> lanes;
  struct Output {
    int64_t channels, height, width;
    Form form;
  };
  std::vector<Output> outputs;
  int64_t images = 0, nb = 1, arena = 0, scratch = 0, flags = 0;
  double work = 0;  // in vectors multiplied and added, for the choice of grids

  int64_t passes() const { return ceil_div(images, nb); }
  // Whether a map has its storage to itself.
  bool alone(int64_t map) const {
    return std::count_if(maps.begin(), maps.end(), [&](const Map& m) { return m.storage == maps[map].storage; }) == 1;
  }
};

// Tasks of a step for each thread, where there are that many: so many that none waits long for the last. And tiles for
// each thread below which they are shared in parts.
constexpr int64_t kTasksPerThread = 16;
constexpr int64_t kTilesPerThread = 4;

// Channels or tiles, dealt out to tasks.
struct Share {
  int64_t size, tasks;

  Share(int64_t size, int64_t threads)
      : size(size), tasks(threads == 1 ? 1 : std::min(size, threads * kTasksPerThread)) {}
  int64_t begin(int64_t task) const { return size * task / tasks; }
  int64_t end(int64_t task) const { return size * (task + 1) / tasks; }
};

// One of some equal parts of the channels of a tile.
struct Part {
  int64_t index = 0, of = 1;

  int64_t begin(int64_t channels) const { return channels * index / of; }
  int64_t end(int64_t channels) const { return channels * (index + 1) / of; }
};

// A step that makes its map tile by tile.
struct TileStep : Step {
  int64_t value;
  int64_t tiles = 0;

  void prepare(Plan& plan) override { tiles = plan.maps[value].tiles(); }
  virtual void make(const Plan& plan, const Frame& frame, int64_t tile, Part part, float* scratch) const = 0;
  // Adds the rows of maps that row y of its tiles is made of.
  virtual void add_reads(const Plan& plan, int64_t y, std::vector<Row>& rows) const = 0;
  // The parts of a tile, where threads have too few tiles.
  virtual int64_t most_parts(int64_t threads) const { return threads * 2; }

  int64_t parts(int64_t threads) const { return threads == 1 || tiles >= threads * kTilesPerThread ? 1 : most_parts(threads); }
  int64_t tasks(int64_t threads) const override { return Share(tiles, threads).tasks * parts(threads); }
  void run(const Plan& plan, const Frame& f, int64_t task, int64_t threads, float* scratch) const override {
    const Share share(tiles, threads);
    const int64_t n = parts(threads);
    for (int64_t t = share.begin(task / n); t < share.end(task / n); ++t) make(plan, f, t, {task % n, n}, scratch);
  }
};

}  // namespace fxprune
