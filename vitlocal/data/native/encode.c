/* Encodes a photo to its stored forms. It is decoded once, then shrunk from the full image for each form. */
#include "native.h"

#include <stdlib.h>
#include <string.h>

struct encoder {
    struct jpeg jpeg;
    struct resizer resizer;
    struct jpeg_compress_struct compressor;
    struct failure failure; /* of the compressor */
    uint8_t *output, *small; /* all forms in a row; the pixels of one form */
    size_t capacity, length, small_bytes;
};

static int reserve(struct encoder *encoder, size_t more) {
    if (more <= encoder->capacity - encoder->length) return 1;
    const size_t wanted = 2 * (encoder->length + more);
    uint8_t *output = realloc(encoder->output, wanted);
    if (!output) return 0;
    encoder->output = output;
    encoder->capacity = wanted;
    return 1;
}

EXPORT void vitlocal_encoder_free(struct encoder *encoder) {
    jpeg_free(&encoder->jpeg);
    resizer_free(&encoder->resizer);
    free(encoder->output);
    free(encoder->small);
    free(encoder);
}

EXPORT struct encoder *vitlocal_encoder_new(void) { return calloc(1, sizeof(struct encoder)); }

static enum status compress(struct encoder *encoder, const struct region *pixels, const struct form *form) {
    struct jpeg_compress_struct *c = &encoder->compressor;
    c->err = jpeg_std_error(&encoder->failure.errors);
    c->err->error_exit = jpeg_fail;
    c->client_data = &encoder->failure; /* jpeg_create_compress keeps it and err */
    if (setjmp(encoder->failure.escape)) {
        jpeg_destroy_compress(c);
        return encoder->failure.status;
    }
    jpeg_create_compress(c);
    uint8_t *made = NULL; /* libjpeg's memory */
    unsigned long bytes = 0;
    jpeg_mem_dest(c, &made, &bytes);
    c->image_width = (JDIMENSION)pixels->width;
    c->image_height = (JDIMENSION)pixels->height;
    c->input_components = 3;
    c->in_color_space = JCS_RGB;
    jpeg_set_defaults(c);
    jpeg_set_quality(c, (int)form->quality, TRUE);
    c->comp_info[0].h_samp_factor = c->comp_info[0].v_samp_factor = form->sampling == 444 ? 1 : 2;
    jpeg_start_compress(c, TRUE);
    while (c->next_scanline < c->image_height) {
        JSAMPROW row = (JSAMPROW)pixels->pixels + c->next_scanline * pixels->stride; /* old headers have no const */
        jpeg_write_scanlines(c, &row, 1);
    }
    jpeg_finish_compress(c);
    jpeg_destroy_compress(c);
    const int fits = reserve(encoder, bytes);
    if (fits) memcpy(encoder->output + encoder->length, made, bytes);
    encoder->length += fits ? bytes : 0;
    free(made);
    return fits ? OK : NO_MEMORY;
}

static enum status store(struct encoder *encoder, const struct region *full, const struct form *form) {
    struct region pixels = *full;
    if (form->width != (uint32_t)full->width || form->height != (uint32_t)full->height) {
        const struct box whole = {0, 0, full->height, full->width, 0, 0};
        const size_t across = (size_t)form->width * 3;
        if (!hold(&encoder->small, &encoder->small_bytes, across * form->height)) return NO_MEMORY;
        pixels = (struct region){encoder->small, across, 0, 0, (int)form->height, (int)form->width, 1};
        const enum status status = resize(&encoder->resizer, full, &whole, AREA, pixels.height, pixels.width,
                                          encoder->small);
        if (status != OK) return status;
    }
    if (form->kind == AS_JPEG) return compress(encoder, &pixels, form);
    const size_t across = (size_t)pixels.width * 3;
    if (!reserve(encoder, across * (size_t)pixels.height)) return NO_MEMORY;
    for (int row = 0; row < pixels.height; row++, encoder->length += across) {
        memcpy(encoder->output + encoder->length, pixels.pixels + (size_t)row * pixels.stride, across);
    }
    return OK;
}

EXPORT int vitlocal_inspect(struct encoder *encoder, const uint8_t *data, int64_t bytes, struct photo *photo) {
    return (int)jpeg_inspect(&encoder->jpeg, data, (size_t)bytes, photo);
}

/* Returns the status of jpeg_check, and sets *message if it is not OK. */
EXPORT int vitlocal_check(struct encoder *encoder, const uint8_t *data, int64_t bytes, const char **message) {
    *message = encoder->jpeg.failure.message;
    return (int)jpeg_check(&encoder->jpeg, data, (size_t)bytes);
}

/* Encodes a photo in all `forms` (count,), none of them larger than it. The photo is the JPEG `data`, or `pixels`
 * (height, width, 3) if not NULL. Returns OK and sets *output, which is valid until the next call, or another status;
 * if that is WARNED or REFUSED, *message says why. */
EXPORT int vitlocal_encode(struct encoder *encoder, const uint8_t *data, int64_t bytes, const uint8_t *pixels,
                           int64_t height, int64_t width, struct form *forms, int64_t count, const uint8_t **output,
                           const char **message) {
    encoder->length = 0;
    *message = encoder->jpeg.failure.message;
    struct region full = {pixels, (size_t)width * 3, 0, 0, (int)height, (int)width, 1};
    if (!pixels) {
        /* At half size or less if that is still twice the size of any form: the difference is not visible. */
        int largest = 0;
        for (int64_t i = 0; i < count; i++) {
            const int shorter = (int)(forms[i].width < forms[i].height ? forms[i].width : forms[i].height);
            largest = shorter > largest ? shorter : largest;
        }
        const struct box whole = {0, 0, (double)height, (double)width, 0, 0};
        const enum status status = jpeg_decode(&encoder->jpeg, data, (size_t)bytes, (int)height, (int)width, &whole,
                                               2 * largest, 8, &full);
        if (status != OK) return (int)status;
    }
    for (int64_t i = 0; i < count; i++) {
        forms[i].offset = encoder->length;
        if (forms[i].kind == AS_ORIGINAL) {
            if (!reserve(encoder, (size_t)bytes)) return NO_MEMORY;
            const size_t kept = jpeg_strip(data, (size_t)bytes, encoder->output + encoder->length);
            encoder->length += kept;
            if (!kept) forms[i].kind = AS_JPEG; /* several scans would be slow to decode */
        }
        if (forms[i].kind != AS_ORIGINAL) {
            const enum status status = store(encoder, &full, &forms[i]);
            if (status != OK) return (int)status;
        }
        forms[i].bytes = encoder->length - forms[i].offset;
    }
    *output = encoder->output;
    return OK;
}
