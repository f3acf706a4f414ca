// The CPU's part of a forward pass beside the matrix products: what cuda_kernels.py is on a GPU.
//
// Built for the machine that it runs on, by its C++ compiler, when an engine is first made (cpu_kernels.py). Numbers are
// bfloat16 or float, sums are float. Vectors of 16 are GCC's and Clang's extension: one register with AVX-512,
// several elsewhere. Not-a-number must come through everywhere, so nothing here may be built with -ffast-math.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512BF16__
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

inline vec load(const float* p) {
  vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline vec load(const bf16* p) {
  hvec h;
  std::memcpy(&h, p, sizeof h);
  return (vec)(__builtin_convertvector(h, uvec) << 16);
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

// Lane l of the result is the sum of the lanes of v[l], which is used up.
inline vec sums(vec (&v)[W]) {
  for (int i = 0; i < 8; i++)
    v[i] = SHUFFLE(v[i], v[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           SHUFFLE(v[i], v[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  for (int i = 0; i < 4; i++)
    v[i] = SHUFFLE(v[i], v[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           SHUFFLE(v[i], v[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int i = 0; i < 2; i++)
    v[i] = SHUFFLE(v[i], v[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           SHUFFLE(v[i], v[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  return SHUFFLE(v[0], v[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
         SHUFFLE(v[0], v[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
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
  x = x > 88.0f ? 88.0f + 0 * x : x;
  x = x < -87.0f ? -87.0f + 0 * x : x;
  ivec n = __builtin_convertvector(x * 1.44269504f + (x < 0 ? -0.5f + 0 * x : 0.5f + 0 * x), ivec);
  vec k = __builtin_convertvector(n, vec);
  vec r = x - k * 0.693359375f + k * 2.12194440e-4f;
  vec p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return (p * r * r + r + 1.0f) * (vec)((n + 127) << 23);
}

// One target's columns and every mixture's entries in them: those of mixture m are from starts[m] to starts[m + 1].
struct Target {
  const void *a, *b;  // (layers, columns of all targets with the same input, in), (layers, columns, out)
  long a_stride, b_stride, out, y_offset;
  const int32_t *starts, *a_columns, *b_columns;
  const float* weights;
};

// y[r] += sum over entries e of weight_e (A_e . x[r]) B_e, for R tokens with the same entries.
template <int R, class T>
void lora_tokens(const T* x, long in, T* y, long y_stride, long out, const T* a, const T* b, const int32_t* a_columns,
                 const int32_t* b_columns, const float* weights, long count, float* shrunk) {
  constexpr int C = R == 1 ? W / 2 : W / R;
  for (long e = 0; e < count; e += C) {
    vec totals[W / R][R] = {};
    const T* rows[C];
    for (int c = 0; c < C; c++) rows[c] = a + a_columns[std::min(e + c, count - 1)] * in;
    dots<C, R>(reinterpret_cast<vec(&)[C][R]>(totals), rows, x, in, in);
    float products[W];
    store(products, sums(reinterpret_cast<vec(&)[W]>(totals)));
    for (int i = 0; i < std::min<long>(C, count - e) * R; i++) shrunk[e * R + i] = weights[e + i / R] * products[i];
  }
  constexpr int V = 4;
  long o = 0;
  for (; o + V * W <= out; o += V * W) {
    vec totals[R][V];
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) totals[r][v] = load(y + r * y_stride + o + v * W);
    for (long e = 0; e < count; e++)
      for (int v = 0; v < V; v++) {
        const vec column = load(b + b_columns[e] * out + o + v * W);
        for (int r = 0; r < R; r++) totals[r][v] += shrunk[e * R + r] * column;
      }
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) store(y + r * y_stride + o + v * W, totals[r][v]);
  }
  each_vector<T>(out - o, [&](long i, auto get, auto put) {
    for (int r = 0; r < R; r++) {
      T* place = y + r * y_stride + o + i;
      vec total = get(place);
      for (long e = 0; e < count; e++) total += shrunk[e * R + r] * get(b + b_columns[e] * out + o + i);
      put(place, total);
    }
  });
}

template <class T>
void lora_add(const T* x, long in, T* y, long y_stride, long tokens, const Target* targets, long n_targets,
              long layer, int shared, int threads) {
  constexpr long R = 4;
  const long step = shared ? R : 1, blocks = (tokens + step - 1) / step;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> shrunk;
#pragma omp for schedule(dynamic, 2)
    for (long block = 0; block < blocks; block++) {
      const long first = block * step, last = std::min(first + step, tokens), mixture = shared ? 0 : first;
      for (const Target* target = targets; target < targets + n_targets; target++) {
        const long begin = target->starts[mixture], count = target->starts[mixture + 1] - begin;
        if (!count) continue;
        shrunk.resize(count * R);
        auto add = [&](auto lora, long t) {
          lora(x + t * in, in, y + t * y_stride + target->y_offset, y_stride, target->out,
               static_cast<const T*>(target->a) + layer * target->a_stride,
               static_cast<const T*>(target->b) + layer * target->b_stride, target->a_columns + begin,
               target->b_columns + begin, target->weights + begin, count, shrunk.data());
        };
        if (last - first == R)
          add(lora_tokens<R, T>, first);
        else
          for (long t = first; t < last; t++) add(lora_tokens<1, T>, t);
      }
    }
  }
}

template <class T>
void add_norm(const T* x, const T* delta, const T* weight, float eps, T* total, T* normed, long tokens, long width,
              int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long t = 0; t < tokens; t++) {
    vec squares = {};
    each_vector<T>(width, [&](long i, auto get, auto put) {
      const long at = t * width + i;
      vec v = get(x + at);
      if (delta) {
        put(total + at, v + get(delta + at));  // rounded first, as the next layers will see it
        v = get(total + at);
      }
      squares += v * v;
    });
    const float scale = 1 / std::sqrt(sum(squares) / width + eps);
    const T* source = delta ? total : x;
    each_vector<T>(width, [&](long i, auto get, auto put) {
      put(normed + t * width + i, get(source + t * width + i) * scale * get(weight + i));
    });
  }
}

template <class T>
void silu_mul(const T* gate_up, T* y, long tokens, long width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long t = 0; t < tokens; t++) {
    const T* gate = gate_up + 2 * t * width;
    each_vector<T>(width, [&](long i, auto get, auto put) {
      vec g = get(gate + i);
      put(y + t * width + i, g / (1.0f + exp(-g)) * get(gate + width + i));
    });
  }
}

// Where a head's vector of one position is in the cache: (rows, kv_heads, length, dim).
struct Cache {
  long heads, length, dim;
  long at(long row, long head, long position) const { return ((row * heads + head) * length + position) * dim; }
};

template <class T>
void rotate_and_store(const T* qkv, const T* cosines, const T* sines, const int64_t* rows, const int64_t* positions,
                      T* keys, T* values, T* q, long tokens, long heads, Cache cache, int threads) {
  const long dim = cache.dim, half = dim / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long t = 0; t < tokens; t++) {
    const T* cosine = cosines + positions[t] * dim;
    const T* sine = sines + positions[t] * dim;
    const T* source = qkv + t * (heads + 2 * cache.heads) * dim;
    for (long h = 0; h < heads + cache.heads; h++, source += dim) {
      T* target = h < heads ? q + (t * heads + h) * dim : keys + cache.at(rows[t], h - heads, positions[t]);
      each_vector<T>(half, [&](long i, auto get, auto put) {
        vec first = get(source + i), second = get(source + half + i);
        put(target + i, first * get(cosine + i) - second * get(sine + i));
        put(target + half + i, second * get(cosine + half + i) + first * get(sine + half + i));
      });
    }
    for (long h = 0; h < cache.heads; h++, source += dim)
      std::memcpy(values + cache.at(rows[t], h, positions[t]), source, dim * sizeof(T));
  }
}

// y[g] = sum over positions of scores[g][p] value[p], for G heads.
template <int G, class T>
void weigh(const float* scores, const T* value, long length, long dim, T* y) {
  each_vector<T>(dim, [&](long i, auto get, auto put) {
    vec totals[G] = {};
    for (long p = 0; p < length; p++) {
      const vec v = get(value + p * dim + i);
      for (int g = 0; g < G; g++) totals[g] += scores[g * length + p] * v;
    }
    for (int g = 0; g < G; g++) put(y + g * dim + i, totals[g]);
  });
}

// One query a row over its own keys alone; the queries that share a KV head go together.
template <class T>
void decode_attention(const T* q, const T* keys, const T* values, const int64_t* positions, T* y, long n, long heads,
                      Cache cache, long window, int threads) {
  const long dim = cache.dim, group = heads / cache.heads;
  const float scale = 1 / std::sqrt(float(dim));
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> scores;
#pragma omp for schedule(dynamic, 4)
    for (long item = 0; item < n * cache.heads; item++) {
      const long row = item / cache.heads, head = item % cache.heads;
      const long end = positions[row] + 1, begin = window && end > window ? end - window : 0, length = end - begin;
      const T* key = keys + cache.at(row, head, begin);
      const T* value = values + cache.at(row, head, begin);
      const long place = (row * heads + head * group) * dim;
      scores.resize(group * length);
      for (long p = 0; p < length; p += W)
        for (long g = 0; g < group; g++) {
          vec totals[W][1] = {};
          const T* rows[W];
          for (int i = 0; i < W; i++) rows[i] = key + std::min(p + i, length - 1) * dim;
          dots<W, 1>(totals, rows, q + place + g * dim, 0, dim);
          const vec products = scale * sums(reinterpret_cast<vec(&)[W]>(totals));
          length - p < W ? store_some(&scores[g * length + p], products, length - p)
                         : store(&scores[g * length + p], products);
        }
      for (long g = 0; g < group; g++) {
        float* score = &scores[g * length];
        const float highest = *std::max_element(score, score + length);
        vec totals = {};
        each_vector<float>(length, [&](long i, auto get, auto put) {
          put(score + i, exp(get(score + i) - highest));
          totals += get(score + i);
        });
        const float share = 1 / sum(totals);
        for (long p = 0; p < length; p++) score[p] *= share;
      }
      for (long g = 0; g < group; g += 4) {
        constexpr decltype(&weigh<1, T>) weigh_some[] = {weigh<1, T>, weigh<2, T>, weigh<3, T>, weigh<4, T>};
        weigh_some[std::min(group - g, 4L) - 1](&scores[g * length], value, length, dim, y + place + g * dim);
      }
    }
  }
}

#ifdef __AVX512BF16__
// y = x W^T for R tokens and N vectors of outputs. `weights` has 16 outputs a panel: (in / 2, 16, 2).
template <int R, int N>
void linear_tile(const bf16* x, long in, const bf16* weights, const bf16* bias, bf16* y, long out, long left) {
  __m512 totals[R][N] = {};
  for (long k = 0; k < in; k += 2) {
    __m512bh columns[N];
    for (int n = 0; n < N; n++) {
      const bf16* column = weights + (n * in + k) * W;
      columns[n] = (__m512bh)_mm512_loadu_si512(column);
      if (R > 1) __builtin_prefetch(column + N * W * in, 0, 2);  // the next panels'
    }
    for (int r = 0; r < R; r++) {
      int32_t pair;
      std::memcpy(&pair, x + r * in + k, sizeof pair);
      const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
      for (int n = 0; n < N; n++) totals[r][n] = _mm512_dpbf16_ps(totals[r][n], columns[n], both);
    }
  }
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) {
      const long width = std::min<long>(W, left - n * W);
      const vec total = (vec)totals[r][n] + (bias ? load_some(bias + n * W, width) : vec{});
      width == W ? store(y + r * out + n * W, total) : store_some(y + r * out + n * W, total, width);
    }
}

template <int N>
void linear_panels(const bf16* x, long in, const bf16* weights, const bf16* bias, bf16* y, long out, long tokens,
                   long left) {
  constexpr decltype(&linear_tile<1, N>) tiles[] = {linear_tile<1, N>, linear_tile<2, N>, linear_tile<3, N>,
                                                    linear_tile<4, N>, linear_tile<5, N>, linear_tile<6, N>,
                                                    linear_tile<7, N>, linear_tile<8, N>};
  for (long t = 0; t < tokens; t += 8)
    tiles[std::min(tokens - t, 8L) - 1](x + t * in, in, weights, bias, y + t * out, out, left);
}
#endif

}  // namespace

#ifdef __AVX512BF16__
extern "C" void linear_bfloat16(const bf16* x, long in, const bf16* weights, const bf16* bias, bf16* y, long out,
                                long tokens, int threads) {
  constexpr long N = 3;  // with 8 tokens, 24 sums, 3 weights and a pair of inputs are in registers
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long o = 0; o < out; o += N * W) {
    constexpr decltype(&linear_panels<1>) panels[] = {linear_panels<1>, linear_panels<2>, linear_panels<3>};
    const long vectors = std::min((out - o + W - 1) / W, N);
    panels[vectors - 1](x, in, weights + o * in, bias ? bias + o : nullptr, y + o, out, tokens, out - o);
  }
}
#endif

#define EXPORT(SUFFIX, T)                                                                                              \
  extern "C" void lora_add_##SUFFIX(const T* x, long in, T* y, long y_stride, long tokens, const Target* targets,     \
                                    long n_targets, long layer, int shared, int threads) {                            \
    lora_add(x, in, y, y_stride, tokens, targets, n_targets, layer, shared, threads);                                 \
  }                                                                                                                    \
  extern "C" void add_norm_##SUFFIX(const T* x, const T* delta, const T* weight, float eps, T* total, T* normed,      \
                                    long tokens, long width, int threads) {                                           \
    add_norm(x, delta, weight, eps, total, normed, tokens, width, threads);                                           \
  }                                                                                                                    \
  extern "C" void silu_mul_##SUFFIX(const T* gate_up, T* y, long tokens, long width, int threads) {                   \
    silu_mul(gate_up, y, tokens, width, threads);                                                                     \
  }                                                                                                                    \
  extern "C" void rotate_and_store_##SUFFIX(const T* qkv, const T* cosines, const T* sines, const int64_t* rows,      \
                                            const int64_t* positions, T* keys, T* values, T* q, long tokens,          \
                                            long heads, long kv_heads, long length, long dim, int threads) {          \
    rotate_and_store(qkv, cosines, sines, rows, positions, keys, values, q, tokens, heads, {kv_heads, length, dim},   \
                     threads);                                                                                        \
  }                                                                                                                    \
  extern "C" void decode_attention_##SUFFIX(const T* q, const T* keys, const T* values, const int64_t* positions,     \
                                            T* y, long n, long heads, long kv_heads, long length, long dim,           \
                                            long window, int threads) {                                               \
    decode_attention(q, keys, values, positions, y, n, heads, {kv_heads, length, dim}, window, threads);              \
  }

EXPORT(bfloat16, bf16)
EXPORT(float32, float)
