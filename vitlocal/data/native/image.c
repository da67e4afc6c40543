/* Decodes one image from its bytes to the crop. */
#include "native.h"

#include <stdlib.h>

enum { LARGEST_EDGE = 65535 }; /* the table of a .beton file has 16 bits for each */

struct decoder {
    struct jpeg *jpeg;
    struct resizer *resizer;
};

struct decoder *decoder_new(void) {
    struct decoder *decoder = malloc(sizeof *decoder);
    if (!decoder) return NULL;
    *decoder = (struct decoder){jpeg_new(), resizer_new()};
    if (decoder->jpeg && decoder->resizer) return decoder;
    decoder_free(decoder);
    return NULL;
}

void decoder_free(struct decoder *decoder) {
    if (!decoder) return;
    jpeg_free(decoder->jpeg);
    resizer_free(decoder->resizer);
    free(decoder);
}

enum status decode(struct decoder *decoder, const uint8_t *file, uint64_t file_bytes, const struct row *row,
                   const struct policy *policy, int64_t draw, int size, int most_reduction, uint8_t *crop,
                   char *message) {
    message[0] = 0;
    if (row->offset > file_bytes || row->bytes > file_bytes - row->offset || !row->width || !row->height
        || row->width > LARGEST_EDGE || row->height > LARGEST_EDGE) return OUTSIDE;
    const int height = (int)row->height, width = (int)row->width;
    const uint8_t *data = file + row->offset;
    struct box box;
    vitlocal_box(policy, draw, height, width, &box);
    if (row->raw) {
        if (row->bytes < (uint64_t)row->width * row->height * 3) return OUTSIDE;
        return resize(decoder->resizer, data, (size_t)width * 3, height, width, &box, TRIANGLE, size, size, crop);
    }
    struct region region;
    const enum status status = jpeg_decode(decoder->jpeg, data, row->bytes, height, width, &box, size,
                                           most_reduction, &region, message);
    if (status != OK) return status;
    box.top = box.top / region.reduction - region.top;
    box.left = box.left / region.reduction - region.left;
    box.height /= region.reduction;
    box.width /= region.reduction;
    return resize(decoder->resizer, region.pixels, region.stride, region.height, region.width, &box, TRIANGLE, size,
                  size, crop);
}
