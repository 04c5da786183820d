/* SPDX-License-Identifier: Apache-2.0 */
/* I/O vectors: parts of them, and copies from and to them. Ranges that the vector does not have are the
 * caller's mistake; nothing here reads or writes outside of it all the same. */
#define _GNU_SOURCE
#include "core.h"

/* A walk over the parts of [offset, offset + length) of a vector, one memory run at a time. */
struct walk {
    const struct iovec *iov, *end;
    uint64_t skip; /* of the first vector that is left */
    uint64_t left;
};

static struct walk walk_start(const struct iovec *iov, int iovcnt, uint64_t offset, uint64_t length)
{
    struct walk walk = {.iov = iov, .end = iov + iovcnt, .skip = offset, .left = length};
    while (walk.iov < walk.end && walk.skip >= walk.iov->iov_len)
        walk.skip -= walk.iov++->iov_len;
    return walk;
}

/* The next run of at least one byte; its length, or 0 at the end. */
static size_t walk_next(struct walk *walk, unsigned char **run)
{
    while (walk->left && walk->iov < walk->end) {
        const struct iovec *iov = walk->iov++;
        size_t skip = (size_t)walk->skip, n = (size_t)bt_min(iov->iov_len - skip, walk->left);
        walk->skip = 0;
        walk->left -= n;
        if (n) { /* an empty vector may have no address */
            *run = (unsigned char *)iov->iov_base + skip;
            return n;
        }
    }
    return 0;
}

int bt_iov_slice(const struct iovec *iov, int iovcnt, uint64_t offset, uint64_t length, struct iovec *out, int max)
{
    struct walk walk = walk_start(iov, iovcnt, offset, length);
    unsigned char *run;
    int used = 0;
    for (size_t n; (n = walk_next(&walk, &run)); used++) {
        if (used == max)
            return -E2BIG;
        out[used] = (struct iovec){.iov_base = run, .iov_len = n};
    }
    return used;
}

void bt_iov_zero(const struct iovec *iov, int iovcnt, uint64_t offset, uint64_t length)
{
    struct walk walk = walk_start(iov, iovcnt, offset, length);
    unsigned char *run;
    for (size_t n; (n = walk_next(&walk, &run));)
        memset(run, 0, n);
}

void bt_iov_to_buffer(const struct iovec *iov, int iovcnt, uint64_t offset, void *out, uint64_t length)
{
    struct walk walk = walk_start(iov, iovcnt, offset, length);
    unsigned char *run, *to = out;
    for (size_t n; (n = walk_next(&walk, &run)); to += n)
        memcpy(to, run, n);
}

void bt_iov_from_buffer(const struct iovec *iov, int iovcnt, uint64_t offset, const void *data, uint64_t length)
{
    struct walk walk = walk_start(iov, iovcnt, offset, length);
    const unsigned char *from = data;
    unsigned char *run;
    for (size_t n; (n = walk_next(&walk, &run)); from += n)
        memcpy(run, from, n);
}

/* Data that is not zero mostly shows it at once, so a few words come first; then the C library's vectorised
 * comparison of the run with itself, shifted by one word: equal means that the first word repeats. */
static bool run_is_zero(const unsigned char *run, size_t n)
{
    uint64_t first = 0, last;
    if (n < sizeof first) {
        memcpy(&first, run, n);
        return first == 0;
    }
    memcpy(&first, run, sizeof first);
    memcpy(&last, run + n - sizeof last, sizeof last);
    if (first || last)
        return false;
    return memcmp(run, run + sizeof first, n - sizeof first) == 0;
}

bool bt_iov_is_zero(const struct iovec *iov, int iovcnt, uint64_t offset, uint64_t length)
{
    struct walk walk = walk_start(iov, iovcnt, offset, length);
    unsigned char *run;
    for (size_t n; (n = walk_next(&walk, &run));)
        if (!run_is_zero(run, n))
            return false;
    return true;
}
