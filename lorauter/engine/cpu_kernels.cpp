// The CPU's part of a forward pass beside the matrix products: what cuda_kernels.py is on a GPU.
//
// Built for the machine that it runs on, by its C++ compiler, when an engine is first made (cpu_kernels.py).

#include <memory>
#include <vector>

#include "cpu_attention.h"
#include "cpu_vectors.h"

namespace {

// One target's entries, columns of adapters in the arena, by rows: those of row r are from starts[r] to starts[r + 1].
struct Target {
  long out, y_offset;
  const int32_t* starts;
  const int64_t *a_offsets, *b_offsets;  // of layer 0
  const float* weights;
};

// The entries of one row in one target, for one token of the row or for RUN that follow one another.
struct LoraTask {
  const Target* target;
  long first, tokens, begin, count;
  float* shrunk;  // (count, tokens): weight_e A_e . x[t]
};

constexpr long RUN = 4, ENTRIES = 8, OUTPUTS = 64;  // entries and outputs that are worked on together

// The products of the entries from `from` to `to` with N tokens.
template <int N, class T>
void shrink(const LoraTask& task, const T* x, long in, const T* a, long from, long to) {
  constexpr int C = N == 1 ? W / 2 : W / N;
  const int64_t* offsets = task.target->a_offsets + task.begin;
  const float* weights = task.target->weights + task.begin;
  for (long e = from; e < to; e += C) {
    vec totals[W / N][N] = {};
    const T* columns[C];
    for (int c = 0; c < C; c++) columns[c] = a + offsets[std::min(e + c, to - 1)];
    dots<C, N>(reinterpret_cast<vec(&)[C][N]>(totals), columns, x + task.first * in, in, in);
    float products[W];
    store(products, sums(reinterpret_cast<vec(&)[W]>(totals)));
    for (int i = 0; i < std::min<long>(C, to - e) * N; i++) task.shrunk[e * N + i] = weights[e + i / N] * products[i];
  }
}

// y[t] += sum over entries e of shrunk[e][t] B_e, for N tokens' outputs from `from` to `to`.
template <int N, class T>
void expand(const LoraTask& task, T* y, long y_stride, const T* b, long from, long to) {
  constexpr long V = OUTPUTS / W;
  const int64_t* offsets = task.target->b_offsets + task.begin;
  y += task.first * y_stride + task.target->y_offset;
  long o = from;
  for (; o + OUTPUTS <= to; o += OUTPUTS) {
    vec totals[N][V];
    for (int t = 0; t < N; t++)
      for (int v = 0; v < V; v++) totals[t][v] = load(y + t * y_stride + o + v * W);
    for (long e = 0; e < task.count; e++)
      for (int v = 0; v < V; v++) {
        const vec column = load(b + offsets[e] + o + v * W);
        for (int t = 0; t < N; t++) totals[t][v] += task.shrunk[e * N + t] * column;
      }
    for (int t = 0; t < N; t++)
      for (int v = 0; v < V; v++) store(y + t * y_stride + o + v * W, totals[t][v]);
  }
  each_vector<T>(to - o, [&](long i, auto get, auto put) {
    for (int t = 0; t < N; t++) {
      T* place = y + t * y_stride + o + i;
      vec total = get(place);
      for (long e = 0; e < task.count; e++) total += task.shrunk[e * N + t] * get(b + offsets[e] + o + i);
      put(place, total);
    }
  });
}

// Calls f(task, from, to) within a parallel region so that threads get equal shares of all units, whatever a task has.
// `ends` are running totals of the tasks' costs, of which a unit of a task has cost(task).
template <class Cost, class F>
inline void share(const std::vector<LoraTask>& tasks, const std::vector<long>& ends, int threads, Cost cost, F f) {
  const long parts = 4 * threads, total = ends.back();
#pragma omp for schedule(dynamic) nowait
  for (long part = 0; part < parts; part++) {
    const long low = total * part / parts, high = total * (part + 1) / parts;
    for (long i = std::upper_bound(ends.begin(), ends.end(), low) - ends.begin(); i < long(ends.size()); i++) {
      const long begin = i ? ends[i - 1] : 0, unit = cost(tasks[i]);
      if (begin >= high) break;
      const long from = (std::max(low - begin, 0L) + unit - 1) / unit;
      const long to = (std::min(high, ends[i]) - begin + unit - 1) / unit;
      if (from < to) f(tasks[i], from, to);
    }
  }
}

// y[t] += sum over entries e of token t's row of weight_e (A_e . x[t]) B_e.
template <class T>
void lora_add(const T* x, long in, T* y, long y_stride, long tokens, const int32_t* rows, const T* arena,
              const Target* targets, long n_targets, long layer, int threads) {
  std::vector<LoraTask> tasks;
  long products = 0;
  for (long t = 0, step; t < tokens; t += step) {
    step = 1;
    while (step < RUN && t + step < tokens && rows[t + step] == rows[t]) step++;
    if (step < RUN) step = 1;
    for (const Target* target = targets; target < targets + n_targets; target++) {
      const long begin = target->starts[rows[t]], count = target->starts[rows[t] + 1] - begin;
      if (count) tasks.push_back({target, t, step, begin, count, nullptr});
      products += count * step;
    }
  }
  if (tasks.empty()) return;
  const auto shrunk = std::make_unique_for_overwrite<float[]>(products);
  const auto shrink_cost = [](const LoraTask& task) { return task.tokens; };
  const auto expand_cost = [](const LoraTask& task) { return task.tokens * task.count; };
  std::vector<long> shrinks, expands;
  long place = 0, shrinking = 0, expanding = 0;
  for (LoraTask& task : tasks) {
    task.shrunk = &shrunk[place];
    place += task.count * task.tokens;
    shrinks.push_back(shrinking += (task.count + ENTRIES - 1) / ENTRIES * shrink_cost(task));
    expands.push_back(expanding += (task.target->out + OUTPUTS - 1) / OUTPUTS * expand_cost(task));
  }
#pragma omp parallel num_threads(threads)
  {
    share(tasks, shrinks, threads, shrink_cost, [&](const LoraTask& task, long from, long to) {
      const auto go = task.tokens == RUN ? shrink<RUN, T> : shrink<1, T>;
      go(task, x, in, arena + layer * in, from * ENTRIES, std::min(to * ENTRIES, task.count));
    });
#pragma omp barrier
    share(tasks, expands, threads, expand_cost, [&](const LoraTask& task, long from, long to) {
      const auto go = task.tokens == RUN ? expand<RUN, T> : expand<1, T>;
      go(task, y, y_stride, arena + layer * task.target->out, from * OUTPUTS,
         std::min(to * OUTPUTS, task.target->out));
    });
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

// Where each row's highest number is, the first of several; -1 where a number is not finite.
template <class T>
void greedy(const T* logits, long n, long width, int64_t* tokens, int threads) {
  constexpr long PART = 8192;
  struct Best {
    float value;
    int64_t at;
  };
  const long parts = (width + PART - 1) / PART;
  const auto bests = std::make_unique_for_overwrite<Best[]>(n * parts);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long item = 0; item < n * parts; item++) {
    const long begin = item % parts * PART, length = std::min(width - begin, PART);
    const T* source = logits + item / parts * width + begin;
    vec highest = vec{} - INFINITY, finite = {};
    ivec where = {};
    each_vector<T>(length, [&](long i, auto get, auto) {
      const ivec at = LANES + int32_t(i);
      const vec v = get(source + i);
      finite += v * 0;  // or NaN
      const ivec better = (v > highest) & (at < int32_t(length));
      highest = better ? v : highest;
      where = better ? at : where;
    });
    Best best = {highest[0], where[0]};
    for (int l = 1; l < W; l++)
      if (highest[l] > best.value || (highest[l] == best.value && where[l] < best.at)) best = {highest[l], where[l]};
    bests[item] = {best.value, sum(finite) == 0 ? begin + best.at : -1};
  }
  for (long row = 0; row < n; row++) {
    const Best* best = &bests[row * parts];
    for (long part = 1; part < parts && best->at >= 0; part++) {
      const Best* other = &bests[row * parts + part];
      if (other->at < 0 || other->value > best->value) best = other;
    }
    tokens[row] = best->at;
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

// The same in single precision, for R tokens and N panels of 16 outputs: (in, 16). P is float, or bf16 where that holds
// the weights as they are, which is half as much to read. A sum is of the same order whatever R and N are.
typedef float half __attribute__((vector_size(2 * W)));  // of a `vec`, which AVX2 has no register for
typedef uint16_t half_bits __attribute__((vector_size(W)));
typedef uint32_t half_words __attribute__((vector_size(2 * W)));

inline half load_half(const float* p) {
  half v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline half load_half(const bf16* p) {
  half_bits h;
  std::memcpy(&h, p, sizeof h);
  return (half)(__builtin_convertvector(h, half_words) << 16);
}

template <int R, int N, class P>
void linear_tile(const float* x, long in, const P* weights, const float* bias, float* y, long out, long left) {
  half totals[R][2 * N] = {};
  for (long k = 0; k < in; k++) {
    half columns[2 * N];
    for (int n = 0; n < 2 * N; n++) columns[n] = load_half(weights + (n / 2 * in + k) * W + n % 2 * W / 2);
    for (int r = 0; r < R; r++) {
      const half one = half{} + x[r * in + k];
      for (int n = 0; n < 2 * N; n++) totals[r][n] += columns[n] * one;
    }
  }
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) {
      const long width = std::min<long>(W, left - n * W);
      vec total;
      std::memcpy(&total, totals[r] + 2 * n, sizeof total);
      if (bias) total += load_some(bias + n * W, width);
      width == W ? store(y + r * out + n * W, total) : store_some(y + r * out + n * W, total, width);
    }
}

// As many tokens as there are, which are at most R.
template <int R, int N, class P>
void linear_tiles(long tokens, const float* x, long in, const P* weights, const float* bias, float* y, long out,
                  long left) {
  if constexpr (R > 1)
    if (tokens < R) return linear_tiles<R - 1, N>(tokens, x, in, weights, bias, y, out, left);
  linear_tile<R, N>(x, in, weights, bias, y, out, left);
}

template <int N, class P>
void linear(const float* x, long in, const P* weights, const float* bias, float* y, long out, long tokens,
            int threads) {
  constexpr long R = 6 / N;  // 12 sums, the weights and an input are in the 16 registers of AVX2
  const long tiles = (tokens + R - 1) / R, rows = (tokens + tiles - 1) / tiles;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long o = 0; o < out; o += N * W)
    for (long t = 0; t < tokens; t += rows) {
      const long some = std::min(rows, tokens - t), panels = std::min<long>(N, (out - o + W - 1) / W);
      if (panels == N)
        linear_tiles<R, N>(some, x + t * in, in, weights + o * in, bias ? bias + o : nullptr, y + t * out + o, out,
                           out - o);
      else
        for (long p = o; p < out; p += W)
          linear_tiles<R, 1>(some, x + t * in, in, weights + p * in, bias ? bias + p : nullptr, y + t * out + p, out,
                             out - p);
    }
}

template <class P>
void linear(const float* x, long in, const P* weights, const float* bias, float* y, long out, long tokens,
            int threads) {
  if (!tokens) return;
  constexpr decltype(&linear<1, P>) few[] = {linear<4, P>, linear<3, P>, linear<2, P>};  // to have sums enough
  (tokens <= 3 ? few[tokens - 1] : linear<1, P>)(x, in, weights, bias, y, out, tokens, threads);
}

}  // namespace

extern "C" void linear_float32(const float* x, long in, const void* weights, const float* bias, float* y, long out,
                               long tokens, int halves, int threads) {
  halves ? linear(x, in, (const bf16*)weights, bias, y, out, tokens, threads)
         : linear(x, in, (const float*)weights, bias, y, out, tokens, threads);
}

#ifdef __AVX512BF16__
extern "C" void linear_bfloat16(const bf16* x, long in, const bf16* weights, const bf16* bias, bf16* y, long out,
                                long tokens, int, int threads) {
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
  extern "C" void lora_add_##SUFFIX(const T* x, long in, T* y, long y_stride, long tokens, const int32_t* rows,        \
                                    const T* arena, const Target* targets, long n_targets, long layer, int threads) {  \
    lora_add(x, in, y, y_stride, tokens, rows, arena, targets, n_targets, layer, threads);                             \
  }                                                                                                                    \
  extern "C" void add_norm_##SUFFIX(const T* x, const T* delta, const T* weight, float eps, T* total, T* normed,       \
                                    long tokens, long width, int threads) {                                            \
    add_norm(x, delta, weight, eps, total, normed, tokens, width, threads);                                            \
  }                                                                                                                    \
  extern "C" void silu_mul_##SUFFIX(const T* gate_up, T* y, long tokens, long width, int threads) {                    \
    silu_mul(gate_up, y, tokens, width, threads);                                                                      \
  }                                                                                                                    \
  extern "C" void greedy_##SUFFIX(const T* logits, long n, long width, int64_t* tokens, int threads) {                 \
    greedy(logits, n, width, tokens, threads);                                                                         \
  }                                                                                                                    \
  extern "C" void rotate_and_store_##SUFFIX(const T* qkv, const T* cosines, const T* sines, const int32_t* rows,       \
                                            const int32_t* positions, T* keys, T* values, T* q, long tokens,           \
                                            long heads, const int32_t* table, long max_blocks, long kv_heads,          \
                                            long dim, int threads) {                                                   \
    rotate_and_store(qkv, cosines, sines, rows, positions, keys, values, q, tokens, heads,                             \
                     {table, max_blocks, kv_heads, dim}, threads);                                                     \
  }                                                                                                                    \
  extern "C" void decode_attention_##SUFFIX(const T* q, const T* keys, const T* values, const int32_t* rows,           \
                                            const int32_t* positions, T* y, long n, long heads, long window,           \
                                            const int32_t* table, long max_blocks, long kv_heads, long dim,            \
                                            int threads) {                                                             \
    decode_attention(q, keys, values, rows, positions, y, n, heads, window, {table, max_blocks, kv_heads, dim},        \
                     threads);                                                                                         \
  }                                                                                                                    \
  extern "C" void prefill_attention_##SUFFIX(const T* q, const T* keys, const T* values, long row, long start, T* y,   \
                                             long n, long heads, long window, const int32_t* table, long max_blocks,   \
                                             long kv_heads, long dim, int threads) {                                   \
    prefill_attention(q, keys, values, row, start, y, n, heads, window, {table, max_blocks, kv_heads, dim},            \
                      threads);                                                                                        \
  }

EXPORT(bfloat16, bf16)
EXPORT(float32, float)
