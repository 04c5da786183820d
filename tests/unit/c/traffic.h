/* SPDX-License-Identifier: Apache-2.0 */
/* What the clients of test_traffic.c share: which blocks are whose, what they must hold, and what to do next.
 *
 * The first half of the disk is interleaved block by block, so that clients meet in the same granules. Then each has
 * a part of its own, where whole granules are zeroed and discarded. The rest is for clients that leave. */
#ifndef TRAFFIC_H
#define TRAFFIC_H

#include <stdio.h>
#include <unistd.h>

#include "check.h"
#include "core.h"

#define BLOCK 512u
#define OWNERS 5u /* the last is the guest */
#define SHARED_BLOCKS 1024u
#define OWN_BLOCKS 128u
#define SCRATCH_BLOCK (SHARED_BLOCKS + OWNERS * OWN_BLOCKS)
#define DISK_BLOCKS 2048u
#define LONGEST (64 * BLOCK)
#define BATCH 8u

enum kind { KIND_READ, KIND_WRITE, KIND_ZEROES, KIND_DISCARD, KIND_FLUSH };

struct operation {
    enum kind kind;
    unsigned block, blocks;
    uint8_t value; /* that a WRITE fills its blocks with */
};

struct owner {
    unsigned id;
    uint32_t random;
    uint8_t holds[DISK_BLOCKS];
    bool or_zero[DISK_BLOCKS]; /* it was discarded */
    struct operation batch[BATCH];
    unsigned batch_size;
    uint8_t data[BATCH][LONGEST];
};

static inline unsigned dice(struct owner *owner, unsigned sides) { return next_random(&owner->random) % sides; }

static inline bool in_batch(const struct owner *owner, unsigned block, unsigned blocks)
{
    for (unsigned i = 0; i < owner->batch_size; i++) {
        const struct operation *other = &owner->batch[i];
        if (other->kind != KIND_FLUSH && other->block < block + blocks && block < other->block + other->blocks)
            return true;
    }
    return false;
}

static inline void choose(struct owner *owner, struct operation *operation)
{
    unsigned number = dice(owner, 100);
    operation->kind = number < 40 ? KIND_WRITE : number < 80 ? KIND_READ : number < 92 ? KIND_ZEROES : KIND_DISCARD;
    operation->blocks = 1;
    operation->block = owner->id + OWNERS * dice(owner, SHARED_BLOCKS / OWNERS);
    if (operation->kind == KIND_DISCARD || dice(owner, 3) == 0) {
        operation->block = dice(owner, OWN_BLOCKS);
        operation->blocks = 1 + dice(owner, (unsigned)bt_min(OWN_BLOCKS - operation->block, LONGEST / BLOCK));
        operation->block += SHARED_BLOCKS + owner->id * OWN_BLOCKS;
    }
    if (number == 99)
        *operation = (struct operation){.kind = KIND_FLUSH};
}

/* Some operations that do not touch one another. */
static inline void fill_batch(struct owner *owner)
{
    owner->batch_size = 0;
    for (unsigned i = 0; i < BATCH; i++) {
        struct operation *operation = &owner->batch[owner->batch_size];
        choose(owner, operation);
        if (operation->kind != KIND_FLUSH && in_batch(owner, operation->block, operation->blocks))
            continue;
        operation->value = (uint8_t)(1 + dice(owner, 255));
        memset(owner->data[owner->batch_size], operation->kind == KIND_WRITE ? operation->value : 0xEE,
               operation->blocks * BLOCK);
        owner->batch_size++;
    }
}

static inline void check_block(struct owner *owner, unsigned block, const uint8_t *data)
{
    CHECK(data[0] == owner->holds[block] || (owner->or_zero[block] && data[0] == 0));
    owner->holds[block] = data[0];
    owner->or_zero[block] = false;
    for (unsigned i = 1; i < BLOCK; i++)
        CHECK(data[i] == data[0]);
}

/* One of the batch was done without an error. */
static inline void completed(struct owner *owner, unsigned index)
{
    const struct operation *operation = &owner->batch[index];
    for (unsigned i = 0; i < operation->blocks; i++) {
        unsigned block = operation->block + i;
        if (operation->kind == KIND_READ)
            check_block(owner, block, owner->data[index] + i * BLOCK);
        if (operation->kind == KIND_DISCARD)
            owner->or_zero[block] = true;
        if (operation->kind == KIND_WRITE || operation->kind == KIND_ZEROES) {
            owner->holds[block] = operation->kind == KIND_WRITE ? operation->value : 0;
            owner->or_zero[block] = false;
        }
    }
}

#endif
