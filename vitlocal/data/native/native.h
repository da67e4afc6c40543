/* The fused decoder: stored bytes -> finished crop, one call for a batch, on threads of its own.
 *
 * Shapes: an image is H x W x 3 bytes, a crop S x S x 3. A box is in pixels of the image and need not be whole.
 * Errors are codes, never exits: a corrupt image costs its own crop alone.
 */
#ifndef VITLOCAL_NATIVE_H
#define VITLOCAL_NATIVE_H

#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

enum status {
    OK = 0,
    CORRUPT = 1,     /* libjpeg's message tells how */
    WRONG_SIZE = 2,  /* not of the width and height that the file's table gives */
    NO_MEMORY = 3,
    OUTSIDE = 4,     /* its bytes lie outside the file, or it is no image at all */
    REFUSED = 5,     /* it would take unduly long; the message tells why */
};

enum { MESSAGE_BYTES = 200 };

enum kind { CENTRE = 0, RANDOM = 1, WHOLE = 2 }; /* the central square, a random resized crop, all of the image */

/* What a pass draws its boxes from. The layout is known to __init__.py. */
struct policy {
    int64_t kind;
    int64_t seed, epoch;
    double scale_low, scale_high; /* area of the box as a part of the image's */
    double ratio_low, ratio_high; /* width : height */
    double flip;                  /* chance */
    double centre;                /* side of the central square as a part of the short edge */
};

struct box {
    double top, left, height, width;
    int32_t flipped;
};

/* A row of a .beton file. The layout is known to __init__.py. */
struct row {
    uint64_t offset, bytes;
    uint32_t width, height;
    uint32_t raw;
    uint32_t padding;
};

/* crops.c */
EXPORT void vitlocal_box(const struct policy *policy, int64_t draw, int64_t height, int64_t width, struct box *box);

/* resize.c */
struct resizer; /* scratch of one thread, grown as needed and kept */
struct resizer *resizer_new(void);
void resizer_free(struct resizer *resizer);
/* TRIANGLE widens as it shrinks: what Pillow and torchvision call bilinear with antialiasing. AREA, for shrinking
 * alone, is the mean of what an output pixel covers: OpenCV's INTER_AREA, with which FFCV stores images. */
enum filter { TRIANGLE, AREA };
/* Resamples `box` (in pixels of `image`, whose rows are `stride` bytes apart) to `out` (rows, columns, 3). Reads no
 * pixel outside of the image. OK or NO_MEMORY. */
enum status resize(struct resizer *resizer, const uint8_t *image, size_t stride, int height, int width,
                   const struct box *box, enum filter filter, int rows, int columns, uint8_t *out);
EXPORT int vitlocal_instructions(int wanted); /* 0 plain, 1 SSE2, 2 AVX2; < 0: the best here. Returns what is used. */

/* jpeg.c */
struct jpeg; /* a decompressor and its scratch, of one thread */
struct region { /* part of an image that was decoded at 1/reduction */
    const uint8_t *pixels;
    size_t stride;
    int top, left, height, width; /* in pixels of the reduced image */
    int reduction;
};
struct jpeg *jpeg_new(void);
void jpeg_free(struct jpeg *jpeg);
/* Decodes what `box` needs, at the largest of 1, 2, 4, 8 that keeps the box at least `size` px. `message` may be
 * written where the result is CORRUPT. The pixels stand until the next call. */
enum status jpeg_decode(struct jpeg *jpeg, const uint8_t *data, size_t bytes, int height, int width,
                        const struct box *box, int size, int most_reduction, struct region *region, char *message);

/* How a photo is to be stored; `offset` and `bytes` tell where it is in the encoder's output. Known to __init__.py. */
struct form {
    uint32_t width, height;
    uint32_t kind;     /* of enum storing */
    uint32_t quality;  /* of JPEG */
    uint32_t sampling; /* 420 or 444 */
    uint32_t padding;
    uint64_t offset, bytes;
};

enum storing { AS_JPEG = 0, AS_RAW = 1, AS_ORIGINAL = 2 }; /* the last: the JPEG itself, stripped */

/* encode.c */
struct encoder; /* what one thread needs */
EXPORT struct encoder *vitlocal_encoder_new(void); /* NULL where there is no memory */
EXPORT void vitlocal_encoder_free(struct encoder *encoder);
/* What `data` says it is; CORRUPT where it is no JPEG. */
struct photo;
EXPORT int vitlocal_inspect(struct encoder *encoder, const uint8_t *data, int64_t bytes, struct photo *photo);
/* Encodes a photo in all `forms` (count,), none of them larger than it: the JPEG `data`, or `pixels` (height, width, 3)
 * where they are not NULL. Returns OK and sets *output, which stands until the next call; else a status of which
 * `message` (MESSAGE_BYTES) tells more. */
EXPORT int vitlocal_encode(struct encoder *encoder, const uint8_t *data, int64_t bytes, const uint8_t *pixels,
                           int64_t height, int64_t width, struct form *forms, int64_t count, const uint8_t **output,
                           char *message);

/* What a file says it is. The layout is known to __init__.py. */
struct photo {
    uint32_t width, height;
    uint32_t upright;  /* EXIF tells of no turn, nor does XMP beside it */
    uint32_t plain;    /* 8 bits, gray or YCbCr */
    uint32_t keepable; /* quick to read: neither progressive nor arithmetic, and of usual sampling */
};
enum status jpeg_inspect(struct jpeg *jpeg, const uint8_t *data, size_t bytes, struct photo *photo, char *message);
/* Copies to `kept` (bytes,) what a decoder needs of a file, without comments, previews and what applications add,
 * and without what follows the end. Returns its length; 0 where there is more than one scan, or no end. */
size_t jpeg_strip(const uint8_t *data, size_t bytes, uint8_t *kept);

/* image.c */
struct decoder; /* what one thread needs */
struct decoder *decoder_new(void);
void decoder_free(struct decoder *decoder);
/* The crop (S, S, 3) that `policy` draws for `draw` from the image that `row` tells of in a file. `message`
 * (MESSAGE_BYTES) tells more of a CORRUPT one. */
enum status decode(struct decoder *decoder, const uint8_t *file, uint64_t file_bytes, const struct row *row,
                   const struct policy *policy, int64_t draw, int size, int most_reduction, uint8_t *crop,
                   char *message);

#endif
