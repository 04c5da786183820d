/* SPDX-License-Identifier: Apache-2.0 */
/* Between the parts of the vhost-user-blk export: guest memory, split rings, requests, sessions.
 *
 * All that lies in guest memory is hostile and changes while it is read: each value is read once into a
 * local, then checked. Sections named below are those of the virtio specification, version 1.2. */
#ifndef BT_VHOST_H
#define BT_VHOST_H

#include "core.h"

/* ---- guest memory (vhost_memory.c) ---- */

struct vhost_region {
    uint64_t guest, size, user;
    unsigned char *host; /* where guest is mapped */
    void *map;           /* the mapping, aligned down and up */
    size_t map_length;
    int slot; /* in the registry of the SIGBUS handler */
};

/* Changed by the control thread, only while no queue runs. */
struct vhost_memory {
    bt_datapath *dp; /* devices may map the regions; NULL: none does */
    struct vhost_region regions[BT_VHOST_MAX_REGIONS]; /* by guest address */
    uint32_t count;
    _Atomic bool broken; /* a page went away (SIGBUS); what it held reads as zeros now */
};

int vhost_memory_add(struct vhost_memory *memory, const struct bt_vhost_region *region, int fd);
int vhost_memory_remove(struct vhost_memory *memory, const struct bt_vhost_region *region);
void vhost_memory_clear(struct vhost_memory *memory);
/* Host address of [user, user + length), which lies in one region; NULL when it does not. */
void *vhost_memory_at_user(const struct vhost_memory *memory, uint64_t user, uint64_t length);
/* Host memory of [guest, guest + length), over neighbouring regions too. Returns the entries used of out, or
 * -EFAULT, or -E2BIG when max is too small. */
int vhost_memory_iov(const struct vhost_memory *memory, uint64_t guest, uint64_t length, struct iovec *out, int max);

/* ---- split rings (vhost_ring.c), section 2.7 ---- */

struct vhost_desc {
    uint64_t addr;
    uint32_t len;
    uint16_t flags;
    uint16_t next;
};

struct vhost_ring {
    const struct vhost_desc *desc;
    uint16_t *avail; /* flags, idx, ring[size], used_event */
    uint16_t *used;  /* flags, idx, size times (id, len), avail_event */
    uint16_t size;
    uint16_t last_avail; /* the next one to take */
    uint16_t used_next;  /* the next one to fill */
    uint16_t published;  /* used idx as the driver sees it */
    bool event_idx;
    bool indirect;
    struct vhost_desc *scratch; /* BT_VHOST_MAX_CHAIN of them, for tables that span regions */
};

/* Where the front end says that a queue lies: user addresses, as SET_VRING_ADDR gives them. */
struct vhost_ring_place {
    uint64_t desc, avail, used;
};

/* A request's buffers: the readable ones first, then the writable ones. */
struct vhost_chain {
    struct iovec *iov;
    int max;
    int readable, writable; /* entries */
    uint64_t readable_bytes, writable_bytes;
};

/* 0, -EFAULT when a part lies outside of memory, -EINVAL when one is not aligned. Takes up at last_avail. */
int vhost_ring_attach(struct vhost_ring *ring, const struct vhost_memory *memory,
                      const struct vhost_ring_place *place, uint16_t size, uint16_t last_avail);
/* How many chains wait, or -EPROTO when the driver's index makes no sense. */
int vhost_ring_available(const struct vhost_ring *ring);
/* Takes the next head; -EPROTO when it is no index into the table. Call at most vhost_ring_available times. */
int vhost_ring_take(struct vhost_ring *ring);
/* Fills chain from the descriptors at head. 0, -EPROTO, -EFAULT, or -E2BIG when chain->max is too small. */
int vhost_ring_chain(const struct vhost_ring *ring, const struct vhost_memory *memory, uint16_t head,
                     struct vhost_chain *chain);
/* Fills a used element; the driver sees it after vhost_ring_publish. */
void vhost_ring_push(struct vhost_ring *ring, uint16_t head, uint32_t written);
/* Shows the filled elements. True when the driver wants to be notified. */
bool vhost_ring_publish(struct vhost_ring *ring);
/* Asks for kicks. True when something came meanwhile. */
bool vhost_ring_arm(struct vhost_ring *ring);
void vhost_ring_disarm(struct vhost_ring *ring);

/* ---- queues: requests of one ring on one I/O thread (vhost_blk.c) ---- */

/* Gets a thread out of a system call that a front end made block; its handler does nothing. */
#define VHOST_INTERRUPT SIGURG
/* Entries of the I/O vector that each request has at hand; longer ones are allocated. */
#define VHOST_IOV (BT_VHOST_SEG_MAX + 18)

struct vhost_segment { /* struct virtio_blk_discard_write_zeroes, section 5.2.6 */
    uint64_t sector;
    uint32_t sectors;
    uint32_t flags;
};

struct vhost_request {
    struct bt_request base;
    struct vhost_request *next; /* in a batch */
    struct vhost_queue *queue;
    struct iovec *iov;           /* VHOST_IOV of them */
    struct iovec *iov_allocated; /* instead, for a longer chain */
    unsigned char *status;
    struct vhost_segment *segments; /* BT_VHOST_MAX_SEGMENTS of them */
    uint16_t head;
    uint16_t segment, segment_count;
    uint32_t type;
    uint32_t written; /* used length when it succeeds */
};

enum vhost_queue_state {
    VHOST_STOPPED = 0, /* the control thread owns the queue; else its I/O thread does */
    VHOST_RUNNING,
    VHOST_STOPPING,
};

struct vhost_queue {
    struct bt_vhost *session;
    uint32_t index;
    /* set by the control thread while it is stopped */
    uint16_t size;
    uint16_t base;
    struct vhost_ring_place place;
    bool placed;
    int kick_fd;
    int err_fd;
    _Atomic int call_fd;
    _Atomic bool hurried; /* it is to stop: see bt_hurry */
    bool running; /* the control thread's view: started and not yet seen to have stopped */
    struct bt_thread *thread;
    /* the I/O thread's */
    enum vhost_queue_state state;
    bool broken; /* no more requests are taken; those in flight end as usual */
    struct vhost_ring ring;
    struct vhost_request *requests;
    uint16_t *free; /* a stack of indices into requests */
    uint16_t free_count;
    struct iovec *iovs;
    struct vhost_segment *segments;
    uint32_t unpublished;
    uint64_t first_ns;       /* when the first of them was done */
    uint64_t notify_cost_ns; /* moving average */
    _Atomic uint64_t signalling_ns; /* since when it writes to a descriptor of the front end's; 0: it does not */
    _Atomic bool interrupted;       /* the control thread found that it took too long */
    bool mute;                      /* the call descriptor blocked: no more notifications */
    struct bt_poller poller;
    struct bt_watch watch;
    struct bt_timer timer; /* wakes the thread for a queue without a kick descriptor */
    bool timed;
    struct bt_deferred deferred;
    struct bt_message start, stop, unstop;
    uint64_t stop_cookie, unstop_cookie;
    struct bt_vhost_counters counters;
};

struct bt_vhost {
    bt_datapath *dp;
    uint64_t tag;
    struct bt_object *gate;
    struct vhost_memory memory;
    uint64_t features;
    uint32_t block_size;
    bool writable;
    _Atomic bool write_through;
    _Atomic uint64_t capacity; /* bytes */
    char serial[BT_VHOST_SERIAL];
    uint32_t queue_count;
    struct vhost_queue queues[];
};

int vhost_queue_alloc(struct vhost_queue *queue);
void vhost_queue_release(struct vhost_queue *queue);
/* Messages: to be posted to the queue's thread. */
void vhost_queue_run(struct bt_message *message, struct bt_thread *thread);
void vhost_queue_halt(struct bt_message *message, struct bt_thread *thread);
void vhost_queue_unhalt(struct bt_message *message, struct bt_thread *thread);
/* Takes no more requests, and tells the front end and Python why. */
void vhost_queue_break(struct vhost_queue *queue, enum bt_vhost_trouble why);
/* One request is finished; its status byte is written. */
void vhost_queue_complete(struct vhost_request *request, uint32_t written);
/* Checks the chain of a request that was taken and starts it, or completes it at once (vhost_blk.c). */
void vhost_request_start(struct vhost_request *request);
/* Fills request from the chain at head. Negative errno when the chain itself is no good. */
int vhost_request_parse(struct vhost_request *request, uint16_t head);

#endif
