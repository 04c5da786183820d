/* SPDX-License-Identifier: Apache-2.0 */
/* Inside of the NBD client. A connection belongs to one I/O thread at a time, with all that is queued or in flight on
 * it; requests of other threads come and go as messages.
 *
 *   nbdc_device.c      the device: which connection an io takes, start and end of ios, what Python calls
 *   nbdc_connection.c  life of a connection: attach, loss, waiting, move to another thread, stop
 *   nbdc_send.c        ios -> requests of the protocol -> the socket
 *   nbdc_receive.c     the socket -> replies, with checks of everything the server says
 *
 * An io is sent as one request or as several (slots). All of them go over one connection; when it is lost, the io
 * begins anew, on this connection or another one.
 */
#ifndef BT_NBDC_INTERNAL_H
#define BT_NBDC_INTERNAL_H

#include "core.h"
#include "nbd_wire.h"
#include "nbdc.h"

#define NBDC_SLOTS 128 /* requests in flight on one connection */
#define NBDC_RX_BYTES (256u << 10)
#define NBDC_SMALL 5120u        /* longest payload that is not data: an error's message has 4096 bytes at most */
#define NBDC_LARGE (16u << 10)  /* data from here on is not received in bulk */
#define NBDC_PIECES 4096u       /* pieces of a read's data that came out of order */
#define NBDC_EMPTY_POLLS 2000   /* polls without a reply after which the socket is only watched */
#define NBDC_MOVE_AFTER 64      /* ios of one other thread in a row that make a connection move there */
#define NBDC_LOOK_EVERY 16      /* ios beyond the bound until a thread looks again for a connection to adopt */
#define NBDC_IDLE_NS 20000000u  /* a connection without a request for so long may be adopted */

struct nbdc;
struct nbdc_conn;

/* What the client keeps in an io's scratch. */
struct nbdc_io {
    struct bt_io *next; /* in the connection's queue */
    uint64_t pos;       /* bytes given to requests */
    struct nbdc_conn *conn;
    int32_t result;
    uint16_t pending; /* requests in flight */
    uint8_t stage;    /* enum nbdc_stage */
    uint8_t queued;   /* it is in the connection's queue */
};
enum nbdc_stage {
    NBDC_PLAIN,
    NBDC_AS_DATA, /* ZEROES written as data: the server cannot do better */
    NBDC_FLUSH,   /* FUA where the server has none: the flush after the change */
};
static inline struct nbdc_io *nbdc_io(struct bt_io *io) { return (struct nbdc_io *)io->scratch; }
_Static_assert(sizeof(struct nbdc_io) <= sizeof((struct bt_io *)0)->scratch, "lies in scratch");

/* Parts of a read that came out of order, sorted, apart from each other; from the start of the request. */
struct nbdc_pieces {
    uint32_t count, capacity;
    struct nbdc_piece {
        uint32_t start, end;
    } *list;
};

enum nbdc_slot_state { NBDC_FREE, NBDC_UNSENT, NBDC_SENDING, NBDC_SENT };

/* One request of the protocol. */
struct nbdc_slot {
    struct nbdc_slot *next; /* free, or to be sent */
    struct bt_io *io;
    uint64_t cookie;
    uint64_t offset, length; /* on the wire */
    uint64_t at;             /* where its data is in the io */
    uint16_t type, flags;
    uint8_t state;
    bool zeros;    /* WRITE: of zeros, not of the io's data */
    bool gone;     /* READ: the io's memory was taken away; what comes for it is dropped */
    bool answered; /* the reply is complete... */
    bool chunked;  /* it has begun, with a chunk */
    bool status;   /* BLOCK_STATUS: has its extent */
    int error;     /* ...with this errno (negative), or 0 */
    uint32_t covered; /* READ: so much from the start has come */
    struct nbdc_pieces pieces;
    uint32_t head_length;
    uint8_t head[NBD_EXTENDED_BYTES];
};

struct nbdc_queue {
    struct bt_io *head, **tail;
};

enum nbdc_state {
    NBDC_DOWN,    /* no socket; what comes waits */
    NBDC_EXPIRED, /* no socket, and the time for waiting is over: what comes fails */
    NBDC_UP,
    NBDC_STOPPED, /* for good */
};

struct nbdc_conn {
    struct nbdc *client;
    uint32_t index;
    _Atomic(struct bt_thread *) thread; /* the owner; see nbdc_is_mine */
    bool present;                       /* the owner has taken it over */
    _Atomic int state;                  /* nbdc_state; written by the owner */
    _Atomic bool attached;              /* from attach to the event of its loss */
    struct bt_nbdc_link link;

    struct bt_watch watch;
    uint32_t watching;
    struct bt_poller poller;
    bool polled;
    unsigned empty_polls;
    struct bt_deferred deferred;
    struct bt_timer delay_timer; /* while DOWN, once something was lost */
    bool delay_armed;
    struct bt_message attach, stop, kick, cut, give_up, arrive, adopt;
    _Atomic bool kicked, outdated;
    int new_fd; /* for attach */
    struct bt_nbdc_link new_link;

    /* who uses it */
    struct bt_thread *foreign;
    unsigned foreign_run;
    _Atomic bool used;         /* its owner has sent ios over it */
    _Atomic bool wanted;       /* `adopt` is on its way; who has set it writes... */
    struct bt_thread *adopter; /* ...for whom */
    struct bt_thread *move_to; /* at the end of the turn; or NULL */

    /* sending */
    struct nbdc_queue waiting; /* ios that are not, or not wholly, made into requests */
    unsigned queued;           /* so many */
    struct nbdc_slot *slots;
    struct nbdc_slot *free_slots;
    unsigned in_flight; /* slots not free */
    uint64_t generation;
    struct nbdc_slot *tx_head, **tx_tail;
    uint64_t tx_sent; /* bytes of tx_head that are sent */
    bool tx_full;
    bool cautious; /* sends one vector at a time, to find whose memory was taken away */

    /* receiving */
    uint8_t *rx;
    uint32_t rx_head, rx_tail;
    uint32_t rx_want;          /* how much to receive in bulk */
    struct nbdc_slot *rx_slot; /* data goes to its io... */
    bool rx_done;              /* ...and ends its reply */
    uint64_t rx_at, rx_left;   /* where in the io, and how much is to come */

    struct bt_nbdc_counters counters; /* written by the owner alone */
};

struct nbdc {
    struct bt_device device;
    uint64_t session_tag;
    _Atomic uint64_t export_size;
    _Atomic uint64_t reconnect_ns;
    bool no_flush;
    _Atomic bool given_up;
    uint32_t count;
    uint32_t depth; /* requests on one connection, from which on a thread takes the next one */
    _Atomic int stopping; /* connections that have still to stop */
    uint64_t stop_cookie;
    struct nbdc_turn {
        uint32_t next;  /* of the others' connections, while it has none of its own */
        uint32_t tries; /* ios for which its own connections were not enough */
        uint64_t looked_ns;
        uint64_t seen[BT_NBDC_MAX_CONNECTIONS]; /* requests of each connection at that time */
        char pad[48];
    } turns[BT_MAX_THREADS]; /* of each thread */
    struct nbdc_conn conns[];
};

static inline uint64_t nbdc_reconnect_ns(const struct nbdc *client)
{
    return atomic_load_explicit(&client->reconnect_ns, memory_order_relaxed);
}

/* nbdc_device.c */
/* Ends an io, on whatever thread it came from. */
void nbdc_complete(struct bt_io *io, int result);
/* Hands an io to the connection it names, on the thread that owns it. */
void nbdc_pass(struct bt_io *io, struct nbdc_conn *conn);
/* A connection in that state, other than this one; NULL. */
struct nbdc_conn *nbdc_another(struct nbdc_conn *conn, enum nbdc_state state);

/* nbdc_connection.c */
bool nbdc_conn_init(struct nbdc_conn *conn, struct nbdc *client, uint32_t index, struct bt_thread *thread);
void nbdc_conn_destroy(struct nbdc_conn *conn);
/* Whether this thread owns the connection now. */
static inline bool nbdc_is_mine(struct nbdc_conn *conn, struct bt_thread *thread)
{
    return atomic_load_explicit(&conn->thread, memory_order_acquire) == thread && conn->present;
}
/* Queues an io of this connection's, or fails it when there is nothing to wait for. */
void nbdc_enqueue(struct nbdc_conn *conn, struct bt_io *io);
/* Asks the connection's owner to let this thread have it. False when another one asks just now. */
bool nbdc_adopt(struct nbdc_conn *conn, struct bt_thread *thread);
/* The connection is of no use any more. The socket is closed, ios go back into queues, or fail. */
void nbdc_lose(struct nbdc_conn *conn, int loss);

/* nbdc_send.c */
/* Makes requests of what waits, and sends what the socket takes. */
void nbdc_send(struct nbdc_conn *conn);
/* A request's reply is complete. */
void nbdc_answered(struct nbdc_conn *conn, struct nbdc_slot *slot);
void nbdc_slot_free(struct nbdc_conn *conn, struct nbdc_slot *slot);

/* nbdc_receive.c */
/* Takes what the socket has, within a turn's fair share. */
void nbdc_receive(struct nbdc_conn *conn);

#endif
