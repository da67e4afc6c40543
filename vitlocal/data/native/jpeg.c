/* Decodes the part of a JPEG that a box needs, at 1/1, 1/2, 1/4 or 1/8 of its size.
 *
 * Columns are left out by whole blocks (jpeg_crop_scanline), rows above are entropy-decoded only
 * (jpeg_skip_scanlines), rows below are never reached. Other scales of libjpeg-turbo (3/8, 5/8 …) have no SIMD
 * and take longer than full size.
 */
#include "native.h"

#include <math.h>
#include <setjmp.h>
#include <stdio.h> /* jpeglib.h needs it before */
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

enum { MARGIN = 2 };

struct jpeg {
    struct jpeg_decompress_struct decoder;
    struct jpeg_error_mgr errors;
    jmp_buf escape;
    char *message;
    uint8_t *pixels;
    size_t capacity;
};

static void fail(j_common_ptr decoder) {
    struct jpeg *jpeg = decoder->client_data;
    char text[JMSG_LENGTH_MAX];
    decoder->err->format_message(decoder, text);
    snprintf(jpeg->message, MESSAGE_BYTES, "%s", text);
    longjmp(jpeg->escape, 1);
}

/* libjpeg goes on after a warning with pixels that it made up; to us the image is corrupt. */
static void warn(j_common_ptr decoder, int level) {
    if (level < 0) fail(decoder);
}

struct jpeg *jpeg_new(void) {
    char message[MESSAGE_BYTES];
    struct jpeg *volatile jpeg = calloc(1, sizeof *jpeg);
    if (!jpeg) return NULL;
    jpeg->message = message;
    jpeg->decoder.err = jpeg_std_error(&jpeg->errors);
    jpeg->errors.error_exit = fail;
    jpeg->errors.emit_message = warn;
    jpeg->decoder.client_data = jpeg; /* jpeg_create_decompress keeps it and err */
    if (setjmp(jpeg->escape)) { /* out of memory */
        free(jpeg);
        return NULL;
    }
    jpeg_create_decompress(&jpeg->decoder);
    return jpeg;
}

void jpeg_free(struct jpeg *jpeg) {
    if (!jpeg) return;
    jpeg_destroy_decompress(&jpeg->decoder);
    free(jpeg->pixels);
    free(jpeg);
}

enum status jpeg_decode(struct jpeg *jpeg, const uint8_t *data, size_t bytes, int height, int width,
                        const struct box *box, int size, int most_reduction, struct region *region, char *message) {
    struct jpeg_decompress_struct *d = &jpeg->decoder;
    jpeg->message = message;
    if (setjmp(jpeg->escape)) {
        jpeg_abort_decompress(d);
        return CORRUPT;
    }
    jpeg_mem_src(d, (unsigned char *)data, (unsigned long)bytes); /* not const in old headers */
    jpeg_read_header(d, TRUE);
    if ((int)d->image_width != width || (int)d->image_height != height) {
        snprintf(message, MESSAGE_BYTES, "is %u x %u", d->image_width, d->image_height);
        jpeg_abort_decompress(d);
        return WRONG_SIZE;
    }

    const double shortest = box->width < box->height ? box->width : box->height;
    int reduction = 1;
    while (reduction < most_reduction && shortest >= 2.0 * reduction * size) reduction *= 2;
    d->scale_num = 1;
    d->scale_denom = (unsigned)reduction;
    d->out_color_space = JCS_RGB;
    d->dct_method = JDCT_ISLOW;
    jpeg_start_decompress(d);

    const int all_rows = (int)d->output_height, all_columns = (int)d->output_width;
    int top = (int)floor(box->top / reduction), bottom = (int)ceil((box->top + box->height) / reduction);
    int left = (int)floor(box->left / reduction), right = (int)ceil((box->left + box->width) / reduction);
    top = top < 0 ? 0 : top > all_rows - 1 ? all_rows - 1 : top;
    left = left < 0 ? 0 : left > all_columns - 1 ? all_columns - 1 : left;
    bottom = bottom > all_rows ? all_rows : bottom <= top ? top + 1 : bottom;
    right = right > all_columns ? all_columns : right <= left ? left + 1 : right;

    /* Chroma is upsampled from its neighbours, and at the border of what is decoded there are none. */
    left = left < MARGIN ? 0 : left - MARGIN;
    right = right + MARGIN > all_columns ? all_columns : right + MARGIN;
    JDIMENSION first = (JDIMENSION)left, columns = (JDIMENSION)(right - left);
    if (columns < d->output_width) jpeg_crop_scanline(d, &first, &columns); /* widened to whole blocks */
    const size_t stride = (size_t)columns * 3, needed = stride * (size_t)(bottom - top);
    if (needed > jpeg->capacity) {
        free(jpeg->pixels);
        jpeg->pixels = malloc(needed);
        jpeg->capacity = jpeg->pixels ? needed : 0;
    }
    if (!jpeg->pixels) {
        jpeg_abort_decompress(d);
        return NO_MEMORY;
    }
    if (top > 0) jpeg_skip_scanlines(d, (JDIMENSION)top);
    while ((int)d->output_scanline < bottom) {
        JSAMPROW row = jpeg->pixels + (d->output_scanline - (JDIMENSION)top) * stride;
        jpeg_read_scanlines(d, &row, 1);
    }
    jpeg_abort_decompress(d);
    *region = (struct region){jpeg->pixels, stride, top, (int)first, bottom - top, (int)columns, reduction};
    return OK;
}
