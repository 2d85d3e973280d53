// What a step on a CPU does beside matrix products: paged attention, RMSNorm, rotary embedding, SiLU * up.
//
// Plain C++17 with the compiler's vector types and OpenMP, no headers of torch: kernels.py loads it with ctypes and
// gives addresses. Everything is computed in float32; numbers are stored as float32 or bfloat16. Tensors have unit
// stride in their last dimension; other strides are counted in elements.

#include <algorithm>
#include <atomic>
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

// Rows in runs, one run a thread. The threads are torch's own: a smaller team than theirs would end some of them, so it
// is all of them or none.
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

// ------------------------------------------------------------------------------------------------------- rotary

// Halves (a, b) of a head become (a cos - b sin, b cos + a sin).
template <typename T>
inline void rotate_head(const T* from, const T* cosine, const T* sine, T* to, int64_t dim) {
  const int64_t half = dim / 2;
  int64_t i = 0;
  for (; i + W <= half; i += W) {
    const vec a = load(from + i), b = load(from + half + i);
    store(to + i, a * load(cosine + i) - b * load(sine + i));
    store(to + half + i, b * load(cosine + half + i) + a * load(sine + half + i));
  }
  for (; i < half; ++i) {
    const float a = to_float(from[i]), b = to_float(from[half + i]);
    put(to + i, a * to_float(cosine[i]) - b * to_float(sine[i]));
    put(to + half + i, b * to_float(cosine[half + i]) + a * to_float(sine[half + i]));
  }
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
  const void *cosine, *sine;        // [tokens, key_dim] or null: query and key are rotated first
  int64_t query_token, query_head, key_token, key_head, value_token, value_head;  // strides
  int64_t angle_token;  // of cosine and sine
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
inline const T* angle(const Attention& c, const void* angles, int64_t token) {
  return (const T*)angles + token * c.angle_token;
}

template <typename T>
void write_token(const Attention& c, int64_t token, int64_t first_head, int64_t heads) {
  const int64_t slot = c.kv_slots[token];
  for (int64_t h = first_head; h < first_head + heads; ++h) {
    const T* key = (const T*)c.key + token * c.key_token + h * c.key_head;
    T* to = (T*)c.key_pool + (slot * c.kv_heads + h) * c.key_dim;
    if (c.cosine) rotate_head(key, angle<T>(c, c.cosine, token), angle<T>(c, c.sine, token), to, c.key_dim);
    else std::memcpy(to, key, c.key_dim * sizeof(T));
    std::memcpy((T*)c.value_pool + (slot * c.kv_heads + h) * c.value_dim,
                (const T*)c.value + token * c.value_token + h * c.value_head, c.value_dim * sizeof(T));
  }
}

// Some tokens of one sequence, and some KV heads with the query heads that look at them.
struct Piece {
  const int64_t* sequence;
  int64_t from, to;  // tokens of the sequence's in this step
  int64_t first_head, heads;
  // No other piece reads its keys and values in this step (blocks are shared only after the step that filled them), so it
  // stores them itself.
  bool writes;
};

// Where keys and values lie that are done at a time: their rows of a piece's first head; the next head's follow.
template <typename T>
struct Rows {
  int64_t base = 0, count = 0;  // positions
  const T *key[KEYS], *value[KEYS];

  void find(const Attention& c, const Piece& piece, int64_t from, int64_t stop) {
    const int32_t* table = c.tables + piece.sequence[0] * c.table_width;
    base = from;
    count = std::min(KEYS, stop - from);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t position = base + i;
      const int64_t slot = (int64_t)table[position / c.block_size] * c.block_size + position % c.block_size;
      key[i] = (const T*)c.key_pool + (slot * c.kv_heads + piece.first_head) * c.key_dim;
      value[i] = (const T*)c.value_pool + (slot * c.kv_heads + piece.first_head) * c.value_dim;
    }
    for (int64_t i = count; i % W != 0; ++i) key[i] = key[i - 1];  // so many are read; their scores are left out
  }
};

// Asks for rows before their turn, in the order in which they lie: out of order memory gives half as much.
template <typename T>
class Ahead {
 public:
  Ahead(const T* const* rows, int64_t count, int64_t width, int64_t steps)
      : row(rows), end(rows + count), width(width * sizeof(T)) {
    const int64_t chunks = count * ((this->width + CHUNK - 1) / CHUNK);
    each = (chunks + steps - 1) / steps;
  }
  // One of ``steps``.
  void step() {
    for (int64_t n = 0; n < each; ++n) {
      if (at >= stop) {
        if (row == end) return;
        at = (const char*)*row++;
        stop = at + width;
      }
      for (int64_t i = 0; i < CHUNK; i += LINE) __builtin_prefetch(at + i, 0, 2);  // the first cache is too small
      at += CHUNK;
    }
  }

 private:
  static constexpr int64_t CHUNK = 4 * LINE;
  const T* const *row, *const *end;
  const char *at = nullptr, *stop = nullptr;
  int64_t width, each;
};

// For each KV head of a piece there are ``rows`` query rows, row = token * group + head in the group.
template <typename T>
class Task {
 public:
  Task(const Attention& call, const Piece& piece)
      : c(call), piece(piece), heads(piece.heads), group(call.heads / call.kv_heads),
        start(piece.sequence[1] + piece.from), first(piece.sequence[3] + piece.from),
        rows((piece.to - piece.from) * group), width((call.value_dim + W - 1) / W * W), in_place(reads_in_place(c, piece)) {
    const int64_t packed = in_place ? 0 : KEYS;
    const int64_t all = heads * rows;
    q = scratch.at_least(all * (c.key_dim + width + KEYS + 2) + packed * (c.key_dim + width) + c.key_dim);
    keys = q + all * c.key_dim;
    values = keys + packed * c.key_dim;
    scores = values + packed * width;
    o = scores + all * KEYS;
    highest = o + all * width;
    total = highest + all;
    rotated = (T*)(total + all);
  }

  // Few query rows: keys and values are read where they lie. Otherwise they are packed, for one head at a time.
  static bool reads_in_place(const Attention& c, const Piece& piece) {
    const int64_t rows = (piece.to - piece.from) * (c.heads / c.kv_heads);
    return rows <= FEW_ROWS && c.key_dim % W == 0 && c.value_dim % W == 0;
  }

  // The first rows that a piece will read.
  static void find_first(const Attention& c, const Piece& piece, Rows<T>& found) {
    const int64_t begin = piece.sequence[1] + piece.from, stop = piece.sequence[1] + piece.to;
    found.find(c, piece, c.window ? std::max<int64_t>(0, begin - c.window + 1) : 0, stop);
  }

  // ``now`` are the piece's first rows; ``following(rows)`` finds those of the next piece, which end up in ``now``. It is
  // called early enough to fetch them.
  template <typename Following>
  void run(Rows<T>*& now, Rows<T>*& next, const Following& following) {
    if (piece.writes)
      for (int64_t i = piece.from; i < piece.to; ++i) write_token<T>(c, piece.sequence[3] + i, piece.first_head, heads);
    for (int64_t h = 0; h < heads; ++h) begin(h);
    const int64_t stop = piece.sequence[1] + piece.to;  // one past the last visible position
    for (bool last = false; !last; std::swap(now, next)) {
      at = now;
      ahead = next;
      last = at->base + at->count >= stop;
      if (last) following(*ahead); else ahead->find(c, piece, at->base + at->count, stop);
      if (in_place) score_in_place(); else for (int64_t h = 0; h < heads; ++h) score_packed(h);
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t r = 0; r < rows; ++r) soften(h, r);
      if (in_place) add_in_place(); else for (int64_t h = 0; h < heads; ++h) add_packed(h);
    }
    for (int64_t h = 0; h < heads; ++h) finish(h);
  }

 private:
  const Attention& c;
  const Piece& piece;
  const int64_t heads, group, start, first, rows, width;
  const bool in_place;
  float *q, *keys, *values, *scores, *o, *highest, *total;
  T* rotated;  // a query head, as it would have been stored
  const Rows<T>* at = nullptr;
  Rows<T>* ahead = nullptr;

  int64_t query_head(int64_t h, int64_t row) const { return (piece.first_head + h) * group + row % group; }

  void begin(int64_t h) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t head = query_head(h, r), i = h * rows + r;
      const int64_t token = first + r / group;
      const T* from = (const T*)c.query + token * c.query_token + head * c.query_head;
      if (c.cosine) {
        rotate_head(from, angle<T>(c, c.cosine, token), angle<T>(c, c.sine, token), rotated, c.key_dim);
        from = rotated;
      }
      for (int64_t d = 0; d < c.key_dim; ++d) q[i * c.key_dim + d] = to_float(from[d]) * c.scaling;
      highest[i] = c.sinks ? c.sinks[head] : -std::numeric_limits<float>::infinity();
      total[i] = c.sinks ? 1.f : 0.f;
    }
    std::memset(o + h * rows * width, 0, rows * width * sizeof(float));
  }

  // Memory is the limit when rows are few: while keys are worked on the values of the same positions are fetched, and
  // meanwhile the keys of the next positions, or of the next piece.
  void score_in_place() {
    const int64_t groups = (at->count + W - 1) / W;
    Ahead<T> values(at->value, at->count, heads * c.value_dim, groups * heads * rows * (c.key_dim / W));
    for (int64_t i = 0; i < groups * W; i += W)
      for (int64_t h = 0; h < heads; ++h) {
        int64_t r = h * rows;
        const int64_t last = r + rows;
        for (; r + 4 <= last; r += 4) dots<4>(r, h, i, values);
        for (; r + 2 <= last; r += 2) dots<2>(r, h, i, values);
        for (; r < last; ++r) dots<1>(r, h, i, values);
      }
  }

  // The products of R rows with W keys.
  template <int R>
  void dots(int64_t r, int64_t h, int64_t first, Ahead<T>& ahead) {
    constexpr int P = W / R;  // positions at a time: as many sums as a vector has lanes
    for (int64_t i = first; i < first + W; i += P) {
      vec acc[W] = {};
      const T* key[P];
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) key[p] = at->key[i + p] + h * c.key_dim;
      for (int64_t d = 0; d < c.key_dim; d += W) {
        ahead.step();
        vec left[R];
#pragma GCC unroll 4
        for (int j = 0; j < R; ++j) left[j] = load(q + (r + j) * c.key_dim + d);
#pragma GCC unroll 16
        for (int p = 0; p < P; ++p) {
          const vec right = load(key[p] + d);
#pragma GCC unroll 4
          for (int j = 0; j < R; ++j) acc[j * P + p] += left[j] * right;
        }
      }
      float summed[W];
      store(summed, sums(acc));
#pragma GCC unroll 4
      for (int j = 0; j < R; ++j) std::memcpy(scores + (r + j) * KEYS + i, summed + j * P, P * sizeof(float));
    }
  }

  void add_in_place() {
    constexpr int N = COLUMNS;
    Ahead<T> keys(ahead->key, ahead->count, heads * c.key_dim, at->count * heads);
    for (int64_t from = 0; from < at->count; from += W) {
      const int64_t to = std::min(at->count, from + W);
      for (int64_t h = 0; h < heads; ++h) {
        int64_t d = 0;
        for (; d + N * W <= c.value_dim; d += N * W) add_rows<N>(h, d, from, to, keys);
        for (; d < c.value_dim; d += W) add_rows<1>(h, d, from, to, keys);
      }
    }
  }

  template <int N>
  void add_rows(int64_t h, int64_t d, int64_t from, int64_t to, Ahead<T>& keys) {
    int64_t r = h * rows;
    const int64_t last = r + rows;
    for (; r + 4 <= last; r += 4) add<4, N>(r, h, d, from, to, keys);
    for (; r + 2 <= last; r += 2) add<2, N>(r, h, d, from, to, keys);
    for (; r < last; ++r) add<1, N>(r, h, d, from, to, keys);
  }

  // Values by their weights, for R rows and N vectors of each.
  template <int R, int N>
  void add(int64_t r, int64_t h, int64_t d, int64_t first, int64_t stop, Ahead<T>& ahead) {
    vec acc[R][N];
    float* to = o + r * width + d;
    const float* weights = scores + r * KEYS;
#pragma GCC unroll 4
    for (int j = 0; j < R; ++j)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[j][n] = load(to + j * width + n * W);
    for (int64_t i = first; i < stop; ++i) {
      const T* from = at->value[i] + h * c.value_dim + d;
      ahead.step();
      vec value[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) value[n] = load(from + n * W);
#pragma GCC unroll 4
      for (int j = 0; j < R; ++j) {
        const vec weight = splat(weights[j * KEYS + i]);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[j][n] += weight * value[n];
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < R; ++j)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) store(to + j * width + n * W, acc[j][n]);
  }

  void add_packed(int64_t h) {
    const auto row = [&](int64_t k) { return (const float*)values + k * width; };
    product(rows, width, at->count, scores + h * rows * KEYS, KEYS, row, o + h * rows * width, width, true);
  }

  void score_packed(int64_t h) {
    const int64_t count = at->count;
    for (int64_t i = 0; i < count; ++i) {
      const T *key = at->key[i] + h * c.key_dim, *from = at->value[i] + h * c.value_dim;
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
  void soften(int64_t h, int64_t r) {
    float* s = scores + (h * rows + r) * KEYS;
    float &top = highest[h * rows + r], &sum_of = total[h * rows + r];
    const int64_t own = start + r / group - at->base;  // the row's own position, seen from the first one
    const int64_t to = std::min(at->count, own + 1), from = c.window ? std::max<int64_t>(0, own - c.window + 1) : 0;
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
      const float* bias = c.bias + query_head(h, r) * c.bias_width + at->base;
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
      const float keep = exponential(splat(before - now))[0];
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

// Tokens of one sequence that make a part, by the rows that all of them are. Packing keys costs as much as reading them
// in place for four times as many rows as that is done for.
inline int64_t tokens_of_part(const Attention& c, int64_t rows) {
  const int64_t group = c.heads / c.kv_heads;
  const bool few = rows > FEW_ROWS && rows <= 4 * FEW_ROWS && c.key_dim % W == 0 && c.value_dim % W == 0;
  return std::max<int64_t>(1, (few && group <= FEW_ROWS ? FEW_ROWS : TILE_ROWS) / group);
}

// The step's keys and values, for whoever attends later.
template <typename T>
void store(const Attention& c) {
  spread_rows(c.tokens, c.kv_heads * (c.key_dim + c.value_dim), c.threads,
              [&](int64_t t) { write_token<T>(c, t, 0, c.kv_heads); });
}

template <typename T>
void attention(const Attention& c) {
  const int64_t group = c.heads / c.kv_heads;
  struct Part {
    const int64_t* sequence;
    int64_t from, to, work;
  };
  std::vector<Part> parts;
  int64_t all = 0, seen = 0;
  for (int64_t i = 0; i < c.num_sequences; ++i) {
    const int64_t* sequence = c.sequences + 4 * i;
    const int64_t tokens = sequence[2], step = tokens_of_part(c, tokens * group);
    if (tokens == 0) continue;
    // The last tokens see the most: they come first, so that no thread is left with them.
    for (int64_t from = (tokens - 1) / step * step; from >= 0; from -= step) {
      const int64_t to = std::min(tokens, from + step), work = (to - from) * (sequence[1] + to);
      parts.push_back({sequence, from, to, work});
      all += work;
    }
    seen += tokens * (sequence[1] + tokens);
    if (tokens > step)  // several parts see these tokens
      spread_rows(tokens, c.kv_heads * (c.key_dim + c.value_dim), c.threads,
                  [&](int64_t t) { write_token<T>(c, sequence[3] + t, 0, c.kv_heads); });
  }
  // Nor with a chunk of a long prompt beside decodes.
  std::stable_sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) { return a.work > b.work; });
  std::vector<Piece> pieces;
  for (const Part& part : parts) {
    // A part that is more than a thread's share of everything is split by heads; one at a time where keys are packed.
    const int64_t split = std::min<int64_t>(c.kv_heads, (c.threads * part.work + all - 1) / all);
    const int64_t share = (c.kv_heads + split - 1) / split;
    for (int64_t head = 0; head < c.kv_heads;) {
      Piece piece{part.sequence, part.from, part.to, head, std::min(share, c.kv_heads - head),
                  part.to - part.from == part.sequence[2]};
      if (!Task<T>::reads_in_place(c, piece)) piece.heads = 1;
      pieces.push_back(piece);
      head += piece.heads;
    }
  }
  std::atomic<size_t> taken{0};
  const auto work = [&] {
    Rows<T> rows[2], *now = rows, *ahead = rows + 1;
    size_t mine = taken++;
    if (mine < pieces.size()) Task<T>::find_first(c, pieces[mine], *now);
    while (mine < pieces.size()) {
      size_t next = pieces.size();
      Task<T>(c, pieces[mine]).run(now, ahead, [&](Rows<T>& found) {
        next = taken++;
        found.count = 0;
        if (next < pieces.size()) Task<T>::find_first(c, pieces[next], found);
      });
      mine = next;
    }
  };
  if (c.threads <= 1 || pieces.size() <= 1 || seen * c.heads * c.key_dim <= SMALL) {
    work();
    return;
  }
#pragma omp parallel num_threads(c.threads)
  work();
}

// ---------------------------------------------------------------------------------------------- packed products

constexpr int64_t PANEL = 64;                // columns side by side in a packed weight
constexpr int64_t LINES = PANEL * 4 / LINE;  // cache lines that they are for one input
constexpr int64_t AHEAD = 32;                // inputs of a panel that are asked for before their turn: 8 KiB
constexpr int64_t DEPTH = 512;  // inputs whose products are summed up on their own, so that long sums stay exact
constexpr int64_t BATCH = 64;   // rows that share one reading of the weight

// Cache lines that are asked for while something else is multiplied with: from ``from`` on, spread evenly over the inputs
// of one pass or several. In 65536ths of a line: ``step`` for each input, ``begin`` before this pass.
struct Later {
  const float* from;
  uint64_t step, begin = 0;

  Later(const float* from, int64_t lines, int64_t inputs)
      : from(from), step((uint64_t(lines) << 16) / std::max<int64_t>(1, inputs)) {}

  // Lines that have to be asked for with each input, so that none is left out.
  int64_t at_once() const { return int64_t((step + 0xffff) >> 16); }
  // More than LINES are not: there is too little to multiply with for all of them.
  bool all() const { return at_once() <= LINES; }

  // Into the second cache: the first one keeps what is worked with.
  template <int64_t lines>
  auto ask() const {
    return [from = from, step = step, begin = begin](int64_t i) {
      for (int64_t l = 0; l < lines; ++l)
        __builtin_prefetch(from + ((begin + i * step + l * step / lines) >> 16) * (LINE / 4), 0, 2);
    };
  }
};

// out [m, PANEL] = or += x [m, depth] times inputs of a panel; ask(i) asks for something else with each of them.
template <typename Ask>
void multiply(int64_t m, int64_t depth, const float* x, int64_t stride, const float* panel, float* out, bool add, const Ask& ask) {
  const auto row = [=](int64_t i) {
    ask(i);
    return panel + i * PANEL;
  };
  product(m, PANEL, depth, x, stride, row, out, PANEL, add);
}

// x [rows, k] times a weight in panels [ceil(n / PANEL)][packed_k][PANEL], which is how oneDNN packs float32 for
// AVX-512. A slice of a panel (DEPTH inputs: 128 KiB) stays in the second cache for all rows, ROWS of them in a pass. One
// pass reads it as fast as memory gives it, that is all there is to it. Where there are more, they ask for the next slice
// all the while: memory brings it while this one is multiplied with. Evenly, since what comes faster than memory gives it
// holds up the reads of this one, too.
struct PackedProduct {
  const float *x, *weight, *bias;
  float* out;
  int64_t stride, packed_k, rows, n, k;

  int64_t panels() const { return (n + PANEL - 1) / PANEL; }
  int64_t passes() const { return (rows + ROWS - 1) / ROWS; }

  // A thread's first panel is the one of its number; the others it takes, each while it is at the one before. So a thread
  // that loses its processor for a while leaves less than its share for the others to wait for.
  void work(int64_t thread, int64_t threads, std::atomic<int64_t>& taken) const {
    bool here = false;  // the slice was asked for during the one before
    for (int64_t p = thread, following; p < panels(); p = following) {
      following = threads + taken++;
      here = panel(p, following, here);
    }
  }

 private:
  // Whether the following panel's first slice is here now.
  bool panel(int64_t p, int64_t following, bool here) const {
    float whole[BATCH * PANEL], part[ROWS * PANEL];
    for (int64_t first = 0; first < k; first += DEPTH) {
      const float* slice = weight + (p * packed_k + first) * PANEL;
      const int64_t depth = std::min(DEPTH, k - first), rest = k - first - depth;
      const bool last = following >= panels();
      const float* next = rest ? slice + depth * PANEL : weight + (last ? p : following) * packed_k * PANEL;
      const int64_t ahead = rest ? std::min(DEPTH, rest) : last ? 0 : std::min(DEPTH, k);
      Later later(next, passes() > 1 ? ahead * LINES : 0, (passes() - !here) * depth);
      for (int64_t r = 0, left = passes(); left > 0; --left) {
        const int64_t m = (rows - r + left - 1) / left;  // as even as may be
        const float* from = x + r * stride + first;
        float *sum = whole + r * PANEL, *to = first ? part : sum;
        if (r == 0 && !here) {
          stream(m, depth, from, slice, next, to);
        } else {
          beside(m, depth, from, slice, later, to);
          later.begin += depth * later.step;
        }
        r += m;
        if (first)
          for (int64_t i = 0; i < m * PANEL; ++i) sum[i] += part[i];
      }
      here = passes() > 1 && later.all();
    }
    const int64_t width = std::min(PANEL, n - p * PANEL);
    for (int64_t r = 0; r < rows; ++r) {
      float* to = out + r * n + p * PANEL;
      for (int64_t j = 0; j < width; ++j) to[j] = whole[r * PANEL + j] + (bias ? bias[p * PANEL + j] : 0.f);
    }
    return here;
  }

  // A slice that nobody has asked for before: lines are, a little ahead of their turn.
  void stream(int64_t m, int64_t depth, const float* from, const float* slice, const float* next, float* to) const {
    const int64_t most = std::max<int64_t>(0, depth - AHEAD);
    const auto ahead = [](const float* lines) {
      return [=](int64_t i) {
        for (int64_t l = 0; l < LINES; ++l) __builtin_prefetch(lines + (i * LINES + l) * (LINE / 4));
      };
    };
    multiply(m, most, from, stride, slice, to, false, ahead(slice + AHEAD * PANEL));
    multiply(m, depth - most, from + most, stride, slice + most * PANEL, to, true, ahead(next));
  }

  void beside(int64_t m, int64_t depth, const float* from, const float* slice, const Later& later, float* to) const {
    switch (later.at_once()) {
      case 0: return multiply(m, depth, from, stride, slice, to, false, [](int64_t) {});
      case 1: return multiply(m, depth, from, stride, slice, to, false, later.ask<1>());
      case 2: return multiply(m, depth, from, stride, slice, to, false, later.ask<2>());
      default: return multiply(m, depth, from, stride, slice, to, false, later.ask<LINES>());
    }
  }
};

void packed_product(PackedProduct whole, int64_t threads) {
  for (int64_t left = whole.rows; left > 0; left -= BATCH, whole.x += BATCH * whole.stride, whole.out += BATCH * whole.n) {
    whole.rows = std::min(BATCH, left);
    std::atomic<int64_t> taken{0};
    if (threads <= 1 || whole.n * whole.k < SMALL) {
      whole.work(0, 1, taken);
      continue;
    }
#pragma omp parallel num_threads(threads)
    whole.work(omp_get_thread_num(), omp_get_num_threads(), taken);
  }
}

// ----------------------------------------------------------------------------------------- norms and activations

// weight * (x / rms): ``offset`` is added to the weight (Gemma: 1); ``early``: x / rms is rounded to T first (Llama).
template <typename T>
struct Norm {
  const T* weight;
  int64_t n;
  float eps, offset;
  bool early;

  void row(const T* from, T* to) const {
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
  }
};

template <typename T>
void rms_norm(const T* x, int64_t stride, T* out, int64_t rows, const Norm<T>& norm, int64_t threads) {
  spread_rows(rows, norm.n, threads, [&](int64_t r) { norm.row(x + r * stride, out + r * norm.n); });
}

// x + y, rounded to T, and its norm.
template <typename T>
void add_rms_norm(const T* x, int64_t x_stride, const T* y, int64_t y_stride, T* total, T* out, int64_t rows,
                  const Norm<T>& norm, int64_t threads) {
  const int64_t n = norm.n;
  spread_rows(rows, 2 * n, threads, [=, &norm](int64_t r) {
    const T *a = x + r * x_stride, *b = y + r * y_stride;
    T* to = total + r * n;
    int64_t i = 0;
    for (; i + W <= n; i += W) store(to + i, load(a + i) + load(b + i));
    for (; i < n; ++i) put(to + i, to_float(a[i]) + to_float(b[i]));
    norm.row(to, out + r * n);
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

template <typename T>
struct Heads {
  const T* from;
  int64_t token, head;  // strides
  T* to;                // [tokens, count, dim], contiguous
  int64_t count;
};

// Heads of queries and of keys in one go.
template <typename T>
void rotate(Heads<T> q, Heads<T> k, const T* cosine, const T* sine, int64_t angle_token, int64_t tokens, int64_t dim,
            int64_t threads) {
  spread_rows(tokens, (q.count + k.count) * dim, threads, [=](int64_t t) {
    for (const Heads<T>& x : {q, k})
      for (int64_t h = 0; h < x.count; ++h)
        rotate_head(x.from + t * x.token + h * x.head, cosine + t * angle_token, sine + t * angle_token,
                    x.to + (t * x.count + h) * dim, dim);
  });
}

// -------------------------------------------------------------------------------------------------- whole layers

}  // namespace

extern "C" {

// A weight and bias as PackedProduct takes them.
struct Linear {
  const float *weight, *bias;
  int64_t packed_k, n, k;
};

// A decoder layer: norm, attention, add, norm, SiLU MLP, add. All but ``attention``'s rows, which come from ``qkv``.
struct Layer {
  Attention* attention;
  Linear qkv, o, gate_up, down;
  const float *input_norm, *post_norm;
  float input_eps, input_offset, post_eps, post_offset;
};

}

namespace {

thread_local Scratch between;  // what a layer's parts hand on

// x [rows, width] -> out, both contiguous. What follows attention is done for a batch of rows at a time, so that all of
// what lies between stays in the cache.
void layer(const Layer& c, const float* x, float* out, int64_t rows, int64_t threads) {
  const int64_t width = c.qkv.k, inner = c.down.k, batch = std::min(BATCH, rows);
  float* qkv = between.at_least(rows * (std::max(width, c.o.k) + c.qkv.n) + batch * (width + 3 * inner));
  float *attended = qkv + rows * c.qkv.n, *normed = attended + rows * std::max(width, c.o.k);
  float *both = normed + batch * width, *gated = both + batch * 2 * inner;
  const auto times = [=](const Linear& w, const float* from, float* to, int64_t m) {
    packed_product({from, w.weight, w.bias, to, w.k, w.packed_k, m, w.n, w.k}, threads);
  };
  rms_norm<float>(x, width, attended, rows, {c.input_norm, width, c.input_eps, c.input_offset, false}, threads);
  times(c.qkv, attended, qkv, rows);
  Attention& a = *c.attention;
  const float *key = qkv + a.heads * a.key_dim, *value = key + a.kv_heads * a.key_dim;
  a.query = qkv, a.key = key, a.value = value, a.out = attended;
  a.query_token = a.key_token = a.value_token = c.qkv.n;
  a.tokens = rows, a.threads = threads;
  attention<float>(a);
  const Norm<float> norm{c.post_norm, width, c.post_eps, c.post_offset, false};
  for (int64_t r = 0; r < rows; r += batch) {
    const int64_t m = std::min(batch, rows - r);
    float* result = out + r * width;
    times(c.o, attended + r * c.o.k, normed, m);
    add_rms_norm<float>(normed, width, x + r * width, width, result, normed, m, norm, threads);
    times(c.gate_up, normed, both, m);
    silu_mul<float>(both, both + inner, gated, 2 * inner, m, inner, threads);
    times(c.down, gated, normed, m);
    spread_rows(m, width, threads, [=](int64_t i) {
      for (int64_t j = i * width; j < (i + 1) * width; ++j) result[j] += normed[j];
    });
  }
}

}  // namespace

extern "C" {

int llm_cluster_kernels_version() { return 5; }

void layer_f32(const Layer* c, const float* x, float* out, int64_t rows, int64_t threads) { layer(*c, x, out, rows, threads); }

void attention_f32(const Attention* c) { attention<float>(*c); }
void attention_bf16(const Attention* c) { attention<bf16>(*c); }

void store_f32(const Attention* c) { store<float>(*c); }
void store_bf16(const Attention* c) { store<bf16>(*c); }

void packed_product_f32(const float* x, int64_t stride, const float* weight, int64_t packed_k, const float* bias,
                        float* out, int64_t rows, int64_t n, int64_t k, int64_t threads) {
  packed_product({x, weight, bias, out, stride, packed_k, rows, n, k}, threads);
}

#define NORM(T) \
  (const T* x, int64_t stride, const T* weight, T* out, int64_t rows, int64_t n, float eps, float offset, int64_t early, \
   int64_t threads) { rms_norm<T>(x, stride, out, rows, {weight, n, eps, offset, early != 0}, threads); }
void rms_norm_f32 NORM(float)
void rms_norm_bf16 NORM(bf16)

#define ADD_NORM(T) \
  (const T* x, int64_t x_stride, const T* y, int64_t y_stride, const T* weight, T* total, T* out, int64_t rows, int64_t n, \
   float eps, float offset, int64_t early, int64_t threads) { \
    add_rms_norm<T>(x, x_stride, y, y_stride, total, out, rows, {weight, n, eps, offset, early != 0}, threads); }
void add_rms_norm_f32 ADD_NORM(float)
void add_rms_norm_bf16 ADD_NORM(bf16)

#define SILU(T) \
  (const T* gate, const T* up, T* out, int64_t stride, int64_t rows, int64_t n, int64_t threads) { \
    silu_mul<T>(gate, up, out, stride, rows, n, threads); }
void silu_mul_f32 SILU(float)
void silu_mul_bf16 SILU(bf16)

#define ROTATE(T) \
  (const T* q, int64_t q_token, int64_t q_head, T* q_out, int64_t heads, const T* k, int64_t k_token, int64_t k_head, \
   T* k_out, int64_t kv_heads, const T* cosine, const T* sine, int64_t angle_token, int64_t tokens, int64_t dim, \
   int64_t threads) { \
    rotate<T>({q, q_token, q_head, q_out, heads}, {k, k_token, k_head, k_out, kv_heads}, cosine, sine, angle_token, \
              tokens, dim, threads); }
void rotate_f32 ROTATE(float)
void rotate_bf16 ROTATE(bf16)
}
