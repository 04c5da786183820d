/* SPDX-License-Identifier: Apache-2.0 */
/* The NBD client: a device whose requests go to a server over one connection or several.
 *
 * Python makes the connections and negotiates (also after a loss), and hands over sockets; a connection that is lost
 * is told by a SESSION event, once for each socket. See docs/drivers.md for what happens to requests meanwhile.
 */
#ifndef BT_NBDC_H
#define BT_NBDC_H

#include "datapath.h"

/* cffi: begin (plain declarations only from here to "cffi: end") */

enum bt_nbdc_bounds {
    BT_NBDC_MAX_CONNECTIONS = 16,
    BT_NBDC_MAX_PAYLOAD = 33554432, /* of one READ or WRITE, whatever the server would take */
};

enum bt_nbdc_mode { /* which replies were negotiated */
    BT_NBDC_SIMPLE = 0,
    BT_NBDC_STRUCTURED = 1,
    BT_NBDC_EXTENDED = 2, /* requests, too */
};

/* What one connection's negotiation has given. */
struct bt_nbdc_link {
    uint32_t mode;
    uint32_t transmission_flags;
    uint32_t max_payload; /* bytes of a READ or WRITE; a multiple of the block */
    uint32_t block;       /* requests are multiples of it: a power of two */
    int64_t context_id;   /* of the context that block status asks for; -1: there is none */
    bool depth;           /* that context is qemu:allocation-depth */
    bool outdates;        /* the export has changed: the other connections are cut, to be made again */
};

/* Why a connection was lost: result of the SESSION event is connection << 16 | this, or connection << 16 | 0x8000 |
 * errno. From BT_NBDC_PROTOCOL on the server broke the protocol. */
enum bt_nbdc_loss {
    BT_NBDC_EOF = 1,
    BT_NBDC_SHUTDOWN = 2, /* the server said that it is shutting down */
    BT_NBDC_OUTDATED = 3, /* another connection has shown that the export has changed */
    BT_NBDC_PROTOCOL = 16,
    BT_NBDC_BAD_MAGIC = 16,
    BT_NBDC_BAD_COOKIE = 17,   /* no request has it, or the request is not sent yet */
    BT_NBDC_BAD_SIMPLE = 18,   /* a simple reply where the protocol wants a structured one */
    BT_NBDC_BAD_TYPE = 19,     /* a chunk that does not belong to the request, or is not known */
    BT_NBDC_BAD_LENGTH = 20,   /* a chunk's length does not fit its type */
    BT_NBDC_BAD_RANGE = 21,    /* data, a hole or an error outside of the request, or content that comes twice */
    BT_NBDC_BAD_ERROR = 22,    /* an error chunk without an error, or with a message too long */
    BT_NBDC_BAD_STATUS = 23,   /* block status: wrong context, no extent, one of length 0, or several chunks */
    BT_NBDC_INCOMPLETE = 24,   /* a reply that is done does not hold all that was asked for */
    BT_NBDC_TOO_MANY = 25,     /* a read's data in too many pieces out of order */
    BT_NBDC_BAD_OFFSET = 26,   /* an extended reply with another offset than its request's */
};

/* size: the export's, in bytes; the object's own is rounded up to 512. depth: with so many requests on a connection, an
 * I/O thread takes the next one. reconnect_ns: how long requests wait for a lost
 * connection. session_tag: of the SESSION events. no_flush: FLUSH and FUA are not passed on. NULL and errno. */
bt_object *bt_nbdc_new(bt_datapath *dp, uint64_t tag, uint64_t session_tag, uint64_t size, uint32_t connections,
                       uint32_t depth, uint64_t reconnect_ns, bool no_flush);
/* Takes over fd (a connected stream socket, non-blocking), when it gives 0. -EBUSY while the connection has one. */
int bt_nbdc_attach(bt_object *client, uint32_t connection, int fd, const struct bt_nbdc_link *link);
/* The export's size, after a reconnect has shown a new one. */
void bt_nbdc_set_size(bt_object *client, uint64_t size);
/* From now on nothing waits for a lost connection: what does fails, and so does what is in flight at a loss. */
void bt_nbdc_give_up(bt_object *client);
/* Disconnects; what waits or comes later fails with EIO. DONE when all sockets are closed. */
void bt_nbdc_stop(bt_object *client, uint64_t cookie);

struct bt_nbdc_counters {
    uint64_t requests; /* sent */
    uint64_t errors;   /* replies with an error */
    uint64_t resent;   /* requests made again after a loss */
    uint64_t received; /* bytes */
    uint64_t sent;
    uint64_t receives; /* system calls */
    uint64_t sends;
    uint64_t losses;
};
void bt_nbdc_counters(bt_object *client, uint32_t connection, struct bt_nbdc_counters *out);

/* cffi: end */

#endif
