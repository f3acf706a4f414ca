// Vectors of 16 numbers, and what is made of them: products, exponentials, transposed matrices.
//
// Numbers are bfloat16 or float, sums are float. Vectors are GCC's and Clang's extension: one register with AVX-512,
// several elsewhere. Not-a-number must come through everywhere, so nothing here may be built with -ffast-math.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, ivec{__VA_ARGS__})
#endif

namespace {

struct bf16 {
  uint16_t bits;
};

constexpr int W = 16;
typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));
typedef uint32_t uvec __attribute__((vector_size(4 * W)));
typedef uint16_t hvec __attribute__((vector_size(2 * W)));
constexpr ivec LANES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline vec load(const float* p) {
  vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline vec load(const bf16* p) {
#ifdef __AVX512F__  // GCC makes several instructions of the conversion
  return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
  hvec h;
  std::memcpy(&h, p, sizeof h);
  return (vec)(__builtin_convertvector(h, uvec) << 16);
#endif
}
inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }
inline void store(bf16* p, vec v) {  // to the nearest, ties to even
  uvec u = (uvec)v;
  uvec rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  uvec nan = (uvec)(v != v);
  hvec h = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), hvec);
  std::memcpy(p, &h, sizeof h);
}

// The first n (less than 16) of a vector; the others are 0, and are not touched in memory.
template <class T>
inline vec load_some(const T* p, long n) {
  T part[W] = {};
  std::memcpy(part, p, n * sizeof(T));
  return load(part);
}
template <class T>
inline void store_some(T* p, vec v, long n) {
  T part[W];
  store(part, v);
  std::memcpy(p, part, n * sizeof(T));
}

// Calls each(i, load, store) for every 16 of n elements, and for the rest.
template <class T, class F>
inline void each_vector(long n, F f) {
  long i = 0;
  for (; i + W <= n; i += W)
    f(i, [](const T* p) { return load(p); }, [](T* p, vec v) { store(p, v); });
  if (i < n)
    f(i, [n, i](const T* p) { return load_some(p, n - i); }, [n, i](T* p, vec v) { store_some(p, v, n - i); });
}

// One step of a transposition: of every 2 H lanes the first H (second H) of both vectors.
template <int H>
inline vec firsts(vec a, vec b) {
  if constexpr (H == 8) return SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  if constexpr (H == 4) return SHUFFLE(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
  if constexpr (H == 2) return SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
  if constexpr (H == 1) return SHUFFLE(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
}
template <int H>
inline vec seconds(vec a, vec b) {
  if constexpr (H == 8) return SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  if constexpr (H == 4) return SHUFFLE(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  if constexpr (H == 2) return SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  if constexpr (H == 1) return SHUFFLE(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

template <int H = W / 2>
inline void transpose(vec (&v)[W]) {
  for (int i = 0; i < W; i++)
    if (!(i & H)) {
      const vec first = v[i], second = v[i + H];
      v[i] = firsts<H>(first, second);
      v[i + H] = seconds<H>(first, second);
    }
  if constexpr (H > 1) transpose<H / 2>(v);
}

// Lane l of the result is the sum of the lanes of v[l], which is used up.
template <int H = W / 2>
inline vec sums(vec (&v)[W]) {
  for (int i = 0; i < H; i++) v[i] = firsts<H>(v[i], v[i + H]) + seconds<H>(v[i], v[i + H]);
  if constexpr (H > 1) return sums<H / 2>(v);
  return v[0];
}
inline float sum(vec v) {
  vec all[W] = {v};
  return sums(all)[0];
}

// Adds the products of n elements to the lanes of `total`, for `C` rows of `a` against each of R rows of `b`.
template <int C, int R, class T>
inline void dots(vec (&totals)[C][R], const T* const (&a)[C], const T* b, long b_stride, long n) {
  long i = 0;
#ifdef __AVX512BF16__
  if constexpr (sizeof(T) == 2)
    for (; i + 2 * W <= n; i += 2 * W)
      for (int r = 0; r < R; r++) {
        const __m512bh right = (__m512bh)_mm512_loadu_si512(b + r * b_stride + i);
        for (int c = 0; c < C; c++)
          totals[c][r] =
              (vec)_mm512_dpbf16_ps((__m512)totals[c][r], (__m512bh)_mm512_loadu_si512(a[c] + i), right);
      }
#endif
  each_vector<T>(n - i, [&](long j, auto get, auto) {
    for (int r = 0; r < R; r++) {
      const vec right = get(b + r * b_stride + i + j);
      for (int c = 0; c < C; c++) totals[c][r] += get(a[c] + i + j) * right;
    }
  });
}

// Cephes' expf: 2^n times a polynomial of the rest; within 2 units in the last place.
inline vec exp(vec x) {
  x = x > 88.0f ? vec{} + 88.0f : x;
  x = x < -87.0f ? vec{} - 87.0f : x;
  ivec n = __builtin_convertvector(x * 1.44269504f + (x < 0 ? vec{} - 0.5f : vec{} + 0.5f), ivec);
  vec k = __builtin_convertvector(n, vec);
  vec r = x - k * 0.693359375f + k * 2.12194440e-4f;
  vec p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return (p * r * r + r + 1.0f) * (vec)((n + 127) << 23);
}

}  // namespace
