/* Attention of one new token of each sequence over its blocks, where they are: nothing is gathered.

   The pool is float32 [block][layer][2: keys, values][slot][head][dim]. Queries that share a head of
   the pool (grouped-query attention) are computed together, so that it is read once. Compiled for
   x86-64 with AVX2 by `cpu_kernels.py`. */

#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>

#define LANES 8
#define MIN_WORK (1 << 16) /* numbers read from the pool that are worth waking a thread for */

typedef struct {
    const float *query, *pool;
    float *out;
    const int64_t *tables, *lengths;
    int64_t width, layer, layers, slots, heads, group, dim, window;
    float scale;
} Step;

static inline float sum_lanes(__m256 f) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(f), _mm256_extractf128_ps(f, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    s = _mm_add_ss(s, _mm_movehdup_ps(s));
    return _mm_cvtss_f32(s);
}

static float dot(const float *a, const float *b, int64_t dim) {
    __m256 sum = _mm256_setzero_ps();
    for (int64_t d = 0; d < dim; d += LANES)
        sum = _mm256_fmadd_ps(_mm256_loadu_ps(a + d), _mm256_loadu_ps(b + d), sum);
    return sum_lanes(sum);
}

/* Dot products of `a` with four rows that lie `stride` apart. */
static __m128 four_dots(const float *a, const float *b, int64_t stride, int64_t dim) {
    __m256 sum[4];
    for (int i = 0; i < 4; i++) sum[i] = _mm256_setzero_ps();
    for (int64_t d = 0; d < dim; d += LANES) {
        __m256 x = _mm256_loadu_ps(a + d);
        for (int i = 0; i < 4; i++)
            sum[i] = _mm256_fmadd_ps(x, _mm256_loadu_ps(b + i * stride + d), sum[i]);
    }
    __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(sum[0], sum[1]), _mm256_hadd_ps(sum[2], sum[3]));
    return _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
}

/* Keys (0) or values (1) of `head` at the first slot of the sequence's block that has `position`. */
static const float *slots_of(const Step *s, int64_t sequence, int64_t head, int64_t position,
                             int64_t which) {
    int64_t block = s->tables[sequence * s->width + position / s->slots];
    int64_t plane = (block * s->layers + s->layer) * 2 + which;
    return s->pool + (plane * s->slots * s->heads + head) * s->dim;
}

/* Scores of the tokens from `first` on for one query after the other; `scores` has rows of
   `length`. A block's keys are in the cache after the first query. */
static void score(const Step *s, int64_t sequence, int64_t head, int64_t first, int64_t length,
                  const float *query, float *scores) {
    int64_t stride = s->heads * s->dim;
    for (int64_t p = first, end; p < length; p = end) {
        end = (p / s->slots + 1) * s->slots;
        end = end < length ? end : length;
        const float *keys = slots_of(s, sequence, head, p, 0) + p % s->slots * stride;
        for (int64_t g = 0; g < s->group; g++) {
            const float *q = query + g * s->dim;
            float *row = scores + g * length + p;
            int64_t i = 0;
            for (; i + 4 <= end - p; i += 4)
                _mm_storeu_ps(row + i, _mm_mul_ps(_mm_set1_ps(s->scale),
                                                  four_dots(q, keys + i * stride, stride, s->dim)));
            for (; i < end - p; i++) row[i] = s->scale * dot(q, keys + i * stride, s->dim);
        }
    }
}

static void normalize(float *row, int64_t count) {
    float top = -INFINITY, total = 0.0f;
    for (int64_t p = 0; p < count; p++) top = row[p] > top ? row[p] : top;
    for (int64_t p = 0; p < count; p++) total += row[p] = expf(row[p] - top);
    for (int64_t p = 0; p < count; p++) row[p] /= total;
}

/* `vectors` numbers of lanes of the output at once: a constant, so that they stay in registers. */
static inline __attribute__((always_inline)) void mix(
    const Step *s, int64_t sequence, int64_t head, int64_t first, int64_t length,
    const float *weights, int64_t at, int vectors, float *out) {
    int64_t stride = s->heads * s->dim;
    __m256 sum[8];
    for (int v = 0; v < vectors; v++) sum[v] = _mm256_setzero_ps();
    for (int64_t p = first, end; p < length; p = end) {
        end = (p / s->slots + 1) * s->slots;
        end = end < length ? end : length;
        const float *values = slots_of(s, sequence, head, p, 1) + p % s->slots * stride + at;
        for (int64_t i = 0; i < end - p; i++) {
            __m256 w = _mm256_broadcast_ss(weights + p + i);
            for (int v = 0; v < vectors; v++)
                sum[v] = _mm256_fmadd_ps(w, _mm256_loadu_ps(values + i * stride + v * LANES),
                                         sum[v]);
        }
    }
    for (int v = 0; v < vectors; v++) _mm256_storeu_ps(out + at + v * LANES, sum[v]);
}

/* `scores` has room for `group` rows of the sequence's length. */
static void attend(const Step *s, int64_t sequence, int64_t head, float *scores) {
    int64_t length = s->lengths[sequence];
    int64_t first = length > s->window ? length - s->window : 0;
    int64_t base = (sequence * s->heads + head) * s->group * s->dim;
    score(s, sequence, head, first, length, s->query + base, scores);
    for (int64_t g = 0; g < s->group; g++) {
        float *weights = scores + g * length, *out = s->out + base + g * s->dim;
        normalize(weights + first, length - first);
        int64_t d = 0;
        for (; d + 8 * LANES <= s->dim; d += 8 * LANES)
            mix(s, sequence, head, first, length, weights, d, 8, out);
        for (; d < s->dim; d += LANES) mix(s, sequence, head, first, length, weights, d, 1, out);
    }
}

/* query and out are [sequences][heads * group][dim], tables [sequences][width] block numbers,
   lengths the tokens of each sequence, the new one included; dim is a multiple of 8. A token sees
   itself and the `window` - 1 before it. Returns 0, or 1 when memory ran out. */
int decode_attention(
    const float *query, const float *pool, const int64_t *tables, const int64_t *lengths,
    int64_t sequences, int64_t width, int64_t layer, int64_t layers, int64_t slots, int64_t heads,
    int64_t group, int64_t dim, int64_t window, float scale, int threads, float *out) {
    Step s = {query, pool, out, tables, lengths, width, layer, layers,
              slots, heads, group, dim, window, scale};
    int64_t longest = 0, work = 0;
    for (int64_t i = 0; i < sequences; i++) {
        longest = lengths[i] > longest ? lengths[i] : longest;
        work += lengths[i] * heads * dim;
    }
    int64_t most = work / MIN_WORK + 1;
    int team = most < threads ? (int)most : threads;
    float *scores = malloc((size_t)team * group * longest * sizeof(float));
    if (!scores) return 1;
    if (team == 1) {
        for (int64_t i = 0; i < sequences * heads; i++) attend(&s, i / heads, i % heads, scores);
    } else {
#pragma omp parallel num_threads(team)
        {
            float *own = scores + (int64_t)omp_get_thread_num() * group * longest;
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < sequences * heads; i++) attend(&s, i / heads, i % heads, own);
        }
    }
    free(scores);
    return 0;
}
