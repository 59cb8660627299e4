/* The momentum step of teleport_optim.update, for float32 tensors on the CPU: the same arithmetic as `averaged` and `descend`
   there, in one call. Where this module is not built, or for other tensors, that code runs instead. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef WIDE /* compiled for processors with 512-bit vectors */
enum { LANES = 16 };
#define NAME "_native_wide"
#define INIT PyInit__native_wide
#else
enum { LANES = 8 };
#define NAME "_native"
#define INIT PyInit__native
#endif

#if !defined(WIDE) && defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
/* One copy for processors with 256-bit vectors and one for all; the right one is chosen when the module is loaded. */
#define PORTABLE __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define PORTABLE
#endif
#define INLINE static inline __attribute__((always_inline))

enum { TILE_ROWS = 8, FEW_COLUMNS = 320, CHUNK = 512, STRIP = 64, AHEAD = 512 };

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t bfloat16; /* the upper half of a float */
typedef float eight __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint64_t words __attribute__((vector_size(32), aligned(4), may_alias)); /* their bits, two floats in a word */

static const float ITERATIONS[3][3] = {
    {7.9424f, -22.2873f, 15.8239f}, {3.5875f, -2.5845f, 0.4893f}, {2.6604f, -1.9134f, 0.4194f}};

/* A block of rows of one tensor, which the step treats on its own. */
typedef struct {
    int64_t tensor, offset, rows, columns, is_mixed;
} RowBlock;

/* What steers the step of one tensor, per unit of the prior rate. */
typedef struct {
    double length, user_decay, learned_decay;
} Numbers;

/* Square matrices of one block, padded with zeros so that every tile can be read and written whole. */
typedef struct {
    int stride, num_rows;
    float *memory, *cosines, *power, *factor, *mixers, *product, *columns;
    float *inverse_norms, *values, *scales;
} Workspace;

INLINE vec load(const float *from) { return *(const vec *)from; }
INLINE void store(float *to, vec value) { *(vec *)to = value; }
/* Loops over numbers of 16 bits are left to the compiler, which makes better vectors of them. */
INLINE float from_half(bfloat16 half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}
INLINE bfloat16 to_half(float value) { /* rounded to the nearest, to even ones between two */
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return (bfloat16)((bits + (0x7fff + (bits >> 16 & 1))) >> 16);
}
/* Asks for the strips of two arrays that come some way after these: processors lose track where pages or rows end. */
INLINE void ask_ahead(const float *values, const bfloat16 *halves) {
    uintptr_t of_values = (uintptr_t)values + AHEAD * sizeof(float), of_halves = (uintptr_t)halves + AHEAD * sizeof(bfloat16);
    for (size_t byte = 0; byte < STRIP * sizeof(float); byte += 64) __builtin_prefetch((const void *)(of_values + byte));
    for (size_t byte = 0; byte < STRIP * sizeof(bfloat16); byte += 64) __builtin_prefetch((const void *)(of_halves + byte));
}
INLINE int round_up(int value, int step) { return (value + step - 1) / step * step; }

INLINE float sum(vec value) {
    float total = 0.0f;
    for (int lane = 0; lane < LANES; lane++) total += value[lane];
    return total;
}

static int workspace_new(Workspace *w, int most_rows, int64_t most_columns, int64_t most_entries) {
    w->num_rows = round_up(most_rows, TILE_ROWS);
    w->stride = round_up(most_rows, LANES) + LANES;
    size_t square = (size_t)w->num_rows * w->stride, columns = (size_t)FEW_COLUMNS * w->stride;
    w->memory = calloc(5 * square + columns + (size_t)w->stride + most_entries + most_columns + 2 * LANES, sizeof(float));
    if (!w->memory) return -1;
    float *next = w->memory;
    float **parts[] = {&w->cosines, &w->power, &w->factor, &w->mixers, &w->product};
    for (int i = 0; i < 5; i++, next += square) *parts[i] = next;
    w->columns = next;
    w->inverse_norms = next + columns;
    w->values = w->inverse_norms + w->stride;
    w->scales = w->values + most_entries + LANES;
    return 0;
}

/* TILE_ROWS rows and LANES columns of a' b, over the rows of both: as many sums as a processor adds to at once. */
INLINE void tile(int depth, const float *a, size_t a_stride, const float *b, size_t b_stride, vec out[TILE_ROWS]) {
    vec sums[TILE_ROWS] = {{0}};
    for (int row = 0; row < depth; row++, a += a_stride, b += b_stride) {
        vec value = load(b);
        for (int i = 0; i < TILE_ROWS; i++) sums[i] += a[i] * value;
    }
    for (int i = 0; i < TILE_ROWS; i++) out[i] = sums[i];
}

/* What lies above the diagonal, copied from below. */
INLINE void mirror(const Workspace *w, int k, float *c, int first_offset) {
    size_t stride = w->stride;
    for (int j = 0; j < k; j += LANES)
        for (int i = j + first_offset; i < k; i++) {
            int count = i - j < LANES ? i - j : LANES;
            for (int lane = 0; lane < count; lane++) c[(j + lane) * stride + i] = c[i * stride + j + lane];
        }
    for (int i = 0; i < k; i++) memset(c + i * stride + k, 0, (round_up(k, LANES) - k) * sizeof(float));
}

/* c = a' b, k x k; a and b are depth x k. */
INLINE void multiply(const Workspace *w, int k, int depth, const float *a, const float *b, float *c, int is_symmetric) {
    size_t stride = w->stride;
    for (int j = 0; j < k; j += LANES)
        for (int i = is_symmetric ? j / TILE_ROWS * TILE_ROWS : 0; i < k; i += TILE_ROWS) {
            vec out[TILE_ROWS];
            tile(depth, a + i, stride, b + j, stride, out);
            for (int row = 0; row < TILE_ROWS; row++) store(c + (i + row) * stride + j, out[row]);
        }
    if (is_symmetric) mirror(w, k, c, LANES);
}

INLINE void transpose(const Workspace *w, int k, const float *from, float *to) {
    for (int i = 0; i < k; i++)
        for (int j = 0; j < k; j++) to[(size_t)j * w->stride + i] = from[(size_t)i * w->stride + j];
    for (int i = 0; i < k; i++) memset(to + (size_t)i * w->stride + k, 0, (round_up(k, LANES) - k) * sizeof(float));
}

INLINE double sum_of_squares(const float *values, int64_t size) {
    double total = 0.0;
    for (int64_t start = 0; start < size; start += 4096) {
        int64_t end = start + 4096 < size ? start + 4096 : size, i = start;
        vec first = {0}, second = {0};
        for (; i + 2 * LANES <= end; i += 2 * LANES) {
            vec a = load(values + i), b = load(values + i + LANES);
            first += a * a, second += b * b;
        }
        first += second;
        float rest = 0.0f;
        for (; i < end; i++) rest += values[i] * values[i];
        total += rest + sum(first);
    }
    return total;
}

/* The sum of squares of a row whose direction is all that matters. A row of very large or very small numbers, whose squares are no
   floats, is divided by its largest one first. */
INLINE double square_in_range(float *values, int64_t size) {
    double square = sum_of_squares(values, size);
    if (square > 1e-24 && square < 1e24) return square;
    float most = 0.0f;
    for (int64_t i = 0; i < size; i++) most = fmaxf(most, fabsf(values[i]));
    if (most == 0.0f) return 0.0;
    for (int64_t i = 0; i < size; i++) values[i] /= most;
    return sum_of_squares(values, size);
}

INLINE float inverse_norm(float square) { return square > 1e-36f ? 1.0f / sqrtf(square) : 0.0f; }

/* From the cosines of vectors, k x k, what to mix them with so that they are nearly orthogonal, in w->mixers. */
INLINE void orthogonalise(Workspace *w, int k) {
    size_t stride = w->stride;
    int width = round_up(k, LANES);
    vec sums = {0};
    for (int i = 0; i < k; i++)
        for (int j = 0; j < width; j += LANES) {
            vec value = load(w->cosines + i * stride + j);
            sums += value * value;
        }
    float norm = sqrtf(sum(sums));
    float scale = 1.0f / (norm > 0.5f ? norm : 0.5f);
    for (int i = 0; i < k; i++)
        for (int j = 0; j < width; j += LANES)
            store(w->power + i * stride + j, scale * load(w->cosines + i * stride + j));
    for (int step = 0; step < 3; step++) {
        const float *p = ITERATIONS[step];
        float *into = step ? w->factor : w->mixers;
        multiply(w, k, k, w->power, w->power, into, 1);
        for (int i = 0; i < k; i++) {
            for (int j = 0; j < width; j += LANES) {
                float *at = into + i * stride + j;
                store(at, p[1] * load(w->power + i * stride + j) + p[2] * load(at));
            }
            into[i * stride + i] += p[0];
        }
        if (step < 2) { /* factor power factor, as (power factor)' factor: small singular values need that order */
            multiply(w, k, k, w->power, into, w->product, 0);
            multiply(w, k, k, w->product, into, w->power, 1);
        }
        if (step) {
            multiply(w, k, k, w->factor, w->mixers, w->product, 0);
            float *swap = w->mixers;
            w->mixers = w->product, w->product = swap;
        }
    }
}

/* The weights with which rows are mixed, in w->factor: what row j of the block gives to row i, in row j. */
INLINE void row_mixers(Workspace *w, int k) {
    size_t stride = w->stride;
    float *inverse = w->inverse_norms, *cosines = w->cosines;
    int width = round_up(k, LANES);
    for (int i = 0; i < k; i++) inverse[i] = inverse_norm(cosines[i * stride + i]);
    memset(inverse + k, 0, (w->stride - k) * sizeof(float));
    for (int i = 0; i < k; i++)
        for (int j = 0; j < width; j += LANES) {
            float *at = cosines + i * stride + j;
            store(at, load(at) * (inverse[i] * load(inverse + j)));
        }
    orthogonalise(w, k);
    transpose(w, k, w->mixers, w->factor);
    for (int j = 0; j < k; j++)
        for (int i = 0; i < width; i += LANES) {
            float *at = w->factor + j * stride + i;
            store(at, inverse[j] * load(at));
        }
}

INLINE vec load_few(const float *from, int count) {
    float values[LANES] = {0};
    memcpy(values, from, count * sizeof(float));
    return load(values);
}

/* Columns times the -3/8th power of their norms among rows of norm 1, which is left in w->scales. */
INLINE void rescale_columns(Workspace *w, float *values, int rows, int64_t columns) {
    float *scales = w->scales, *inverse = w->inverse_norms;
    for (int row = 0; row < rows; row++) inverse[row] = inverse_norm((float)square_in_range(values + row * columns, columns));
    for (int64_t j = 0; j < columns; j += LANES) {
        int few = columns - j < LANES ? (int)(columns - j) : 0;
        vec sums[2] = {{0}};
        for (int row = 0; row < rows; row++) {
            const float *from = values + row * columns + j;
            vec value = inverse[row] * (few ? load_few(from, few) : load(from));
            sums[row & 1] += value * value;
        }
        store(scales + j, sums[0] + sums[1]);
    }
    for (int64_t j = 0; j < columns; j++) {
        float square = scales[j] > 1e-36f ? scales[j] : INFINITY, eighth = sqrtf(sqrtf(sqrtf(square)));
        scales[j] = 1.0f / (eighth * sqrtf(eighth));
    }
    for (int row = 0; row < rows; row++)
        for (int64_t j = 0; j < columns; j++) values[row * columns + j] *= scales[j];
}

/* Orthogonal rows, or nearly so, of any length, their columns rescaled, in the place of those of a block of fewer columns than
   rows: the same as mixing its rows of norm 1, by mixing its columns instead. */
INLINE void mix_columns(Workspace *w, float *values, int rows, int columns) {
    size_t stride = w->stride;
    float *normal = w->columns;
    for (int row = 0; row < rows; row++) {
        float *from = values + row * columns, scale = inverse_norm((float)sum_of_squares(from, columns));
        for (int column = 0; column < columns; column++) normal[row * stride + column] = scale * from[column];
        memset(normal + row * stride + columns, 0, (stride - columns) * sizeof(float));
    }
    multiply(w, columns, rows, normal, normal, w->cosines, 1);
    orthogonalise(w, columns);
    float *transposed = w->product;
    for (int column = 0; column < columns; column++) {
        for (int row = 0; row < rows; row++) transposed[column * stride + row] = normal[row * stride + column];
        memset(transposed + column * stride + rows, 0, (stride - rows) * sizeof(float));
    }
    for (int j = 0; j < columns; j += LANES)
        for (int i = 0; i < rows; i += TILE_ROWS) {
            vec out[TILE_ROWS];
            tile(columns, transposed + i, stride, w->mixers + j, stride, out);
            int count = rows - i < TILE_ROWS ? rows - i : TILE_ROWS, few = columns - j < LANES ? columns - j : LANES;
            for (int row = 0; row < count; row++) {
                out[row] *= load(w->scales + j);
                memcpy(values + (i + row) * columns + j, out + row, few * sizeof(float));
            }
        }
}

/* Inner products of two rows with three, over a multiple of LANES columns, added to out. */
INLINE void add_products(const float *const first[2], const float *const second[3], int64_t columns, float *const out[6]) {
    vec sums[6] = {{0}};
    for (int64_t j = 0; j < columns; j += LANES) {
        vec a = load(first[0] + j), b = load(first[1] + j);
        vec c = load(second[0] + j), d = load(second[1] + j), e = load(second[2] + j);
        sums[0] += a * c, sums[1] += a * d, sums[2] += a * e;
        sums[3] += b * c, sums[4] += b * d, sums[5] += b * e;
    }
    for (int i = 0; i < 6; i++) *out[i] += sum(sums[i]);
}

/* Inner products of the rows of a block, in w->cosines. */
INLINE void gram(Workspace *w, const float *values, int rows, int64_t columns) {
    size_t stride = w->stride;
    if (columns < FEW_COLUMNS) {
        for (int column = 0; column < columns; column++)
            memset(w->columns + column * stride + rows, 0, (stride - rows) * sizeof(float));
        for (int row = 0; row < rows; row++)
            for (int column = 0; column < columns; column++)
                w->columns[column * stride + row] = values[row * columns + column];
        multiply(w, rows, (int)columns, w->columns, w->columns, w->cosines, 1);
        return;
    }
    for (int i = 0; i < rows; i++) memset(w->cosines + i * stride, 0, stride * sizeof(float));
    int64_t whole = columns / LANES * LANES;
    float ignored = 0.0f;
    for (int64_t start = 0; start < whole; start += CHUNK)
        for (int i = 0; i < rows; i += 2)
            for (int j = 0; j <= i + 1 && j < rows; j += 3) {
                const float *first[2], *second[3];
                float *out[6];
                for (int a = 0; a < 2; a++) first[a] = values + (i + a < rows ? i + a : i) * columns + start;
                for (int b = 0; b < 3; b++) second[b] = values + (j + b < rows ? j + b : j) * columns + start;
                for (int a = 0; a < 2; a++)
                    for (int b = 0; b < 3; b++)
                        out[3 * a + b] = i + a < rows && j + b <= i + a ? w->cosines + (i + a) * stride + j + b : &ignored;
                add_products(first, second, whole - start < CHUNK ? whole - start : CHUNK, out);
            }
    for (int64_t column = whole; column < columns; column++)
        for (int i = 0; i < rows; i++)
            for (int j = 0; j <= i; j++)
                w->cosines[i * stride + j] += values[i * columns + column] * values[j * columns + column];
    mirror(w, rows, w->cosines, 1);
}

/* A fingerprint tells whether somebody has written into a tensor. It is a sum of the bits of all entries, each with a weight of its
   place: of the row, of the strip in the row, and of the place in the strip. Rows may come in any order. */
#define NEXT_STRIP UINT64_C(0x9E3779B97F4A7C15) /* any odd number with many ones */
INLINE void add_words(words *total, words *upper, words next) {
    *total = (*total << 1) + next;
    *upper = (*upper << 1) + (next >> 32); /* two changes of signs in upper halves cancel in the total, but not by themselves */
}
INLINE uint64_t end_strip(uint64_t print, words total, words upper, uint64_t rest) {
    total += 5 * upper;
    return print * NEXT_STRIP + rest + 7 * (total[0] + 11 * total[1] + 101 * total[2] + 1009 * total[3]);
}
INLINE uint64_t add_strip(uint64_t print, const float *values, int64_t size) {
    words total = {0}, upper = {0};
    uint64_t rest = 0;
    int64_t i = 0;
    for (; i + 8 <= size; i += 8) add_words(&total, &upper, *(const words *)(values + i));
    for (; i < size; i++) {
        uint32_t bits;
        memcpy(&bits, values + i, sizeof(bits));
        rest = 3 * rest + bits;
    }
    return end_strip(print, total, upper, rest);
}
/* Weights of rows are spread, since small numbers with signs add up to 0 too easily. */
INLINE uint64_t of_row(uint64_t print, int64_t at) {
    uint64_t weight = ((uint64_t)at + 1) * NEXT_STRIP;
    return print * ((weight ^ weight >> 29) * NEXT_STRIP | 1);
}
/* As it is kept: odd, which tells it from none, which is 0, and from those that torch makes, which are even. */
INLINE uint64_t as_kept(uint64_t print) { return print * NEXT_STRIP | 1; }

/* One step of a row of parameters. */
INLINE void move(float *restrict params, const float *restrict values, int64_t size, float shrink, float factor) {
    for (int64_t i = 0; i < size; i++) params[i] = shrink * params[i] - factor * values[i];
}

/* One step of a row of parameters, which begins at an entry of the tensor, and of the offset of its average, of which a share is
   kept; adds to the fingerprints from before and after. */
INLINE void move_with_average(float *restrict params, bfloat16 *restrict offsets, const float *restrict values, int64_t size,
                              float shrink, float factor, float keep, int64_t at, uint64_t prints[2]) {
    uint64_t before = 0, after = 0;
    int64_t start = 0;
    for (; start + STRIP <= size; start += STRIP) {
        float change[STRIP];
        words old_total = {0}, old_upper = {0}, new_total = {0}, new_upper = {0};
        ask_ahead(params + start, offsets + start);
        for (int64_t i = 0; i < STRIP; i += 8) {
            eight old = *(const eight *)(params + start + i), new = shrink * old - factor * *(const eight *)(values + start + i);
            *(eight *)(params + start + i) = new;
            *(eight *)(change + i) = old - new;
            add_words(&old_total, &old_upper, (words)old);
            add_words(&new_total, &new_upper, (words)new);
        }
        before = end_strip(before, old_total, old_upper, 0);
        after = end_strip(after, new_total, new_upper, 0);
        for (int64_t i = 0; i < STRIP; i++)
            offsets[start + i] = to_half(keep * (from_half(offsets[start + i]) + change[i]));
    }
    if (start < size) {
        before = add_strip(before, params + start, size - start);
        for (int64_t i = start; i < size; i++) {
            float old = params[i], new = shrink * old - factor * values[i];
            params[i] = new;
            offsets[i] = to_half(keep * (from_half(offsets[i]) + (old - new)));
        }
        after = add_strip(after, params + start, size - start);
    }
    prints[0] += of_row(before, at);
    prints[1] += of_row(after, at);
}

/* Mixed rows, their columns rescaled, in the place of those of a block; a few columns at a time, which are laid side by side first. */
INLINE void mix_rows(Workspace *w, float *values, int rows, int64_t columns) {
    gram(w, values, rows, columns);
    row_mixers(w, rows);
    float *panel = w->product;
    for (int64_t j = 0; j < columns; j += LANES) {
        int few = columns - j < LANES ? (int)(columns - j) : 0;
        for (int row = 0; row < rows; row++) {
            const float *from = values + row * columns + j;
            store(panel + row * LANES, few ? load_few(from, few) : load(from));
        }
        for (int i = 0; i < rows; i += TILE_ROWS) {
            vec out[TILE_ROWS];
            tile(rows, w->factor + i, w->stride, panel, LANES, out);
            int count = rows - i < TILE_ROWS ? rows - i : TILE_ROWS;
            for (int row = 0; row < count; row++) {
                float *to = values + (i + row) * columns + j;
                out[row] *= load(w->scales + j);
                if (few)
                    memcpy(to, out + row, few * sizeof(float));
                else
                    store(to, out[row]);
            }
        }
    }
}

/* The averages of a block after the gradients have come in: rounded where they are kept, and as they are in values. */
INLINE void average(bfloat16 *restrict averages, const float *restrict grads, int64_t size, float rest, float *restrict values) {
    for (int64_t start = 0; start < size; start += STRIP) {
        int64_t end = start + STRIP < size ? start + STRIP : size;
        ask_ahead(grads + start, averages + start);
        for (int64_t i = start; i < end; i++) {
            float old = from_half(averages[i]), new = old + rest * (grads[i] - old);
            values[i] = new;
            averages[i] = to_half(new);
        }
    }
}

/* Whether a row has no gradient; in the usual case the first entry tells. */
INLINE int is_idle(const float *grads, int64_t size) {
    for (int64_t i = 0; i < size; i++)
        if (grads[i] != 0.0f) return 0;
    return 1;
}

PORTABLE static void take_blocks(const RowBlock *blocks, int64_t count, float *const *params, bfloat16 *const *averages,
                                bfloat16 *const *offsets, float *const *grads, const Numbers *numbers, double rate,
                                double decay, float rest, const float *keeps, uint64_t *prints, Workspace *w) {
    for (const RowBlock *block = blocks; block < blocks + count; block++) {
        int64_t size = block->rows * block->columns, tensor = block->tensor, offset = block->offset;
        const Numbers *own = numbers + tensor;
        float shrink = (float)(1.0 - rate * (own->user_decay + decay * own->learned_decay));
        float length = (float)(rate * own->length), *values = w->values;
        const float *own_grads = grads[tensor] + offset;
        average(averages[tensor] + offset, own_grads, size, rest, values);
        /* A row without a gradient stays where it is, whatever its momentum, and has no influence on the others. */
        for (int64_t at = 0; at < size; at += block->columns)
            if (is_idle(own_grads + at, block->columns)) memset(values + at, 0, block->columns * sizeof(float));
        if (block->is_mixed) {
            rescale_columns(w, values, (int)block->rows, block->columns);
            if (block->columns < block->rows)
                mix_columns(w, values, (int)block->rows, (int)block->columns);
            else
                mix_rows(w, values, (int)block->rows, block->columns);
        }
        uint64_t own_prints[2] = {0, 0};
        for (int64_t row = 0; row < block->rows; row++, values += block->columns, own_grads += block->columns) {
            double norm = sqrt(square_in_range(values, block->columns));
            float factor = norm > 1e-18 ? (float)(length / norm) : 0.0f;
            float own_shrink = factor == 0.0f && is_idle(own_grads, block->columns) ? 1.0f : shrink;
            int64_t at = offset + row * block->columns;
            if (offsets)
                move_with_average(params[tensor] + at, offsets[tensor] + at, values, block->columns, own_shrink, factor,
                                  keeps[tensor], at, own_prints);
            else
                move(params[tensor] + at, values, block->columns, own_shrink, factor);
        }
        if (offsets) /* other threads may have other rows of the same tensor */
            for (int i = 0; i < 2; i++) __atomic_fetch_add(prints + 2 * tensor + i, own_prints[i], __ATOMIC_RELAXED);
    }
}

PORTABLE static void square_sums(const float *const *tensors, const int64_t *sizes, Py_ssize_t count, double *out) {
    for (Py_ssize_t i = 0; i < count; i++) {
        out[i] = sum_of_squares(tensors[i], sizes[i]);
        if (out[i] > 1e-24 && out[i] < 1e36) continue;
        out[i] = 0.0; /* squares of very large or very small numbers are no floats, but they are doubles */
        for (int64_t j = 0; j < sizes[i]; j++) out[i] += (double)tensors[i][j] * tensors[i][j];
    }
}

/* The addresses in a list of numbers, in memory that the caller frees; NULL with an exception set if that fails. */
static void *addresses(PyObject *list, Py_ssize_t count) {
    if (!PyList_Check(list) || PyList_GET_SIZE(list) != count) {
        PyErr_SetString(PyExc_ValueError, "lists of one length are needed");
        return NULL;
    }
    void **out = PyMem_Malloc(sizeof(void *) * (count + 1));
    if (!out) return PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < count; i++) out[i] = PyLong_AsVoidPtr(PyList_GET_ITEM(list, i));
    if (PyErr_Occurred()) {
        PyMem_Free(out);
        return NULL;
    }
    return out;
}

static PyObject *step(PyObject *self, PyObject *args) {
    Py_buffer numbers, keeps, prints, blocks;
    PyObject *lists[4];
    double rate, decay;
    float rest;
    int most_rows;
    if (!PyArg_ParseTuple(args, "OOOOy*ddfy*w*iy*", &lists[0], &lists[1], &lists[2], &lists[3], &numbers, &rate, &decay, &rest,
                          &keeps, &prints, &most_rows, &blocks))
        return NULL;
    void *tensors[4] = {0};
    Py_ssize_t count = numbers.len / (Py_ssize_t)sizeof(Numbers);
    int has_average = lists[2] != Py_None;
    Workspace workspace = {0};
    const RowBlock *first = blocks.buf, *end = first + blocks.len / (Py_ssize_t)sizeof(RowBlock);
    int64_t most_entries = 0, most_columns = 0;
    for (const RowBlock *block = first; block < end; block++) {
        if (block->is_mixed && block->columns > most_columns) most_columns = block->columns;
        if (block->rows * block->columns > most_entries) most_entries = block->rows * block->columns;
    }
    int is_ready = 1;
    for (int i = 0; i < 4 && is_ready; i++)
        if (i != 2 || has_average) is_ready = (tensors[i] = addresses(lists[i], count)) != NULL;
    if (is_ready && has_average &&
        (keeps.len < count * (Py_ssize_t)sizeof(float) || prints.len < 2 * count * (Py_ssize_t)sizeof(int64_t))) {
        PyErr_SetString(PyExc_ValueError, "one share that is kept and two fingerprints for each tensor are needed");
        is_ready = 0;
    }
    if (is_ready && workspace_new(&workspace, most_rows, most_columns, most_entries)) {
        PyErr_NoMemory();
        is_ready = 0;
    }
    if (is_ready) {
        Py_BEGIN_ALLOW_THREADS
        take_blocks(first, end - first, (float *const *)tensors[0], (bfloat16 *const *)tensors[1],
                   (bfloat16 *const *)tensors[2], (float *const *)tensors[3], numbers.buf, rate, decay, rest, keeps.buf,
                   prints.buf, &workspace);
        Py_END_ALLOW_THREADS
    }
    free(workspace.memory);
    for (int i = 0; i < 4; i++) PyMem_Free(tensors[i]);
    PyBuffer_Release(&numbers);
    PyBuffer_Release(&keeps);
    PyBuffer_Release(&prints);
    PyBuffer_Release(&blocks);
    if (!is_ready) return NULL;
    Py_RETURN_NONE;
}

static PyObject *norms(PyObject *self, PyObject *args) {
    PyObject *list;
    Py_buffer sizes;
    if (!PyArg_ParseTuple(args, "Oy*", &list, &sizes)) return NULL;
    Py_ssize_t count = sizes.len / (Py_ssize_t)sizeof(int64_t);
    PyObject *result = NULL;
    void *tensors = addresses(list, count);
    double *out = tensors ? PyMem_Malloc(8 * (count + 1)) : NULL;
    if (out) {
        Py_BEGIN_ALLOW_THREADS
        square_sums(tensors, sizes.buf, count, out);
        Py_END_ALLOW_THREADS
        result = PyList_New(count);
        for (Py_ssize_t i = 0; result && i < count; i++) PyList_SET_ITEM(result, i, PyFloat_FromDouble(sqrt(out[i])));
    } else if (tensors)
        PyErr_NoMemory();
    PyMem_Free(out);
    PyMem_Free(tensors);
    PyBuffer_Release(&sizes);
    return result;
}

/* Count a step of every tensor, and of every average. */
static PyObject *count(PyObject *self, PyObject *args) {
    PyObject *lists[2];
    if (!PyArg_ParseTuple(args, "OO", &lists[0], &lists[1])) return NULL;
    Py_ssize_t sizes[2];
    void **found[2];
    for (int i = 0; i < 2; i++) sizes[i] = PyList_Check(lists[i]) ? PyList_GET_SIZE(lists[i]) : -1;
    found[0] = addresses(lists[0], sizes[0]);
    found[1] = found[0] ? addresses(lists[1], sizes[1]) : NULL;
    if (found[1]) {
        for (Py_ssize_t i = 0; i < sizes[0]; i++) *(float *)found[0][i] += 1.0f;
        for (Py_ssize_t i = 0; i < sizes[1]; i++) *(int64_t *)found[1][i] += 1;
    }
    for (int i = 0; i < 2; i++)
        if (found[0]) PyMem_Free(found[i]);
    if (!found[0] || !found[1]) return NULL;
    Py_RETURN_NONE;
}

/* Compare the fingerprints from before a step with those that are kept, and keep those from after it. Returns the numbers of the
   tensors that differ. */
static PyObject *compare(PyObject *self, PyObject *args) {
    PyObject *list;
    Py_buffer prints;
    if (!PyArg_ParseTuple(args, "Oy*", &list, &prints)) return NULL;
    Py_ssize_t size = prints.len / (2 * (Py_ssize_t)sizeof(uint64_t));
    uint64_t **kept = addresses(list, size);
    PyObject *differing = kept ? PyList_New(0) : NULL;
    const uint64_t *known = prints.buf;
    for (Py_ssize_t i = 0; differing && i < size; i++, known += 2) {
        int is_other = *kept[i] & 1 && *kept[i] != as_kept(known[0]);
        *kept[i] = as_kept(known[1]);
        PyObject *number = is_other ? PyLong_FromSsize_t(i) : NULL;
        if (is_other && (!number || PyList_Append(differing, number))) Py_CLEAR(differing);
        Py_XDECREF(number);
    }
    PyMem_Free(kept);
    PyBuffer_Release(&prints);
    return differing;
}

PORTABLE static void add_rows(const float *const *tensors, const int64_t *shapes, Py_ssize_t count, uint64_t *prints) {
    for (Py_ssize_t i = 0; i < count; i++)
        for (int64_t row = 0, columns = shapes[2 * i + 1]; row < shapes[2 * i]; row++) {
            const float *values = tensors[i] + row * columns;
            uint64_t print = 0;
            for (int64_t start = 0; start < columns; start += STRIP)
                print = add_strip(print, values + start, start + STRIP < columns ? STRIP : columns - start);
            prints[i] += of_row(print, row * columns);
        }
}

/* The fingerprints, as they are kept, of tensors of given rows and columns, in an array of zeros. */
static PyObject *fingerprints(PyObject *self, PyObject *args) {
    PyObject *list;
    Py_buffer shapes, prints;
    if (!PyArg_ParseTuple(args, "Oy*w*", &list, &shapes, &prints)) return NULL;
    Py_ssize_t count = prints.len / (Py_ssize_t)sizeof(uint64_t);
    uint64_t *out = prints.buf;
    void *tensors = NULL;
    if (shapes.len < 2 * count * (Py_ssize_t)sizeof(int64_t))
        PyErr_SetString(PyExc_ValueError, "rows and columns of every tensor are needed");
    else
        tensors = addresses(list, count);
    if (tensors) {
        Py_BEGIN_ALLOW_THREADS
        add_rows(tensors, shapes.buf, count, out);
        for (Py_ssize_t i = 0; i < count; i++) out[i] = as_kept(out[i]);
        Py_END_ALLOW_THREADS
    }
    PyMem_Free(tensors);
    PyBuffer_Release(&shapes);
    PyBuffer_Release(&prints);
    if (!tensors) return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef METHODS[] = {
    {"step", step, METH_VARARGS, NULL},
    {"norms", norms, METH_VARARGS, NULL},
    {"count", count, METH_VARARGS, NULL},
    {"compare", compare, METH_VARARGS, NULL},
    {"fingerprints", fingerprints, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, NAME, NULL, 0, METHODS, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC INIT(void) { return PyModule_Create(&MODULE); }
