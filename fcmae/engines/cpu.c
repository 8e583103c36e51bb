/* The kernels of engine `cpu`. Plain C with GCC's and clang's vector types, so that it is quick on any processor;
 * fcmae/engines/cpu.py compiles it, once per element type, and calls it.
 *
 * Shapes: B images, V visible patches of p x p positions, C channels, k taps per side, (h, w) grid of patches.
 * A tensor of tokens is (B, V, p, p, C). Work is cut into tasks, and nothing that a task writes is written by another.
 * In the convolution a task is one block of channels, NB vectors, of one image; N neighbouring positions are computed
 * at once. k, N and NB are constants wherever they are called `const int`: every function is inlined. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(ELEMENT_DOUBLE)
typedef double real;
typedef double element;
typedef int64_t whole;
#elif defined(ELEMENT_BFLOAT16)
typedef float real; /* of sums and of what they are made from */
typedef uint16_t element; /* in memory */
typedef int32_t whole;
#else
typedef float real;
typedef float element;
typedef int32_t whole;
#endif

#if defined(__AVX512F__)
#define VECTOR 64
#elif defined(__AVX__)
#define VECTOR 32
#else
#define VECTOR 16
#endif
typedef real vec __attribute__((vector_size(VECTOR)));
typedef whole mask __attribute__((vector_size(VECTOR)));
enum { LANES = VECTOR / sizeof(real) };

#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

/* ---- vectors from and to memory; n < LANES of them at the end of the channels ---- */

INLINE vec fill(real value) { return value - (vec){0}; }
INLINE vec get(const real *from) { vec v; memcpy(&v, from, sizeof v); return v; }
INLINE void put(real *to, vec v) { memcpy(to, &v, sizeof v); }

#if defined(ELEMENT_BFLOAT16)
typedef uint16_t halves __attribute__((vector_size(VECTOR / 2)));
typedef uint32_t words __attribute__((vector_size(VECTOR)));

INLINE vec widen(halves h) { return (vec)(__builtin_convertvector(h, words) << 16); }
INLINE halves narrow(vec v) { /* to the nearest, ties to even; not a number stays so */
    words bits = (words)v;
    words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    mask number = v == v;
    return __builtin_convertvector((rounded & (words)number) | (0x7fc0 & ~(words)number), halves);
}
INLINE vec load(const element *from, int n) {
    halves h = {0};
    if (n == LANES) memcpy(&h, from, sizeof h);
    else for (int i = 0; i < n; i++) h[i] = from[i];
    return widen(h);
}
INLINE void store(element *to, vec v, int n) {
    halves h = narrow(v);
    if (n == LANES) memcpy(to, &h, sizeof h);
    else for (int i = 0; i < n; i++) to[i] = h[i];
}
#else
INLINE vec load(const element *from, int n) {
    vec v = {0};
    if (n == LANES) memcpy(&v, from, sizeof v);
    else for (int i = 0; i < n; i++) v[i] = from[i];
    return v;
}
INLINE void store(element *to, vec v, int n) {
    if (n == LANES) memcpy(to, &v, sizeof v);
    else for (int i = 0; i < n; i++) to[i] = v[i];
}
#endif

INLINE int lanes(int64_t channels) { return channels >= LANES ? LANES : channels > 0 ? (int)channels : 0; }
enum { WHOLE = 1 << 20 }; /* as a number of channels: known to be enough when the compiler unrolls */

/* ---- depthwise convolution ---- */

typedef struct {
    int64_t V, p, C, k, h, w;
    const int64_t *index; /* (B, V): the cells of the grid in which the patches lie */
} Shape;

/* A map (h*p + k - 1, w*p + k - 1, NB*LANES) of one block of channels, with zeros around and where patches are hidden.
 * It stays in the cache, and the convolution reads its neighbours from there. */
INLINE int64_t width(const Shape *s) { return s->w * s->p + s->k - 1; }
INLINE int64_t corner(const Shape *s, const int64_t *index, int64_t v) { /* the position of a patch's first tap */
    return (index[v] / s->w) * s->p * width(s) + (index[v] % s->w) * s->p;
}

INLINE void spread(real *map, const element *x, const Shape *s, const int64_t *index, int64_t channels, const int NB) {
    const int64_t half = (s->k - 1) / 2, inset = half * width(s) + half;
    for (int64_t v = 0; v < s->V; v++)
        for (int64_t row = 0; row < s->p; row++) {
            real *to = map + (corner(s, index, v) + inset + row * width(s)) * NB * LANES;
            const element *from = x + (v * s->p + row) * s->p * s->C;
            for (int64_t column = 0; column < s->p; column++)
                for (int n = 0; n < NB; n++)
                    put(to + (column * NB + n) * LANES,
                        load(from + column * s->C + n * LANES, lanes(channels - n * LANES)));
        }
}

/* N neighbouring positions of a row of outputs, in registers. */
INLINE void convolve_run(
    element *y, const real *map, const real *taps, const real *bias, int64_t C, int64_t row_length, int64_t channels,
    const int k, const int N, const int NB
) {
    vec sum[N][NB];
    for (int i = 0; i < N; i++)
        for (int n = 0; n < NB; n++) sum[i][n] = get(bias + n * LANES);
    for (int row = 0; row < k; row++) {
        const real *from = map + row * row_length * NB * LANES, *tap = taps + row * k * NB * LANES;
#pragma GCC unroll 7
        for (int column = 0; column < k; column++)
#pragma GCC unroll 4
            for (int n = 0; n < NB; n++) {
                const vec weight = get(tap + (column * NB + n) * LANES);
#pragma GCC unroll 8
                for (int i = 0; i < N; i++) sum[i][n] += weight * get(from + ((i + column) * NB + n) * LANES);
            }
    }
    for (int i = 0; i < N; i++)
        for (int n = 0; n < NB; n++) store(y + i * C + n * LANES, sum[i][n], lanes(channels - n * LANES));
}

INLINE void convolve_block(
    element *y, const real *map, const real *taps, const real *bias, const Shape *s, const int64_t *index,
    int64_t channels, const int k, const int N, const int NB
) {
    for (int64_t v = 0; v < s->V; v++)
        for (int64_t row = 0; row < s->p; row++) {
            const real *from = map + (corner(s, index, v) + row * width(s)) * NB * LANES;
            element *to = y + (v * s->p + row) * s->p * s->C;
            int64_t column = 0;
            for (; column + N <= s->p; column += N)
                convolve_run(
                    to + column * s->C, from + column * NB * LANES, taps, bias, s->C, width(s), channels, k, N, NB);
            for (; column < s->p; column++)
                convolve_run(
                    to + column * s->C, from + column * NB * LANES, taps, bias, s->C, width(s), channels, k, 1, NB);
        }
}

/* A run of N positions adds to the gradients of one row of taps. */
INLINE void gradient_run(
    vec *sum, const element *grad, const real *from, int64_t C, int n_lanes, const int k, const int N, const int NB
) {
#pragma GCC unroll 8
    for (int i = 0; i < N; i++) {
        const vec g = load(grad + i * C, n_lanes);
#pragma GCC unroll 7
        for (int column = 0; column < k; column++) sum[column] += g * get(from + (i + column) * NB * LANES);
    }
}

INLINE void gradient_block(
    real *of_taps, const element *grad, const real *map, const Shape *s, const int64_t *index, int64_t channels,
    const int k, const int N, const int NB
) {
    for (int n = 0; n < NB; n++) {
        const int n_lanes = lanes(channels - n * LANES);
        if (n_lanes == 0) break;
        for (int tap_row = 0; tap_row < k; tap_row++) {
            vec sum[k];
            for (int i = 0; i < k; i++) sum[i] = (vec){0};
            for (int64_t v = 0; v < s->V; v++)
                for (int64_t row = 0; row < s->p; row++) {
                    const real *from = map + ((corner(s, index, v) + (row + tap_row) * width(s)) * NB + n) * LANES;
                    const element *g = grad + (v * s->p + row) * s->p * s->C + n * LANES;
                    int64_t column = 0;
                    for (; column + N <= s->p; column += N)
                        gradient_run(sum, g + column * s->C, from + column * NB * LANES, s->C, n_lanes, k, N, NB);
                    for (; column < s->p; column++)
                        gradient_run(sum, g + column * s->C, from + column * NB * LANES, s->C, n_lanes, k, 1, NB);
                }
            for (int i = 0; i < k; i++)
                for (int lane = 0; lane < n_lanes; lane++)
                    of_taps[(tap_row * k + i) * s->C + n * LANES + lane] = sum[i][lane];
        }
    }
}

/* Tasks first ... last - 1 of the B * blocks. Returns 0, or 1 if there is no memory.
 * Without of_taps: y (tokens) = convolution of x with taps (blocks, k*k, block) and bias (blocks, block).
 * With it: of_taps (B, k*k, C) = each image's gradient of the taps, for the output's gradient in y. */
INLINE int run_tasks(
    int64_t first, int64_t last, const Shape *s, const element *x, element *y, const real *taps, const real *bias,
    real *of_taps, const int k, const int N, const int NB
) {
    const int block = NB * LANES;
    const int64_t blocks = (s->C + block - 1) / block, image = s->V * s->p * s->p * s->C;
    const size_t size = (size_t)(s->h * s->p + k - 1) * width(s) * block * sizeof(real);
    real *map = NULL;
    for (int64_t task = first; task < last; task++) {
        const int64_t b = task / blocks, c = task % blocks * block, at = b * image + c;
        const int64_t *index = s->index + b * s->V;
        if (map == NULL || task % blocks == 0) { /* another image hides other patches */
            if (map == NULL && posix_memalign((void **)&map, 64, size)) return 1;
            memset(map, 0, size);
        }
#define RUN_BLOCK(channels)                                                                          \
    {                                                                                                \
        spread(map, x + at, s, index, channels, NB);                                                 \
        if (of_taps == NULL)                                                                         \
            convolve_block(y + at, map, taps + c * k * k, bias + c, s, index, channels, k, N, NB);   \
        else                                                                                         \
            gradient_block(of_taps + b * k * k * s->C + c, y + at, map, s, index, channels, k, N, NB); \
    }
        if (s->C - c >= block) RUN_BLOCK(WHOLE) else RUN_BLOCK(s->C - c)
    }
    free(map);
    return 0;
}

/* Few positions in a row leave registers for more channels. */
EXPORT int block_of(int64_t p) { return (p >= 8 ? 1 : p >= 4 ? 2 : 4) * LANES; }

EXPORT int depthwise(
    int64_t first, int64_t last, const int64_t *shape, const int64_t *index, const element *x, element *y,
    const real *taps, const real *bias, real *of_taps
) {
    const Shape s = {shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], index};
#define RUN(k, N, NB) return run_tasks(first, last, &s, x, y, taps, bias, of_taps, k, N, NB)
    if (s.k == 7 && s.p >= 8) RUN(7, 8, 1);
    if (s.k == 7 && s.p >= 4) RUN(7, 4, 2);
    if (s.k == 7 && s.p >= 2) RUN(7, 2, 4);
    if (s.k == 7) RUN(7, 1, 4);
    if (s.p >= 8) RUN(s.k, 8, 1);
    if (s.p >= 4) RUN(s.k, 4, 2);
    RUN(s.k, 1, 4);
}

/* ---- GELU and GRN: x (B, N, C). A task is a segment of at most SEGMENT rows of one image. ---- */

enum { SEGMENT = 64 };
EXPORT int segment(void) { return SEGMENT; }

INLINE vec get_n(const real *from, int n) {
    if (n == LANES) return get(from);
    vec v = {0};
    for (int i = 0; i < n; i++) v[i] = from[i];
    return v;
}
INLINE void add_n(real *to, vec v, int n) {
    if (n == LANES) put(to, get(to) + v);
    else for (int i = 0; i < n; i++) to[i] += v[i];
}

/* Phi(x), the normal distribution, and its density: GELU(x) = x Phi(x), GELU'(x) = Phi(x) + x density(x). */
#if defined(ELEMENT_DOUBLE)
INLINE void normal(vec x, vec *distribution, vec *density) {
    for (int i = 0; i < LANES; i++) {
        (*distribution)[i] = 0.5 * erfc(-x[i] * 0.70710678118654752440);
        (*density)[i] = 0.39894228040143267794 * exp(-0.5 * x[i] * x[i]);
    }
}
#else
/* 2^x for -126 <= x <= 0, to two parts in 10^7: 2^n 2^f with |f| <= 1/2, and 2^f from a polynomial that meets it at the
 * Chebyshev nodes. */
INLINE vec power_of_two(vec x) {
    const vec shift = fill(12582912.0f); /* 1.5 * 2^23: adding it rounds, and leaves n in the lowest bits */
    const vec n = x + shift, f = x - (n - shift);
    vec power = fill(1.339086336e-03f);
    power = power * f + 9.676031918e-03f;
    power = power * f + 5.550357114e-02f;
    power = power * f + 2.402210749e-01f;
    power = power * f + 6.931471880e-01f;
    power = power * f + 1.000000075e+00f;
    return (vec)((mask)power + ((mask)n << 23));
}
/* Abramowitz and Stegun, Handbook of Mathematical Functions, 26.2.17: the distribution to 7.5e-8. */
INLINE void normal(vec x, vec *distribution, vec *density) {
    const mask negative = x < 0;
    vec size = (vec)((mask)x & 0x7fffffff);
    const mask small = size < 13.0f; /* beyond, a float32 x times the tail or the density is taken for zero */
    vec near = (vec)(((mask)size & small) | ((mask)fill(13.0f) & ~small));
    vec t = 1.0f / (near * 0.2316419f + 1.0f);
    vec tail = fill(1.330274429f);
    tail = tail * t - 1.821255978f;
    tail = tail * t + 1.781477937f;
    tail = tail * t - 0.356563782f;
    tail = tail * t + 0.319381530f;
    *density = power_of_two(near * near * -0.72134752f) * 0.39894228f; /* 1 / (2 ln 2) */
    *density = (vec)((mask)*density & small);
    tail = tail * t * *density;
    vec upper = 1.0f - tail;
    *distribution = (vec)(((mask)tail & negative) | ((mask)upper & ~negative));
}
#endif

INLINE vec gelu(vec x) {
    vec distribution, density;
    normal(x, &distribution, &density);
    return x * distribution;
}

/* What is done to n channels of a row, from channel c of tensors whose rows and vectors begin at the pointers. */
typedef struct {
    element *grad, *y;
    const element *x;
    const real *scale, *bias, *per_h;
    real *squares, *products, *totals;
} Row;

INLINE void squares_of(const Row *r, int64_t c, int n) {
    const vec h = gelu(load(r->x + c, n));
    add_n(r->squares + c, h * h, n);
}
INLINE void scale_of(const Row *r, int64_t c, int n) {
    store(r->y + c, gelu(load(r->x + c, n)) * get_n(r->scale + c, n) + get_n(r->bias + c, n), n);
}
INLINE void products_of(const Row *r, int64_t c, int n) {
    const vec g = load(r->grad + c, n), h = gelu(load(r->x + c, n));
    store(r->y + c, h * get_n(r->scale + c, n) + get_n(r->bias + c, n), n);
    add_n(r->products + c, g * h, n);
    add_n(r->totals + c, g, n);
}
INLINE void backward_of(const Row *r, int64_t c, int n) {
    const vec g = load(r->grad + c, n), x = load(r->x + c, n);
    vec distribution, density;
    normal(x, &distribution, &density);
    const vec of_h = g * get_n(r->scale + c, n) + x * distribution * get_n(r->per_h + c, n);
    store(r->grad + c, of_h * (x * density + distribution), n);
}

/* Does `what` to all rows of the tasks; the pointers in `all` are those of whole tensors, null where not used. */
INLINE int each_row(
    int64_t first, int64_t last, int64_t N, int64_t C, Row all, void (*const what)(const Row *, int64_t, int)
) {
#define AT(pointer, offset) ((pointer) ? (pointer) + (offset) : NULL)
    for (int64_t task = first; task < last; task++) {
        const int64_t segments = (N + SEGMENT - 1) / SEGMENT;
        const int64_t image = task / segments, start = task % segments * SEGMENT;
        real *const sums[] = {all.squares, all.products, all.totals};
        for (int i = 0; i < 3; i++)
            if (sums[i]) memset(sums[i] + task * C, 0, C * sizeof(real));
        for (int64_t row = image * N + start; row < image * N + N && row < image * N + start + SEGMENT; row++) {
            const Row r = {
                AT(all.grad, row * C), AT(all.y, row * C), AT(all.x, row * C),
                AT(all.scale, image * C), all.bias, AT(all.per_h, image * C),
                AT(all.squares, task * C), AT(all.products, task * C), AT(all.totals, task * C),
            };
            int64_t c = 0;
            for (; c + LANES <= C; c += LANES) what(&r, c, LANES);
            if (c < C) what(&r, c, (int)(C - c));
        }
    }
    return 0;
}

/* squares (tasks, C) = the sums of GELU(x)'s squares over each segment. */
EXPORT int gelu_squares(int64_t first, int64_t last, int64_t N, int64_t C, const element *x, real *squares) {
    return each_row(first, last, N, C, (Row){.x = x, .squares = squares}, squares_of);
}

/* y = GELU(x) * scale + bias; scale (B, C), bias (C). */
EXPORT int gelu_scale(
    int64_t first, int64_t last, int64_t N, int64_t C, const element *x, const real *scale, const real *bias, element *y
) {
    return each_row(first, last, N, C, (Row){.x = x, .scale = scale, .bias = bias, .y = y}, scale_of);
}

/* y as of gelu_scale, and the sums over each segment of grad * GELU(x) and of grad: both (tasks, C). */
EXPORT int gelu_products(
    int64_t first, int64_t last, int64_t N, int64_t C, element *grad, const element *x, const real *scale,
    const real *bias, element *y, real *products, real *totals
) {
    return each_row(
        first, last, N, C,
        (Row){.grad = grad, .x = x, .scale = scale, .bias = bias, .y = y, .products = products, .totals = totals},
        products_of);
}

/* grad = GELU'(x) * (grad * scale + GELU(x) * per_h); scale and per_h (B, C). */
EXPORT int gelu_scale_backward(
    int64_t first, int64_t last, int64_t N, int64_t C, element *grad, const element *x, const real *scale,
    const real *per_h
) {
    return each_row(first, last, N, C, (Row){.grad = grad, .x = x, .scale = scale, .per_h = per_h}, backward_of);
}
