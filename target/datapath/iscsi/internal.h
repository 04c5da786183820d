/* SPDX-License-Identifier: Apache-2.0 */
/* Inside of the iSCSI device.
 *
 *   guard.c     between libiscsi and the target: checks what comes, and moves it; guard_out.c, guard_text.c
 *   output.c    what has left libiscsi
 *   digest.c    CRC32C
 *   link.c      connect, log in, inquire: everything that waits
 *   session.c   a connection in the hands of an I/O thread: life, socket, timers, loss
 *   command.c   SCSI commands: sent, retried, their status and sense
 *   device.c    requests of the datapath; their parts
 *   ops.c       parts as commands
 *   control.c   what Python asks for
 *
 * libiscsi reconnects by itself if it is let; it is not: it would resolve names on the I/O thread, resend for ever,
 * and come back as another initiator port. Here a connection that is lost is lost with its context.
 */
#ifndef BT_ISCSI_INTERNAL_H
#define BT_ISCSI_INTERNAL_H

#include <iscsi/iscsi.h>
#include <iscsi/scsi-lowlevel.h>

#include "device_api.h"
#include "initiator.h"

#define MS 1000000ull
#define SECOND (1000 * MS)
#define BT_ISCSI_MAX_VECTOR 1024 /* of readv and writev */

/* ---- big endian, as SCSI has it ---- */

static inline void put16(unsigned char *p, uint16_t n) { p[0] = (unsigned char)(n >> 8), p[1] = (unsigned char)n; }
static inline void put32(unsigned char *p, uint32_t n) { put16(p, (uint16_t)(n >> 16)), put16(p + 2, (uint16_t)n); }
static inline void put64(unsigned char *p, uint64_t n) { put32(p, (uint32_t)(n >> 32)), put32(p + 4, (uint32_t)n); }
static inline uint16_t get16(const unsigned char *p) { return (uint16_t)(p[0] << 8 | p[1]); }
static inline uint32_t get32(const unsigned char *p) { return (uint32_t)get16(p) << 16 | get16(p + 2); }
static inline uint64_t get64(const unsigned char *p) { return (uint64_t)get32(p) << 32 | get32(p + 4); }

/* SPC-4, SBC-3 */
enum scsi_code {
    INQUIRY = 0x12,
    MODE_SENSE_6 = 0x1a,
    READ_CAPACITY_10 = 0x25,
    READ_10 = 0x28,
    WRITE_10 = 0x2a,
    SYNCHRONIZE_CACHE_10 = 0x35,
    WRITE_SAME_10 = 0x41,
    UNMAP = 0x42,
    EXTENDED_COPY = 0x83,
    RECEIVE_COPY = 0x84,
    READ_16 = 0x88,
    WRITE_16 = 0x8a,
    SYNCHRONIZE_CACHE_16 = 0x91,
    WRITE_SAME_16 = 0x93,
    SERVICE_ACTION_IN_16 = 0x9e,
    SA_COPY_PARAMETERS = 0x03,
    SA_READ_CAPACITY_16 = 0x10,
    SA_GET_LBA_STATUS = 0x12,
};

#define ASCQ_BECOMING_READY 0x0401
#define ASCQ_SPACE_ALLOCATION_FAILED 0x2707
#define ASCQ_REPORTED_LUNS_CHANGED 0x3f0e

/* ---- guards: see guard.c ---- */

#define BHS 48 /* bytes of a basic header segment */

struct guard;
struct session;
struct command;

/* What libiscsi writes to a target: see output.c. */
struct output {
    uint32_t have, left; /* bytes of the header that are here; bytes of the data that are not */
    uint32_t cmd_sn;     /* of the last command */
    unsigned char header[BHS + 4]; /* and its digest */
};

/* The next bytes. header_bytes: of each PDU. */
void output_passes(struct output *output, struct session *session, uint32_t header_bytes, const unsigned char *bytes,
                   uint32_t length);
/* Whether a command has been among them, with the data that went with it. */
bool output_has(const struct output *output, const struct command *command);

/* What is offered: enum iscsi_header_digest, for data too. NULL without memory. */
struct guard *guard_new(int header_digest, int data_digest);
void guard_free(struct guard *guard);
/* Takes the place of the target behind libiscsi's descriptor, which is connected. 0 or -errno. */
int guard_insert(struct guard *guard, struct iscsi_context *ctx);
/* From here on the answers are for commands of the session. */
void guard_serve(struct guard *guard, struct session *session);
int guard_fd(const struct guard *guard);
/* What libiscsi has to say goes to the target, as far as the socket takes it. 0 or -errno: then guard_error. */
int guard_push(struct guard *guard);
/* What the target says goes to libiscsi, which calls back. 0 or -errno: then guard_error. */
int guard_pull(struct guard *guard);
/* What to wait for on its descriptor: POLLIN, POLLOUT. */
int guard_events(const struct guard *guard);
const char *guard_error(const struct guard *guard);
const struct output *guard_output(const struct guard *guard);

/* ---- links ---- */

struct bt_iscsi_link {
    struct iscsi_context *ctx;
    struct guard *guard; /* once it is connected */
    int cancel_fd; /* eventfd */
    int lun_number;
    struct bt_iscsi_lun lun;
    char error[512];
    uint64_t until_ns;
    struct scsi_task *task; /* one that libiscsi still has */
    struct {
        bool here;
        int status;
        struct scsi_sense sense;
        uint32_t length;
        unsigned char data[256];
    } answer;
    /* while it is on its way to its session */
    struct bt_message message;
    struct session *session;
};

/* ---- commands ---- */

struct node;

/* One SCSI command. It is in one list of its session, or with its owner. */
struct command {
    struct command *next, **pprev;
    struct session *session;
    struct scsi_task task;
    /* On the session's thread. result: 0, or -errno as the sense says; the task tells more. */
    void (*done)(struct command *command, int result);
    void *owner;
    struct bt_io *io;
    unsigned char cdb[16];
    uint8_t cdb_length;
    uint8_t direction; /* enum scsi_xfer_dir */
    uint8_t attentions, busy, aborted, resent, timeouts; /* how often it was sent again, and why */
    bool once; /* not to be sent again over a new connection */
    bool raw;  /* the user's: any status but a unit attention is an answer */
    uint32_t length;          /* bytes to move */
    uint32_t received;        /* bytes of Data-In so far */
    uint64_t asked;           /* bytes that R2Ts have asked for */
    uint32_t unsent;          /* sequences of Data-Out of which libiscsi has something left */
    bool ended;               /* the target has said how; libiscsi may not know yet */
    bool held;                /* libiscsi knows; it ends when nothing is unsent */
    uint64_t at, span;        /* the part of the io that it serves */
    uint64_t sent_ns, due_ns; /* when it was sent; when it is to be sent again */
    struct iovec *iov;        /* where they are */
    int iovcnt;
    struct iovec iov_inline[4], *iov_allocated;
    void *bounce;             /* the data, for a vector that is too long */
    unsigned char buffer[112]; /* of short parameter data */
};

struct list {
    struct command *head, **tail;
    unsigned count;
};

static inline void list_init(struct list *list) { *list = (struct list){.tail = &list->head}; }
void list_append(struct list *list, struct command *command);
void list_remove(struct list *list, struct command *command);

/* A command to fill in, without data; NULL without memory. */
struct command *command_new(struct session *session, void (*done)(struct command *, int));
void command_free(struct command *command);
/* Data from or to one buffer. */
void command_data(struct command *command, int direction, void *data, uint32_t length);
/* A part of the io's vector. 0 or -ENOMEM. */
int command_vector(struct command *command, int direction, struct bt_io *io, uint64_t at, uint32_t length);
/* Sends it, or lets it wait for a connection. */
void command_start(struct command *command);
/* Gives it to libiscsi. False when it does not take it: then the connection is of no use. */
bool command_send(struct command *command);
/* The target asks for so much of its data; false when it may not. */
bool command_asked(struct command *command, uint64_t length);
/* It was answered, and libiscsi has nothing of it any more. */
void command_settle(struct command *command);
/* It ends without an answer. */
void command_fail(struct command *command, int result);
/* Whether all data were moved that were to be. */
bool command_is_whole(const struct command *command);
int sense_errno(const struct scsi_sense *sense);

/* ---- sessions ---- */

enum session_state {
    DOWN,    /* without a connection; commands wait for one */
    GIVEN_UP, /* without a connection; commands fail */
    UP,
    CLOSING, /* logging out */
    CLOSED,
};

struct session {
    struct node *node;
    unsigned index;
    struct bt_thread *thread;
    enum session_state state;
    struct iscsi_context *ctx;
    struct guard *guard;
    struct bt_watch watch;
    uint32_t events; /* that are watched */
    struct bt_deferred kick;
    struct bt_deferred end; /* behind what is deferred already: then nothing leads to the session any more */
    struct bt_timer tick; /* NOPs, limits of time */
    struct bt_timer retry; /* the first of `delayed` is due */
    bool ticking, retrying;
    bool broken; /* to be given up when libiscsi has returned */
    bool dying;  /* callbacks mean nothing now */
    bool refreshing;
    bool answering; /* a command was answered since the limits were looked at */
    unsigned nops;
    unsigned held; /* commands in `sent` that are held */
    uint64_t heard_ns; /* when something last came */
    struct list waiting, sent, delayed;
    struct command *free;
    char reason[256]; /* under the node's lock */
    struct bt_message close;
};

void session_init(struct session *session, struct node *node, unsigned index, struct bt_thread *thread);
void session_destroy(struct session *session);
void session_attach(struct session *session, struct bt_iscsi_link *link);
void session_give_up(struct session *session);
void session_close(struct session *session);
/* The connection is of no use: to be ended as soon as libiscsi is not on the stack. */
__attribute__((format(printf, 2, 3))) void session_break(struct session *session, const char *format, ...);
/* Something about the LUN may have changed: read its capacity again. */
void session_refresh(struct session *session);
/* The command that was sent with this initiator task tag; NULL when there is none. */
struct command *session_find(struct session *session, uint32_t itt);
/* The same for one with data in this direction (enum scsi_xfer_dir), which the target has not ended. */
struct command *session_find_open(struct session *session, uint32_t itt, int direction);
/* The target has said how the command has ended. */
void session_ends(struct session *session, uint32_t itt);
void session_retry_later(struct session *session, struct command *command, uint64_t delay_ns);

/* ---- the device ---- */

struct node {
    struct bt_device device;
    const struct bt_device_api *api;
    uint64_t event_tag;
    int lun_number;
    uint64_t timeout_ns;
    bool no_flush;
    char place[2 * BT_ISCSI_MAX_STRING + 2];
    pthread_mutex_t lock;
    struct bt_iscsi_lun lun; /* as it was opened, but for what is here again */
    _Atomic uint64_t blocks, most_blocks; /* now; ever */
    _Atomic bool changed; /* it has another block size */
    _Atomic bool no_write_same, no_write_same_unmap, no_status, no_sync, no_unmap, no_copy;
    _Atomic uint8_t copy_id;
    uint32_t max_transfer; /* bytes */
    unsigned session_count;
    struct session sessions[BT_ISCSI_MAX_SESSIONS];
    _Atomic int open_sessions;
    uint64_t close_cookie;
    _Atomic uint64_t connections, resent, retried, unit_attentions, timeouts, copied;
};

extern const struct bt_device_ops iscsi_device_ops;
/* The LUN has this many blocks now. */
void node_set_blocks(struct session *session, uint64_t blocks, uint32_t block_size);
void node_event(struct session *session, enum bt_iscsi_event event);
void node_session_closed(struct node *node);
static inline bool node_has(const struct node *node, uint32_t flag) { return node->lun.flags & flag; }

#endif
