// Attention over a paged cache, and the writing of keys and values into it.
//
// Memory past the end of a sequence may hold anything, not-a-number too: scores made of it are thrown away, and its
// values are never read. What a query gets does not depend on what else is in the step.

#pragma once

#include <memory>
#include <vector>

#include "cpu_vectors.h"

namespace {

// Where things are in the cache, (blocks, kv_heads, BLOCK, dim): position p of a row is in its block p / BLOCK.
constexpr long BLOCK = W;
struct Cache {
  const int32_t* table;
  long max_blocks, heads, dim;
  long at(long row, long head, long position) const {
    const long block = table[row * max_blocks + position / BLOCK];
    return ((block * heads + head) * BLOCK + position % BLOCK) * dim;
  }
};

template <class T>
void rotate_and_store(const T* qkv, const T* cosines, const T* sines, const int32_t* rows, const int32_t* positions,
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

// Scores are of so many positions at a time, from a multiple of it on.
constexpr long CHUNK = 256;

// Positions from `begin` to `end`.
struct Span {
  long begin, end;
  long length() const { return end - begin; }
  Span operator&(Span other) const { return {std::max(begin, other.begin), std::min(end, other.end)}; }
};

// What a query sees at a position.
inline Span seen(long position, long window) {
  return {window && position >= window ? position + 1 - window : 0, position + 1};
}

// What attention is made of before it is divided: the highest score, the sum of exp(score - highest).
struct Softmax {
  float highest = -INFINITY, total = 0;
};

// Makes exp(score - highest) of the scores of `span`, which stand at scores[position % CHUNK], and takes them in.
// Returns what all that was made with the highest score until now is to be multiplied with.
inline float take(Softmax& softmax, float* scores, Span span) {
  const long begin = span.begin % CHUNK, end = begin + span.length(), first = begin / W * W;
  auto inside = [&](long i) { return (LANES >= int32_t(begin - i)) & (LANES < int32_t(end - i)); };
  vec highest = vec{} + softmax.highest, total = {};
  for (long i = first; i < end; i += W) {
    const vec v = load(scores + i);
    highest = (v > highest) & inside(i) ? v : highest;
  }
  const float before = softmax.highest;
  for (int l = 0; l < W; l++) softmax.highest = std::max(softmax.highest, highest[l]);
  for (long i = first; i < end; i += W) {
    const vec v = inside(i) ? exp(load(scores + i) - softmax.highest) : vec{};
    store(scores + i, v);
    total += v;
  }
  const float factor = exp(vec{before - softmax.highest})[0];
  softmax.total = softmax.total * factor + sum(total);
  return factor;
}

// y[g] += sum over the positions of a span within a chunk of scores[g][p % CHUNK] value[p], for G heads.
template <int G, class T>
void weigh(const float* scores, const T* values, const Cache& cache, long row, long head, Span span, float* y) {
#ifdef __AVX512F__
  constexpr int V = 4;
#else
  constexpr int V = 1;
#endif
  const long dim = cache.dim;
  auto each_position = [&](auto f) {
    for (long p = span.begin; p < span.end;) {
      const T* value = values + cache.at(row, head, p);
      const float* score = scores + p % CHUNK;
      for (const long end = std::min(p / BLOCK * BLOCK + BLOCK, span.end); p < end; p++, value += dim)
        f(score++, value);
    }
  };
  long i = 0;
  for (; i + V * W <= dim; i += V * W) {
    vec totals[G][V];
    for (int g = 0; g < G; g++)
      for (int v = 0; v < V; v++) totals[g][v] = load(y + g * dim + i + v * W);
    each_position([&](const float* score, const T* value) {
      for (int v = 0; v < V; v++) {
        const vec part = load(value + i + v * W);
        for (int g = 0; g < G; g++) totals[g][v] += score[g * CHUNK] * part;
      }
    });
    for (int g = 0; g < G; g++)
      for (int v = 0; v < V; v++) store(y + g * dim + i + v * W, totals[g][v]);
  }
  each_vector<float>(dim - i, [&](long j, auto get, auto put) {
    vec totals[G];
    for (int g = 0; g < G; g++) totals[g] = get(y + g * dim + i + j);
    each_position([&](const float* score, const T* value) {
      const vec part = load_some(value + i + j, std::min<long>(W, dim - i - j));
      for (int g = 0; g < G; g++) totals[g] += score[g * CHUNK] * part;
    });
    for (int g = 0; g < G; g++) put(y + g * dim + i + j, totals[g]);
  });
}

// The same for any number of heads.
template <class T>
void weigh_all(long heads, const float* scores, const T* values, const Cache& cache, long row, long head, Span span,
               float* y) {
  constexpr decltype(&weigh<1, T>) some[] = {weigh<1, T>, weigh<2, T>, weigh<3, T>, weigh<4, T>};
  for (long g = 0; g < heads; g += 4)
    some[std::min(heads - g, 4L) - 1](scores + g * CHUNK, values, cache, row, head, span, y + g * cache.dim);
}

template <class T, class S>
void put_scaled(T* y, const S* x, float factor, long n) {
  each_vector<S>(n, [&](long i, auto get, auto) {
    const vec v = get(x + i) * factor;
    n - i < W ? store_some(y + i, v, n - i) : store(y + i, v);
  });
}

// One query a token over its own row's keys; the queries that share a KV head go together, those of a chunk of keys
// apart from those of the next, so that threads share a long row too.
template <class T>
void decode_attention(const T* q, const T* keys, const T* values, const int32_t* rows, const int32_t* positions, T* y,
                      long n, long heads, long window, Cache cache, int threads) {
  const long dim = cache.dim, group = heads / cache.heads;
  const float scale = 1 / std::sqrt(float(dim));
  struct Item {
    long token;
    Span span;
    long place;  // among those whose results are joined, or -1
  };
  std::vector<Item> items;
  std::vector<long> joined;  // the first items of rows of several chunks
  long places = 0;
  for (long t = 0; t < n; t++) {
    const Span span = seen(positions[t], window);
    const bool several = span.begin / CHUNK < (span.end - 1) / CHUNK;
    if (several) joined.push_back(items.size());
    for (long begin = span.begin / CHUNK * CHUNK; begin < span.end; begin += CHUNK)
      items.push_back({t, span & Span{begin, begin + CHUNK}, several ? places++ : -1});
  }
  const auto part_totals = std::make_unique_for_overwrite<float[]>(places * heads * dim);
  const auto part_softmaxes = std::make_unique<Softmax[]>(places * heads);
#pragma omp parallel num_threads(threads)
  {
    const auto scores = std::make_unique_for_overwrite<float[]>(group * CHUNK);
    const auto own_totals = std::make_unique_for_overwrite<float[]>(group * dim);
    const auto own_softmaxes = std::make_unique_for_overwrite<Softmax[]>(group);
#pragma omp for schedule(dynamic) nowait
    for (long i = 0; i < long(items.size()) * cache.heads; i++) {
      const auto [token, span, place] = items[i / cache.heads];
      const long head = i % cache.heads, row = rows[token], first = head * group;
      const T* query = q + (token * heads + first) * dim;
      for (long p = span.begin / BLOCK * BLOCK; p < span.end; p += BLOCK) {
        const T* key = keys + cache.at(row, head, p);
        const T* columns[W];
        for (int c = 0; c < W; c++) columns[c] = key + c * dim;
        for (long g = 0; g < group; g++) {
          vec totals[W][1] = {};
          dots<W, 1>(totals, columns, query + g * dim, 0, dim);
          store(&scores[g * CHUNK + p % CHUNK], scale * sums(reinterpret_cast<vec(&)[W]>(totals)));
        }
      }
      float* totals = place < 0 ? own_totals.get() : &part_totals[(place * heads + first) * dim];
      Softmax* softmaxes = place < 0 ? own_softmaxes.get() : &part_softmaxes[place * heads + first];
      std::fill_n(totals, group * dim, 0.0f);
      for (long g = 0; g < group; g++) take(softmaxes[g] = {}, &scores[g * CHUNK], span);
      weigh_all(group, scores.get(), values, cache, row, head, span, totals);
      if (place < 0)
        for (long g = 0; g < group; g++)
          put_scaled(y + (token * heads + first + g) * dim, totals + g * dim, 1 / softmaxes[g].total, dim);
    }
    if (places) {
#pragma omp barrier
#pragma omp for schedule(static) nowait
      for (long i = 0; i < long(joined.size()) * heads; i++) {
        const long head = i % heads;
        const Item* item = &items[joined[i / heads]];
        const long token = item->token;
        Softmax* whole = &part_softmaxes[item->place * heads + head];
        float* totals = &part_totals[(item->place * heads + head) * dim];
        while (++item < items.data() + items.size() && item->token == token) {
          const Softmax part = part_softmaxes[item->place * heads + head];
          const float* more = &part_totals[(item->place * heads + head) * dim];
          const float highest = std::max(whole->highest, part.highest);
          const float old_factor = exp(vec{whole->highest - highest})[0], factor = exp(vec{part.highest - highest})[0];
          each_vector<float>(dim, [&](long j, auto get, auto put) {
            put(totals + j, get(totals + j) * old_factor + get(more + j) * factor);
          });
          *whole = {highest, whole->total * old_factor + part.total * factor};
        }
        put_scaled(y + (token * heads + head) * dim, totals, 1 / whole->total, dim);
      }
    }
  }
}

// --- prompts

// scores[r][0..16] = query r . keys of a panel (dim, 16), for R queries (R, dim).
template <int R>
void score(const float* queries, const float* panel, long dim, float* scores) {
  vec totals[R] = {};
  for (long i = 0; i < dim; i++) {
    const vec keys = load(panel + i * W);
    for (int r = 0; r < R; r++) totals[r] += keys * queries[r * dim + i];
  }
  for (int r = 0; r < R; r++) store(scores + r * CHUNK, totals[r]);
}

// Causal attention of successive tokens of one row. Tokens go several at a time, so that what is read of keys and
// values serves all their queries that share a KV head.
template <class T>
void prefill_attention(const T* q, const T* keys, const T* values, long row, long start, T* y, long n, long heads,
                       long window, Cache cache, int threads) {
  constexpr long TILE = 32, R = 8;
  constexpr decltype(&score<1>) scorers[] = {score<1>, score<2>, score<3>, score<4>,
                                             score<5>, score<6>, score<7>, score<8>};
  const long dim = cache.dim, group = heads / cache.heads;
  const float scale = 1 / std::sqrt(float(dim));
  const long tile_tokens = std::max(TILE / group, 1L), tiles = (n + tile_tokens - 1) / tile_tokens;
  const long first_block = seen(start, window).begin / BLOCK, blocks = (start + n + BLOCK - 1) / BLOCK - first_block;
  const auto panels = std::make_unique_for_overwrite<float[]>(cache.heads * blocks * dim * W);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (long i = 0; i < cache.heads * blocks; i++) {
      const T* key = keys + cache.at(row, i / blocks, (first_block + i % blocks) * BLOCK);
      float* panel = &panels[i * dim * W];
      each_vector<T>(dim, [&](long first, auto get, auto) {
        vec part[W];
        for (int p = 0; p < W; p++) part[p] = get(key + p * dim + first);
        transpose(part);
        for (long k = 0; k < std::min<long>(W, dim - first); k++) store(panel + (first + k) * W, part[k]);
      });
    }
    const long most = tile_tokens * group;
    const auto queries = std::make_unique_for_overwrite<float[]>(most * dim);
    const auto scores = std::make_unique_for_overwrite<float[]>(most * CHUNK);
    const auto totals = std::make_unique_for_overwrite<float[]>(most * dim);
    const auto softmaxes = std::make_unique_for_overwrite<Softmax[]>(most);
#pragma omp for schedule(dynamic) nowait
    for (long i = tiles * cache.heads - 1; i >= 0; i--) {  // the longest first
      const long head = i % cache.heads, first = i / cache.heads * tile_tokens;
      const long count = std::min(tile_tokens, n - first) * group;
      auto place = [&](long k) { return ((first + k / group) * heads + head * group + k % group) * dim; };
      auto sees = [&](long k) { return seen(start + first + k / group, window); };
      std::fill_n(totals.get(), count * dim, 0.0f);
      for (long k = 0; k < count; k++) {
        softmaxes[k] = {};
        put_scaled(&queries[k * dim], q + place(k), scale, dim);
      }
      for (long begin = sees(0).begin / CHUNK * CHUNK; begin < sees(count - 1).end; begin += CHUNK) {
        const Span chunk = {begin, begin + CHUNK};
        for (long k = 0; k < count; k += R) {
          const long some = std::min(count - k, R);
          const Span span = chunk & Span{sees(k).begin, sees(k + some - 1).end};
          for (long b = span.begin / BLOCK; b * BLOCK < span.end; b++)
            scorers[some - 1](&queries[k * dim], &panels[(head * blocks + b - first_block) * dim * W], dim,
                              &scores[k * CHUNK + b * BLOCK % CHUNK]);
        }
        for (long k = 0; k < count; k++) {
          const Span span = chunk & sees(k);
          if (span.length() <= 0) continue;
          const float factor = take(softmaxes[k], &scores[k * CHUNK], span);
          put_scaled(&totals[k * dim], &totals[k * dim], factor, dim);
        }
        for (long k = 0; k < count; k += 4) {
          const long some = std::min(count - k, 4L);
          const Span all = chunk & sees(k) & sees(k + some - 1);
          auto add = [&](long from, long queries, Span span) {
            if (span.length() > 0)
              weigh_all(queries, &scores[from * CHUNK], values, cache, row, head, span, &totals[from * dim]);
          };
          auto add_each = [&](Span part) {
            for (long one = k; one < k + some; one++) add(one, 1, part & chunk & sees(one));
          };
          if (all.length() > 0) {
            add_each({0, all.begin});  // what not all of them see
            add(k, some, all);
            add_each({all.end, chunk.end});
          } else {
            add_each(chunk);
          }
        }
      }
      for (long k = 0; k < count; k++) put_scaled(y + place(k), &totals[k * dim], 1 / softmaxes[k].total, dim);
    }
  }
}

}  // namespace
