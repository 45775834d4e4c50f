// What the ops that multiply by one packed weight have in common: checks, results, and memory between calls.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "activations.h"

namespace fxprune {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows of W that make one result: y [tokens, rows].
struct Part {
  int64_t first, rows;
  void* y;

  // Where y has the token's value for a row of W.
  template <class T>
  T* at(int64_t token, int64_t row) const {
    return static_cast<T*>(y) + token * rows + row - first;
  }
};

// Memory that a thread keeps between calls, so that a call allocates nothing but its result.
inline float* scratch(int which, int64_t floats) {
  struct Buffer {
    std::unique_ptr<float, decltype(&std::free)> memory{nullptr, &std::free};
    int64_t size = 0;
  };
  static thread_local Buffer buffers[2];
  Buffer& buffer = buffers[which];
  if (buffer.size < floats) {
    const size_t bytes = (floats * sizeof(float) + 4095) / 4096 * 4096;
    buffer.memory.reset(static_cast<float*>(std::aligned_alloc(4096, bytes)));
    buffer.size = buffer.memory ? floats : 0;
    if (!buffer.memory) throw std::bad_alloc();
  }
  return buffer.memory.get();
}

// The checks of one op, which throw in its name.
struct Checks {
  const char* op;

  void require(bool condition, const char* what) const {
    if (!condition) throw std::runtime_error(std::string(op) + ": " + what);
  }

  template <class T>
  const T* data(const Tensor& t, ScalarType type, int64_t numel, const char* what) const {
    require(t.is_cpu() && t.scalar_type() == type && t.numel() == numel && t.is_contiguous(), what);
    return static_cast<const T*>(t.const_data_ptr());
  }

  // given.of<kind>() for the activation of that name.
  template <class Result, class Given>
  Result with_activation(const std::string& name, const Given& given) const {
    if (name.empty()) return given.template of<Activation::kNone>();
    if (name == "relu") return given.template of<Activation::kRelu>();
    if (name == "gelu") return given.template of<Activation::kGelu>();
    if (name == "gelu_tanh") return given.template of<Activation::kGeluTanh>();
    if (name == "silu") return given.template of<Activation::kSilu>();
    throw std::runtime_error(std::string(op) + ": unknown activation '" + name + "'");
  }

  // x [..., columns], contiguous.
  Tensor rows_of(const Tensor& x, int64_t columns) const {
    require(x.dim() >= 1, "x must have at least one dimension");
    require(x.size(x.dim() - 1) == columns, "the last dimension of x differs from the weight's in_features");
    return x.is_contiguous() ? x : torch::stable::contiguous(x);
  }

  // New tensors [..., rows] for x [..., columns], one for each of `out_features`, and the parts that write them.
  std::vector<Tensor> results(
      const Tensor& x, int64_t rows, const std::vector<int64_t>& out_features, std::vector<Part>& parts) const {
    const auto sizes = x.sizes();
    std::vector<int64_t> shape(sizes.begin(), sizes.end());
    int64_t first = 0;
    for (const int64_t features : out_features) {
      require(features >= 0 && features <= rows - first, "out_features must add up to the packed weight's rows");
      parts.push_back({first, features, nullptr});
      first += features;
    }
    require(first == rows, "out_features must add up to the packed weight's rows");
    std::vector<Tensor> made;
    made.reserve(parts.size());
    for (Part& part : parts) {
      shape.back() = part.rows;
      made.push_back(torch::stable::new_empty(x, shape));
      part.y = made.back().mutable_data_ptr();
    }
    return made;
  }
};

}  // namespace fxprune
