/* Encodes a photo to its stored forms. It is decoded once, then shrunk from the full image for each form. */
#include "native.h"

#include <setjmp.h>
#include <stdio.h> /* jpeglib.h needs it */
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

enum status describe_error(j_common_ptr codec, char *message); /* in jpeg.c */

struct encoder {
    struct jpeg *jpeg;
    struct resizer *resizer;
    struct jpeg_compress_struct compressor;
    struct jpeg_error_mgr errors;
    struct jpeg_destination_mgr destination;
    jmp_buf escape;
    enum status failure; /* the reason of the longjmp */
    char *message;
    uint8_t *output, *small; /* all forms in a row; the pixels of one form */
    size_t capacity, length, small_bytes;
};

static void fail(j_common_ptr compressor) {
    struct encoder *encoder = compressor->client_data;
    encoder->failure = describe_error(compressor, encoder->message);
    longjmp(encoder->escape, 1);
}

static int reserve(struct encoder *encoder, size_t more) {
    if (more <= encoder->capacity - encoder->length) return 1;
    const size_t wanted = 2 * (encoder->length + more);
    uint8_t *output = realloc(encoder->output, wanted);
    if (!output) return 0;
    encoder->output = output;
    encoder->capacity = wanted;
    return 1;
}

/* libjpeg appends to the output. */
static void begin_output(j_compress_ptr compressor) {
    struct encoder *encoder = compressor->client_data;
    compressor->dest->next_output_byte = encoder->output + encoder->length;
    compressor->dest->free_in_buffer = encoder->capacity - encoder->length;
}

static boolean more_output(j_compress_ptr compressor) { /* called if the buffer is full */
    struct encoder *encoder = compressor->client_data;
    encoder->length = encoder->capacity;
    if (!reserve(encoder, encoder->capacity)) {
        encoder->failure = NO_MEMORY;
        longjmp(encoder->escape, 1);
    }
    begin_output(compressor);
    return TRUE;
}

static void end_output(j_compress_ptr compressor) {
    struct encoder *encoder = compressor->client_data;
    encoder->length = encoder->capacity - compressor->dest->free_in_buffer;
}

EXPORT void vitlocal_encoder_free(struct encoder *encoder) {
    if (!encoder) return;
    jpeg_destroy_compress(&encoder->compressor);
    jpeg_free(encoder->jpeg);
    resizer_free(encoder->resizer);
    free(encoder->output);
    free(encoder->small);
    free(encoder);
}

EXPORT struct encoder *vitlocal_encoder_new(void) { /* NULL if there is no memory */
    char message[MESSAGE_BYTES];
    struct encoder *volatile encoder = calloc(1, sizeof *encoder);
    if (!encoder) return NULL;
    encoder->message = message;
    encoder->compressor.err = jpeg_std_error(&encoder->errors);
    encoder->errors.error_exit = fail;
    encoder->compressor.client_data = encoder; /* jpeg_create_compress keeps it and err */
    encoder->destination = (struct jpeg_destination_mgr){
        .init_destination = begin_output, .empty_output_buffer = more_output, .term_destination = end_output,
    };
    if (!setjmp(encoder->escape)) {
        jpeg_create_compress(&encoder->compressor);
        encoder->compressor.dest = &encoder->destination;
        encoder->jpeg = jpeg_new();
        encoder->resizer = resizer_new();
        if (encoder->jpeg && encoder->resizer) return encoder;
    }
    vitlocal_encoder_free(encoder);
    return NULL;
}

static enum status compress(struct encoder *encoder, const struct region *pixels, const struct form *form) {
    struct jpeg_compress_struct *c = &encoder->compressor;
    const size_t before = encoder->length;
    if (setjmp(encoder->escape)) {
        jpeg_abort_compress(c);
        encoder->length = before;
        return encoder->failure;
    }
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
    return OK;
}

static enum status store(struct encoder *encoder, const struct region *full, const struct form *form) {
    struct region pixels = *full;
    if (form->width != (uint32_t)full->width || form->height != (uint32_t)full->height) {
        const struct box whole = {0, 0, full->height, full->width, 0};
        const size_t needed = (size_t)form->width * form->height * 3;
        if (!hold(&encoder->small, &encoder->small_bytes, needed)) return NO_MEMORY;
        const enum status status = resize(encoder->resizer, full->pixels, full->stride, full->height, full->width, &whole,
                                          AREA, (int)form->height, (int)form->width, encoder->small);
        if (status != OK) return status;
        pixels = (struct region){encoder->small, (size_t)form->width * 3, 0, 0, (int)form->height, (int)form->width, 1};
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
    char message[MESSAGE_BYTES];
    return (int)jpeg_inspect(encoder->jpeg, data, (size_t)bytes, photo, message);
}

/* Encodes a photo in all `forms` (count,), none of them larger than it. The photo is the JPEG `data`, or `pixels`
 * (height, width, 3) if not NULL. Returns OK and sets *output, which is valid until the next call, or another status
 * with a `message` (MESSAGE_BYTES). */
EXPORT int vitlocal_encode(struct encoder *encoder, const uint8_t *data, int64_t bytes, const uint8_t *pixels,
                           int64_t height, int64_t width, struct form *forms, int64_t count, const uint8_t **output,
                           char *message) {
    encoder->message = message;
    encoder->length = 0;
    message[0] = 0;
    struct region full = {pixels, (size_t)width * 3, 0, 0, (int)height, (int)width, 1};
    if (!pixels) {
        /* At half size or less if that is still twice the size of any form: the difference is not visible. */
        int largest = 0;
        for (int64_t i = 0; i < count; i++) {
            const int shorter = (int)(forms[i].width < forms[i].height ? forms[i].width : forms[i].height);
            largest = shorter > largest ? shorter : largest;
        }
        const struct box whole = {0, 0, (double)height, (double)width, 0};
        const enum status status = jpeg_decode(encoder->jpeg, data, (size_t)bytes, (int)height, (int)width, &whole,
                                               2 * largest, 8, &full, message);
        if (status != OK) return (int)status;
    }
    if (!reserve(encoder, 1 << 16)) return NO_MEMORY; /* libjpeg starts with the free part */
    for (int64_t i = 0; i < count; i++) {
        forms[i].offset = encoder->length;
        size_t kept = 0;
        if (forms[i].kind == AS_ORIGINAL) {
            if (!reserve(encoder, (size_t)bytes)) return NO_MEMORY;
            kept = jpeg_strip(data, (size_t)bytes, encoder->output + encoder->length);
            encoder->length += kept;
            if (!kept) forms[i].kind = AS_JPEG; /* several scans would be slow to decode */
        }
        if (!kept) {
            if (!reserve(encoder, 1 << 12)) return NO_MEMORY;
            const enum status status = store(encoder, &full, &forms[i]);
            if (status != OK) return (int)status;
        }
        forms[i].bytes = encoder->length - forms[i].offset;
    }
    *output = encoder->output;
    return OK;
}
