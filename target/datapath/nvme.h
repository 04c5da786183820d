/* SPDX-License-Identifier: Apache-2.0 */
/* The NVMe device as Python sees it. Python sets the controller up and creates the I/O queue pairs by admin
 * commands; the queues run on I/O threads. Sections named in nvme*.c are those of the NVM Express base
 * specification 1.4, unless they say otherwise. */
#ifndef BT_NVME_H
#define BT_NVME_H

#include "datapath.h"

/* cffi: begin (plain declarations only from here to "cffi: end") */

/* ---- DMA ----
 * What one IOMMU domain (a VFIO container) maps. It maps the memory that exports share (see memory.h) in pieces,
 * on worker threads, within limits, and evicts what was not used for long. */

typedef struct bt_dma bt_dma;

/* Called on worker threads and by bt_dma_map; may block. 0 or a negative errno. length and address are multiples of
 * 4096. */
struct bt_dma_ops {
    int (*map)(void *opaque, void *address, uint64_t length, uint64_t *iova);
    int (*unmap)(void *opaque, uint64_t iova, uint64_t length);
    void (*close)(void *opaque); /* at the end; may be NULL */
};

struct bt_dma_limits {
    uint64_t bytes;    /* of shared memory mapped at a time; 0: none is, all goes through bounce pages */
    uint32_t mappings; /* at a time; not counted: those of bt_dma_map */
    uint32_t piece;    /* bytes mapped at once, at most: a power of two from 4096 */
    uint64_t idle_ns;  /* what was used since then is not evicted */
};

/* Addresses that the device may use, both ends included. */
struct bt_iova_range {
    uint64_t first, last;
};

struct bt_dma_counters {
    uint64_t mapped_bytes; /* of shared memory, now */
    uint64_t mappings;     /* the same, as a number */
    uint64_t maps;         /* done */
    uint64_t unmaps;
    uint64_t evictions;
    uint64_t failures;   /* the kernel refused; last_error says why */
    uint64_t last_error; /* errno */
};

/* NULL and errno. */
bt_dma *bt_dma_new(bt_datapath *dp, const struct bt_dma_ops *ops, void *opaque, const struct bt_dma_limits *limits);
/* For a VFIO container of type 1; takes its own duplicate of the descriptor. ranges: sorted, up to 64. */
bt_dma *bt_dma_vfio_new(bt_datapath *dp, int container, const struct bt_iova_range *ranges, int count,
                        const struct bt_dma_limits *limits);
/* Maps memory for good (queues, admin buffers). BLOCKS, for long under an emulated IOMMU; from any thread.
 * address and length: multiples of 4096. */
int bt_dma_map(bt_dma *dma, void *address, uint64_t length, uint64_t *iova);
int bt_dma_unmap(bt_dma *dma, uint64_t iova, uint64_t length);
void bt_dma_get_counters(bt_dma *dma, struct bt_dma_counters *out);
/* After the release of every device that uses it. Unmaps all shared memory and closes the descriptor; DONE when
 * that is done. What bt_dma_map mapped stays as long as the container does. */
void bt_dma_free(bt_dma *dma, uint64_t cookie);

/* ---- the device ---- */

enum bt_nvme_limits {
    BT_NVME_MAX_QUEUES = 16,
    BT_NVME_MIN_DEPTH = 2,
    BT_NVME_MAX_DEPTH = 1024,
    BT_NVME_MIN_PAGES = 36,
    BT_NVME_MAX_PAGES = 8192,
    BT_NVME_MAX_TRANSFER = 4194304, /* commands are not larger, whatever MDTS says */
    BT_NVME_BOUNCE = 131072,        /* bounced ones are not larger than that */
};

enum bt_nvme_flags {
    BT_NVME_VOLATILE_CACHE = 1, /* VWC: without it FLUSH has nothing to do */
    BT_NVME_WRITE_ZEROES = 2,   /* ONCS bit 3; without it zeroes are written as data */
    BT_NVME_DEALLOCATE = 4,     /* DLFEAT bit 3: Write Zeroes may deallocate */
    BT_NVME_DISCARD = 8,        /* ONCS bit 2: Dataset Management */
    BT_NVME_NO_FUA = 16,        /* flush after a write instead of its FUA bit */
    BT_NVME_NO_FLUSH = 32,      /* cache.no-flush: FLUSH and FUA are not passed on */
};

struct bt_nvme_options {
    uint32_t nsid;
    uint32_t block_size; /* 512 or 4096, or any power of two up to 65536 */
    uint64_t size;       /* bytes */
    uint64_t max_transfer; /* MDTS in bytes; 0: no limit */
    uint64_t zeroes_bytes; /* of one Write Zeroes (WZSL); 0: no limit */
    uint32_t flags;        /* bt_nvme_flags */
    uint32_t discard_ranges;      /* of one Dataset Management (DMRL); 0: 256 */
    uint64_t discard_range_bytes; /* of one range (DMRSL); 0: no limit */
    uint64_t discard_bytes;       /* of all of them (DMSL); 0: no limit */
    uint64_t timeout_ns; /* a command that takes longer is reported */
    void *registers;     /* BAR 0 */
    uint64_t registers_length;
    uint32_t stride; /* bytes from one doorbell to the next: 4 << CAP.DSTRD */
    uint32_t pad;
};

/* One queue pair, which the controller has, with both queues of this depth and this id. The pair's memory is one
 * mapping: see bt_nvme_layout. */
struct bt_nvme_queue {
    uint32_t id;    /* 1 ... */
    uint32_t depth; /* entries of each; BT_NVME_MIN_DEPTH .. BT_NVME_MAX_DEPTH */
    uint32_t pages; /* for PRP lists and bounces: as given to bt_nvme_layout */
    int thread;     /* index of the I/O thread that it belongs to; one pair each */
    int interrupt;  /* an eventfd; a duplicate is taken */
    uint32_t pad;
    void *memory; /* host address, page aligned, zeroed */
    uint64_t iova;
};

struct bt_nvme_layout {
    uint64_t bytes;      /* of a pair's memory */
    uint64_t submission; /* offset of the submission queue: page aligned */
    uint64_t completion;
    uint64_t pages;
};
/* How the memory of a queue pair is divided. pages: from BT_NVME_MIN_PAGES (one bounced command with its list) to
 * BT_NVME_MAX_PAGES; each bounced 4 KiB takes one, and each command that spans more than two pages. -EINVAL. */
int bt_nvme_queue_layout(uint32_t depth, uint32_t pages, struct bt_nvme_layout *out);

/* Low byte of the result of the device's BT_EVENT_SESSION; bits 8-23: the queue's id. */
enum bt_nvme_trouble {
    BT_NVME_TIMEOUT = 1,  /* bits 24-39: id of a command older than the timeout, to be aborted */
    BT_NVME_STUCK = 2,    /* a timeout later it is still there: the controller is to be reset */
    BT_NVME_PROTOCOL = 3, /* bits 24-39: bt_nvme_breach. The queue stands still until the controller was reset */
    BT_NVME_ERROR = 4,    /* bits 24-39: status of a command that failed, as last_status; one a second of a queue */
};

enum bt_nvme_breach {
    BT_NVME_BAD_COMMAND = 1, /* a completion of a command that is not in flight, or for the second time */
    BT_NVME_BAD_QUEUE = 2,   /* a completion that names another submission queue */
    BT_NVME_BAD_HEAD = 3,    /* a submission queue head outside of the queue */
};

/* session: tag of its session events. dma: for the buffers of requests, may be NULL (all are bounced). The device
 * must be wrapped by an alignment object of its block size. NULL and errno. */
bt_object *bt_nvme_new(bt_datapath *dp, uint64_t tag, uint64_t session, bt_dma *dma,
                       const struct bt_nvme_options *options, const struct bt_nvme_queue *queues, int count);
/* No queue touches its memory or doorbells from DONE on; requests wait. Then the controller is reset (it must be
 * disabled: CSTS.RDY clear, before bt_nvme_resume), and gets the same queue pairs with the same memory again. */
void bt_nvme_quiesce(bt_object *nvme, uint64_t cookie);
/* After the DONE of quiesce. error 0: what was in flight is submitted again, but for what has met too many resets
 * or was in flight in a queue that broke the protocol, which fails with EIO. error negative: everything fails with
 * it, now and from now on, until the next resume. */
void bt_nvme_resume(bt_object *nvme, int error);
/* Before the last reference goes, when no request is in flight: the queues leave their threads. DONE. Later
 * requests fail with ESHUTDOWN. */
void bt_nvme_stop(bt_object *nvme, uint64_t cookie);

struct bt_nvme_counters {
    uint64_t aligned;   /* reads and writes (as commands) whose buffers the device used as they are */
    uint64_t unaligned; /* those that were bounced */
    uint64_t direct_bytes;
    uint64_t bounced_bytes;
    uint64_t completion_errors; /* completions with another status than success */
    uint64_t last_status;       /* of the last of them: status code type << 8 | status code */
    uint64_t commands;          /* submitted, again or not */
    uint64_t completions;
    uint64_t retries;    /* submitted again after an error that the controller called temporary */
    uint64_t timeouts;   /* commands reported */
    uint64_t aborted;    /* completed as aborted */
    uint64_t resets;     /* quiesced and resumed, for each queue */
    uint64_t resubmitted; /* after a reset */
    uint64_t breaches;    /* of the protocol */
    uint64_t doorbells;   /* written */
    uint64_t interrupts;
    uint64_t waits;           /* times that a request waited for room in the queue, or for pages */
    uint64_t handed_over;     /* requests of threads without a queue */
};
void bt_nvme_get_counters(bt_object *nvme, struct bt_nvme_counters *out);

/* cffi: end */

#endif
