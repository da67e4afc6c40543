/* The fused decoder: stored bytes to finished crops, with one call for each batch, on its own threads.
 *
 * Shapes: an image is H x W x 3 bytes, a crop S x S x 3. A box is in pixels of the image and need not be whole.
 * Errors are status codes. A corrupt image spoils only its own crop.
 */
#ifndef VITLOCAL_NATIVE_H
#define VITLOCAL_NATIVE_H

#include <math.h>
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h> /* jpeglib.h needs it */

#include <jpeglib.h>

#define EXPORT __attribute__((visibility("default")))

enum status {
    OK = 0,
    CORRUPT = 1,     /* see libjpeg's message */
    WRONG_SIZE = 2,  /* width or height differ from those in the file's table */
    NO_MEMORY = 3,
    OUTSIDE = 4,     /* its bytes are outside of the file, or it has no area */
    REFUSED = 5,     /* it would take too long, or too much memory; see the message */
    BAD_BOX = 6,     /* the box that was given for it is not inside of it, or has no area */
    WARNED = 7,      /* corrupt, but libjpeg, and so others, would decode it with invented pixels; see the message */
    UNREADABLE = 8,  /* a part of the mapped file: it became shorter, or its disk fails */
};

enum kind { CENTRE = 0, RANDOM = 1, WHOLE = 2 }; /* the central square, a random resized crop, the whole image */

/* The crop policy of a pass. __init__.py has this struct, and row, photo and form, as numpy types. */
struct policy {
    int64_t kind;
    int64_t seed, epoch;
    double scale_low, scale_high; /* area of the box, as a fraction of the image */
    double ratio_low, ratio_high; /* width : height */
    double flip;                  /* probability */
    double centre;                /* size of the central crop, as a fraction of the resized short edge */
};

struct box {
    double top, left, height, width;
    double reach; /* pixels around the box that the filter reads too */
    int32_t flipped;
};

/* The whole pixels in [0, height) x [0, width) that a box reaches at 1/reduction. There is at least one. */
struct window {
    int top, left, bottom, right;
};
static inline struct window window_of(const struct box *box, int reduction, int height, int width) {
    struct window w = {
        (int)floor((box->top - box->reach) / reduction),
        (int)floor((box->left - box->reach) / reduction),
        (int)ceil((box->top + box->height + box->reach) / reduction),
        (int)ceil((box->left + box->width + box->reach) / reduction),
    };
    w.top = w.top < 0 ? 0 : w.top > height - 1 ? height - 1 : w.top;
    w.left = w.left < 0 ? 0 : w.left > width - 1 ? width - 1 : w.left;
    w.bottom = w.bottom > height ? height : w.bottom <= w.top ? w.top + 1 : w.bottom;
    w.right = w.right > width ? width : w.right <= w.left ? w.left + 1 : w.right;
    return w;
}

struct row { /* of a .beton file */
    uint64_t offset, bytes;
    uint32_t width, height;
    uint32_t raw;
    uint32_t padding;
};

/* crops.c */
EXPORT void vitlocal_box(const struct policy *policy, int64_t draw, int64_t height, int64_t width, int64_t size,
                         struct box *box);

struct region { /* a part of an image, at 1/reduction */
    const uint8_t *pixels;
    size_t stride;                /* bytes from row to row */
    int top, left, height, width; /* in pixels of the reduced image */
    int reduction;
};

/* resize.c */
struct weights { /* an output pixel is a weighted sum of the `taps` pixels from `first`, all inside of the image */
    int taps;
    int32_t *first; /* (length of the output,) */
    uint16_t *of;   /* (length, taps), each row summing to `total` */
    size_t first_bytes, of_bytes;
};
struct resizer { /* scratch memory of one thread, which grows as needed; starts as zeros */
    struct weights vertical, horizontal;
    uint16_t *wide;   /* (ROWS, taps, ROWS): the vertical weights of a block, each repeated to a vector */
    uint16_t *turned; /* (columns, ROWS): a transposed block of rows after the first pass, values x 256 */
    double *shares;   /* (taps,): weights of the pixels in one output pixel */
    int32_t *exact;   /* (taps,): the same as integers, and */
    uint8_t *middle;  /* (rows, columns, 3): the image after the first pass, for exact.c */
    size_t wide_bytes, turned_bytes, shares_bytes, exact_bytes, middle_bytes;
};
void resizer_free(struct resizer *resizer);
/* Makes *pointer hold at least `bytes`, aligned to 64; its content is lost. Returns 0 if there is no memory. */
int hold(void *pointer, size_t *capacity, size_t bytes);
/* TRIANGLE is the bilinear filter with antialiasing of Pillow and torchvision. AREA, only for shrinking, is the mean of
 * the covered pixels, as OpenCV's INTER_AREA, which FFCV uses to store images. */
enum filter { TRIANGLE, AREA };
/* Resamples `box` (in pixels from the region's first) to `out` (rows, columns, 3). Reads no pixel outside of the region.
 * Returns OK or NO_MEMORY. */
enum status resize(struct resizer *resizer, const struct region *region, const struct box *box, enum filter filter,
                   int rows, int columns, uint8_t *out);
/* exact.c: as resize() with TRIANGLE to (size, size, 3), with the bytes of Pillow, which shrinks rows or columns first. */
enum status resize_exactly(struct resizer *resizer, const struct region *region, const struct box *box,
                           int columns_first, int size, uint8_t *out);
/* 0 plain; on x86-64 1 SSE2, 2 AVX2; on aarch64 1 NEON; < 0: the best here. Returns the choice. */
EXPORT int vitlocal_instructions(int wanted);

/* jpeg.c */
enum { MESSAGE_BYTES = JMSG_LENGTH_MAX };
struct failure { /* how a call of libjpeg ends at an error: the status and the message are set, then it jumps */
    struct jpeg_error_mgr errors;
    jmp_buf escape;
    enum status status;
    char message[MESSAGE_BYTES];
};
void jpeg_fail(j_common_ptr codec); /* the error_exit of a codec whose client_data is a struct failure */
struct jpeg { /* a decompressor and its scratch memory, of one thread; starts as zeros */
    struct jpeg_decompress_struct decoder;
    struct jpeg_progress_mgr progress;
    struct failure failure;
    uint8_t *pixels;
    size_t capacity;
};
void jpeg_free(struct jpeg *jpeg);
/* Decodes the part that `box` needs, at the largest reduction of 1, 2, 4, 8 that keeps the box at least `size` px. If
 * it is CORRUPT, the failure has a message. The pixels are valid until the next call. */
enum status jpeg_decode(struct jpeg *jpeg, const uint8_t *data, size_t bytes, int height, int width,
                        const struct box *box, int size, int most_reduction, struct region *region);
/* Decodes all of a JPEG of any colours, and keeps nothing: OK if libjpeg does so without a warning that counts. */
enum status jpeg_check(struct jpeg *jpeg, const uint8_t *data, size_t bytes);

struct form { /* a stored form of a photo; `offset` and `bytes` locate it in the encoder's output */
    uint32_t width, height;
    uint32_t kind;     /* of enum storing */
    uint32_t quality;  /* of JPEG */
    uint32_t sampling; /* 420 or 444 */
    uint32_t padding;
    uint64_t offset, bytes;
};

enum storing { AS_JPEG = 0, AS_RAW = 1, AS_ORIGINAL = 2 }; /* AS_ORIGINAL: the JPEG itself without metadata */

struct photo { /* the header of a file */
    uint32_t width, height;
    uint32_t upright;  /* neither EXIF nor XMP turns it */
    uint32_t plain;    /* 8 bits, gray or YCbCr */
    uint32_t keepable; /* fast to decode: not progressive, not arithmetic, usual sampling */
};
/* Reads the header of `data`; CORRUPT if it is not a JPEG. */
enum status jpeg_inspect(struct jpeg *jpeg, const uint8_t *data, size_t bytes, struct photo *photo);
/* Copies a file to `kept` (bytes,) without comments, previews, application data and trailing bytes. Returns its length;
 * 0 if it has several scans or no end. */
size_t jpeg_strip(const uint8_t *data, size_t bytes, uint8_t *kept);

#endif
