// Words of a bitmap made dense in registers: 32 bits and the values of those that are set become 32 floats.
#pragma once

#include <type_traits>

#include "vectors.h"

namespace fxprune {

// Columns of a word of bits, and the vectors that hold them.
constexpr int kWord = 32;
constexpr int kParts = kWord / kLanes;
using Wide = Float<kLanes>;

// Elements past its end that a read of values may touch.
constexpr int64_t kPast = 32;

// How a value is stored.
struct Single {
  using Type = float;
};
struct Brain {
  using Type = uint16_t;
};
struct Half {
  using Type = uint16_t;
};

#if FXPRUNE_LANES == 16 && defined(__AVX512VBMI2__)
#define FXPRUNE_EXPANDS_WORDS 1
#endif

// Whether the parts of a word are its even and its odd columns, not the columns in their order.
template <class Stored>
constexpr bool kEvenOdd = false;
#if FXPRUNE_EXPANDS_WORDS
template <>
constexpr bool kEvenOdd<Brain> = true;
#endif

FXPRUNE_INLINE float widen(Single, float value) { return value; }

FXPRUNE_INLINE float widen(Brain, uint16_t value) {
  const uint32_t bits = uint32_t{value} << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

FXPRUNE_INLINE float widen(Half, uint16_t value) {
  _Float16 half;
  std::memcpy(&half, &value, 2);
  return static_cast<float>(half);
}

FXPRUNE_INLINE float narrow(Single, float value) { return value; }

// To the nearest, ties to even; nan stays nan.
FXPRUNE_INLINE uint16_t narrow(Brain, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}

FXPRUNE_INLINE uint16_t narrow(Half, float value) {
  const _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

// kLanes stored values as floats.
#if FXPRUNE_LANES == 16
FXPRUNE_INLINE Wide widened(Single, const float* from) { return load<Wide>(from); }
FXPRUNE_INLINE Wide widened(Brain, const uint16_t* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
  return (Wide)_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
FXPRUNE_INLINE Wide widened(Half, const uint16_t* from) {
  return (Wide)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
}
#elif FXPRUNE_LANES == 8
FXPRUNE_INLINE Wide widened(Single, const float* from) { return load<Wide>(from); }
FXPRUNE_INLINE Wide widened(Brain, const uint16_t* from) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
  return (Wide)_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
FXPRUNE_INLINE Wide widened(Half, const uint16_t* from) {
#if defined(__F16C__)
  return (Wide)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
  Wide wide;
  for (int j = 0; j < kLanes; ++j) wide[j] = widen(Half{}, from[j]);
  return wide;
#endif
}

// For eight bits: which of the values that follow one another each lane takes, or -1.
struct Places {
  int8_t lanes[256][8];

  constexpr Places() : lanes() {
    for (int bits = 0; bits < 256; ++bits)
      for (int j = 0, next = 0; j < 8; ++j) lanes[bits][j] = static_cast<int8_t>(bits >> j & 1 ? next++ : -1);
  }
};
constexpr Places kPlaces;
#endif

// The low kLanes bits and the values of those that are set, as floats; other lanes are +0.
template <class Stored>
FXPRUNE_INLINE Wide expand(uint32_t bits, const typename Stored::Type* values) {
#if FXPRUNE_LANES == 16
  return (Wide)_mm512_maskz_expand_ps(static_cast<__mmask16>(bits), (__m512)widened(Stored{}, values));
#elif FXPRUNE_LANES == 8
  const __m256i at = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)kPlaces.lanes[bits & 255]));
  const __m256 found = _mm256_permutevar8x32_ps((__m256)widened(Stored{}, values), at);
  return (Wide)_mm256_blendv_ps(found, _mm256_setzero_ps(), _mm256_castsi256_ps(at));
#else
  Wide wide = {};
  for (int j = 0; j < kLanes; ++j)
    if (bits >> j & 1) wide[j] = widen(Stored{}, *values++);
  return wide;
#endif
}

// The columns of a word; returns where the values of the next one begin.
template <class Stored>
FXPRUNE_INLINE const typename Stored::Type* expand_word(
    uint32_t bits, const typename Stored::Type* values, Wide* parts) {
#if FXPRUNE_EXPANDS_WORDS
  if constexpr (!std::is_same_v<Stored, Single>) {
    const __m512i word = _mm512_maskz_expand_epi16(bits, _mm512_loadu_si512(values));
    if constexpr (kEvenOdd<Stored>) {
      parts[0] = (Wide)_mm512_castsi512_ps(_mm512_slli_epi32(word, 16));
      parts[1] = (Wide)_mm512_castsi512_ps(_mm512_and_si512(word, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
    } else {
      parts[0] = (Wide)_mm512_cvtph_ps(_mm512_castsi512_si256(word));
      parts[1] = (Wide)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(word, 1));
    }
    return values + __builtin_popcount(bits);
  }
#endif
  constexpr uint32_t kMask = (uint32_t{1} << kLanes) - 1;
  const typename Stored::Type* at = values;
  FXPRUNE_UNROLL
  for (int p = 0; p < kParts; ++p) {
    parts[p] = expand<Stored>(bits, at);
    at = p + 1 < kParts ? at + __builtin_popcount(bits & kMask) : at;
    bits >>= p + 1 < kParts ? kLanes : 0;
  }
  return at + __builtin_popcount(bits);
}

// x[0:columns] as floats in the order in which a word's columns come, filled up with zeros to whole words.
template <class Stored, class Given>
void in_order(const typename Given::Type* x, int64_t columns, float* __restrict out) {
  for (int64_t word = 0; word < columns; word += kWord, out += kWord) {
    float wide[kWord] = {};
    const int64_t some = columns - word < kWord ? columns - word : kWord;
    for (int64_t j = 0; j < some; ++j) wide[j] = widen(Given{}, x[word + j]);
    for (int j = 0; j < kWord; ++j) out[j] = wide[kEvenOdd<Stored> ? j % (kWord / 2) * 2 + j / (kWord / 2) : j];
  }
}

}  // namespace fxprune
