/* Antialiased resampling of interleaved RGB bytes, rows first and then columns.
 *
 * Sixteen output rows are made at a time. They are transposed so that a column of all sixteen is one vector. So the
 * second pass needs no shuffles and one weight for each vector. All arithmetic is on 16-bit integers, so every
 * instruction set gives the same bytes.
 */
#include "native.h"

#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define HAVE_X86 1
#elif defined(__aarch64__)
#include <arm_neon.h>
#define HAVE_NEON 1
#endif

enum {
    ROWS = 16,
    ALIGNMENT = 64,
    MANY_TAPS = 64,
    STRIP = 160, /* pixels of the image that are transposed at a time: 15 KiB, which stay in the L1 cache */
};

/* Output pixels start..end of some rows, from the transposed pixels from `from`. */
struct strip {
    int start, end, rows, from;
};

struct passes {
    void (*first)(const uint8_t *image, size_t stride, int columns, const int32_t *first, int taps,
                  const uint16_t *wide, uint16_t *turned);
    void (*second)(const uint16_t *turned, const struct weights *weights, const struct strip *strip, uint8_t *out,
                   size_t stride);
};

/* --- plain C, with which tests compare the others --- */

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

static uint16_t rounding(int taps) { /* half a level, and the average loss of truncating each product */
    return (uint16_t)(128 + taps / 2);
}

/* For more than MANY_TAPS, which shrink to less than a thirtieth, a sum of truncated products is not exact enough. */
static void second_plain(const uint16_t *turned, const struct weights *weights, const struct strip *strip,
                         uint8_t *out, size_t stride) {
    const int taps = weights->taps, exact = taps > MANY_TAPS;
    for (int x = strip->start; x < strip->end; x++) {
        for (int channel = 0; channel < 3; channel++) {
            const uint16_t *column = turned + ((weights->first[x] - strip->from) * 3 + channel) * ROWS;
            for (int row = 0; row < strip->rows; row++) {
                uint32_t sum = exact ? 1 << 23 : rounding(taps); /* stays below 2^32, or 2^16 */
                for (int tap = 0; tap < taps; tap++) {
                    const uint32_t product = (uint32_t)column[(size_t)tap * 3 * ROWS + row]
                                             * weights->of[(size_t)x * taps + tap];
                    sum += exact ? product : product >> 16;
                }
                out[(size_t)row * stride + (size_t)(x - strip->start) * 3 + channel] =
                    (uint8_t)(sum >> (exact ? 24 : 8));
            }
        }
    }
}

#if defined(HAVE_X86) || defined(HAVE_NEON)

typedef uint8_t BYTES __attribute__((vector_size(16), may_alias)); /* also as eight words */

/* ZIP_1 and ZIP_2 interleave the lower and the upper halves of two vectors. LEVELS, and then PACKED, take the upper
 * bytes of words. */
#ifdef HAVE_X86
#define ZIP_1_BYTES(a, b) ((BYTES)_mm_unpacklo_epi8((__m128i)(a), (__m128i)(b)))
#define ZIP_2_BYTES(a, b) ((BYTES)_mm_unpackhi_epi8((__m128i)(a), (__m128i)(b)))
#define ZIP_1_WORDS(a, b) ((BYTES)_mm_unpacklo_epi16((__m128i)(a), (__m128i)(b)))
#define ZIP_2_WORDS(a, b) ((BYTES)_mm_unpackhi_epi16((__m128i)(a), (__m128i)(b)))
#define LEVELS(sums) ((sums) >> 8)
#define PACKED(a, b) ((BYTES)_mm_packus_epi16((__m128i)(a), (__m128i)(b)))
#else
#define ZIP_1_BYTES(a, b) ((BYTES)vzip1q_u8((uint8x16_t)(a), (uint8x16_t)(b)))
#define ZIP_2_BYTES(a, b) ((BYTES)vzip2q_u8((uint8x16_t)(a), (uint8x16_t)(b)))
#define ZIP_1_WORDS(a, b) ((BYTES)vzip1q_u16((uint16x8_t)(a), (uint16x8_t)(b)))
#define ZIP_2_WORDS(a, b) ((BYTES)vzip2q_u16((uint16x8_t)(a), (uint16x8_t)(b)))
#define LEVELS(sums) (sums)
#define PACKED(a, b) ((BYTES)vuzp2q_u8((uint8x16_t)(a), (uint8x16_t)(b))) /* takes the upper bytes itself */

/* NEON has this instruction only for signed numbers. */
static inline uint16x8_t high_of_products(uint16x8_t a, uint16x8_t b) {
    const uint32x4_t lower = vmull_u16(vget_low_u16(a), vget_low_u16(b)), upper = vmull_high_u16(a, b);
    return vuzp2q_u16((uint16x8_t)lower, (uint16x8_t)upper);
}
#endif

/* Transposes a square of count x count numbers. Each stage doubles the length of the runs in place. */
#define TURN(v, count, stages, type)                                                                          \
    do {                                                                                                      \
        BYTES t[count];                                                                                       \
        for (int stage = 0; stage < stages; stage++) {                                                        \
            for (int i = 0; i < count / 2; i++) {                                                             \
                t[2 * i] = ZIP_1_##type(v[i], v[i + count / 2]);                                              \
                t[2 * i + 1] = ZIP_2_##type(v[i], v[i + count / 2]);                                          \
            }                                                                                                 \
            for (int i = 0; i < count; i++) v[i] = t[i];                                                      \
        }                                                                                                     \
    } while (0)
#define TURN_BYTES(v) TURN(v, 16, 4, BYTES)
#define TURN_WORDS(v) TURN(v, 8, 3, WORDS)

/* Constants unroll the loop over the taps. */
#define FOR_TAPS(taps, pass, ...)                                                                             \
    switch (taps) {                                                                                           \
    case 2: pass(2, __VA_ARGS__); break;                                                                      \
    case 3: pass(3, __VA_ARGS__); break;                                                                      \
    case 4: pass(4, __VA_ARGS__); break;                                                                      \
    case 5: pass(5, __VA_ARGS__); break;                                                                      \
    default: pass(taps, __VA_ARGS__);                                                                         \
    }

/* The two passes, for each instruction set. */
#ifdef HAVE_X86
#define AVX2 1
#include "passes.h"
#define AVX2 0
#endif
#include "passes.h"

#endif

/* --- the choice of an instruction set --- */

static const struct passes PASSES[] = {
    {first_plain, second_plain},
#ifdef HAVE_X86
    {first_sse2, second_sse2},
    {first_avx2, second_avx2},
#elif defined(HAVE_NEON)
    {first_neon, second_neon},
#endif
};

static int instructions = -1;

int vitlocal_instructions(int wanted) {
#ifdef HAVE_X86
    const int most = __builtin_cpu_supports("avx2") ? 2 : 1;
#else
    const int most = (int)(sizeof PASSES / sizeof *PASSES) - 1; /* every aarch64 processor has NEON */
#endif
    const int used = wanted < 0 || wanted > most ? most : wanted;
    __atomic_store_n(&instructions, used, __ATOMIC_RELAXED);
    return used;
}

/* --- weights --- */

static const double TINY = 1e-6; /* of a pixel: rounding errors must not add a pixel */

/* Without these, calls of libm take half of the time of a small crop. */
static inline double larger(double a, double b) { return a > b ? a : b; }
static inline double smaller(double a, double b) { return a < b ? a : b; }
static inline int rounded_up(double a) { /* for a >= 0 */
    const int down = (int)a;
    return down + (down < a);
}

static int taps_for(enum filter filter, double start, double extent, int size, int length) {
    const double scale = extent / size;
    int taps = rounded_up(2 * larger(scale, 1)); /* the largest number of pixel centres under the triangle */
    if (filter == AREA) { /* the largest number of covered pixels */
        taps = 1;
        for (int i = 0; i < size; i++) {
            const int covered = rounded_up(start + (i + 1) * scale - TINY) - (int)(start + i * scale + TINY);
            taps = covered > taps ? covered : taps;
        }
    }
    return taps < length ? taps : length;
}

/* The weights of the pixels low..high in the output pixel that covers [from, to), and their sum. A weight is the covered
 * part of a pixel (AREA), or a triangle around the centre that reaches `reach` pixels to either side. */
static double shares_of(enum filter filter, int low, int high, double from, double to, double reach, double *shares) {
    const double centre = (from + to) / 2, slope = 1 / reach;
    double sum = 0;
    for (int k = low; k < high; k++) {
        const double share = filter == AREA ? smaller(to, k + 1) - larger(from, k) : 1 - fabs(k + 0.5 - centre) * slope;
        shares[k - low] = larger(share, 0);
        sum += shares[k - low];
    }
    return sum;
}

/* Fills in the weights of the filter over [start, start + extent) of `length` pixels. Each weight is the difference of
 * two rounded running sums. So the weights sum to `total`, and rounding errors cancel. `shares` is scratch, (taps,). */
static void fill(struct weights *weights, enum filter filter, double start, double extent, int length, int size,
                 int total, int flip, double *shares) {
    const double scale = extent / size, reach = larger(scale, 1);
    const int taps = weights->taps;
    for (int i = 0; i < size; i++) {
        const double from = start + i * scale, to = start + (i + 1) * scale, centre = (from + to) / 2;
        int low = filter == AREA ? (int)(from + TINY) : (int)(centre - reach + 0.5);
        int high = filter == AREA ? rounded_up(to - TINY) : (int)(centre + reach + 0.5);
        low = low < 0 ? 0 : low > length - 1 ? length - 1 : low;
        high = high > length ? length : high <= low ? low + 1 : high;
        high = high - low > taps ? low + taps : high;
        const double sum = shares_of(filter, low, high, from, to, reach, shares);
        const double each = sum > 0 ? total / sum : 0;

        const int first = low < length - taps ? low : length - taps;
        const int place = flip ? size - 1 - i : i;
        uint16_t *of = weights->of + (size_t)place * taps;
        for (int tap = 0; tap < taps; tap++) of[tap] = 0;
        double running = 0;
        int before = 0;
        for (int k = low; k < high; k++) {
            running += shares[k - low];
            const int now = (int)smaller(running * each + 0.5, total);
            of[k - first] = (uint16_t)(now - before);
            before = now;
        }
        of[high - 1 - first] = (uint16_t)(of[high - 1 - first] + total - before);
        weights->first[place] = first;
    }
}

/* --- scratch memory --- */

void resizer_free(struct resizer *r) {
    free(r->vertical.first);
    free(r->vertical.of);
    free(r->horizontal.first);
    free(r->horizontal.of);
    free(r->wide);
    free(r->turned);
    free(r->shares);
    free(r->exact);
    free(r->middle);
}

int hold(void *pointer, size_t *capacity, size_t bytes) {
    void **memory = pointer;
    if (bytes <= *capacity && *memory) return 1;
    free(*memory);
    *capacity = 0;
    *memory = aligned_alloc(ALIGNMENT, (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    if (*memory) *capacity = bytes;
    return *memory != NULL;
}

static int prepare_weights(struct weights *weights, int length) {
    return hold(&weights->first, &weights->first_bytes, (size_t)length * sizeof(int32_t))
           && hold(&weights->of, &weights->of_bytes, (size_t)length * (size_t)weights->taps * sizeof(uint16_t));
}

enum status resize(struct resizer *r, const struct region *region, const struct box *box, enum filter filter,
                   int rows, int columns, uint8_t *out) {
    const struct window window = window_of(box, 1, region->height, region->width); /* no other pixels are read */
    const int top = window.top, left = window.left, tall = window.bottom - top, across = window.right - left;
    const uint8_t *image = region->pixels + (size_t)top * region->stride + (size_t)left * 3;

    const int bytes_across = across * 3;
    const int taps = taps_for(filter, box->top - top, box->height, rows, tall);
    r->vertical.taps = taps;
    r->horizontal.taps = taps_for(filter, box->left - left, box->width, columns, across);
    if (!prepare_weights(&r->vertical, rows) || !prepare_weights(&r->horizontal, columns)
        || !hold(&r->shares, &r->shares_bytes, (size_t)(taps > r->horizontal.taps ? taps : r->horizontal.taps) * sizeof(double))
        || !hold(&r->wide, &r->wide_bytes, (size_t)ROWS * ROWS * (size_t)taps * sizeof(uint16_t))
        || !hold(&r->turned, &r->turned_bytes, (size_t)bytes_across * ROWS * sizeof(uint16_t))) return NO_MEMORY;
    fill(&r->vertical, filter, box->top - top, box->height, tall, rows, 256, 0, r->shares);
    fill(&r->horizontal, filter, box->left - left, box->width, across, columns, 65535, box->flipped, r->shares);

    int kind = __atomic_load_n(&instructions, __ATOMIC_RELAXED);
    if (kind < 0) kind = vitlocal_instructions(-1);
    struct passes passes = PASSES[kind];
    if (bytes_across < ROWS) passes.first = first_plain; /* a vector would exceed the image */
    if (r->horizontal.taps > MANY_TAPS) passes.second = second_plain;
    /* Whole vectors of three channels. */
    const int fitting = (int)fmin(columns, STRIP * columns / box->width) / ROWS * ROWS;
    const int strip_columns = fitting ? fitting : ROWS;
    for (int y = 0; y < rows; y += ROWS) {
        const int some = rows - y < ROWS ? rows - y : ROWS;
        int32_t from[ROWS];
        for (int row = 0; row < ROWS; row++) { /* the last block repeats its last row */
            const int place = y + (row < some ? row : some - 1);
            from[row] = r->vertical.first[place];
            for (int tap = 0; tap < taps; tap++) {
                const uint16_t weight = r->vertical.of[(size_t)place * taps + tap];
                uint16_t *wide = r->wide + ((size_t)row * taps + tap) * ROWS;
                for (int lane = 0; lane < ROWS; lane++) wide[lane] = weight;
            }
        }
        for (int x = 0; x < columns; x += strip_columns) {
            const int end = columns - x < strip_columns ? columns : x + strip_columns;
            const int a = r->horizontal.first[x], b = r->horizontal.first[end - 1]; /* a > b if it is flipped */
            int low = a < b ? a : b, bytes = ((a < b ? b : a) + r->horizontal.taps - low) * 3;
            if (bytes < ROWS) { /* less than a vector, but the whole row is not */
                low = 0;
                bytes = bytes_across;
            }
            const struct strip strip = {x, end, some, low};
            passes.first(image + (size_t)low * 3, region->stride, bytes, from, taps, r->wide, r->turned);
            passes.second(r->turned, &r->horizontal, &strip, out + ((size_t)y * columns + x) * 3, (size_t)columns * 3);
        }
    }
    return OK;
}
