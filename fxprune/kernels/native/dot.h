// One token: sums over the nonzeros of a row, x gathered by their columns.
#pragma once

#include <fstream>
#include <string>

#include "microkernels.h"

namespace fxprune {

// Sum over a row's nonzeros for one token, each element of x fetched by itself.
struct OneByOne {
  FXPRUNE_INLINE static float row(const float* values, const uint16_t* columns, int64_t count, const float* x) {
    using Quad = Float<4>;
    Quad a = {}, b = {};
    int64_t n = 0;
    for (; n + 8 <= count; n += 8) {
      const uint16_t* c = columns + n;
      a += load<Quad>(values + n) * Quad{x[c[0]], x[c[1]], x[c[2]], x[c[3]]};
      b += load<Quad>(values + n + 4) * Quad{x[c[4]], x[c[5]], x[c[6]], x[c[7]]};
    }
    float rest = 0;
    for (; n < count; ++n) rest += values[n] * x[columns[n]];
    return total(a + b) + rest;
  }
};

#if FXPRUNE_LANES == 16
// The same by gathers.
struct Gathered {
  FXPRUNE_INLINE static float row(const float* values, const uint16_t* columns, int64_t count, const float* x) {
    Float<16> a = {}, b = {};
    int64_t n = 0;
    for (; n + 32 <= count; n += 32) {
      ask_ahead<kAhead>(values + n);
      ask_ahead<kAhead>(values + n + 16);
      ask_ahead<kAhead / 2>(columns + n);
      a += load<Float<16>>(values + n) * gather(x, _mm256_loadu_si256((const __m256i*)(columns + n)));
      b += load<Float<16>>(values + n + 16) * gather(x, _mm256_loadu_si256((const __m256i*)(columns + n + 16)));
    }
    for (; n < count; n += 16) {
      ask_ahead<kAhead>(values + n);
      const __mmask16 lanes = count - n < 16 ? (1u << (count - n)) - 1 : 0xffff;
      const __m512i at = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, columns + n));
      const __m512 found = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), lanes, at, x, 4);
      a += (Float<16>)_mm512_maskz_loadu_ps(lanes, values + n) * (Float<16>)found;
    }
    return total(a + b);
  }

  FXPRUNE_INLINE static Float<16> gather(const float* x, __m256i columns) {
    return (Float<16>)_mm512_i32gather_ps(_mm512_cvtepu16_epi32(columns), x, 4);
  }
};
#elif FXPRUNE_LANES == 8
struct Gathered {
  FXPRUNE_INLINE static float row(const float* values, const uint16_t* columns, int64_t count, const float* x) {
    Float<8> a = {}, b = {};
    int64_t n = 0;
    for (; n + 16 <= count; n += 16) {
      ask_ahead<kAhead>(values + n);
      ask_ahead<kAhead / 2>(columns + n);
      a += load<Float<8>>(values + n) * gather(x, columns + n);
      b += load<Float<8>>(values + n + 8) * gather(x, columns + n + 8);
    }
    for (; n + 8 <= count; n += 8) a += load<Float<8>>(values + n) * gather(x, columns + n);
    float rest = 0;
    for (; n < count; ++n) rest += values[n] * x[columns[n]];
    return total(a + b) + rest;
  }

  FXPRUNE_INLINE static Float<8> gather(const float* x, const uint16_t* columns) {
    const __m256i at = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)columns));
    return (Float<8>)_mm256_i32gather_ps(x, at, 4);
  }
};
#else
using Gathered = OneByOne;
#endif

// multiply for one token: x is the K-block's part of the token itself.
template <class Row, bool Accumulate>
FXPRUNE_OUTLINE void dot(const Segments& s, const float* __restrict x, float* __restrict tile) {
  const float* values = s.values;
  const uint16_t* columns = s.columns;
  for (int64_t r = 0; r < s.rows; ++r) {
    const int64_t count = s.counts[r];
    const float sum = Row::row(values, columns, count, x);
    float& out = tile[s.order[r]];
    out = Accumulate ? out + sum : sum;
    values += count;
    columns += count;
  }
}

// Whether gathers are faster here than one load after another: they are on Intel's processors, but for those whose
// microcode slows them down against Downfall; on AMD's they take longer.
inline bool gathers_pay() {
#if defined(FXPRUNE_GATHERS)
  return FXPRUNE_GATHERS;
#elif defined(__x86_64__)
  static const bool pay = [] {
    std::ifstream file("/sys/devices/system/cpu/vulnerabilities/gather_data_sampling");
    std::string state;
    std::getline(file, state);
    return __builtin_cpu_is("intel") && (state == "Not affected" || state.rfind("Vulnerable", 0) == 0);
  }();
  return pay;
#else
  return false;
#endif
}

}  // namespace fxprune
