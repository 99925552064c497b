/* out[m][n] = scale[n] * unit[m] * sum_k weight[n][k] * q[m][k] + bias[n], where
   x[m][k] ~ unit[m] * q[m][k] and q has 16 bits: int8 weights are read once, as they are stored.

   Compiled for x86-64 with AVX2 by `cpu_kernels.py`, which says how it is used. Each of the eight
   32-bit lanes adds up K / 8 products of at most 127 * largest; the caller keeps `largest` low
   enough for its K. */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#define STEP 16      /* numbers in a vector */
#define TOKENS 4     /* computed together, so that a weight is widened once for them */
#define ROWS 2       /* of the weight, likewise */
#define BLOCK 64     /* rows of the weight that stay in the cache while all tokens pass */
#define AHEAD 4096   /* bytes that are fetched before they are needed: 1.4-1.6x of the speed */
#define MIN_WORK (1 << 19) /* products that are worth waking a thread for */

/* In float32: the sum of all lanes may be too large for 32 bits. */
static inline float sum_lanes(__m256i v) {
    __m256 f = _mm256_cvtepi32_ps(v);
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(f), _mm256_extractf128_ps(f, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    s = _mm_add_ss(s, _mm_movehdup_ps(s));
    return _mm_cvtss_f32(s);
}

/* Dot products of `rows` weight rows with `tokens` activation rows; both are constants, so that
   every use of this is unrolled and its sums stay in registers. */
static inline __attribute__((always_inline)) void tile(
    const int8_t *w, const int16_t *q, int64_t depth, int64_t q_stride, int rows, int tokens,
    float *sums) {
    __m256i acc[ROWS * TOKENS];
    for (int i = 0; i < rows * tokens; i++) acc[i] = _mm256_setzero_si256();
    int64_t k = 0;
    for (; k + STEP <= depth; k += STEP) {
        __m256i wide[ROWS];
        for (int r = 0; r < rows; r++) {
            const int8_t *at = w + r * depth + k;
            _mm_prefetch((const char *)at + AHEAD, _MM_HINT_T0);
            wide[r] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)at));
        }
        for (int t = 0; t < tokens; t++) {
            __m256i a = _mm256_load_si256((const __m256i *)(q + t * q_stride + k));
            for (int r = 0; r < rows; r++)
                acc[r * tokens + t] =
                    _mm256_add_epi32(acc[r * tokens + t], _mm256_madd_epi16(wide[r], a));
        }
    }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) {
            int64_t rest = 0;
            for (int64_t j = k; j < depth; j++) rest += w[r * depth + j] * q[t * q_stride + j];
            sums[r * tokens + t] = sum_lanes(acc[r * tokens + t]) + (float)rest;
        }
}

typedef struct {
    const int8_t *weight;
    const float *scale, *bias, *unit;
    const int16_t *q;
    float *out;
    int64_t tokens, depth, width, stride;
} Product;

static inline __attribute__((always_inline)) void store_tile(
    const Product *p, int64_t n, int64_t m, int rows, int tokens) {
    float sums[ROWS * TOKENS];
    tile(p->weight + n * p->depth, p->q + m * p->stride, p->depth, p->stride, rows, tokens, sums);
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++)
            p->out[(m + t) * p->width + n + r] = sums[r * tokens + t] * p->scale[n + r] *
                    p->unit[m + t] + (p->bias ? p->bias[n + r] : 0.0f);
}

static void multiply(const Product *p, int64_t first, int64_t last) {
    for (int64_t block = first; block < last; block += BLOCK) {
        int64_t end = block + BLOCK < last ? block + BLOCK : last;
        int64_t m = 0;
        for (; m + TOKENS <= p->tokens; m += TOKENS) {
            int64_t n = block;
            for (; n + ROWS <= end; n += ROWS) store_tile(p, n, m, ROWS, TOKENS);
            for (; n < end; n++) store_tile(p, n, m, 1, TOKENS);
        }
        for (; m < p->tokens; m++)
            for (int64_t n = block; n < end; n++) store_tile(p, n, m, 1, 1);
    }
}

static void quantize(const float *x, int16_t *q, float *unit, int64_t depth, float largest) {
    __m256 tops = _mm256_setzero_ps();
    const __m256 sign = _mm256_set1_ps(-0.0f);
    int64_t k = 0;
    for (; k + 8 <= depth; k += 8)
        tops = _mm256_max_ps(tops, _mm256_andnot_ps(sign, _mm256_loadu_ps(x + k)));
    float lanes[8], top = 0.0f;
    _mm256_storeu_ps(lanes, tops);
    for (int i = 0; i < 8; i++) top = fmaxf(top, lanes[i]);
    for (; k < depth; k++) top = fmaxf(top, fabsf(x[k]));
    *unit = top / largest;
    float factor = top > 0.0f ? largest / top : 0.0f;
    for (k = 0; k + STEP <= depth; k += STEP) {
        __m256 f = _mm256_set1_ps(factor);
        __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + k), f));
        __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + k + 8), f));
        __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
        _mm256_storeu_si256((__m256i *)(q + k), both);
    }
    for (; k < depth; k++) q[k] = (int16_t)lrintf(x[k] * factor);
}

/* x is [tokens][depth], weight [width][depth], out [tokens][width]; bias may be NULL.
   Returns 0, or 1 when memory ran out. */
int int8_linear(
    const float *x, int64_t tokens, int64_t depth, const int8_t *weight, const float *scale,
    const float *bias, int64_t width, float largest, int threads, float *out) {
    int64_t stride = (depth + STEP - 1) / STEP * STEP;
    size_t bytes = (size_t)tokens * stride * sizeof(int16_t);
    int16_t *q = aligned_alloc(32, bytes);
    float *unit = malloc((size_t)tokens * sizeof(float));
    if (!q || !unit) {
        free(q);
        free(unit);
        return 1;
    }
    Product p = {weight, scale, bias, unit, q, out, tokens, depth, width, stride};
    int64_t most = tokens * depth * width / MIN_WORK + 1;
    int team = most < threads ? (int)most : threads;
    if (team == 1) {
        for (int64_t m = 0; m < tokens; m++)
            quantize(x + m * depth, q + m * stride, unit + m, depth, largest);
        multiply(&p, 0, width);
    } else {
        int64_t blocks = (width + BLOCK - 1) / BLOCK;
#pragma omp parallel num_threads(team)
        {
#pragma omp for schedule(static)
            for (int64_t m = 0; m < tokens; m++)
                quantize(x + m * depth, q + m * stride, unit + m, depth, largest);
            /* Taken one by one: on shared cores one thread may stand still for a while. */
#pragma omp for schedule(dynamic, 1)
            for (int64_t b = 0; b < blocks; b++) {
                int64_t end = (b + 1) * BLOCK < width ? (b + 1) * BLOCK : width;
                multiply(&p, b * BLOCK, end);
            }
        }
    }
    free(q);
    free(unit);
    return 0;
}
