/* Antialiased resampling of interleaved RGB bytes, rows first and then columns.
 *
 * Sixteen output rows are made at a time. Their columns are turned so that the same column of all sixteen lies in
 * one vector: the second pass then needs no shuffles, and its weights are one number a vector. All arithmetic is
 * on 16-bit integers, so every instruction set gives the same bytes.
 */
#include "native.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define HAVE_X86 1
#endif

enum { ROWS = 16, ALIGNMENT = 64 };

/* Which `taps` pixels from `first` on give an output pixel. Each has all its taps inside of the image. */
struct weights {
    int taps;
    int32_t *first; /* (S,) */
    uint16_t *of;   /* (S, taps), summing to `total` */
};

struct resizer {
    size_t places, numbers, columns; /* capacities */
    struct weights vertical, horizontal;
    uint16_t *wide;   /* (ROWS, taps, ROWS): a block's vertical weights, each filling a vector */
    size_t wide_numbers;
    uint16_t *turned; /* (columns, ROWS): a block of rows after the first pass, values x 256 */
    uint8_t *narrow;  /* a copy of an image too narrow for a vector */
    size_t narrow_bytes;
};

typedef void first_pass(const uint8_t *image, size_t stride, int columns, const int32_t *first, int taps,
                        const uint16_t *wide, uint16_t *turned);
typedef void second_pass(const uint16_t *turned, const struct weights *weights, int size, int rows, uint8_t *crop);

/* --- plain C, the twin that the others are tested against ------------------------------------------------- */

static void first_plain(const uint8_t *image, size_t stride, int columns, const int32_t *first, int taps,
                        const uint16_t *wide, uint16_t *turned) {
    for (int column = 0; column < columns; column++) {
        for (int row = 0; row < ROWS; row++) {
            const uint8_t *pixel = image + (size_t)first[row] * stride + column;
            uint16_t sum = 0; /* at most 255 x 256 */
            for (int tap = 0; tap < taps; tap++) {
                sum = (uint16_t)(sum + pixel[(size_t)tap * stride] * wide[(row * taps + tap) * ROWS]);
            }
            turned[column * ROWS + row] = sum;
        }
    }
}

static uint16_t rounding(int taps) { /* half a level, and what cutting each product off loses on average */
    return (uint16_t)(128 + taps / 2);
}

static void second_plain(const uint16_t *turned, const struct weights *weights, int size, int rows, uint8_t *crop) {
    const int taps = weights->taps;
    for (int x = 0; x < size; x++) {
        for (int channel = 0; channel < 3; channel++) {
            const uint16_t *column = turned + (weights->first[x] * 3 + channel) * ROWS;
            for (int row = 0; row < rows; row++) {
                uint32_t sum = rounding(taps);
                for (int tap = 0; tap < taps; tap++) {
                    sum += ((uint32_t)column[tap * 3 * ROWS + row] * weights->of[x * taps + tap]) >> 16;
                }
                crop[((size_t)row * size + x) * 3 + channel] = (uint8_t)((sum > 65535 ? 65535 : sum) >> 8);
            }
        }
    }
}

#ifdef HAVE_X86

/* Turns a 16 x 16 square of bytes: rows in, columns out. */
#define TURN_BYTES(v)                                                                                         \
    do {                                                                                                      \
        __m128i t[16];                                                                                        \
        for (int stage = 0; stage < 4; stage++) { /* each doubles the run that lies right */                  \
            for (int i = 0; i < 8; i++) {                                                                     \
                t[2 * i] = _mm_unpacklo_epi8(v[i], v[i + 8]);                                                 \
                t[2 * i + 1] = _mm_unpackhi_epi8(v[i], v[i + 8]);                                             \
            }                                                                                                 \
            for (int i = 0; i < 16; i++) v[i] = t[i];                                                         \
        }                                                                                                     \
    } while (0)

/* Turns an 8 x 8 square of 16-bit numbers. */
#define TURN_WORDS(v)                                                                                         \
    do {                                                                                                      \
        __m128i t[8];                                                                                         \
        for (int stage = 0; stage < 3; stage++) {                                                             \
            for (int i = 0; i < 4; i++) {                                                                     \
                t[2 * i] = _mm_unpacklo_epi16(v[i], v[i + 4]);                                                \
                t[2 * i + 1] = _mm_unpackhi_epi16(v[i], v[i + 4]);                                            \
            }                                                                                                 \
            for (int i = 0; i < 8; i++) v[i] = t[i];                                                          \
        }                                                                                                     \
    } while (0)

/* The two passes for one instruction set; included once for each. */
#define TARGET __attribute__((target("avx2")))
#define NAME(pass) pass##_avx2
#define AVX2 1
#include "passes.h"
#undef TARGET
#undef NAME
#undef AVX2
#define TARGET
#define NAME(pass) pass##_sse2
#define AVX2 0
#include "passes.h"
#undef TARGET
#undef NAME
#undef AVX2

#endif

/* --- which of them --------------------------------------------------------------------------------------- */

enum { PLAIN = 0, SSE2 = 1, WITH_AVX2 = 2 };

static int instructions = -1;

static int best(void) {
#ifdef HAVE_X86
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") ? WITH_AVX2 : SSE2;
#else
    return PLAIN;
#endif
}

int vitlocal_instructions(int wanted) {
    const int most = best();
    instructions = wanted < 0 || wanted > most ? most : wanted;
    return instructions;
}

static first_pass *first_of(int kind) {
#ifdef HAVE_X86
    return kind == WITH_AVX2 ? first_avx2 : kind == SSE2 ? first_sse2 : first_plain;
#else
    (void)kind;
    return first_plain;
#endif
}

static second_pass *second_of(int kind) {
#ifdef HAVE_X86
    return kind == WITH_AVX2 ? second_avx2 : kind == SSE2 ? second_sse2 : second_plain;
#else
    (void)kind;
    return second_plain;
#endif
}

/* --- weights --------------------------------------------------------------------------------------------- */

static int taps_for(double extent, int size, int length) {
    const double support = fmax(extent / size, 1);
    const int taps = (int)ceil(2 * support) + 1;
    return taps < length ? taps : length;
}

/* The triangle filter over [start, start + extent) of `length` pixels, as Pillow's. Each weight is the difference
 * of two rounded running sums, so that they sum to `total` and rounding errors cancel between neighbours. */
static void fill(struct weights *weights, double start, double extent, int length, int size, double total, int flip) {
    const double scale = extent / size, wide = fmax(scale, 1);
    const int taps = weights->taps;
    for (int i = 0; i < size; i++) {
        const double centre = start + (i + 0.5) * scale;
        int low = (int)(centre - wide + 0.5), high = (int)(centre + wide + 0.5);
        low = low < 0 ? 0 : low;
        high = high > length ? length : high;
        if (low > length - 1) low = length - 1;
        if (high <= low) high = low + 1;
        if (high - low > taps) high = low + taps;
        const int first = low < length - taps ? low : length - taps;
        const int place = flip ? size - 1 - i : i;
        uint16_t *of = weights->of + (size_t)place * taps;
        double sum = 0;
        for (int k = low; k < high; k++) sum += fmax(0, 1 - fabs(k + 0.5 - centre) / wide);
        double running = 0;
        int before = 0;
        for (int tap = 0; tap < taps; tap++) {
            const int k = first + tap;
            if (k >= low && k < high) running += sum > 0 ? fmax(0, 1 - fabs(k + 0.5 - centre) / wide) / sum : k == low;
            const int now = (int)(fmin(running, 1) * total + 0.5);
            of[tap] = (uint16_t)(now - before);
            before = now;
        }
        of[taps - 1] = (uint16_t)(of[taps - 1] + (int)total - before);
        weights->first[place] = first;
    }
}

/* --- scratch --------------------------------------------------------------------------------------------- */

struct resizer *resizer_new(void) { return calloc(1, sizeof(struct resizer)); }

void resizer_free(struct resizer *r) {
    if (!r) return;
    free(r->vertical.first);
    free(r->vertical.of);
    free(r->horizontal.first);
    free(r->horizontal.of);
    free(r->wide);
    free(r->turned);
    free(r->narrow);
    free(r);
}

/* Makes *pointer hold at least `bytes`; what was in it is lost. */
static int hold(void *pointer, size_t *capacity, size_t bytes) {
    void **memory = pointer;
    if (bytes <= *capacity && *memory) return 1;
    free(*memory);
    *capacity = 0;
    *memory = aligned_alloc(ALIGNMENT, (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    if (*memory) *capacity = bytes;
    return *memory != NULL;
}

static int prepare(struct resizer *r, int columns, int size) {
    const size_t numbers = (size_t)size * (size_t)(r->vertical.taps > r->horizontal.taps ? r->vertical.taps
                                                                                          : r->horizontal.taps);
    size_t places = r->places, of = r->numbers;
    int enough = hold(&r->vertical.first, &places, (size_t)size * sizeof(int32_t));
    places = r->places;
    enough = enough && hold(&r->horizontal.first, &places, (size_t)size * sizeof(int32_t));
    r->places = enough ? places : 0;
    enough = enough && hold(&r->vertical.of, &of, numbers * sizeof(uint16_t));
    of = r->numbers;
    enough = enough && hold(&r->horizontal.of, &of, numbers * sizeof(uint16_t));
    r->numbers = enough ? of : 0;
    return enough
           && hold(&r->wide, &r->wide_numbers, (size_t)ROWS * ROWS * (size_t)r->vertical.taps * sizeof(uint16_t))
           && hold(&r->turned, &r->columns, (size_t)columns * ROWS * sizeof(uint16_t));
}

enum status resize(struct resizer *r, const uint8_t *image, size_t stride, int height, int width,
                   const struct box *box, int size, uint8_t *crop) {
    /* Only what the box covers is looked at, be it in part. */
    int top = (int)floor(box->top), left = (int)floor(box->left);
    int bottom = (int)ceil(box->top + box->height), right = (int)ceil(box->left + box->width);
    top = top < 0 ? 0 : top > height - 1 ? height - 1 : top;
    left = left < 0 ? 0 : left > width - 1 ? width - 1 : left;
    bottom = bottom > height ? height : bottom <= top ? top + 1 : bottom;
    right = right > width ? width : right <= left ? left + 1 : right;
    const int tall = bottom - top, across = right - left;
    image += (size_t)top * stride + (size_t)left * 3;

    int columns = across * 3;
    if (columns < ROWS) { /* a vector would read past the end of the image */
        if (!hold(&r->narrow, &r->narrow_bytes, (size_t)tall * ROWS)) return NO_MEMORY;
        for (int row = 0; row < tall; row++) {
            memset(r->narrow + row * ROWS, 0, ROWS);
            memcpy(r->narrow + row * ROWS, image + (size_t)row * stride, (size_t)columns);
        }
        image = r->narrow;
        stride = ROWS;
        columns = ROWS;
    }
    r->vertical.taps = taps_for(box->height, size, tall);
    r->horizontal.taps = taps_for(box->width, size, across);
    if (!prepare(r, columns, size)) return NO_MEMORY;
    fill(&r->vertical, box->top - top, box->height, tall, size, 256, 0);
    fill(&r->horizontal, box->left - left, box->width, across, size, 65535, box->flipped);

    const int kind = instructions < 0 ? vitlocal_instructions(-1) : instructions;
    first_pass *first = first_of(kind);
    second_pass *second = second_of(kind);
    const int taps = r->vertical.taps;
    for (int y = 0; y < size; y += ROWS) {
        const int rows = size - y < ROWS ? size - y : ROWS;
        int32_t from[ROWS];
        for (int row = 0; row < ROWS; row++) { /* the last block's missing rows repeat the last one */
            const int place = y + (row < rows ? row : rows - 1);
            from[row] = r->vertical.first[place];
            for (int tap = 0; tap < taps; tap++) {
                const uint16_t weight = r->vertical.of[(size_t)place * taps + tap];
                uint16_t *wide = r->wide + ((size_t)row * taps + tap) * ROWS;
                for (int lane = 0; lane < ROWS; lane++) wide[lane] = weight;
            }
        }
        first(image, stride, columns, from, taps, r->wide, r->turned);
        second(r->turned, &r->horizontal, size, rows, crop + (size_t)y * size * 3);
    }
    return OK;
}
