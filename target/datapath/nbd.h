/* SPDX-License-Identifier: Apache-2.0 */
/* Inside of the NBD transmission phase: one session is one connection after its handshake, owned by one I/O
 * thread, or by none while it is paused. The names on the wire are those of the NBD protocol document (doc/proto.md).
 *
 *   nbd_session.c   life of a session: start, stop, socket watch, end
 *   nbd_receive.c   bytes from the socket -> requests, with checks of everything the client says
 *   nbd_request.c   requests -> the gate, in pieces; what happens when a piece is done
 *   nbd_reply.c     replies -> the socket
 *   nbd_pool.c      buffers of a session
 *
 * The negotiation is not here: Python does it and hands over the socket.
 */
#ifndef BT_NBD_H
#define BT_NBD_H

#include "core.h"
#include "nbd_wire.h"

/* ---- bounds ---- */

#define NBD_MAX_PAYLOAD (32u << 20) /* announced; as QEMU's */
#define NBD_MAX_DRAIN (64u << 20)   /* a refused WRITE longer than this ends the session */
#ifndef NBD_PIECE /* fuzzing makes it smaller */
#define NBD_PIECE (512u << 10)      /* larger reads and writes are done in pieces of this size */
#endif
#define NBD_SLOTS 128               /* requests and pieces in flight on one connection */
#define NBD_RX_BYTES (64u << 10)
#define NBD_FLUSH_BYTES (384u << 10)     /* replies are sent when so much is queued, */
#define NBD_FLUSH_REPLIES 16             /* or so many, */
#define NBD_FLUSH_WRITTEN (640u << 10)   /* or for writes of so much */
#define NBD_LARGE_WRITE (16u << 10)      /* payloads from here on are not received in bulk */
#define NBD_SESSION_MEMORY (16u << 20)   /* buffers of one session */
#define NBD_SESSION_MEMORY_LOW (2u << 20) /* the same while the server is over its bound */
#define NBD_CHUNKS 8                     /* chunks in the reply to one piece */
#define NBD_STATUS_EXTENTS 2048
#define NBD_POLLED 4        /* sessions of one thread that are polled at once */
#define NBD_EMPTY_POLLS 2000 /* polls without a request after which a session is only watched */
#define NBD_LINGER_NS 3000000000ull /* a closing session whose client takes nothing for so long is cut */
#define NBD_IDLE_NS 1000000000ull   /* buffers of a session that did nothing for so long are freed */

/* ---- buffers (nbd_pool.c) ---- */

#define NBD_CLASSES 8 /* 4 KiB << class, up to NBD_PIECE */

struct nbd_slab {
    struct nbd_slab *next;
    void *memory;
    size_t bytes;
};

struct nbd_pool {
    struct bt_nbd_server *server;
    void *free[NBD_CLASSES];
    struct nbd_slab *slabs; /* that the small classes are carved from */
    uint64_t bytes;         /* mapped: in use and free */
    unsigned in_use;
};

/* A buffer of at least length bytes, 1..NBD_PIECE, aligned to 4 KiB; NULL when the bounds say wait. When NULL
 * and nothing of the pool is in use, the system has no memory. */
void *nbd_pool_get(struct nbd_pool *pool, uint32_t length);
void nbd_pool_put(struct nbd_pool *pool, void *buffer, uint32_t length);
/* Gives back what is not in use. */
void nbd_pool_trim(struct nbd_pool *pool);

/* ---- requests ---- */

/* One part of a reply: a header in `head`, then a part of the buffer. */
struct nbd_chunk {
    uint32_t data_at;
    uint32_t data_length;
    uint16_t head_at;
    uint16_t head_length;
};

/* A request of the client, or a piece of one. A request of up to NBD_PIECE bytes is its own only piece. */
struct nbd_slot {
    struct bt_request core;
    struct bt_nbd_session *session;
    struct nbd_slot *next; /* free, or queued for sending */
    struct nbd_slot *call; /* the request that this is a piece of; itself when it is whole */
    struct iovec iov;
    void *buffer;
    uint32_t buffer_length;
    uint64_t cookie;
    uint64_t offset; /* of the whole request */
    uint32_t length;
    uint16_t type;
    uint16_t flags;
    /* of a request in pieces */
    uint32_t assigned;  /* bytes given to pieces */
    uint32_t pieces;    /* not done yet */
    uint32_t error;     /* first NBD error */
    const char *reason; /* of an error that the session itself found */
    /* reply */
    uint32_t reply_bytes;
    uint16_t chunk_count;
    uint16_t head_used;
    bool last; /* the reply of an ordered request is complete with this one */
    struct nbd_chunk chunks[NBD_CHUNKS];
    uint8_t head[NBD_CHUNKS * 32];
};

struct nbd_queue {
    struct nbd_slot *head, **tail;
};

enum nbd_rx_state {
    NBD_RX_HEADER,  /* wants a request header */
    NBD_RX_START,   /* has a request (`call`) that waits for a buffer or a slot */
    NBD_RX_PAYLOAD, /* receives into `piece` */
    NBD_RX_DRAIN,   /* drops the payload of a refused WRITE */
    NBD_RX_CLOSED,  /* takes nothing any more */
};

struct bt_nbd_server {
    bt_datapath *dp;
    uint64_t memory;           /* bound on the buffers of all sessions */
    _Atomic uint64_t in_use;   /* mapped by all pools */
    _Atomic unsigned refs;     /* Python's, and one for each session */
};

struct bt_nbd_session {
    struct bt_thread *thread;
    struct bt_nbd_server *server;
    struct bt_object *gate;
    uint64_t tag;
    _Atomic uint64_t size; /* as announced; changes when the node's does */
    uint32_t mode;
    uint32_t allocation_id;
    uint16_t transmission_flags;
    void *memory; /* mapped: it goes back to the system when the session ends, and costs nothing until it is used */

    struct bt_watch watch;
    bool watched;
    struct bt_poller poller; /* looks at the socket while the session is busy */
    bool polled;
    unsigned empty_polls;
    uint32_t watching; /* the events asked for */
    struct bt_deferred deferred;
    struct bt_message start, pause, unpause, resume, shut_message, stop, cut, release;
    bool shut_posted, stop_posted, cut_posted; /* the control thread's */
    uint64_t pause_cookie, unpause_cookie;
    struct bt_timer idle_timer, linger_timer;
    bool idle_armed, linger_armed;
    uint64_t idle_mark, linger_mark; /* requests and bytes sent when they were armed */

    /* receiving */
    enum nbd_rx_state state;
    uint8_t *rx; /* NBD_RX_BYTES, at the end of `memory` */
    uint32_t rx_head, rx_tail;
    uint32_t rx_want; /* how much to receive in bulk */
    bool rx_stalled;  /* does not go on until a slot or a buffer is free... */
    bool relieved;    /* ...and one was freed since */
    struct nbd_slot *call, *piece;
    uint32_t piece_got;
    uint32_t drain_left;

    /* requests */
    struct nbd_slot *slots; /* NBD_SLOTS of them, at the start of `memory` */
    struct nbd_slot *free_slots;
    unsigned made_slots; /* those above were never used */
    unsigned used_slots;
    unsigned active; /* requests inside the gate */
    struct nbd_pool pool;

    /* sending */
    struct nbd_queue tx, held;
    uint32_t tx_sent; /* bytes of tx.head that are sent */
    uint64_t tx_bytes;
    uint32_t tx_replies; /* queued since the last send... */
    uint64_t tx_written; /* ...and how much those of WRITEs wrote */
    bool tx_full;           /* the socket takes no more now */
    struct nbd_slot *owner; /* an ordered request that the reply stream belongs to */

    bool pausing; /* starts no request; paused when none is under way, and then no thread looks at it */
    bool paused;
    bool shut;    /* answers ESHUTDOWN; ends where the client waits for nothing */
    _Atomic bool hurried; /* the target waits for it: see bt_hurry */
    bool closing; /* nothing more is read; ends when all is answered and sent */
    bool broken;  /* replies cannot be sent any more */
    bool ended;
    int64_t end_result;
    struct bt_nbd_counters counters; /* written by the thread alone */
};

/* nbd_session.c */
/* No more requests; the session ends when those under way are answered. result: for the END event. */
void nbd_close(struct bt_nbd_session *session, int64_t result);
/* As nbd_close, and no more replies. */
void nbd_break(struct bt_nbd_session *session, int64_t result);

/* nbd_slots.c */
struct nbd_slot *nbd_slot_get(struct bt_nbd_session *session);
void nbd_slot_put(struct bt_nbd_session *session, struct nbd_slot *slot);
/* session->memory and what is in it. False: there is none. */
bool nbd_memory_init(struct bt_nbd_session *session);
void nbd_memory_free(struct bt_nbd_session *session);

/* nbd_receive.c */
/* Takes what the socket has, within a turn's fair share. */
void nbd_receive(struct bt_nbd_session *session);
/* Goes on with what was received, until it is used up or the session stalls. */
void nbd_parse(struct bt_nbd_session *session);

/* nbd_request.c */
/* Starts the request of which slot has cookie, offset, length, type and flags. The state says what follows. */
void nbd_begin(struct bt_nbd_session *session, struct nbd_slot *slot);
/* Goes on with session->call (state START). False when it has to wait. */
bool nbd_continue(struct bt_nbd_session *session);
/* The payload of session->piece is complete. */
void nbd_payload_done(struct bt_nbd_session *session);
/* The call cannot go on: answers it with an error. */
void nbd_fail(struct bt_nbd_session *session, struct nbd_slot *call, uint32_t error, const char *reason);

/* nbd_reply.c */
void nbd_reply_status(struct bt_nbd_session *session, struct nbd_slot *slot, uint32_t error, const char *reason);
void nbd_reply_read(struct bt_nbd_session *session, struct nbd_slot *piece, bool done);
void nbd_reply_ordered(struct bt_nbd_session *session, struct nbd_slot *piece, bool first, bool last);
void nbd_reply_extents(struct bt_nbd_session *session, struct nbd_slot *slot);
/* Sends what is queued, as far as the socket takes it. */
void nbd_send(struct bt_nbd_session *session);
/* Drops all replies. */
void nbd_discard_replies(struct bt_nbd_session *session);
uint32_t nbd_error_from_errno(int error, bool fast_zero);

#endif
