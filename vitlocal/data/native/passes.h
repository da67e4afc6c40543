/* The two passes for TARGET, on vectors of LANES numbers. A block of ROWS numbers is one vector with AVX2, else two.
 *
 * WIDENED is the part of the sixteen bytes at an address that fills a vector. HIGH is the upper half of products.
 */

#if AVX2
#define TARGET __attribute__((target("avx2")))
#define NAME(name) name##_avx2
#define LANES 16
#define WIDENED(bytes, part) ((VECTOR)_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(bytes))))
#define HIGH(a, b) ((VECTOR)_mm256_mulhi_epu16((__m256i)(a), (__m256i)(b)))
#elif defined(HAVE_X86)
#define TARGET
#define NAME(name) name##_sse2
#define LANES 8
#define WIDENED(bytes, part) \
    ((VECTOR)_mm_unpacklo_epi8(_mm_loadl_epi64((const __m128i *)((bytes) + (part) * LANES)), _mm_setzero_si128()))
#define HIGH(a, b) ((VECTOR)_mm_mulhi_epu16((__m128i)(a), (__m128i)(b)))
#else
#define TARGET
#define NAME(name) name##_neon
#define LANES 8
#define WIDENED(bytes, part) /* both parts share the load */ \
    ((VECTOR)((part) ? vmovl_high_u8(vld1q_u8(bytes)) : vmovl_u8(vget_low_u8(vld1q_u8(bytes)))))
#define HIGH(a, b) ((VECTOR)high_of_products((uint16x8_t)(a), (uint16x8_t)(b)))
#endif
#define VECTOR NAME(vector)
typedef uint16_t VECTOR __attribute__((vector_size(LANES * sizeof(uint16_t)), may_alias));

TARGET static inline __attribute__((always_inline)) void NAME(first_of_taps)(
    const int taps, const uint8_t *image, size_t stride, int columns, const int32_t *first, const uint16_t *wide,
    uint16_t *turned) {
    const uint8_t *rows[ROWS];
    for (int row = 0; row < ROWS; row++) rows[row] = image + (size_t)first[row] * stride;
    for (int column = 0; column < columns; column += ROWS) {
        if (column > columns - ROWS) column = columns - ROWS; /* repeats some columns to stay inside */
        BYTES lower[ROWS], upper[ROWS]; /* columns 0-7 and 8-15 of each row */
        for (int row = 0; row < ROWS; row++) {
            VECTOR sums[ROWS / LANES];
            for (int part = 0; part < ROWS / LANES; part++) {
                const uint8_t *pixel = rows[row] + column;
                const VECTOR *weight = (const VECTOR *)(wide + (size_t)row * taps * ROWS);
                sums[part] = WIDENED(pixel, part) * weight[0];
                for (int tap = 1; tap < taps; tap++) {
                    sums[part] += WIDENED(pixel + (size_t)tap * stride, part) * weight[tap * (ROWS / LANES)];
                }
            }
            lower[row] = ((const BYTES *)sums)[0];
            upper[row] = ((const BYTES *)sums)[1];
        }
        for (int half = 0; half < ROWS; half += 8) {
            BYTES *a = lower + half, *b = upper + half;
            TURN_WORDS(a);
            TURN_WORDS(b);
            for (int i = 0; i < 8; i++) {
                *(BYTES *)(turned + (size_t)(column + i) * ROWS + half) = a[i];
                *(BYTES *)(turned + (size_t)(column + 8 + i) * ROWS + half) = b[i];
            }
        }
    }
}

TARGET static void NAME(first)(const uint8_t *image, size_t stride, int columns, const int32_t *first, int taps,
                               const uint16_t *wide, uint16_t *turned) {
    FOR_TAPS(taps, NAME(first_of_taps), image, stride, columns, first, wide, turned);
}

TARGET static inline __attribute__((always_inline)) void NAME(second_of_taps)(
    const int taps, const uint16_t *turned, const struct weights *weights, const struct strip *strip, uint8_t *out,
    size_t stride) {
    for (int start = strip->start; start < strip->end; start += ROWS) {
        const int count = strip->end - start < ROWS ? strip->end - start : ROWS;
        BYTES bytes[3 * ROWS]; /* 16 pixels with three channels; each lane is a row */
        for (int i = 0; i < count; i++) {
            const uint16_t *from = turned + (size_t)(weights->first[start + i] - strip->from) * 3 * ROWS;
            const uint16_t *weight = weights->of + (size_t)(start + i) * taps;
            VECTOR sums[3 * ROWS / LANES];
            for (int part = 0; part < 3 * ROWS / LANES; part++) sums[part] = (VECTOR){0} + rounding(taps);
            for (int tap = 0; tap < taps; tap++, from += 3 * ROWS) {
                const VECTOR filled = (VECTOR){0} + weight[tap];
                for (int part = 0; part < 3 * ROWS / LANES; part++) {
                    sums[part] += HIGH(((const VECTOR *)from)[part], filled);
                }
            }
            for (int part = 0; part < 3 * ROWS / LANES; part++) sums[part] = LEVELS(sums[part]);
            for (int channel = 0; channel < 3; channel++) {
                const BYTES *halves = (const BYTES *)sums + 2 * channel;
                bytes[3 * i + channel] = PACKED(halves[0], halves[1]);
            }
        }
        for (int i = 3 * count; i < 3 * ROWS; i++) bytes[i] = (BYTES){0};
        uint8_t *place = out + (size_t)(start - strip->start) * 3;
        for (int part = 0; part < 3; part++) {
            BYTES *turning = bytes + part * ROWS;
            const int there = 3 * count - part * ROWS; /* bytes of this part in the strip */
            if (there <= 0) break;
            TURN_BYTES(turning);
            for (int row = 0; row < strip->rows; row++) {
                uint8_t *to = place + (size_t)row * stride + part * ROWS;
                if (there >= ROWS) {
                    memcpy(to, turning + row, ROWS);
                } else {
                    memcpy(to, turning + row, (size_t)there);
                }
            }
        }
    }
}

TARGET static void NAME(second)(const uint16_t *turned, const struct weights *weights, const struct strip *strip,
                                uint8_t *out, size_t stride) {
    FOR_TAPS(weights->taps, NAME(second_of_taps), turned, weights, strip, out, stride);
}

#undef TARGET
#undef NAME
#undef LANES
#undef WIDENED
#undef HIGH
#undef VECTOR
#undef AVX2
