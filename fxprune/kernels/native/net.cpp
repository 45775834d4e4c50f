// fxprune::net for the CPU: a part of a graph of convolutions, computed on maps in lanes (maps.h, net.h).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>

#include "crew.h"
#include "net_plan.h"

namespace fxprune {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

void run(
    const Plan& plan, int64_t threads, const Weights& weights, const std::vector<const float*>& inputs,
    const std::vector<float*>& outputs) {
  static thread_local Memory memory;
  const int64_t passes = plan.passes(), steps = plan.steps.size();
  const int64_t arena = ceil_div(plan.arena, 1024) * 1024;
  // Passes are shared where each thread has one; else the steps of a pass are.
  const bool apart = passes >= threads;
  float* const base = memory.of((apart ? threads : 1) * arena + threads * plan.scratch);
  float* const scratch = base + (apart ? threads : 1) * arena;
  std::vector<std::atomic<int>> flags(plan.flags * (apart ? 1 : passes));
  const auto frame = [&](int64_t pass, int64_t thread) {
    return Frame{weights, inputs, outputs, pass * plan.nb, std::min(plan.nb, plan.images - pass * plan.nb), base + thread * arena,
                 !apart && threads > 1, flags.data() + (apart ? 0 : pass * plan.flags)};
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

std::vector<Tensor> run_net(
    const std::vector<Tensor>& inputs, const Tensor& values, const Tensor& columns, const Tensor& order,
    const Tensor& counts, const Tensor& starts, const Tensor& dense, const Tensor& words, const Tensor& brains,
    const std::vector<int64_t>& program) {
  Weights w = {};
  w.values = data<float>(values, ScalarType::Float, "values must be contiguous float32");
  w.columns = data<uint16_t>(columns, ScalarType::Short, "columns must be contiguous int16");
  w.order = data<int16_t>(order, ScalarType::Short, "order must be contiguous int16");
  w.counts = data<int16_t>(counts, ScalarType::Short, "counts must be contiguous int16");
  w.starts = data<int64_t>(starts, ScalarType::Long, "starts must be contiguous int64");
  w.dense = data<float>(dense, ScalarType::Float, "dense must be contiguous float32");
  w.words = reinterpret_cast<const uint32_t*>(data<int32_t>(words, ScalarType::Int, "words must be contiguous int32"));
  w.brains = data<uint16_t>(brains, ScalarType::BFloat16, "brains must be contiguous bfloat16");
  w.word_count = words.numel(), w.brain_count = brains.numel();
  require_net(values.numel() == columns.numel() && order.numel() == counts.numel(), "the packed tensors do not fit together");
  w.value_count = values.numel(), w.segment_count = order.numel(), w.start_count = starts.numel(), w.dense_count = dense.numel();

  require_net(!inputs.empty(), "there is no input");
  std::vector<Tensor> held;
  std::vector<InputSize> sizes;
  std::vector<const float*> pointers;
  for (const Tensor& input : inputs) {
    require_net(input.is_cpu() && input.scalar_type() == ScalarType::Float && (input.dim() == 4 || input.dim() == 3),
                "inputs must be float32 [n, c, h, w] or [n, w, c] on the CPU");
    const bool tokens = input.dim() == 3, last = tokens || (!input.is_contiguous() && is_channels_last(input));
    held.push_back((last && !tokens) || input.is_contiguous() ? input : torch::stable::contiguous(input));
    const Tensor& x = held.back();
    sizes.push_back(tokens ? InputSize{x.size(0), x.size(2), 1, x.size(1), true}
                           : InputSize{x.size(0), x.size(1), x.size(2), x.size(3), last});
    pointers.push_back(static_cast<const float*>(x.const_data_ptr()));
  }
  // A net of no images has the plan of one, for its sizes.
  std::vector<InputSize> planned = sizes;
  for (InputSize& size : planned) size.images = std::max<int64_t>(1, size.images);
  const int64_t threads = torch::stable::get_num_threads();
  const std::shared_ptr<const Plan> plan = plan_for(program, planned, threads);
  for (const auto& step : plan->steps) step->check(w);
  std::vector<Tensor> results;
  std::vector<float*> written;
  for (const Plan::Output& o : plan->outputs) {
    const int64_t n = sizes[0].images;
    const std::vector<int64_t> shape = o.form == Form::kTokens ? std::vector<int64_t>{n, o.width, o.channels}
        : o.form == Form::kChannelsLast ? std::vector<int64_t>{n, o.height, o.width, o.channels}
                                        : std::vector<int64_t>{n, o.channels, o.height, o.width};
    results.push_back(torch::stable::new_empty(held[0], shape));
    written.push_back(static_cast<float*>(results.back().mutable_data_ptr()));
  }
  if (sizes[0].images > 0) run(*plan, threads, w, pointers, written);
  return results;
}

}  // namespace
}  // namespace fxprune

STABLE_TORCH_LIBRARY_IMPL(fxprune, CPU, m) { m.impl("net", TORCH_BOX(&fxprune::run_net)); }
