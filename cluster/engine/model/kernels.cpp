// What a step on a CPU does beside matrix products: paged attention, RMSNorm, rotary embedding, SiLU * up.
//
// Plain C++17 with the compiler's vector types and OpenMP, no headers of torch: kernels.py loads it with ctypes and
// gives addresses. Everything is computed in float32; numbers are stored as float32 or bfloat16. Tensors have unit
// stride in their last dimension; other strides are counted in elements.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <utility>
#include <vector>

#include <omp.h>

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;        // floats of a vector
constexpr int ROWS = 6;      // a tile of 6 x 4 vectors stays in 32 registers
constexpr int COLUMNS = 4;
#else
constexpr int W = 8;
constexpr int ROWS = 4;
constexpr int COLUMNS = 2;
#endif
constexpr int64_t KEYS = 64;        // key positions done at a time; a multiple of W * COLUMNS
constexpr int64_t TILE_ROWS = 192;  // query rows of a task, so that packing its keys costs little
constexpr int64_t FEW_ROWS = 8;     // up to here keys and values are read in place
constexpr int64_t LINE = 64;         // bytes of a cache line
constexpr int64_t SMALL = 16384;    // elements below which a second thread does not pay

typedef float vec __attribute__((vector_size(W * 4)));
typedef int32_t ivec __attribute__((vector_size(W * 4)));
typedef uint32_t uvec __attribute__((vector_size(W * 4)));
typedef uint16_t hvec __attribute__((vector_size(W * 2)));

struct bf16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline void put(float* to, float x) { *to = x; }
inline void put(bf16* to, float x) {  // to the nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  to->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline vec load(const float* p) {
  vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline vec load(const bf16* p) {
  hvec h;
  std::memcpy(&h, p, sizeof h);
  uvec u = __builtin_convertvector(h, uvec) << 16;
  vec v;
  std::memcpy(&v, &u, sizeof v);
  return v;
}
inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }
inline void store(bf16* p, vec v) {
  uvec u;
  std::memcpy(&u, &v, sizeof u);
  u = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  ivec nan = v != v;
  u = (uvec)((nan & 0x7fc0) | (~nan & (ivec)u));
  hvec h = __builtin_convertvector(u, hvec);
  std::memcpy(p, &h, sizeof h);
}
inline vec splat(float x) { return x - vec{}; }
inline vec select(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }
inline vec larger(vec a, vec b) { return select(a > b, a, b); }

// Lanes of a and b by number, a's first.
#if defined(__clang__)
template <typename V, size_t... I>
inline V pick(V a, V b, ivec lanes, std::index_sequence<I...>) {
  V out;
  for (int i = 0; i < W; ++i) out[i] = lanes[i] < W ? a[lanes[i]] : b[lanes[i] - W];
  return out;
}
#define PICK(a, b, lanes) pick(a, b, lanes, std::make_index_sequence<W>())
#else
#define PICK(a, b, lanes) __builtin_shuffle(a, b, lanes)
#endif

// Runs of ``width`` lanes, every other one, of the lanes of two vectors: the even runs, or with ``odd`` the odd ones.
template <int width, int odd>
inline ivec runs() {
  ivec lanes;
  for (int i = 0; i < W; ++i) lanes[i] = i / width * 2 * width + i % width + odd * width;
  return lanes;
}
template <int width>
inline vec fold(vec a, vec b) {
  return PICK(a, b, (runs<width, 0>())) + PICK(a, b, (runs<width, 1>()));
}
// The sums of W vectors, as the lanes of one.
inline vec sums(vec* v) {
  if constexpr (W == 16) {
    for (int i = 0; i < 8; ++i) v[i] = fold<8>(v[2 * i], v[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) v[i] = fold<4>(v[2 * i], v[2 * i + 1]);
  for (int i = 0; i < 2; ++i) v[i] = fold<2>(v[2 * i], v[2 * i + 1]);
  return fold<1>(v[0], v[1]);
}
inline float sum(vec v) {
  if constexpr (W == 16) v = fold<8>(v, v);
  v = fold<4>(v, v);
  v = fold<2>(v, v);
  return fold<1>(v, v)[0];
}
template <int width>
inline vec fold_max(vec v) { return larger(PICK(v, v, (runs<width, 0>())), PICK(v, v, (runs<width, 1>()))); }
inline float max(vec v) {
  if constexpr (W == 16) v = fold_max<8>(v);
  return fold_max<1>(fold_max<2>(fold_max<4>(v)))[0];
}

// exp(x) to 1-2 ulp (the polynomial of Cephes' expf); 0 below -87.3, x <= 88; NaN stays NaN, or damaged weights would
// go unnoticed.
inline vec exponential(vec x) {
  const ivec tiny = x < splat(-87.3f);
  x = larger(splat(-87.3f), x);
  const vec magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  vec shifted = x * 1.44269504088896341f + magic;
  vec n = shifted - magic;
  vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  vec y = p * (r * r) + r + 1.f;
  ivec exponent = ((ivec)shifted - (ivec)magic) << 23;
  y = (vec)((ivec)y + exponent);
  return select(x == x, (vec)(~tiny & (ivec)y), x);
}

// Runs task(i) for i in 0..n-1 on torch's own OpenMP threads. A smaller team than the pool would end threads of it,
// so it is all of them or none.
template <typename Task>
void spread(int64_t n, int64_t threads, bool worth, const Task& task) {
  if (threads <= 1 || n <= 1 || !worth) {
    for (int64_t i = 0; i < n; ++i) task(i);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t i = 0; i < n; ++i) task(i);
}

// Rows in runs, one run a thread.
template <typename Task>
void spread_rows(int64_t rows, int64_t width, int64_t threads, const Task& task) {
  if (threads <= 1 || rows <= 1 || rows * width < SMALL) {
    for (int64_t r = 0; r < rows; ++r) task(r);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t r = 0; r < rows; ++r) task(r);
}

// ---------------------------------------------------------------------------------------------- small products

// C[M, N] = or += A[M, K] B[K, N], M and N of registers. B's row k begins at b(k).
template <int M, int N, typename Row>
inline void tile(const float* a, int64_t lda, const Row& b, float* c, int64_t ldc, int64_t k_count, bool add) {
  vec acc[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[m][n] = add ? load(c + m * ldc + n * W) : vec{};
  for (int64_t k = 0; k < k_count; ++k) {
    const auto* row = b(k);
    vec right[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) right[n] = load(row + n * W);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const vec left = splat(a[m * lda + k]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[m][n] += left * right[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(c + m * ldc + n * W, acc[m][n]);
}

template <int N, typename Row>
inline void tile_rows(int64_t m, const float* a, int64_t lda, const Row& b, float* c, int64_t ldc, int64_t k, bool add) {
  for (; m >= ROWS; m -= ROWS, a += ROWS * lda, c += ROWS * ldc) tile<ROWS, N>(a, lda, b, c, ldc, k, add);
  switch (m) {
    case 5: tile<5, N>(a, lda, b, c, ldc, k, add); break;
    case 4: tile<4, N>(a, lda, b, c, ldc, k, add); break;
    case 3: tile<3, N>(a, lda, b, c, ldc, k, add); break;
    case 2: tile<2, N>(a, lda, b, c, ldc, k, add); break;
    case 1: tile<1, N>(a, lda, b, c, ldc, k, add); break;
    default: break;
  }
}

// ``n`` is a multiple of W; row(k) gives where row k of B begins.
template <typename Row>
void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const Row& row, float* c, int64_t ldc, bool add) {
  int64_t j = 0;
  const auto shifted = [&](int64_t i) { return row(i) + j; };
  for (; j + COLUMNS * W <= n; j += COLUMNS * W) tile_rows<COLUMNS>(m, a, lda, shifted, c + j, ldc, k, add);
  for (; j < n; j += W) tile_rows<1>(m, a, lda, shifted, c + j, ldc, k, add);
}

// --------------------------------------------------------------------------------------------------- attention

}  // namespace

extern "C" {

struct Attention {
  const void *query, *key, *value;  // [tokens, heads, key_dim], [tokens, kv_heads, key_dim], [.., value_dim]
  void *out;                        // [tokens, heads, value_dim], contiguous
  void *key_pool, *value_pool;      // [blocks, block_size, kv_heads, dim], contiguous
  const int32_t* tables;            // [slots, table_width]
  const int64_t* sequences;         // [num_sequences, 4]: slot, start, tokens, first token
  const int64_t* kv_slots;          // [tokens]
  const float *sinks, *slopes;      // [heads] or null
  const float* bias;                // [heads, bias_width] or null: added by key position
  int64_t query_token, query_head, key_token, key_head, value_token, value_head;  // strides
  int64_t tokens, heads, kv_heads, key_dim, value_dim, block_size, table_width, num_sequences;
  int64_t window;  // 0: none
  int64_t bias_width;
  int64_t threads;
  float scaling, softcap;  // softcap 0: none
};

}

namespace {

struct Scratch {
  float* memory = nullptr;
  size_t size = 0;
  float* at_least(size_t floats) {
    if (floats > size) {
      ::operator delete[](memory, std::align_val_t(64));
      memory = static_cast<float*>(::operator new[](floats * sizeof(float), std::align_val_t(64)));
      size = floats;
    }
    return memory;
  }
  ~Scratch() { ::operator delete[](memory, std::align_val_t(64)); }
};
thread_local Scratch scratch;

template <typename T>
void write_token(const Attention& c, int64_t token) {
  const int64_t slot = c.kv_slots[token];
  for (int64_t h = 0; h < c.kv_heads; ++h) {
    std::memcpy((T*)c.key_pool + (slot * c.kv_heads + h) * c.key_dim,
                (const T*)c.key + token * c.key_token + h * c.key_head, c.key_dim * sizeof(T));
    std::memcpy((T*)c.value_pool + (slot * c.kv_heads + h) * c.value_dim,
                (const T*)c.value + token * c.value_token + h * c.value_head, c.value_dim * sizeof(T));
  }
}

// Whether few query rows look at this sequence's keys: then they are read where they lie.
inline bool reads_in_place(const Attention& c, int64_t rows) {
  return rows <= FEW_ROWS && c.key_dim % W == 0 && c.value_dim % W == 0;
}

// Some tokens of one sequence, and some KV heads with the query heads that look at them: for each KV head these are
// ``rows`` rows, row = token * group + head in the group.
template <typename T>
class Task {
 public:
  Task(const Attention& call, const int64_t* sequence, int64_t from, int64_t to, int64_t first_head, int64_t heads)
      : c(call), table(call.tables + sequence[0] * call.table_width), first_head(first_head), heads(heads),
        group(call.heads / call.kv_heads), start(sequence[1] + from), first(sequence[3] + from),
        rows((to - from) * group), width((call.value_dim + W - 1) / W * W), in_place(reads_in_place(call, rows)) {
    const int64_t packed = in_place ? 0 : KEYS;
    const int64_t all = heads * rows, partial = in_place ? all * W * W : 0;
    q = scratch.at_least(all * (c.key_dim + width + KEYS + 2) + partial + packed * (c.key_dim + width));
    partials = q + all * c.key_dim;
    keys = partials + partial;
    values = keys + packed * c.key_dim;
    scores = values + packed * width;
    o = scores + all * KEYS;
    highest = o + heads * rows * width;
    total = highest + heads * rows;
  }

  void run() {
    for (int64_t h = 0; h < heads; ++h) begin(h);
    const int64_t stop = start + rows / group;  // one past the last visible position
    const int64_t from = c.window ? std::max<int64_t>(0, start - c.window + 1) : 0;
    for (int64_t base = from; base < stop; base += KEYS) {
      count = std::min(KEYS, stop - base);
      find_rows(base);
      if (in_place) score_in_place(); else for (int64_t h = 0; h < heads; ++h) score_packed(h);
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t r = 0; r < rows; ++r) soften(h, r, base);
      if (in_place) add_in_place(); else for (int64_t h = 0; h < heads; ++h) add_packed(h);
    }
    for (int64_t h = 0; h < heads; ++h) finish(h);
  }

 private:
  const Attention& c;
  const int32_t* table;
  int64_t first_head, heads, group, start, first, rows, width, count = 0;
  bool in_place;
  float *q, *partials, *keys, *values, *scores, *o, *highest, *total;
  const T* key_rows[KEYS];  // of the first head; the next one's follows
  const T* value_rows[KEYS];

  int64_t query_head(int64_t h, int64_t row) const { return (first_head + h) * group + row % group; }

  void begin(int64_t h) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t head = query_head(h, r), i = h * rows + r;
      const T* from = (const T*)c.query + (first + r / group) * c.query_token + head * c.query_head;
      for (int64_t d = 0; d < c.key_dim; ++d) q[i * c.key_dim + d] = to_float(from[d]) * c.scaling;
      highest[i] = c.sinks ? c.sinks[head] : -std::numeric_limits<float>::infinity();
      total[i] = c.sinks ? 1.f : 0.f;
    }
    std::memset(o + h * rows * width, 0, rows * width * sizeof(float));
  }

  void find_rows(int64_t base) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t position = base + i;
      const int64_t slot = (int64_t)table[position / c.block_size] * c.block_size + position % c.block_size;
      key_rows[i] = (const T*)c.key_pool + (slot * c.kv_heads + first_head) * c.key_dim;
      value_rows[i] = (const T*)c.value_pool + (slot * c.kv_heads + first_head) * c.value_dim;
    }
  }

  // Memory is the limit here: keys and values are read in the very order in which they lie, all heads of a position
  // before the next one. By head, which takes less arithmetic, it was half as fast.
  void score_in_place() {
    for (int64_t base = 0; base < count; base += W) {
      for (int64_t i = 0; i < W; ++i) {
        const T* key = key_rows[std::min(base + i, count - 1)];  // soften leaves out what lies beyond
        for (int64_t h = 0; h < heads; ++h, key += c.key_dim) {
          int64_t r = h * rows;
          const int64_t last = r + rows;
          for (; r + 4 <= last; r += 4) dots<4>(r, key, i);
          for (; r + 2 <= last; r += 2) dots<2>(r, key, i);
          for (; r < last; ++r) dots<1>(r, key, i);
        }
      }
      for (int64_t r = 0; r < heads * rows; ++r) {
        vec v[W];
        for (int i = 0; i < W; ++i) v[i] = load(partials + (r * W + i) * W);
        store(scores + r * KEYS + base, sums(v));
      }
    }
  }

  // The products of R rows with one key, not yet summed up.
  template <int R>
  void dots(int64_t r, const T* key, int64_t i) {
    vec acc[R] = {};
    for (int64_t d = 0; d < c.key_dim; d += W) {
      const vec right = load(key + d);
#pragma GCC unroll 4
      for (int j = 0; j < R; ++j) acc[j] += load(q + (r + j) * c.key_dim + d) * right;
    }
#pragma GCC unroll 4
    for (int j = 0; j < R; ++j) store(partials + ((r + j) * W + i) * W, acc[j]);
  }

  void add_in_place() {  // two positions at a time, so that sums are read and written half as often
    for (int64_t i = 0; i < count; i += 2) {
      const bool pair = i + 1 < count;
      const T *one = value_rows[i], *two = value_rows[pair ? i + 1 : i];
      for (int64_t h = 0; h < heads; ++h, one += c.value_dim, two += c.value_dim)
        for (int64_t r = h * rows; r < (h + 1) * rows; ++r) {
          const vec first_weight = splat(scores[r * KEYS + i]), second = splat(pair ? scores[r * KEYS + i + 1] : 0.f);
          float* to = o + r * width;
          for (int64_t d = 0; d < c.value_dim; d += W)
            store(to + d, load(to + d) + first_weight * load(one + d) + second * load(two + d));
        }
    }
  }

  void add_packed(int64_t h) {
    const auto row = [&](int64_t k) { return (const float*)values + k * width; };
    product(rows, width, count, scores + h * rows * KEYS, KEYS, row, o + h * rows * width, width, true);
  }

  void score_packed(int64_t h) {
    for (int64_t i = 0; i < count; ++i) {
      const T *key = key_rows[i] + h * c.key_dim, *from = value_rows[i] + h * c.value_dim;
      for (int64_t d = 0; d < c.key_dim; ++d) keys[d * KEYS + i] = to_float(key[d]);
      float* value = values + i * width;
      for (int64_t d = 0; d < c.value_dim; ++d) value[d] = to_float(from[d]);
      for (int64_t d = c.value_dim; d < width; ++d) value[d] = 0.f;
    }
    if (count < KEYS)
      for (int64_t d = 0; d < c.key_dim; ++d) std::memset(keys + d * KEYS + count, 0, (KEYS - count) * sizeof(float));
    const auto row = [&](int64_t d) { return (const float*)keys + d * KEYS; };
    product(rows, KEYS, c.key_dim, q + h * rows * c.key_dim, c.key_dim, row, scores + h * rows * KEYS, KEYS, false);
  }

  // Scores of a row become weights; what was summed before is scaled to the new maximum.
  void soften(int64_t h, int64_t r, int64_t base) {
    float* s = scores + (h * rows + r) * KEYS;
    float &top = highest[h * rows + r], &sum_of = total[h * rows + r];
    const int64_t own = start + r / group - base;  // the row's own position, seen from base
    const int64_t to = std::min(count, own + 1), from = c.window ? std::max<int64_t>(0, own - c.window + 1) : 0;
    if (to <= from) {
      std::memset(s, 0, KEYS * sizeof(float));
      return;
    }
    if (c.softcap != 0.f)
      for (int64_t i = from; i < to; ++i) s[i] = c.softcap * std::tanh(s[i] / c.softcap);
    if (c.slopes) {
      const float slope = c.slopes[query_head(h, r)];
      for (int64_t i = from; i < to; ++i) s[i] += slope * float(i - own);
    }
    if (c.bias) {
      const float* bias = c.bias + query_head(h, r) * c.bias_width + base;
      for (int64_t i = from; i < to; ++i) s[i] += bias[i];
    }
    constexpr int N = KEYS / W;
    ivec index;
    for (int i = 0; i < W; ++i) index[i] = i;
    const vec nothing = splat(-std::numeric_limits<float>::infinity());
    vec part[N], larger_yet = nothing;
    for (int n = 0; n < N; ++n) {
      const ivec at = index + n * W;
      part[n] = select((at >= int32_t(from)) & (at < int32_t(to)), load(s + n * W), nothing);
      larger_yet = larger(larger_yet, part[n]);
    }
    const float before = top, now = std::max(before, max(larger_yet));
    vec weights{};
    for (int n = 0; n < N; ++n) {
      part[n] = exponential(part[n] - now);
      weights += part[n];
      store(s + n * W, part[n]);
    }
    if (now != before) {
      const float keep = std::exp(before - now);
      float* row = o + (h * rows + r) * width;
      for (int64_t d = 0; d < width; d += W) store(row + d, load(row + d) * keep);
      sum_of *= keep;
      top = now;
    }
    sum_of += sum(weights);
  }

  void finish(int64_t h) {
    for (int64_t r = 0; r < rows; ++r) {
      T* to = (T*)c.out + ((first + r / group) * c.heads + query_head(h, r)) * c.value_dim;
      const float* row = o + (h * rows + r) * width;
      const float share = 1.f / total[h * rows + r];
      for (int64_t d = 0; d < c.value_dim; ++d) put(to + d, row[d] * share);
    }
  }
};

template <typename T>
void attention(const Attention& c) {
  spread_rows(c.tokens, c.kv_heads * (c.key_dim + c.value_dim), c.threads, [&](int64_t t) { write_token<T>(c, t); });
  const int64_t step = std::max<int64_t>(1, TILE_ROWS / (c.heads / c.kv_heads));
  struct Part {
    const int64_t* sequence;
    int64_t from;
  };
  std::vector<Part> parts;
  int64_t seen = 0;
  for (int64_t i = 0; i < c.num_sequences; ++i) {
    const int64_t* sequence = c.sequences + 4 * i;
    // The last tokens see the most: they come first, so that no thread is left with them.
    for (int64_t from = (sequence[2] - 1) / step * step; from >= 0; from -= step) parts.push_back({sequence, from});
    seen += sequence[2] * (sequence[1] + sequence[2]);
  }
  // As many heads to a task as leave every thread something to do.
  const int64_t split = std::min<int64_t>(c.kv_heads, (c.threads + parts.size() - 1) / parts.size());
  const int64_t heads = (c.kv_heads + split - 1) / split;
  spread((int64_t)parts.size() * split, c.threads, seen * c.heads * c.key_dim > SMALL, [&](int64_t i) {
    const Part& part = parts[i / split];
    const int64_t to = std::min(part.sequence[2], part.from + step);
    const int64_t at_once = reads_in_place(c, (to - part.from) * (c.heads / c.kv_heads)) ? heads : 1;
    const int64_t last = std::min(c.kv_heads, (i % split + 1) * heads);
    for (int64_t head = i % split * heads; head < last; head += at_once)
      Task<T>(c, part.sequence, part.from, to, head, std::min(at_once, last - head)).run();
  });
}

// ----------------------------------------------------------------------------------------- norms and activations

// weight * (x / rms): ``offset`` is added to the weight (Gemma: 1); ``early``: x / rms is rounded to T first (Llama).
template <typename T>
void rms_norm(const T* x, int64_t stride, const T* weight, T* out, int64_t rows, int64_t n, float eps, float offset,
              bool early, int64_t threads) {
  spread_rows(rows, n, threads, [=](int64_t r) {
    const T* from = x + r * stride;
    T* to = out + r * n;
    vec acc[2] = {};
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
      const vec a = load(from + i), b = load(from + i + W);
      acc[0] += a * a;
      acc[1] += b * b;
    }
    float squares = sum(acc[0] + acc[1]);
    for (; i < n; ++i) squares += to_float(from[i]) * to_float(from[i]);
    const float scale = 1.f / std::sqrt(squares / float(n) + eps);
    T rounded[W];
    for (i = 0; i + W <= n; i += W) {
      vec normal = load(from + i) * scale;
      if (early && sizeof(T) < 4) {
        store(rounded, normal);
        normal = load(rounded);
      }
      store(to + i, normal * (load(weight + i) + offset));
    }
    for (; i < n; ++i) {
      put(rounded, to_float(from[i]) * scale);
      const float normal = early ? to_float(rounded[0]) : to_float(from[i]) * scale;
      put(to + i, normal * (to_float(weight[i]) + offset));
    }
  });
}

template <typename T>
void silu_mul(const T* gate, const T* up, T* out, int64_t stride, int64_t rows, int64_t n, int64_t threads) {
  spread_rows(rows, n, threads, [=](int64_t r) {
    const T *g = gate + r * stride, *u = up + r * stride;
    T* to = out + r * n;
    int64_t i = 0;
    for (; i + W <= n; i += W) {
      const vec x = load(g + i);
      // exp(-x) stays finite: beyond 87 the quotient is below the smallest normal number anyway.
      const vec e = exponential(-larger(x, splat(-87.f)));
      store(to + i, x / (1.f + e) * load(u + i));
    }
    for (; i < n; ++i) {
      const float x = to_float(g[i]);
      put(to + i, x / (1.f + std::exp(-x)) * to_float(u[i]));
    }
  });
}

// Halves (a, b) become (a cos - b sin, b cos + a sin); out [tokens, heads, dim] is contiguous.
template <typename T>
void rotate(const T* x, int64_t x_token, int64_t x_head, const T* cosine, const T* sine, int64_t angle_token, T* out,
            int64_t tokens, int64_t heads, int64_t dim, int64_t threads) {
  spread_rows(tokens, heads * dim, threads, [=](int64_t t) {
    const T *cs = cosine + t * angle_token, *sn = sine + t * angle_token;
    const int64_t half = dim / 2;
    for (int64_t h = 0; h < heads; ++h) {
      const T* from = x + t * x_token + h * x_head;
      T* to = out + (t * heads + h) * dim;
      int64_t i = 0;
      for (; i + W <= half; i += W) {
        const vec a = load(from + i), b = load(from + half + i);
        store(to + i, a * load(cs + i) - b * load(sn + i));
        store(to + half + i, b * load(cs + half + i) + a * load(sn + half + i));
      }
      for (; i < half; ++i) {
        const float a = to_float(from[i]), b = to_float(from[half + i]);
        put(to + i, a * to_float(cs[i]) - b * to_float(sn[i]));
        put(to + half + i, b * to_float(cs[half + i]) + a * to_float(sn[half + i]));
      }
    }
  });
}

}  // namespace

extern "C" {

int llm_cluster_kernels_version() { return 2; }

void attention_f32(const Attention* c) { attention<float>(*c); }
void attention_bf16(const Attention* c) { attention<bf16>(*c); }

#define NORM(T) \
  (const T* x, int64_t stride, const T* weight, T* out, int64_t rows, int64_t n, float eps, float offset, int64_t early, \
   int64_t threads) { rms_norm<T>(x, stride, weight, out, rows, n, eps, offset, early != 0, threads); }
void rms_norm_f32 NORM(float)
void rms_norm_bf16 NORM(bf16)

#define SILU(T) \
  (const T* gate, const T* up, T* out, int64_t stride, int64_t rows, int64_t n, int64_t threads) { \
    silu_mul<T>(gate, up, out, stride, rows, n, threads); }
void silu_mul_f32 SILU(float)
void silu_mul_bf16 SILU(bf16)

#define ROTATE(T) \
  (const T* x, int64_t x_token, int64_t x_head, const T* cosine, const T* sine, int64_t angle_token, T* out, \
   int64_t tokens, int64_t heads, int64_t dim, int64_t threads) { \
    rotate<T>(x, x_token, x_head, cosine, sine, angle_token, out, tokens, heads, dim, threads); }
void rotate_f32 ROTATE(float)
void rotate_bf16 ROTATE(bf16)
}
