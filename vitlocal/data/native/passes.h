/* The two passes for TARGET. With AVX2, a vector of 16 numbers is one register, else two. */

#if AVX2
#define TARGET __attribute__((target("avx2")))
#define NAME(pass) pass##_avx2
#define VECTOR __m256i
#define LOAD(p) _mm256_load_si256((const __m256i *)(p))
#define LOAD_BYTES(p) _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(p)))
#define ZERO _mm256_setzero_si256()
#define FILL(number) _mm256_set1_epi16((short)(number))
#define ADD(a, b) _mm256_add_epi16(a, b)
#define ADD_CLIPPED(a, b) _mm256_adds_epu16(a, b)
#define LOW(a, b) _mm256_mullo_epi16(a, b)
#define HIGH(a, b) _mm256_mulhi_epu16(a, b)
#define SHIFTED(v) _mm256_srli_epi16(v, 8)
#define LOWER(v) _mm256_castsi256_si128(v)
#define UPPER(v) _mm256_extracti128_si256(v, 1)
#else
#define TARGET
#define NAME(pass) pass##_sse2
typedef struct { __m128i low, high; } NAME(pair);
#define VECTOR NAME(pair)
#define BOTH(operation, a, b) ((VECTOR){operation((a).low, (b).low), operation((a).high, (b).high)})
#define LOAD(p) ((VECTOR){_mm_load_si128((const __m128i *)(p)), _mm_load_si128((const __m128i *)(p) + 1)})
#define LOAD_BYTES(p) NAME(widened)(_mm_loadu_si128((const __m128i *)(p)))
#define ZERO ((VECTOR){_mm_setzero_si128(), _mm_setzero_si128()})
#define FILL(number) ((VECTOR){_mm_set1_epi16((short)(number)), _mm_set1_epi16((short)(number))})
#define ADD(a, b) BOTH(_mm_add_epi16, a, b)
#define ADD_CLIPPED(a, b) BOTH(_mm_adds_epu16, a, b)
#define LOW(a, b) BOTH(_mm_mullo_epi16, a, b)
#define HIGH(a, b) BOTH(_mm_mulhi_epu16, a, b)
#define SHIFTED(v) ((VECTOR){_mm_srli_epi16((v).low, 8), _mm_srli_epi16((v).high, 8)})
#define LOWER(v) (v).low
#define UPPER(v) (v).high

static inline VECTOR NAME(widened)(__m128i bytes) {
    const __m128i zero = _mm_setzero_si128();
    return (VECTOR){_mm_unpacklo_epi8(bytes, zero), _mm_unpackhi_epi8(bytes, zero)};
}
#endif

TARGET static inline __attribute__((always_inline)) void NAME(first_of_taps)(
    const uint8_t *image, size_t stride, int columns, const int32_t *first, const int taps, const uint16_t *wide,
    uint16_t *turned) {
    const uint8_t *rows[ROWS];
    for (int row = 0; row < ROWS; row++) rows[row] = image + (size_t)first[row] * stride;
    for (int column = 0; column < columns; column += ROWS) {
        if (column > columns - ROWS) column = columns - ROWS; /* repeats some columns to stay inside */
        __m128i lower[ROWS], upper[ROWS]; /* columns 0-7 and 8-15 of each row */
        for (int row = 0; row < ROWS; row++) {
            const uint8_t *pixel = rows[row] + column;
            const uint16_t *weight = wide + (size_t)row * taps * ROWS;
            VECTOR sum = LOW(LOAD_BYTES(pixel), LOAD(weight));
            for (int tap = 1; tap < taps; tap++) {
                sum = ADD(sum, LOW(LOAD_BYTES(pixel + (size_t)tap * stride), LOAD(weight + tap * ROWS)));
            }
            lower[row] = LOWER(sum);
            upper[row] = UPPER(sum);
        }
        for (int half = 0; half < ROWS; half += 8) {
            __m128i *a = lower + half, *b = upper + half;
            TURN_WORDS(a);
            TURN_WORDS(b);
            for (int i = 0; i < 8; i++) {
                _mm_store_si128((__m128i *)(turned + (size_t)(column + i) * ROWS + half), a[i]);
                _mm_store_si128((__m128i *)(turned + (size_t)(column + 8 + i) * ROWS + half), b[i]);
            }
        }
    }
}

TARGET static void NAME(first)(const uint8_t *image, size_t stride, int columns, const int32_t *first, int taps,
                               const uint16_t *wide, uint16_t *turned) {
#define PASS(taps) NAME(first_of_taps)(image, stride, columns, first, taps, wide, turned)
    FOR_TAPS(taps);
#undef PASS
}

TARGET static inline __attribute__((always_inline)) void NAME(second_of_taps)(
    const uint16_t *turned, const struct weights *weights, const struct strip *strip, const int taps, uint8_t *out,
    size_t stride) {
    const VECTOR half = FILL(rounding(taps));
    for (int start = strip->start; start < strip->end; start += ROWS) {
        const int count = strip->end - start < ROWS ? strip->end - start : ROWS;
        __m128i bytes[3 * ROWS]; /* 16 pixels with three channels; each lane is a row */
        for (int i = 0; i < count; i++) {
            const uint16_t *from = turned + (size_t)(weights->first[start + i] - strip->from) * 3 * ROWS;
            const uint16_t *weight = weights->of + (size_t)(start + i) * taps;
            VECTOR sums[3] = {half, half, half};
            for (int tap = 0; tap < taps; tap++, from += 3 * ROWS) {
                const VECTOR filled = FILL(weight[tap]);
                sums[0] = ADD_CLIPPED(sums[0], HIGH(LOAD(from), filled));
                sums[1] = ADD_CLIPPED(sums[1], HIGH(LOAD(from + ROWS), filled));
                sums[2] = ADD_CLIPPED(sums[2], HIGH(LOAD(from + 2 * ROWS), filled));
            }
            for (int channel = 0; channel < 3; channel++) {
                const VECTOR shifted = SHIFTED(sums[channel]);
                bytes[3 * i + channel] = _mm_packus_epi16(LOWER(shifted), UPPER(shifted));
            }
        }
        for (int i = 3 * count; i < 3 * ROWS; i++) bytes[i] = _mm_setzero_si128();
        uint8_t *place = out + (size_t)(start - strip->start) * 3;
        for (int part = 0; part < 3; part++) {
            __m128i *turning = bytes + part * ROWS;
            const int there = 3 * count - part * ROWS; /* bytes of this part in the strip */
            if (there <= 0) break;
            TURN_BYTES(turning);
            for (int row = 0; row < strip->rows; row++) {
                uint8_t *to = place + (size_t)row * stride + part * ROWS;
                if (there >= ROWS) {
                    _mm_storeu_si128((__m128i *)to, turning[row]);
                } else {
                    uint8_t whole[ROWS];
                    _mm_storeu_si128((__m128i *)whole, turning[row]);
                    memcpy(to, whole, (size_t)there);
                }
            }
        }
    }
}

TARGET static void NAME(second)(const uint16_t *turned, const struct weights *weights, const struct strip *strip,
                                uint8_t *out, size_t stride) {
#define PASS(taps) NAME(second_of_taps)(turned, weights, strip, taps, out, stride)
    FOR_TAPS(weights->taps);
#undef PASS
}

#undef VECTOR
#undef BOTH
#undef LOAD
#undef LOAD_BYTES
#undef ZERO
#undef FILL
#undef ADD
#undef ADD_CLIPPED
#undef LOW
#undef HIGH
#undef SHIFTED
#undef LOWER
#undef UPPER
#undef TARGET
#undef NAME
#undef AVX2
