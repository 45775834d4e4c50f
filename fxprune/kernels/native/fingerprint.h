// A number for the bytes of a tensor (fingerprint.py has the definition). Every term is a bijection of its word, so that
// a change of one word always shows, and depends on the word's place, so that moved words show.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <cstring>

namespace fxprune {

using Word = uint64_t __attribute__((aligned(1), may_alias));

constexpr uint64_t kStep = 0x9E3779B97F4A7C15ull;
// Words that a thread must have to be worth waking.
constexpr int64_t kSerialWords = 32 << 10;

inline uint64_t mixed(uint64_t v) {
  v = (v ^ (v >> 30)) * 0xBF58476D1CE4E5B9ull;
  v = (v ^ (v >> 27)) * 0x94D049BB133111EBull;
  return v ^ (v >> 31);
}

inline uint64_t sum_of_mixed(const Word* words, int64_t begin, int64_t end) {
  uint64_t sum = 0, step = kStep * static_cast<uint64_t>(begin + 1);
  for (int64_t i = begin; i < end; ++i, step += kStep) sum += mixed(words[i] + step);
  return sum;
}

inline uint64_t fingerprint(const void* data, int64_t bytes) {
  const int64_t whole = bytes / 8;
  uint64_t last = 0;
  std::memcpy(&last, static_cast<const char*>(data) + whole * 8, bytes % 8);
  std::atomic<uint64_t> sum{bytes % 8 ? mixed(last + kStep * static_cast<uint64_t>(whole + 1)) : 0};
  torch::stable::parallel_for(0, whole, kSerialWords, [&](int64_t begin, int64_t end) {
    sum += sum_of_mixed(static_cast<const Word*>(data), begin, end);
  });
  return sum;
}

}  // namespace fxprune
