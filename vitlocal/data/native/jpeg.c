/* Decodes the part of a JPEG that a box needs, at 1/1, 1/2, 1/4 or 1/8 of its size.
 *
 * Whole blocks of columns are skipped (jpeg_crop_scanline), rows above are only entropy-decoded (jpeg_skip_scanlines),
 * and rows below are not read. Other scales of libjpeg-turbo (3/8, 5/8 …) have no SIMD and are slower than full size.
 */
#define _GNU_SOURCE /* memmem */
#include "native.h"

#include <stdlib.h>
#include <string.h>

#include <jerror.h>

static const long MAX_MEMORY = 1L << 30; /* of libjpeg: all coefficients of a progressive photo of 178 megapixels */

enum {
    MARGIN = 2,
    MAX_SCANS = 100, /* progressive photos have about ten; thousands would take many minutes */
};

static void leave(struct failure *failure, enum status status) {
    failure->status = status;
    longjmp(failure->escape, 1);
}

void jpeg_fail(j_common_ptr codec) {
    struct failure *failure = codec->client_data;
    if (codec->err->msg_code == JERR_NO_BACKING_STORE) {
        snprintf(failure->message, MESSAGE_BYTES, "its coefficients need more than %ld bytes", MAX_MEMORY);
        leave(failure, REFUSED);
    }
    codec->err->format_message(codec, failure->message);
    leave(failure, codec->err->msg_code == JERR_OUT_OF_MEMORY ? NO_MEMORY : CORRUPT);
}

/* After most warnings, libjpeg continues with invented pixels. Here the image counts as corrupt. Whole photos of some
 * cameras and editors have a strange revision of JFIF or Adobe, or bytes between segments or before the end. */
static void warn(j_common_ptr decoder, int level) {
    if (level >= 0) return;
    const int code = decoder->err->msg_code, before_scans = ((j_decompress_ptr)decoder)->input_scan_number == 0;
    if (code == JWRN_JFIF_MAJOR || code == JWRN_ADOBE_XFORM) return;
    if (code == JWRN_EXTRANEOUS_DATA && (before_scans || decoder->err->msg_parm.i[1] == JPEG_EOI)) return;
    struct failure *failure = decoder->client_data;
    decoder->err->format_message(decoder, failure->message);
    leave(failure, WARNED);
}

static void watch(j_common_ptr decoder) {
    struct failure *failure = decoder->client_data;
    if (((j_decompress_ptr)decoder)->input_scan_number <= MAX_SCANS) return;
    snprintf(failure->message, MESSAGE_BYTES, "has more than %d scans", MAX_SCANS);
    leave(failure, REFUSED);
}

void jpeg_free(struct jpeg *jpeg) {
    jpeg_destroy_decompress(&jpeg->decoder); /* does nothing if there is none */
    free(jpeg->pixels);
}

/* Makes a new decompressor for each image. Otherwise libjpeg would use the tables of the last image for one that lacks
 * its own, without an error. The caller must have set the longjmp target. */
static void begin(struct jpeg *jpeg, const uint8_t *data, size_t bytes) {
    struct jpeg_decompress_struct *d = &jpeg->decoder;
    jpeg_destroy_decompress(d); /* does nothing the first time */
    d->err = jpeg_std_error(&jpeg->failure.errors);
    d->err->error_exit = jpeg_fail;
    d->err->emit_message = warn;
    d->client_data = &jpeg->failure; /* jpeg_create_decompress keeps it and err */
    jpeg_create_decompress(d);
    d->mem->max_memory_to_use = MAX_MEMORY;
    jpeg->progress.progress_monitor = watch;
    d->progress = &jpeg->progress;
    jpeg_mem_src(d, (unsigned char *)data, (unsigned long)bytes); /* old headers have no const */
}

/* Whether a part of the image can be decoded. libjpeg-turbo 2.1 leaves columns of chroma undefined if luma has four by
 * two samples for each (such files are very rare). */
static int usual_sampling(const struct jpeg_decompress_struct *d) {
    if (d->num_components == 1) return 1;
    for (int i = 1; i < d->num_components; i++) {
        if (d->comp_info[i].h_samp_factor != 1 || d->comp_info[i].v_samp_factor != 1) return 0;
    }
    const int across = d->comp_info[0].h_samp_factor, down = d->comp_info[0].v_samp_factor;
    return across <= 2 && down <= 2;
}

enum status jpeg_decode(struct jpeg *jpeg, const uint8_t *data, size_t bytes, int height, int width,
                        const struct box *box, int size, int most_reduction, struct region *region) {
    struct jpeg_decompress_struct *d = &jpeg->decoder;
    if (setjmp(jpeg->failure.escape)) return jpeg->failure.status;
    begin(jpeg, data, bytes);
    jpeg_read_header(d, TRUE);
    if ((int)d->image_width != width || (int)d->image_height != height) {
        snprintf(jpeg->failure.message, MESSAGE_BYTES, "is %u x %u", d->image_width, d->image_height);
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

    const int all_columns = (int)d->output_width;
    const struct window window = window_of(box, reduction, (int)d->output_height, all_columns);
    const int top = window.top, bottom = window.bottom;
    /* Chroma is upsampled from its neighbours, which are missing at the border of the decoded part. */
    const int left = window.left < MARGIN ? 0 : window.left - MARGIN;
    const int right = window.right + MARGIN > all_columns ? all_columns : window.right + MARGIN;
    JDIMENSION first = (JDIMENSION)left, columns = (JDIMENSION)(right - left);
    if (!usual_sampling(d)) {
        first = 0;
        columns = d->output_width;
    } else if (columns < d->output_width) {
        jpeg_crop_scanline(d, &first, &columns); /* widened to whole blocks */
    }
    const size_t stride = (size_t)columns * 3, needed = stride * (size_t)(bottom - top);
    if (!hold(&jpeg->pixels, &jpeg->capacity, needed)) return NO_MEMORY;
    if (top > 0) jpeg_skip_scanlines(d, (JDIMENSION)top);
    while ((int)d->output_scanline < bottom) {
        JSAMPROW row = jpeg->pixels + (d->output_scanline - (JDIMENSION)top) * stride;
        jpeg_read_scanlines(d, &row, 1);
    }
    *region = (struct region){jpeg->pixels, stride, top, (int)first, bottom - top, (int)columns, reduction};
    return OK;
}

enum status jpeg_check(struct jpeg *jpeg, const uint8_t *data, size_t bytes) {
    struct jpeg_decompress_struct *d = &jpeg->decoder;
    if (setjmp(jpeg->failure.escape)) return jpeg->failure.status;
    begin(jpeg, data, bytes);
    jpeg_read_header(d, TRUE);
    d->scale_num = 1;
    d->scale_denom = 8;
    d->out_color_space = d->jpeg_color_space; /* of any number of components */
    d->dct_method = JDCT_IFAST;
    d->do_fancy_upsampling = FALSE;
    jpeg_start_decompress(d);
    if (!hold(&jpeg->pixels, &jpeg->capacity, (size_t)d->output_width * (size_t)d->output_components)) return NO_MEMORY;
    while (d->output_scanline < d->output_height) {
        JSAMPROW row = jpeg->pixels;
        jpeg_read_scanlines(d, &row, 1);
    }
    return OK;
}

/* --- the header of a file --- */

static uint32_t number_at(const uint8_t *data, size_t bytes, int big_endian) {
    uint32_t number = 0;
    for (size_t i = 0; i < bytes; i++) number = number << 8 | data[big_endian ? i : bytes - 1 - i];
    return number;
}

/* Whether the APP1 segments say that the image is upright; 0 also if they cannot be parsed. */
static int says_upright(jpeg_saved_marker_ptr segment) {
    static const uint32_t ORIENTATION = 0x0112, SHORT = 3;
    int exifs = 0, upright = 0, elsewhere = 0;
    for (; segment; segment = segment->next) {
        const uint8_t *tiff = segment->data + 6;
        if (segment->data_length < 6 || memcmp(segment->data, "Exif\0", 6) != 0) {
            elsewhere |= memmem(segment->data, segment->data_length, "rientation", 10) != NULL; /* XMP */
            continue;
        }
        const size_t bytes = segment->data_length - 6;
        if (++exifs > 1 || bytes < 8) return 0;
        const int big_endian = tiff[0] == 'M';
        if (memcmp(tiff, big_endian ? "MM\0*" : "II*\0", 4) != 0) return 0;
        const size_t directory = number_at(tiff + 4, 4, big_endian);
        if (directory > bytes - 2) return 0;
        const size_t entries = number_at(tiff + directory, 2, big_endian);
        if (entries * 12 > bytes - directory - 2) return 0;
        for (const uint8_t *entry = tiff + directory + 2; entry < tiff + directory + 2 + entries * 12; entry += 12) {
            if (number_at(entry, 2, big_endian) != ORIENTATION) continue;
            if (number_at(entry + 2, 2, big_endian) != SHORT || number_at(entry + 4, 4, big_endian) != 1
                || number_at(entry + 8, 2, big_endian) != 1) return 0;
            upright = 1;
        }
    }
    return upright || !exifs || !elsewhere;
}

size_t jpeg_strip(const uint8_t *data, size_t bytes, uint8_t *kept) {
    enum { TEM = 0x01, RST0 = 0xD0, SOI = 0xD8, EOI = 0xD9, SOS = 0xDA, APP0 = 0xE0, APP14 = 0xEE, APP15 = 0xEF, COM = 0xFE };
    size_t at = 2, length = 2;
    if (bytes < 4 || data[0] != 0xFF || data[1] != SOI) return 0;
    memcpy(kept, data, 2);
    for (;;) {
        while (at + 1 < bytes && data[at] == 0xFF && data[at + 1] == 0xFF) at++; /* padding */
        if (at + 4 > bytes || data[at] != 0xFF) return 0;
        const int marker = data[at + 1];
        const size_t segment = 2 + number_at(data + at + 2, 2, 1);
        if (marker == TEM || (marker >= RST0 && marker <= EOI) || segment < 4 || segment > bytes - at) return 0;
        /* the segments of JFIF and Adobe define the colours */
        const int needed = (marker < APP0 || marker > APP15 || marker == APP0 || marker == APP14) && marker != COM;
        if (needed) memcpy(kept + length, data + at, segment);
        length += needed ? segment : 0;
        at += segment;
        if (marker == SOS) break;
    }
    size_t end = at;
    for (;; end++) {
        const uint8_t *next = end < bytes ? memchr(data + end, 0xFF, bytes - end) : NULL;
        if (!next || next + 1 >= data + bytes) return 0;
        end = (size_t)(next - data);
        const int marker = data[end + 1];
        if (marker == EOI) break;
        if (marker != 0 && marker != 0xFF && (marker < RST0 || marker > RST0 + 7)) return 0; /* another scan */
    }
    memcpy(kept + length, data + at, end + 2 - at);
    return length + end + 2 - at;
}

enum status jpeg_inspect(struct jpeg *jpeg, const uint8_t *data, size_t bytes, struct photo *photo) {
    struct jpeg_decompress_struct *d = &jpeg->decoder;
    *photo = (struct photo){0};
    if (setjmp(jpeg->failure.escape)) return jpeg->failure.status;
    begin(jpeg, data, bytes);
    jpeg_save_markers(d, JPEG_APP0 + 1, 0xFFFF); /* EXIF and XMP, whole */
    jpeg_read_header(d, TRUE);
    photo->width = d->image_width;
    photo->height = d->image_height;
    photo->upright = (uint32_t)says_upright(d->marker_list);
    photo->plain = d->data_precision == 8 && (d->jpeg_color_space == JCS_GRAYSCALE || d->jpeg_color_space == JCS_YCbCr);
    photo->keepable = !d->progressive_mode && !d->arith_code && usual_sampling(d);
    return OK;
}
