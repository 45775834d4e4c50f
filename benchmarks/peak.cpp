// What a core can do at most: multiply-adds from registers, and reads from memory, with vectors as wide as it has.
#include <cstddef>

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

typedef float Vector __attribute__((vector_size(kBytes)));
constexpr int kLanes = kBytes / sizeof(float), kChains = 12;

// `rounds` multiply-adds into each of kChains vectors: more than are needed to hide each other's latency.
extern "C" float multiply_add(std::size_t rounds) {
  Vector x = Vector{} + 0.5f, y = Vector{} + 1.0f;
  // Or the compiler would work it out beforehand, and starts that are equal it would compute once.
  asm volatile("" : "+m"(x), "+m"(y));
  Vector a = y, b = a + y, c = b + y, d = c + y, e = d + y, f = e + y;
  Vector g = f + y, h = g + y, i = h + y, j = i + y, k = j + y, l = k + y;
  for (std::size_t n = 0; n < rounds; ++n) {
    a = a * x + y, b = b * x + y, c = c * x + y, d = d * x + y, e = e * x + y, f = f * x + y;
    g = g * x + y, h = h * x + y, i = i * x + y, j = j * x + y, k = k * x + y, l = l * x + y;
    asm volatile("" ::: "memory");
  }
  const Vector total = ((a + b) + (c + d)) + ((e + f) + (g + h)) + ((i + j) + (k + l));
  return total[0];
}

// Floating-point operations of one round.
extern "C" int operations() { return 2 * kChains * kLanes; }

// The sum of `count` floats at `data`, which is aligned to a vector, as far as they fill four vectors.
extern "C" float read(const float* data, std::size_t count) {
  Vector a{}, b{}, c{}, d{};
  // Four parts at once: the processor's own prefetcher stops at the end of each page.
  const std::size_t part = count / kLanes / 4;
  const Vector* from = reinterpret_cast<const Vector*>(data);
  for (std::size_t n = 0; n < part; ++n) {
    a += from[n], b += from[n + part], c += from[n + 2 * part], d += from[n + 3 * part];
  }
  const Vector total = (a + b) + (c + d);
  return total[0];
}
