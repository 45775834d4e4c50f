// A part of a graph that is computed on maps in lanes: its program, and the plan made of it for given sizes.
//
// A program is a list of integers (fxprune/kernels/native/net/program.py writes it): a version, the number of steps, and each
// step as its op, the width of its map's tiles, the number of its arguments, and these. A step makes one value, which
// later steps name by the step's number.
#pragma once

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
                         kLayerNorm, kAttention };
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
  int64_t value_count, segment_count, start_count, dense_count;
};

// A call: what its steps read and write.
struct Frame {
  const Weights& weights;
  const std::vector<const float*>& inputs;
  const std::vector<float*>& outputs;
  int64_t image, images;  // the first image of the pass, and how many there are
  float* arena;
};

struct Plan;

struct Step {
  virtual ~Step() = default;
  // Raises where the weights that it reads are not there.
  virtual void check(const Weights& weights) const {}
  // After all maps have their places.
  virtual void prepare(Plan& plan) {}
  virtual int64_t tasks(int64_t threads) const = 0;
  virtual void run(const Plan& plan, const Frame& frame, int64_t task, int64_t threads, float* scratch) const = 0;
  // The map that a step makes and the one whose place it may take, if nothing reads that later; -1 for none.
  virtual std::pair<int64_t, int64_t> takes_over() const { return {-1, -1}; }
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
  int64_t images = 0, nb = 1, arena = 0, scratch = 0;
  double work = 0;  // in vectors multiplied and added, for the choice of grids

  int64_t passes() const { return ceil_div(images, nb); }
};

// Tasks of a step for each thread, where there are that many: enough that none waits long for the last.
constexpr int64_t kTasksPerThread = 4;

// Channels or tiles, dealt out to tasks.
struct Share {
  int64_t size, tasks;

  Share(int64_t size, int64_t threads)
      : size(size), tasks(threads == 1 ? 1 : std::min(size, threads * kTasksPerThread)) {}
  int64_t begin(int64_t task) const { return size * task / tasks; }
  int64_t end(int64_t task) const { return size * (task + 1) / tasks; }
};

}  // namespace fxprune
