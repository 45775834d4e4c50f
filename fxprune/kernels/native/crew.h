// Steps of tasks done by several threads, none of which waits for one that has not come.
//
// A thread has the tasks of a step that stand where its own stood in the step before, so that it finds in its cache what
// it made; when they are done it takes others'. A step is over when its tasks are done, not when every thread has
// arrived. On a machine that has other work a thread that gets no processor delays nothing but a task that it has
// begun, and where only one thread comes it does everything.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <memory>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fxprune {

inline void rest_a_moment(int64_t waited) {
  if (waited > 4096) {
    std::this_thread::yield();
    return;
  }
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// run(step, task, thread) for each task of each step; a step begins after the one before it is over.
template <class Tasks, class Run>
void in_steps(int64_t threads, int64_t steps, const Tasks& tasks_of, const Run& run) {
  if (threads <= 1) {
    for (int64_t s = 0; s < steps; ++s)
      for (int64_t t = 0, n = tasks_of(s); t < n; ++t) run(s, t, 0);
    return;
  }
  struct alignas(64) Counter {
    std::atomic<int64_t> count{0};
  };
  // By step: the tasks done, and of each thread's the next one.
  const std::unique_ptr<Counter[]> counters(new Counter[steps * (threads + 1)]);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t s = 0; s < steps; ++s) {
        Counter* const counter = counters.get() + s * (threads + 1);
        std::atomic<int64_t>& done = counter[threads].count;
        const int64_t tasks = tasks_of(s);
        for (int64_t n = 0; n < threads; ++n) {
          const int64_t owner = (thread + n) % threads;
          const int64_t first = tasks * owner / threads, many = tasks * (owner + 1) / threads - first;
          for (int64_t t; (t = counter[owner].count.fetch_add(1)) < many;) {
            run(s, first + t, thread);
            done.fetch_add(1, std::memory_order_release);
          }
        }
        for (int64_t w = 0; done.load(std::memory_order_acquire) < tasks; ++w) rest_a_moment(w);
      }
    }
  });
}

}  // namespace fxprune
