/* Sends mutated images through decoder and encoder: fuzz COUNT SEED FILE.jpg ...  Built with sanitizers by fuzz.py.
 *
 * Every image lies in memory of exactly its size, so that a read beyond it is seen, and so does every crop.
 */
#include "batch.c"
#include "encode.c"
#include "numbers.h"

struct seed_image {
    uint8_t *data;
    size_t bytes;
    uint32_t width, height;
};

static struct seed_image load(const char *path) {
    struct seed_image image = {0};
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END)) exit(2);
    image.bytes = (size_t)ftell(file);
    image.data = malloc(image.bytes);
    rewind(file);
    if (!image.data || fread(image.data, 1, image.bytes, file) != image.bytes) exit(2);
    fclose(file);
    struct jpeg_decompress_struct decoder;
    struct jpeg_error_mgr errors;
    decoder.err = jpeg_std_error(&errors);
    jpeg_create_decompress(&decoder);
    jpeg_mem_src(&decoder, image.data, (unsigned long)image.bytes);
    jpeg_read_header(&decoder, TRUE);
    image.width = decoder.image_width;
    image.height = decoder.image_height;
    jpeg_destroy_decompress(&decoder);
    return image;
}

/* A changed copy: some bytes set, bits flipped, a run moved, zeroed or cut out, or the end cut off. */
static uint8_t *mutate(const struct seed_image *image, size_t *bytes) {
    uint8_t *data = malloc(image->bytes);
    if (!data) exit(2);
    memcpy(data, image->data, image->bytes);
    size_t length = image->bytes;
    for (uint64_t change = random_number(8); change > 0 && length > 1; change--) {
        /* Half of the changes fall into the headers, which are a small part of the file. */
        const size_t reach = random_number(2) && length > 700 ? 700 : length;
        const size_t at = random_number(reach);
        size_t run = 1 + random_number(64);
        if (run > length - at) run = length - at;
        switch (random_number(6)) {
        case 0: data[at] = (uint8_t)random_number(256); break;
        case 1: data[at] ^= (uint8_t)(1u << random_number(8)); break;
        case 2: memset(data + at, (int)(random_number(2) * 255), run); break;
        case 3: memmove(data + at, data + random_number(length - run + 1), run); break;
        case 4:
            memmove(data + at, data + at + run, length - at - run);
            length -= run;
            break;
        default:
            if (random_number(4) == 0) length = at + 1;
        }
    }
    uint8_t *exact = malloc(length);
    if (!exact) exit(2);
    memcpy(exact, data, length);
    free(data);
    *bytes = length;
    return exact;
}

/* Encodes the image, if possible. A JPEG that is stored unchanged must decode to the same pixels by itself. */
static int encode_and_compare(struct encoder *encoder, const uint8_t *data, size_t bytes) {
    struct photo photo;
    if (vitlocal_inspect(encoder, data, (int64_t)bytes, &photo) != OK) return CORRUPT;
    if ((uint64_t)photo.width * photo.height > 400000) return OUTSIDE;
    struct form forms[3];
    const int count = 1 + (int)random_number(3);
    for (int i = 0; i < count; i++) {
        forms[i] = (struct form){
            .width = 1 + (uint32_t)random_number(photo.width), .height = 1 + (uint32_t)random_number(photo.height),
            .kind = (uint32_t)random_number(3), .quality = 1 + (uint32_t)random_number(100),
            .sampling = random_number(2) ? 420 : 444,
        };
        if (forms[i].kind == AS_ORIGINAL) {
            forms[i].width = photo.width;
            forms[i].height = photo.height;
        }
    }
    const char *message;
    const uint8_t *output;
    const int status = vitlocal_encode(encoder, data, (int64_t)bytes, NULL, photo.height, photo.width, forms, count,
                                       &output, &message);
    for (int i = 0; status == OK && i < count; i++) {
        if (forms[i].kind != AS_ORIGINAL) continue;
        uint8_t *kept = malloc(forms[i].bytes);
        if (!kept) exit(2);
        memcpy(kept, output + forms[i].offset, forms[i].bytes);
        const struct box whole = {0, 0, photo.height, photo.width, 0};
        struct jpeg first = {0}, second = {0};
        struct region a, b;
        const int height = (int)photo.height, width = (int)photo.width;
        if (jpeg_decode(&first, data, bytes, height, width, &whole, 1, 1, &a) != OK
            || jpeg_decode(&second, kept, forms[i].bytes, height, width, &whole, 1, 1, &b) != OK
            || memcmp(a.pixels, b.pixels, (size_t)height * (size_t)width * 3) != 0) {
            fprintf(stderr, "what was kept of a JPEG decodes to something else: %s\n", second.failure.message);
            exit(1);
        }
        jpeg_free(&first);
        jpeg_free(&second);
        free(kept);
    }
    return status;
}

int main(int count, char **arguments) {
    if (count < 4) return 2;
    const long total = atol(arguments[1]);
    state = (uint64_t)atoll(arguments[2]);
    const int images = count - 3;
    struct seed_image *seeds = calloc((size_t)images, sizeof *seeds);
    for (int i = 0; i < images; i++) seeds[i] = load(arguments[3 + i]);
    struct jpeg jpeg = {0};
    struct resizer resizer = {0};
    struct encoder *encoder = vitlocal_encoder_new();
    long outcomes[8] = {0}, encoded = 0;
    static const int sizes[] = {1, 16, 32, 50, 96, 160, 224};
    for (long number = 0; number < total; number++) {
        const struct seed_image *image = &seeds[random_number((uint64_t)images)];
        size_t bytes;
        uint8_t *data = mutate(image, &bytes);
        struct row row = {0, bytes, image->width, image->height, 0, 0};
        if (random_number(8) == 0) { /* the table is wrong, or says that the image is raw */
            row.width = (uint32_t)random_number(70000);
            row.height = (uint32_t)random_number(70000);
            row.raw = (uint32_t)random_number(2);
            if (random_number(2)) row.bytes = random_number(2 * bytes + 1);
            if (random_number(4) == 0) row.offset = random_number(2 * bytes + 1);
        } else if (random_number(16) == 0) { /* a raw image of the available pixels */
            row.width = 1 + (uint32_t)random_number(100);
            row.height = (uint32_t)(bytes / 3 / row.width);
            row.raw = 1;
        }
        const struct policy policy = {
            .kind = (int64_t)random_number(3), .seed = (int64_t)random_number(1000), .scale_low = 0.01,
            .scale_high = 1, .ratio_low = 0.5, .ratio_high = 2, .flip = 0.5, .centre = 1,
        };
        const int size = sizes[random_number(sizeof sizes / sizeof *sizes)];
        vitlocal_instructions((int)random_number(3));
        uint8_t *crop = malloc((size_t)size * (size_t)size * 3);
        const int64_t draw = number;
        const struct batch batch = {
            .file = data, .file_bytes = bytes, .rows = &row, .draws = &draw, .count = 1, .policy = &policy,
            .size = size, .most_reduction = 1 << random_number(4), .crops = crop,
        };
        outcomes[decode(&jpeg, &resizer, &batch, 0)]++;
        free(crop);
        encoded += encode_and_compare(encoder, data, bytes) == OK;
        free(data);
        if ((number + 1) % 10000 == 0) fprintf(stderr, "%ld of %ld\n", number + 1, total);
    }
    jpeg_free(&jpeg);
    resizer_free(&resizer);
    vitlocal_encoder_free(encoder);
    for (int i = 0; i < images; i++) free(seeds[i].data);
    free(seeds);
    printf("%ld images: %ld decoded, %ld corrupt, %ld of another size, %ld without memory, %ld outside, %ld refused; "
           "%ld encoded\n",
           total, outcomes[OK], outcomes[CORRUPT] + outcomes[WARNED], outcomes[WRONG_SIZE], outcomes[NO_MEMORY],
           outcomes[OUTSIDE], outcomes[REFUSED], encoded);
    return outcomes[OK] == 0 || outcomes[CORRUPT] + outcomes[WARNED] == 0 || encoded == 0;
}
