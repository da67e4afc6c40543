/* Resizes random images and prints a digest of each result, so that machines can be compared: compare COUNT SEED
 *
 * Every instruction set of the processor must give the bytes of plain C. An image ends or begins at memory that cannot
 * be read. With more arguments, compare COUNT SEED KIND SIDE SIZE makes random crops of one kind of instructions, of SIZE
 * px from a photo with a long edge of SIDE px. So instructions can be counted.
 */
#define _GNU_SOURCE /* MAP_ANONYMOUS */
#include "native.h"
#include "numbers.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { PAGE = 65536 /* the largest of aarch64 */, LARGEST = 1 << 24, GUARD = 64, MOST = 256 * 256 * 3 };

struct image {
    uint8_t *pixels;
    int height, width;
};

static uint8_t *memory; /* (PAGE + LARGEST + PAGE,); reading the first or the last page is a fault */

static int between(int low, int high) { return low + (int)random_number((uint64_t)(high - low + 1)); }
static double fraction(void) { return (double)random_number(1 << 20) / (1 << 20); }

/* Noise, black and white, or a ramp: their sums are typical, the largest, and even. */
static struct image random_image(int height, int width) {
    const size_t bytes = (size_t)height * (size_t)width * 3;
    if (bytes > LARGEST) exit(2);
    struct image image = {memory + PAGE + (random_number(2) ? LARGEST - bytes : 0), height, width};
    const uint64_t content = random_number(3);
    for (size_t i = 0; i < bytes; i++) {
        const uint64_t number = content < 2 ? random_number(256) : i;
        image.pixels[i] = content == 1 ? (number < 128 ? 0 : 255) : (uint8_t)number;
    }
    return image;
}

static uint64_t digest(const uint8_t *bytes, size_t count) { /* FNV-1a */
    uint64_t hash = 0xCBF29CE484222325u;
    for (size_t i = 0; i < count; i++) hash = (hash ^ bytes[i]) * 0x100000001B3u;
    return hash;
}

/* A part of an image, its filter, and the size of the result. */
struct test {
    struct region region;
    struct box box;
    enum filter filter;
    int rows, columns, exact; /* exact: by resize_exactly, 1 with rows first and 2 with columns first */
};

/* Draws one number in each statement: compilers choose the order within a statement. */
static struct test random_test(long number) {
    static const int edges[] = {1, 5, 16, 40, 300, 800};
    const int longest = edges[random_number(6)];
    int height = between(1, longest);
    int width = between(1, longest);
    if (random_number(8) == 0) { /* many taps */
        width = between(2000, 9000);
        height = between(1, 40);
    } else if (random_number(16) == 0) {
        height = between(2000, 9000);
        width = between(1, 40);
    }
    const struct image image = random_image(height, width);
    struct test test = {{image.pixels, (size_t)width * 3, 0, 0, height, width, 1}, {0}, TRIANGLE, 0, 0, 0};
    test.rows = between(1, random_number(2) ? 40 : 230);
    test.columns = random_number(2) ? test.rows : between(1, random_number(2) ? 40 : 230);
    const uint64_t how = random_number(4);
    if (how == 0) { /* as the loader does */
        struct policy policy = {RANDOM, 7, 0, 0.01, 1, 0.5, 2, 0.5, 1};
        policy.kind = between(CENTRE, WHOLE);
        policy.centre = 0.5 + fraction() / 2;
        test.columns = test.rows;
        vitlocal_box(&policy, number, height, width, test.rows, &test.box);
        test.exact = policy.kind == CENTRE ? between(1, 2) : 0;
    } else if (how == 1) { /* as the writer does */
        test.filter = AREA;
        test.rows = test.rows < height ? test.rows : height;
        test.columns = test.columns < width ? test.columns : width;
        test.box = (struct box){0, 0, height, width, 0, 0};
    } else { /* any box, also less than a pixel */
        test.box.height = height * (how == 2 ? fraction() : 1) + 1e-3;
        test.box.width = width * (how == 2 ? fraction() : 1) + 1e-3;
        test.box.top = (height - test.box.height) * fraction();
        test.box.left = (width - test.box.width) * fraction();
        test.box.reach = random_number(2) ? 3 * fraction() : 0;
        test.box.flipped = (int32_t)random_number(2);
    }
    return test;
}

static struct test random_crop(const struct image *image, int size, long number) {
    static const struct policy policy = {RANDOM, 0, 0, 0.35, 1, 0.75, 4.0 / 3, 0.5, 1};
    struct test test = {{image->pixels, (size_t)image->width * 3, 0, 0, image->height, image->width, 1}, {0}, TRIANGLE,
                        size, size, 0};
    vitlocal_box(&policy, number, image->height, image->width, size, &test.box);
    return test;
}

static void run(struct resizer *resizer, const struct test *test, uint8_t *out) {
    const enum status status =
        test->exact ? resize_exactly(resizer, &test->region, &test->box, test->exact == 2, test->rows, out)
                    : resize(resizer, &test->region, &test->box, test->filter, test->rows, test->columns, out);
    if (status != OK) exit(2);
}

/* Runs a case with all instructions. Prints it, all digits of the box, and a digest of the result. */
static void compare(struct resizer *resizer, const struct test *test, int best) {
    static uint8_t expected[MOST + GUARD], out[MOST + GUARD];
    const size_t bytes = (size_t)test->rows * (size_t)test->columns * 3;
    printf("%a x %a at %a, %a of %d x %d to %d x %d, %s %d: ", test->box.height, test->box.width, test->box.top,
           test->box.left, test->region.height, test->region.width, test->rows, test->columns,
           test->exact ? "exactly" : "filter", test->exact ? test->exact : (int)test->filter);
    for (int kind = 0; kind <= best; kind++) {
        uint8_t *result = kind ? out : expected;
        memset(result, 0, bytes);
        memset(result + bytes, 77, GUARD);
        vitlocal_instructions(kind);
        run(resizer, test, result);
        if (memcmp(result, expected, bytes + GUARD) != 0 || result[bytes] != 77) {
            printf("instructions %d differ from plain C\n", kind);
            exit(1);
        }
    }
    printf("%016llx\n", (unsigned long long)digest(expected, bytes));
}

int main(int count, char **arguments) {
    if (count != 3 && count != 6) return 2;
    const long total = atol(arguments[1]);
    state = (uint64_t)atoll(arguments[2]);
    memory = mmap(NULL, PAGE + LARGEST + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, PAGE, PROT_NONE)
        || mprotect(memory + PAGE + LARGEST, PAGE, PROT_NONE)) return 2;
    struct resizer resizer = {0};
    if (count == 3) {
        const int best = vitlocal_instructions(-1);
        fprintf(stderr, "%d\n", best);
        for (long number = 0; number < total; number++) {
            const struct test test = random_test(number);
            compare(&resizer, &test, best);
        }
    } else {
        static uint8_t out[MOST];
        const int kind = atoi(arguments[3]), side = atoi(arguments[4]), size = atoi(arguments[5]);
        if (vitlocal_instructions(kind) != kind || size > 256) return 2;
        const struct image photo = random_image(side * 3 / 4, side);
        for (long number = 0; number < total; number++) {
            const struct test test = random_crop(&photo, size, number);
            run(&resizer, &test, out);
        }
    }
    resizer_free(&resizer);
    return 0;
}
