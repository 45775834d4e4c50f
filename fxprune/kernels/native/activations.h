// Activations on one vector, within about 1e-7 of exact; nan and inf come out as the textbook formulas give
// them.
#pragma once

#include <limits>

#include "vectors.h"

namespace fxprune {

enum class Activation { kNone, kRelu, kGelu, kGeluTanh, kSilu, kSigmoid, kHardsigmoid, kHardswish };

// Several vectors that go through the same steps side by side: a polynomial is a chain of dependent
// multiply-adds, and only independent chains keep the machine busy.
template <int N, class Vector = Block>
struct Group {
  Vector part[N];

  FXPRUNE_INLINE static Group spread(float value) {
    Group g;
    FXPRUNE_UNROLL
    for (int n = 0; n < N; ++n) g.part[n] = Vector{} + value;
    return g;
  }
};

#define FXPRUNE_OPERATOR(op)                                                    \
  template <int N, class V>                                                     \
  FXPRUNE_INLINE Group<N, V> operator op(Group<N, V> a, const Group<N, V>& b) { \
    FXPRUNE_UNROLL                                                              \
    for (int n = 0; n < N; ++n) a.part[n] = a.part[n] op b.part[n];             \
    return a;                                                                   \
  }                                                                             \
  template <int N, class V>                                                     \
  FXPRUNE_INLINE Group<N, V> operator op(Group<N, V> a, float b) {              \
    FXPRUNE_UNROLL                                                              \
    for (int n = 0; n < N; ++n) a.part[n] = a.part[n] op b;                     \
    return a;                                                                   \
  }
FXPRUNE_OPERATOR(+)
FXPRUNE_OPERATOR(-)
FXPRUNE_OPERATOR(*)
FXPRUNE_OPERATOR(/)
#undef FXPRUNE_OPERATOR

// Where x is below (above) `bound`: `value`; elsewhere, and where x is nan: `other`.
template <int N, class V>
FXPRUNE_INLINE Group<N, V> if_below(const Group<N, V>& x, float bound, float value, Group<N, V> other) {
  FXPRUNE_UNROLL
  for (int n = 0; n < N; ++n) other.part[n] = x.part[n] < bound ? V{} + value : other.part[n];
  return other;
}

template <int N, class V>
FXPRUNE_INLINE Group<N, V> if_above(const Group<N, V>& x, float bound, float value, Group<N, V> other) {
  FXPRUNE_UNROLL
  for (int n = 0; n < N; ++n) other.part[n] = x.part[n] > bound ? V{} + value : other.part[n];
  return other;
}

// fraction * 2^n, with n the integer in the low bits of `shifted`.
template <int N, class V>
FXPRUNE_INLINE Group<N, V> scale(Group<N, V> fraction, const Group<N, V>& shifted) {
  using Integers = typename Vectors<sizeof(V) / 4>::Int;
  FXPRUNE_UNROLL
  for (int n = 0; n < N; ++n) fraction.part[n] *= (V)(((Integers)shifted.part[n] << 23) + 0x3f800000);
  return fraction;
}

// exp(x) for use in 1 / (1 + exp(x)): below -87 it is 0 and above 88 it is inf.
template <int N, class V>
FXPRUNE_INLINE Group<N, V> exponential(const Group<N, V>& x) {
  // Clamped so that the integer arithmetic stays in range; nan passes through.
  const Group<N, V> clamped = if_above(x, 88.0f, 88.0f, if_below(x, -87.0f, -87.0f, x));
  // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits of the mantissa.
  const Group<N, V> shifted = clamped * 1.44269504f + 12582912.0f;
  const Group<N, V> whole = shifted - 12582912.0f;
  // ln 2 in two parts, the first with so few bits that its product with `whole` is exact.
  const Group<N, V> rest = (clamped - whole * 0.693359375f) + whole * 2.12194440e-4f;
  // (exp(r) - 1 - r) / r^2 on [-ln2/2, ln2/2], a Chebyshev fit.
  Group<N, V> p = rest * 1.394613732e-3f + 8.369108441e-3f;
  p = p * rest + 4.166626893e-2f;
  p = p * rest + 1.666651654e-1f;
  p = p * rest + 5.000000078e-1f;
  const Group<N, V> fraction = (rest * rest) * p + (rest + 1.0f);
  constexpr float kInf = std::numeric_limits<float>::infinity();
  return if_above(x, 88.0f, kInf, if_below(x, -87.0f, 0.0f, scale(fraction, shifted)));
}

// The normal distribution's Phi(x) = (1 + erf(x / sqrt 2)) / 2, without division or exp: x times a polynomial
// in x^2.
template <int N, class V>
FXPRUNE_INLINE Group<N, V> normal_cdf(const Group<N, V>& x) {
  // (Phi(x) - 1/2) / x in z = x^2 * 2 / 5.2^2 - 1, a Chebyshev fit for |x| <= 5.2; beyond, Phi is 0 or 1 in
  // fp32.
  constexpr float kCoefficients[] = {
      1.359499786e-01f,  -6.774380766e-02f, 5.002607943e-02f, -3.992530858e-02f, 3.196274443e-02f,
      -2.476443751e-02f, 1.813190752e-02f,  -1.234891971e-02f, 8.014079204e-03f, -5.076685478e-03f,
      2.659598255e-03f,  -9.694050221e-04f, 6.003600211e-04f, -5.656387968e-04f, 2.032845990e-04f};
  const Group<N, V> z = x * x * 7.396449704e-02f - 1.0f;
  Group<N, V> p = z * kCoefficients[14] + kCoefficients[13];
  FXPRUNE_UNROLL
  for (int k = 12; k >= 0; --k) p = p * z + kCoefficients[k];
  return if_above(x, 5.2f, 1.0f, if_below(x, -5.2f, 0.0f, x * p + 0.5f));
}

template <int N, class V>
FXPRUNE_INLINE Group<N, V> hard_sigmoid(const Group<N, V>& x) {
  return if_above(x, 3.0f, 1.0f, if_below(x, -3.0f, 0.0f, (x + 3.0f) * (1.0f / 6.0f)));
}

template <Activation kind, int N, class V>
FXPRUNE_INLINE Group<N, V> activate(const Group<N, V>& x) {
  if constexpr (kind == Activation::kRelu) return if_below(x, 0.0f, 0.0f, x);
  if constexpr (kind == Activation::kGelu) return x * normal_cdf(x);
  if constexpr (kind == Activation::kSilu) return x / (exponential(x * -1.0f) + 1.0f);
  if constexpr (kind == Activation::kSigmoid) return Group<N, V>::spread(1.0f) / (exponential(x * -1.0f) + 1.0f);
  if constexpr (kind == Activation::kHardsigmoid) return hard_sigmoid(x);
  if constexpr (kind == Activation::kHardswish) return x * hard_sigmoid(x);
  if constexpr (kind == Activation::kGeluTanh) {
    // (1 + tanh(u)) / 2 is 1 / (1 + exp(-2u)), here with u = sqrt(2 / pi) (x + 0.044715 x^3).
    return x / (exponential(x * (x * x * -0.0713548163f - 1.5957691216f)) + 1.0f);
  }
  return x;
}

}  // namespace fxprune
