/* Where crops are cut: SplitMix64 (Steele et al. 2014) keyed by (seed, epoch, draw), in relative coordinates.
 *
 * The box has the distribution of torchvision's RandomResizedCrop. The area is uniform, the ratio log-uniform. After ten
 * attempts, the box is the largest centre crop of a legal ratio. It is not rounded to whole pixels: so it is the same
 * part of the photo in every stored size, with rare exceptions. Stored sides are rounded, so a box that just fits into
 * one file may not fit into another, which then draws again. tests/reference_boxes.py is the same in Python.
 */
#include "native.h"

enum { ATTEMPTS = 10 }; /* before the fallback to a centre crop, as in torchvision */

static const uint64_t GOLDEN = 0x9E3779B97F4A7C15u;

static uint64_t scramble(uint64_t word) {
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9u;
    word = (word ^ (word >> 27)) * 0x94D049BB133111EBu;
    return word ^ (word >> 31);
}

static double uniform(uint64_t key, uint64_t counter) { /* in [0, 1) */
    return (double)(scramble(key + (counter + 1) * GOLDEN) >> 11) * 0x1p-53;
}

static void random_box(const struct policy *p, int64_t draw, double height, double width, struct box *box) {
    uint64_t key = scramble((uint64_t)p->seed + GOLDEN);
    key = scramble((key ^ (uint64_t)p->epoch) + GOLDEN);
    key = scramble((key ^ (uint64_t)draw) + GOLDEN);
    const double shape = width / height;
    const double log_low = log(p->ratio_low), log_high = log(p->ratio_high);
    box->flipped = uniform(key, 0) < p->flip;
    box->reach = 0; /* RandomResizedCrop cuts first and resizes then */
    for (uint64_t attempt = 0; attempt < ATTEMPTS; attempt++) {
        const double area = p->scale_low + (p->scale_high - p->scale_low) * uniform(key, 4 * attempt + 1);
        const double ratio = exp(log_low + (log_high - log_low) * uniform(key, 4 * attempt + 2));
        const double part_w = sqrt(area * ratio / shape), part_h = sqrt(area / ratio * shape);
        if (part_w <= 1 && part_h <= 1) {
            box->left = uniform(key, 4 * attempt + 3) * (1 - part_w) * width;
            box->top = uniform(key, 4 * attempt + 4) * (1 - part_h) * height;
            box->width = part_w * width;
            box->height = part_h * height;
            return;
        }
    }
    const double part_w = fmin(1, p->ratio_high / shape), part_h = fmin(1, shape / p->ratio_low);
    box->width = part_w * width;
    box->height = part_h * height;
    box->left = (width - box->width) / 2;
    box->top = (height - box->height) / 2;
}

/* timm's evaluation: Resize(floor(size / crop_pct)) and CenterCrop(size) of torchvision. They round to whole pixels of the
 * resized image. Its filter also reads around the crop. */
static void centre_box(const struct policy *p, double height, double width, double size, struct box *box) {
    const double edge = floor(size / p->centre);
    const double tall = height <= width ? edge : floor(edge * height / width);
    const double across = height <= width ? floor(edge * width / height) : edge;
    box->top = rint((tall - size) / 2) * height / tall;
    box->left = rint((across - size) / 2) * width / across;
    box->height = size * height / tall;
    box->width = size * width / across;
    box->reach = fmax(1, fmax(height / tall, width / across));
    box->flipped = 0;
}

void vitlocal_box(const struct policy *policy, int64_t draw, int64_t height, int64_t width, int64_t size,
                  struct box *box) {
    if (policy->kind == RANDOM) {
        random_box(policy, draw, (double)height, (double)width, box);
    } else if (policy->kind == WHOLE) {
        *box = (struct box){0, 0, (double)height, (double)width, 0, 0};
    } else {
        centre_box(policy, (double)height, (double)width, (double)size, box);
    }
}
