/* SPDX-License-Identifier: Apache-2.0 */
/* Between the parts of the NVMe device: nvme.c (device and control), nvme_queue.c (rings and doorbells),
 * nvme_command.c (from requests to commands), nvme_prp.c (where their data lies), nvme_recover.c (timeouts, resets).
 *
 * What the controller writes is hostile: each completion is read once and checked in nvme_queue.c. A request is
 * finished only when its commands are completed, or after the controller was disabled: until then the device may
 * write to its memory. */
#ifndef BT_NVME_QUEUE_H
#define BT_NVME_QUEUE_H

#include "nvme_dma.h"

#define NVME_PAGE 4096u /* CC.MPS is 0 */
#define NVME_SLOT_MAPPINGS 4
#define NVME_MAX_RETRIES 5 /* of a command that failed for a time */
#define NVME_MAX_ABORTS 1  /* times that it is tried again after an abort */
#define NVME_MAX_RESETS 2  /* that it outlives */
#define NVME_NO_PAGE UINT16_MAX

/* ---- the wire: figures 104 and 121 ---- */

struct nvme_sqe {
    uint8_t opcode, flags;
    uint16_t cid;
    uint32_t nsid;
    uint64_t reserved, metadata;
    uint64_t prp1, prp2;
    uint32_t cdw10, cdw11, cdw12, cdw13, cdw14, cdw15;
};
_Static_assert(sizeof(struct nvme_sqe) == 64, "as on the wire");

struct nvme_cqe {
    uint32_t result, reserved;
    uint32_t queue;  /* SQ head, SQ identifier */
    uint32_t status; /* command identifier, phase tag, status field */
};
_Static_assert(sizeof(struct nvme_cqe) == 16, "as on the wire");

enum nvme_opcode { /* section 6 */
    NVME_FLUSH = 0x00,
    NVME_WRITE = 0x01,
    NVME_READ = 0x02,
    NVME_WRITE_ZEROES = 0x08,
    NVME_DATASET = 0x09,
};
#define NVME_CDW12_FUA (1u << 30)
#define NVME_CDW12_DEAC (1u << 25)
#define NVME_DSM_DEALLOCATE 4u
#define NVME_MAX_BLOCKS 65536u /* of one command: 16 bits, from 0 */

struct nvme_range { /* figure 372 */
    uint32_t attributes, blocks;
    uint64_t start;
};
#define NVME_MAX_RANGES 256u

/* Status field without the phase: section 4.6.1 */
#define NVME_STATUS_CODE 0x7FFu /* type and code */
#define NVME_STATUS_DNR 0x4000u
enum nvme_status {
    NVME_INVALID_OPCODE = 0x001,
    NVME_ABORTED = 0x007,
};

/* ---- a command in flight ---- */

enum nvme_slot_state { NVME_SLOT_FREE, NVME_SLOT_SENT, NVME_SLOT_RETRY };

struct nvme_slot {
    struct nvme_slot *next, **pprev; /* of the queue's list of busy ones, oldest first; or free ones */
    struct bt_io *io;
    struct nvme_sqe sqe;
    uint64_t sent_ns; /* RETRY: when it is sent again */
    uint64_t offset;  /* of its part in the io */
    uint32_t length;
    uint16_t index;
    uint16_t generation; /* in the command identifier, above the index: finds late duplicates */
    uint8_t state;
    uint8_t reported; /* how far its lateness was told: 1 timeout, 2 stuck */
    uint8_t retries, aborts, resets;
    bool bounced;
    uint8_t mapping_count;
    struct dma_mapping *mappings[NVME_SLOT_MAPPINGS];
    uint16_t pages; /* bounce pages, in order; then those of the PRP list */
    uint16_t lists;
};

/* ---- a request's state, in io->scratch; while it waits io->bounce is the next one ---- */

struct nvme_queue;
struct nvme_io {
    uint64_t pos;  /* issued so far */
    uint64_t end;  /* length, without what is past the end of the namespace */
    struct nvme_queue *queue;
    uint16_t pending; /* commands in flight */
    int16_t error;
    uint8_t stage; /* nvme_stage */
    bool as_data;  /* zeroes that are written */
    bool again;    /* to be done again as data */
    bool waiting;  /* in the queue's list */
};
enum nvme_stage { NVME_BODY, NVME_BEFORE_FLUSH, NVME_FLUSHING };
static inline struct nvme_io *nvme_io(struct bt_io *io)
{
    _Static_assert(sizeof(struct nvme_io) <= sizeof io->scratch, "the state lies in scratch");
    return (struct nvme_io *)io->scratch;
}

/* ---- queues ---- */

struct nvme_queue {
    struct nvme *nvme;
    struct bt_thread *thread;
    uint16_t id, depth;
    bool attached;  /* to its thread */
    bool running;   /* else requests wait */
    bool broken;    /* the controller broke the protocol in it */
    int dead;       /* negative: requests fail with it */
    /* the rings */
    struct nvme_sqe *sq;
    struct nvme_cqe *cq;
    uint32_t *sq_doorbell, *cq_doorbell;
    uint16_t sq_tail, sq_told; /* told: as the controller knows it */
    uint16_t cq_head, cq_told;
    uint8_t phase;
    /* commands */
    struct nvme_slot *slots; /* depth - 1 of them, so that the rings never overflow */
    struct nvme_slot *free_slots;
    struct nvme_slot *busy, **busy_tail;
    uint16_t index_bits;
    uint32_t in_flight;
    struct bt_io *waiting, **waiting_tail;
    /* pages: for bounces and PRP lists; the first one is all zeros */
    unsigned char *pages;
    uint64_t pages_iova;
    uint16_t *page_next;
    uint16_t free_pages, page_count;
    uint64_t now_ns; /* of this turn; 0: not looked at yet */
    struct bt_poller poller;
    struct bt_watch watch;
    struct bt_timer timer;
    bool timer_armed;
    uint64_t error_told_ns;
    bool stuck_told;
    struct bt_deferred deferred;
    struct bt_message start, quiesce, resume, stop;
    struct bt_nvme_counters counters;
    char pad[64]; /* the next one is another thread's */
};

struct nvme {
    struct bt_device device;
    uint64_t session;
    bt_dma *dma;
    struct bt_nvme_options options;
    unsigned block_bits;
    uint32_t max_transfer;
    _Atomic bool no_zeroes, no_discard; /* the controller does not know them, whatever it said */
    int queue_count;
    struct nvme_queue *by_thread[BT_MAX_THREADS];
    _Atomic int waiting_for; /* queues that have yet to quiesce or stop */
    uint64_t cookie;
    int resume_error;
    struct nvme_queue queues[];
};

static inline uint64_t nvme_now(struct nvme_queue *queue)
{
    if (!queue->now_ns) {
        queue->now_ns = bt_now_ns();
        bt_defer(queue->thread, &queue->deferred); /* which forgets it */
    }
    return queue->now_ns;
}

/* nvme_queue.c */
int nvme_queue_init(struct nvme_queue *queue, struct nvme *nvme, const struct bt_nvme_queue *place);
void nvme_queue_free(struct nvme_queue *queue);
void nvme_queue_clear(struct nvme_queue *queue); /* as after the controller's creation of it */
/* NULL when all are in use. */
struct nvme_slot *nvme_slot_get(struct nvme_queue *queue);
/* Gives back its pages, mappings and the slot itself. */
void nvme_slot_put(struct nvme_queue *queue, struct nvme_slot *slot);
void nvme_slot_release_data(struct nvme_queue *queue, struct nvme_slot *slot);
/* Puts slot->sqe, with a new command identifier, into the ring. */
void nvme_send(struct nvme_queue *queue, struct nvme_slot *slot);
/* Takes what has completed. True when there was anything. */
bool nvme_reap(struct nvme_queue *queue);
void nvme_enter_busy(struct nvme_queue *queue, struct nvme_slot *slot);
void nvme_leave_busy(struct nvme_queue *queue, struct nvme_slot *slot);
/* An event of bt_nvme_trouble. */
void nvme_tell(struct nvme_queue *queue, enum bt_nvme_trouble what, uint16_t detail);

/* nvme_command.c */
void nvme_submit(struct bt_io *io);
/* Issues what waits, as far as there is room. */
void nvme_pump(struct nvme_queue *queue);
/* The controller has answered (status 0: success). */
void nvme_completed(struct nvme_queue *queue, struct nvme_slot *slot, uint16_t status);
/* The command will not be answered any more: its io fails. */
void nvme_give_up(struct nvme_queue *queue, struct nvme_slot *slot, int error);
void nvme_fail_waiting(struct nvme_queue *queue, int error);
/* The request's end, on whichever thread of it. */
void nvme_io_finish(struct nvme_queue *queue, struct bt_io *io, int result);
int nvme_error_of(uint16_t status);

/* nvme_prp.c: fill the data pointer of slot->sqe. */

/* Data of the io from slot->offset on, max bytes at most: returns the bytes that the command has, which are direct
 * or bounced; or 0 when pages are short: wait. */
uint32_t nvme_map_data(struct nvme_queue *queue, struct nvme_slot *slot, uint64_t max);
/* The same with zeros. */
uint32_t nvme_map_zeros(struct nvme_queue *queue, struct nvme_slot *slot, uint64_t max);
/* One page; NULL when there is none. */
void *nvme_map_page(struct nvme_queue *queue, struct nvme_slot *slot);
/* Data that was read into bounce pages goes where it belongs. */
void nvme_unbounce(struct nvme_queue *queue, struct nvme_slot *slot);

/* nvme_recover.c */
void nvme_timer_arm(struct nvme_queue *queue, uint64_t at_ns);
void nvme_timer_passed(struct bt_timer *timer, struct bt_thread *thread);
void nvme_retry(struct nvme_queue *queue, struct nvme_slot *slot);
void nvme_quiesce_message(struct bt_message *message, struct bt_thread *thread);
void nvme_resume_message(struct bt_message *message, struct bt_thread *thread);

#endif
