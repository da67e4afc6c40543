/* Resampling with the same bytes as Pillow's bilinear filter, for evaluations: their decisions are then those of timm's
 * scripts. It has 22 bits for weights, and bytes between the two passes. resize.c is several times as
 * fast, and differs by at most one level.
 */
#include "native.h"

#include <stdlib.h>

enum { BITS = 22 };

/* The weights of each output pixel: `taps` numbers in `of`, from the pixel `first` of `length` on. */
static void fill(double start, double scale, int length, int size, int taps, double *shares, int32_t *of,
                 int32_t *first) {
    const double reach = fmax(scale, 1), slope = 1 / reach;
    for (int i = 0; i < size; i++) {
        const double centre = start + (i + 0.5) * scale;
        int low = (int)(centre - reach + 0.5), high = (int)(centre + reach + 0.5);
        low = low < 0 ? 0 : low;
        high = high > length ? length : high;
        double sum = 0;
        for (int k = low; k < high; k++) {
            const double distance = fabs((k - centre + 0.5) * slope);
            shares[k - low] = distance < 1 ? 1 - distance : 0;
            sum += shares[k - low];
        }
        first[i] = low < length - taps ? low : length > taps ? length - taps : 0; /* all taps are in the image */
        for (int k = 0; k < taps; k++) of[i * taps + k] = 0;
        for (int k = low; k < high; k++) {
            of[i * taps + k - first[i]] = (int32_t)(shares[k - low] / sum * (1 << BITS) + 0.5);
        }
    }
}

static uint8_t as_byte(int32_t sum) {
    const int32_t level = (sum + (1 << (BITS - 1))) >> BITS;
    return (uint8_t)(level > 255 ? 255 : level);
}

static int taps_for(double scale, int length) {
    const int taps = 2 * (int)ceil(fmax(scale, 1)) + 1;
    return taps < length ? taps : length;
}

/* `rows` of an image, with lines of `stride` bytes, to rows of `size` pixels. */
static void shrink_rows(const uint8_t *image, size_t stride, int rows, int size, int taps, const int32_t *first,
                        const int32_t *of, uint8_t *out) {
    for (int y = 0; y < rows; y++, image += stride) {
        for (int x = 0; x < size; x++, out += 3) {
            const uint8_t *pixel = image + (size_t)first[x] * 3;
            int32_t red = 0, green = 0, blue = 0;
            for (int k = 0; k < taps; k++, pixel += 3) {
                const int32_t weight = of[x * taps + k];
                red += pixel[0] * weight;
                green += pixel[1] * weight;
                blue += pixel[2] * weight;
            }
            out[0] = as_byte(red);
            out[1] = as_byte(green);
            out[2] = as_byte(blue);
        }
    }
}

/* Columns of an image, with lines of `stride` bytes, to `size` lines of their first `bytes`. */
static void shrink_columns(const uint8_t *image, size_t stride, size_t bytes, int size, int taps, const int32_t *first,
                           const int32_t *of, uint8_t *out) {
    for (int y = 0; y < size; y++, out += bytes) {
        const uint8_t *line = image + (size_t)first[y] * stride;
        for (size_t i = 0; i < bytes; i++) {
            int32_t sum = 0;
            for (int k = 0; k < taps; k++) sum += line[(size_t)k * stride + i] * of[y * taps + k];
            out[i] = as_byte(sum);
        }
    }
}

enum status resize_exactly(struct resizer *r, const struct region *region, const struct box *box, int columns_first,
                           int size, uint8_t *out) {
    const struct window window = window_of(box, 1, region->height, region->width); /* no other pixels are read */
    const int tall = window.bottom - window.top, wide = window.right - window.left;
    const double down = box->height / size, across = box->width / size;
    const int taps_down = taps_for(down, tall), taps_across = taps_for(across, wide);
    const size_t taps = (size_t)(taps_down > taps_across ? taps_down : taps_across), length = (size_t)size;
    const size_t longest = (size_t)(tall > wide ? tall : wide);
    if (!hold(&r->shares, &r->shares_bytes, taps * sizeof(double))
        || !hold(&r->exact, &r->exact_bytes, length * (2 * taps + 2) * sizeof(int32_t))
        || !hold(&r->middle, &r->middle_bytes, longest * length * 3)) return NO_MEMORY;
    int32_t *left = r->exact, *top = left + length, *of_across = top + length, *of_down = of_across + length * taps;
    fill(box->left - window.left, across, wide, size, taps_across, r->shares, of_across, left);
    fill(box->top - window.top, down, tall, size, taps_down, r->shares, of_down, top);
    const uint8_t *image = region->pixels + (size_t)window.top * region->stride + (size_t)window.left * 3;
    if (columns_first) {
        shrink_columns(image, region->stride, (size_t)wide * 3, size, taps_down, top, of_down, r->middle);
        shrink_rows(r->middle, (size_t)wide * 3, size, size, taps_across, left, of_across, out);
    } else {
        shrink_rows(image, region->stride, tall, size, taps_across, left, of_across, r->middle);
        shrink_columns(r->middle, length * 3, length * 3, size, taps_down, top, of_down, out);
    }
    return OK;
}
