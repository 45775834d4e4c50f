// Fixed-width float vectors on the compiler's vector extensions: one source for AVX-512, AVX2 and NEON.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512VL__) && defined(__AVX512BW__) && defined(__FMA__)
#define FXPRUNE_ISA "AVX-512"
#define FXPRUNE_LANES 16
#elif defined(__AVX2__) && defined(__FMA__)
#define FXPRUNE_ISA "AVX2"
#define FXPRUNE_LANES 8
#elif defined(__ARM_NEON) && defined(__aarch64__)
#define FXPRUNE_ISA "NEON"
#define FXPRUNE_LANES 4
#else
#error "fxprune needs a CPU with AVX2 and FMA, AVX-512, or NEON"
#endif

#define FXPRUNE_INLINE inline __attribute__((always_inline))
// Kept out of its callers, of which there is one per activation: it would only be compiled once for each.
#define FXPRUNE_OUTLINE __attribute__((noinline))
#if defined(__clang__)
#define FXPRUNE_UNROLL _Pragma("unroll")
#define FXPRUNE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FXPRUNE_UNROLL _Pragma("GCC unroll 64")
#define FXPRUNE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, IntBlock{__VA_ARGS__})
#endif

namespace fxprune {

// Widest vector of the machine, in floats.
constexpr int kLanes = FXPRUNE_LANES;

template <int Lanes>
struct Vectors {
  typedef float Float __attribute__((vector_size(Lanes * 4)));
  typedef int32_t Int __attribute__((vector_size(Lanes * 4)));
};

template <int Lanes>
using Float = typename Vectors<Lanes>::Float;

// Width of the blocks that are transposed in registers and of the epilogue. Eight also with AVX-512: shuffles
// of 256-bit vectors are issued at twice the rate of 512-bit ones.
constexpr int kBlock = kLanes < 8 ? kLanes : 8;
using Block = Float<kBlock>;
using IntBlock = Vectors<kBlock>::Int;

template <class Vector>
FXPRUNE_INLINE Vector load(const float* from) {
  Vector value;
  std::memcpy(&value, from, sizeof(Vector));
  return value;
}

template <class Vector>
FXPRUNE_INLINE void store(float* to, Vector value) {
  std::memcpy(to, &value, sizeof(Vector));
}

// Asks for what stands some bytes after what is read now. A core that waits for memory reads a single stream fastest when
// that is a page, measured at 12 of 13 GB/s against 9 without: by itself it looks no further than the page's end.
template <int Bytes>
FXPRUNE_INLINE void ask_ahead(const void* reading) {
  __builtin_prefetch(static_cast<const char*>(reading) + Bytes);
}
constexpr int kAhead = 4096;

// The sum of all lanes.
FXPRUNE_INLINE float total(Float<4> v) { return (v[0] + v[2]) + (v[1] + v[3]); }

#if FXPRUNE_LANES >= 8
FXPRUNE_INLINE float total(Float<8> v) {
  return total((Float<4>)_mm256_castps256_ps128((__m256)v) + (Float<4>)_mm256_extractf128_ps((__m256)v, 1));
}
#endif
#if FXPRUNE_LANES >= 16
FXPRUNE_INLINE float total(Float<16> v) {
  const __m512d halves = _mm512_castps_pd((__m512)v);
  return total((Float<8>)_mm512_castps512_ps256((__m512)v) +
               (Float<8>)_mm256_castpd_ps(_mm512_extractf64x4_pd(halves, 1)));
}
#endif

// The first `lanes` lanes from memory, the others zero; reads nothing past them.
inline Block load_some(const float* from, int64_t lanes) {
  Block value = {};
  std::memcpy(&value, from, lanes * sizeof(float));
  return value;
}

inline void store_some(float* to, Block value, int64_t lanes) {
  std::memcpy(to, &value, lanes * sizeof(float));
}

// Transposes a kBlock x kBlock block held in registers, in place.
FXPRUNE_INLINE void transpose(Block* r) {
  Block t[kBlock];
#if FXPRUNE_LANES >= 8
  FXPRUNE_UNROLL
  for (int i = 0; i < 8; i += 2) {
    t[i] = FXPRUNE_SHUFFLE(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    t[i + 1] = FXPRUNE_SHUFFLE(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  FXPRUNE_UNROLL
  for (int i = 0; i < 8; i += 4) {
    r[i] = FXPRUNE_SHUFFLE(t[i], t[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    r[i + 1] = FXPRUNE_SHUFFLE(t[i], t[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    r[i + 2] = FXPRUNE_SHUFFLE(t[i + 1], t[i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
    r[i + 3] = FXPRUNE_SHUFFLE(t[i + 1], t[i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  FXPRUNE_UNROLL
  for (int i = 0; i < 4; ++i) {
    t[i] = FXPRUNE_SHUFFLE(r[i], r[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    t[i + 4] = FXPRUNE_SHUFFLE(r[i], r[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
  FXPRUNE_UNROLL
  for (int i = 0; i < 8; ++i) r[i] = t[i];
#else
  FXPRUNE_UNROLL
  for (int i = 0; i < 4; i += 2) {
    t[i] = FXPRUNE_SHUFFLE(r[i], r[i + 1], 0, 4, 1, 5);
    t[i + 1] = FXPRUNE_SHUFFLE(r[i], r[i + 1], 2, 6, 3, 7);
  }
  r[0] = FXPRUNE_SHUFFLE(t[0], t[2], 0, 1, 4, 5);
  r[1] = FXPRUNE_SHUFFLE(t[0], t[2], 2, 3, 6, 7);
  r[2] = FXPRUNE_SHUFFLE(t[1], t[3], 0, 1, 4, 5);
  r[3] = FXPRUNE_SHUFFLE(t[1], t[3], 2, 3, 6, 7);
#endif
}

}  // namespace fxprune
