// Layer norm: each place of a map less its mean over the channels, by its deviation.
#pragma once

#include <cmath>

#include "net.h"

namespace fxprune {

// N vectors of a tile; `weight` and `bias` may be null.
template <int N>
FXPRUNE_OUTLINE void norm_places(
    const float* x, float* y, int64_t channels, int64_t x_stride, int64_t y_stride, const float* weight,
    const float* bias, float epsilon) {
  Lane mean[N] = {}, scale[N] = {};
  for (int64_t c = 0; c < channels; ++c)
    FXPRUNE_UNROLL
    for (int v = 0; v < N; ++v) mean[v] += load<Lane>(x + c * x_stride + v * kLanes);
  FXPRUNE_UNROLL
  for (int v = 0; v < N; ++v) mean[v] /= static_cast<float>(channels);
  for (int64_t c = 0; c < channels; ++c)
    FXPRUNE_UNROLL
    for (int v = 0; v < N; ++v) {
      const Lane apart = load<Lane>(x + c * x_stride + v * kLanes) - mean[v];
      scale[v] += apart * apart;
    }
  FXPRUNE_UNROLL
  for (int v = 0; v < N; ++v) {
    scale[v] = scale[v] / static_cast<float>(channels) + epsilon;
    for (int l = 0; l < kLanes; ++l) scale[v][l] = 1.0f / std::sqrt(scale[v][l]);
  }
  for (int64_t c = 0; c < channels; ++c) {
    const float by = weight ? weight[c] : 1.0f, more = bias ? bias[c] : 0.0f;
    FXPRUNE_UNROLL
    for (int v = 0; v < N; ++v) {
      const Lane apart = load<Lane>(x + c * x_stride + v * kLanes) - mean[v];
      store(y + c * y_stride + v * kLanes, apart * scale[v] * by + more);
    }
  }
}

struct LayerNorm : Step {
  int64_t x, value, channels, weight, bias;
  float epsilon;
  int64_t vectors = 0;

  void check(const Weights& w) const override {
    for (const int64_t at : {weight, bias}) require_net(at < 0 || at + channels <= w.dense_count, "a norm's weights are not there");
  }
  std::pair<int64_t, int64_t> takes_over() const override { return {value, x}; }
  void prepare(Plan& plan) override { vectors = plan.maps[x].tiles() * plan.maps[x].tile; }
  int64_t tasks(int64_t threads) const override { return Share(vectors, threads).tasks; }
  void run(const Plan& plan, const Frame& f, int64_t task, int64_t threads, float*) const override {
    const Map &in = plan.maps[x], &out = plan.maps[value];
    const Share share(vectors, threads);
    for (int64_t now = share.begin(task), end = share.end(task), many; now < end; now += many) {
      const int64_t tile = now / in.tile, first = now % in.tile, left = std::min(in.tile - first, end - now);
      many = left >= 4 ? 4 : left >= 2 ? 2 : 1;
      const auto norm = many == 4 ? norm_places<4> : many == 2 ? norm_places<2> : norm_places<1>;
      norm(f.arena + in.storage + in.tile_at(tile) + first * kLanes, f.arena + out.storage + out.tile_at(tile) + first * kLanes,
           channels, in.channel_stride(), out.channel_stride(), weight < 0 ? nullptr : f.weights.dense + weight,
           bias < 0 ? nullptr : f.weights.dense + bias, epsilon);
    }
  }
};

}  // namespace fxprune
