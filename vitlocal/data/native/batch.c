/* Threads that decode batches. Several batches may be decoded at once. The file is mapped: if it became shorter, or if
 * its disk fails, reading a part of it raises SIGBUS, which would end the process. */
#include "native.h"

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

/* One call: decodes the images `draws` (count,) of a file to `crops`. It is on the caller's stack. */
struct batch {
    const uint8_t *file;
    uint64_t file_bytes;
    const struct row *rows;
    int64_t row_count; /* 0: there is one row for each draw, in their order */
    const int64_t *draws;
    int64_t count;
    const struct policy *policy;
    const struct box *boxes; /* (count,), instead of the policy's, unless it is NULL */
    int size, most_reduction;
    uint8_t *crops;
    int32_t *statuses;
    char *message;    /* of the first bad image of the batch */
    int64_t *damaged; /* counts bad images, unless it is NULL */

    int64_t next, done, worst; /* guarded by the pool, as *message and *damaged */
    struct batch *after;
};

struct pool {
    pthread_mutex_t lock;
    pthread_cond_t work, finished;
    struct batch *first; /* list of batches with images that no thread has taken */
    int closing, threads;
    pthread_t ids[];
};

/* Images that a thread takes at once, because small images decode faster than a thread can fetch them. */
enum { TAKEN = 4, REPEAT_SHIFT = 40 /* of crops.py */, LARGEST_EDGE = 65535 /* 16 bits in a .beton file's table */ };

/* Whether a box has an area within the image. False for numbers that are not finite. */
static int is_inside(const struct box *box, int height, int width) {
    const double rounding = 1e-6 * (height + width);
    return box->height > 0 && box->width > 0 && box->top >= -rounding && box->left >= -rounding
           && box->top + box->height <= height + rounding && box->left + box->width <= width + rounding;
}

static size_t crop_bytes(const struct batch *b) { return (size_t)b->size * (size_t)b->size * 3; }

/* Makes the crop (S, S, 3) at `place` of a batch. */
static enum status decode(struct jpeg *jpeg, struct resizer *resizer, const struct batch *b, int64_t place) {
    const int64_t draw = b->draws[place];
    const int64_t index = b->row_count ? draw & (((int64_t)1 << REPEAT_SHIFT) - 1) : place;
    if (draw < 0 || (b->row_count && index >= b->row_count)) return OUTSIDE;
    const struct row *row = &b->rows[index];
    if (row->offset > b->file_bytes || row->bytes > b->file_bytes - row->offset || !row->width || !row->height
        || row->width > LARGEST_EDGE || row->height > LARGEST_EDGE) return OUTSIDE;
    if (row->raw && row->bytes < (uint64_t)row->width * row->height * 3) return OUTSIDE;

    const int height = (int)row->height, width = (int)row->width;
    const uint8_t *data = b->file + row->offset;
    struct region region = {data, (size_t)width * 3, 0, 0, height, width, 1};
    struct box box;
    if (b->boxes) {
        box = b->boxes[place];
        if (!is_inside(&box, height, width)) return BAD_BOX;
    } else {
        vitlocal_box(b->policy, draw, height, width, b->size, &box);
    }
    const int exact = !b->boxes && b->policy->kind == CENTRE;
    /* By how much the whole image would shrink: Pillow chooses its first pass by that. */
    const double shorter = height - rint(b->size * height / box.height), narrower = width - rint(b->size * width / box.width);
    const int columns_first = shorter > 0 && shorter > 2 * narrower;
    if (!row->raw) {
        const int reduction = exact ? 1 : b->most_reduction;
        const enum status status = jpeg_decode(jpeg, data, row->bytes, height, width, &box, b->size, reduction, &region);
        if (status != OK) return status;
        box.top = box.top / region.reduction - region.top;
        box.left = box.left / region.reduction - region.left;
        box.height /= region.reduction;
        box.width /= region.reduction;
        box.reach /= region.reduction;
    }
    uint8_t *crop = b->crops + (size_t)place * crop_bytes(b);
    return exact ? resize_exactly(resizer, &region, &box, columns_first, b->size, crop)
                 : resize(resizer, &region, &box, TRIANGLE, b->size, b->size, crop);
}

/* --- reading a mapped file --- */

#ifdef __linux__
__attribute__((tls_model("initial-exec"))) /* a handler must not allocate the variable */
#endif
static _Thread_local sigjmp_buf *escape; /* where a thread that reads a file goes on; NULL: it reads none */
static struct sigaction handler_before;
static volatile sig_atomic_t passed_on; /* the handler before works; it may call this one, as faulthandler does */

static void leave_file(int number, siginfo_t *about, void *context) {
    if (escape) siglongjmp(*escape, 1);
    if (passed_on) handler_before = (struct sigaction){.sa_handler = SIG_DFL};
    passed_on = 1;
    if (handler_before.sa_flags & SA_SIGINFO) {
        handler_before.sa_sigaction(number, about, context);
    } else if (handler_before.sa_handler != SIG_DFL && handler_before.sa_handler != SIG_IGN) {
        handler_before.sa_handler(number);
    } else {
        sigaction(number, &handler_before, NULL);
        raise(number);
    }
    passed_on = 0;
}

/* Installs the handler if another one has taken its place: workers of PyTorch's DataLoader do that when they start. */
static void handle_bus_errors(void) {
    struct sigaction now;
    if (sigaction(SIGBUS, NULL, &now) || ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == leave_file)) return;
    struct sigaction action = {.sa_sigaction = leave_file, .sa_flags = SA_SIGINFO | SA_NODEFER}; /* the mask stays */
    sigemptyset(&action.sa_mask);
    handler_before = now;
    sigaction(SIGBUS, &action, NULL);
}

/* Calls work(argument), which reads a mapped file. Returns 0 if that failed; the work may then have stopped anywhere. */
static int read_mapped(void (*work)(void *), void *argument) {
    sigjmp_buf here;
    if (sigsetjmp(here, 0)) {
        escape = NULL;
        return 0;
    }
    escape = &here;
    work(argument);
    escape = NULL;
    return 1;
}

struct gathering {
    const uint8_t *file;
    const uint64_t *offsets, *sizes;
    int64_t count;
    uint8_t *out;
};

static void gather(void *argument) {
    struct gathering g = *(struct gathering *)argument;
    for (int64_t i = 0; i < g.count; g.out += g.sizes[i++]) memcpy(g.out, g.file + g.offsets[i], g.sizes[i]);
}

/* Copies `count` parts of a mapped file to `out`, one behind the other. Returns OK, OUTSIDE or UNREADABLE. */
EXPORT int vitlocal_gather(const uint8_t *file, int64_t file_bytes, const uint64_t *offsets, const uint64_t *sizes,
                           int64_t count, uint8_t *out) {
    handle_bus_errors();
    const uint64_t end = (uint64_t)file_bytes;
    for (int64_t i = 0; i < count; i++) {
        if (offsets[i] > end || sizes[i] > end - offsets[i]) return OUTSIDE;
    }
    struct gathering gathering = {file, offsets, sizes, count, out};
    return read_mapped(gather, &gathering) ? OK : UNREADABLE;
}

struct decoding {
    struct jpeg *jpeg;
    struct resizer *resizer;
    const struct batch *batch;
    int64_t place;
    enum status status;
};

static void decode_place(void *argument) {
    struct decoding *d = argument;
    d->status = decode(d->jpeg, d->resizer, d->batch, d->place);
}

static void *serve(void *argument) {
    struct pool *pool = argument;
    struct jpeg jpeg = {0};
    struct resizer resizer = {0};
    pthread_mutex_lock(&pool->lock);
    for (;;) {
        while (!pool->first && !pool->closing) pthread_cond_wait(&pool->work, &pool->lock);
        if (!pool->first) break; /* batches of other callers are finished first */
        struct batch *b = pool->first;
        const int64_t start = b->next, end = start + TAKEN < b->count ? start + TAKEN : b->count;
        b->next = end;
        if (end == b->count) pool->first = b->after;
        pthread_mutex_unlock(&pool->lock);

        for (int64_t place = start; place < end; place++) {
            struct decoding decoding = {&jpeg, &resizer, b, place, UNREADABLE};
            const enum status status = read_mapped(decode_place, &decoding) ? decoding.status : UNREADABLE;
            b->statuses[place] = (int32_t)status;
            if (status == OK) continue;
            memset(b->crops + (size_t)place * crop_bytes(b), 0, crop_bytes(b)); /* not old pixels */
            pthread_mutex_lock(&pool->lock);
            if (b->worst < 0 || place < b->worst) {
                b->worst = place;
                memcpy(b->message, jpeg.failure.message, MESSAGE_BYTES);
            }
            if (b->damaged) ++*b->damaged;
            pthread_mutex_unlock(&pool->lock);
        }

        pthread_mutex_lock(&pool->lock);
        b->done += end - start;
        if (b->done == b->count) pthread_cond_broadcast(&pool->finished);
    }
    pthread_mutex_unlock(&pool->lock);
    jpeg_free(&jpeg);
    resizer_free(&resizer);
    return NULL;
}

EXPORT void vitlocal_pool_free(struct pool *pool) {
    pthread_mutex_lock(&pool->lock);
    pool->closing = 1;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 0; i < pool->threads; i++) pthread_join(pool->ids[i], NULL);
    pthread_mutex_destroy(&pool->lock);
    pthread_cond_destroy(&pool->work);
    pthread_cond_destroy(&pool->finished);
    free(pool);
}

/* NULL if `threads` is less than one, and if the system has no memory or cannot start them. */
EXPORT struct pool *vitlocal_pool_new(int64_t threads) {
    if (threads < 1) return NULL;
    handle_bus_errors();
    struct pool *pool = calloc(1, sizeof *pool + (size_t)threads * sizeof pool->ids[0]);
    if (!pool) return NULL;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->finished, NULL);
    for (; pool->threads < threads; pool->threads++) {
        if (pthread_create(&pool->ids[pool->threads], NULL, serve, pool)) break;
    }
    if (pool->threads < threads) {
        vitlocal_pool_free(pool);
        return NULL;
    }
    return pool;
}

/* Decodes `draws` (count,) of the `rows` (row_count,) of a file to `crops` (count, S, S, 3) and fills `statuses`
 * (count,). If row_count is 0, `rows` (count,) has one row for each draw. `boxes` (count,) replaces the policy's boxes
 * unless it is NULL.
 *
 * Returns the place of the first image that could not be decoded, with a `message` (MESSAGE_BYTES), or -1. Such crops
 * are black and are added to *damaged unless that is NULL. Several threads may call it at once. The caller must not
 * hold the interpreter's lock. */
EXPORT int64_t vitlocal_decode(struct pool *pool, const uint8_t *file, int64_t file_bytes, const struct row *rows,
                               int64_t row_count, const int64_t *draws, int64_t count, const struct policy *policy,
                               const struct box *boxes, int64_t size, int64_t most_reduction, uint8_t *crops,
                               int32_t *statuses, char *message, int64_t *damaged) {
    if (count <= 0) return -1;
    struct batch batch = {
        .file = file, .file_bytes = (uint64_t)file_bytes, .rows = rows, .row_count = row_count, .draws = draws,
        .count = count, .policy = policy, .boxes = boxes, .size = (int)size, .most_reduction = (int)most_reduction,
        .crops = crops, .statuses = statuses, .message = message, .damaged = damaged, .worst = -1,
    };
    pthread_mutex_lock(&pool->lock);
    struct batch **end = &pool->first;
    while (*end) end = &(*end)->after;
    *end = &batch;
    pthread_cond_broadcast(&pool->work);
    while (batch.done < batch.count) pthread_cond_wait(&pool->finished, &pool->lock);
    pthread_mutex_unlock(&pool->lock);
    return batch.worst;
}
