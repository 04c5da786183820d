/* SPDX-License-Identifier: Apache-2.0 */
/* The interface of the extension target.datapath._iscsi: an iSCSI LUN as a device of the datapath.
 *
 * A link is a connection that is made, logged in and asked about its LUN by a thread that may wait. A device has one
 * or more sessions; a link that is given to one is served by an I/O thread from then on. When a session loses its
 * connection it keeps its requests and says so (BT_ISCSI_LOST); Python makes a new link, or gives up.
 */
#ifndef BT_ISCSI_INITIATOR_H
#define BT_ISCSI_INITIATOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* cffi: begin */

typedef struct bt_iscsi_link bt_iscsi_link;

enum bt_iscsi_lun_flags {
    BT_ISCSI_READ_ONLY = 1,      /* mode parameter header: WP */
    BT_ISCSI_DPOFUA = 2,         /* READ and WRITE take FUA */
    BT_ISCSI_WRITE_CACHE = 4,    /* caching mode page: WCE; assumed where the page is missing */
    BT_ISCSI_PROVISIONED = 8,    /* READ CAPACITY(16): LBPME */
    BT_ISCSI_READS_ZEROS = 16,   /* LBPRZ: what is not mapped reads as zeros */
    BT_ISCSI_UNMAP = 32,         /* VPD page B2: LBPU */
    BT_ISCSI_SAME_UNMAP = 64,    /* LBPWS: WRITE SAME(16) may unmap */
    BT_ISCSI_SAME10_UNMAP = 128, /* LBPWS10 */
    BT_ISCSI_COPY = 256,         /* standard INQUIRY data: 3PC */
    BT_ISCSI_ROTATES = 512,      /* VPD page B1: has a rotation rate */
};

enum bt_iscsi_limits {
    BT_ISCSI_MAX_SESSIONS = 16,
    BT_ISCSI_MAX_STRING = 255,
    BT_ISCSI_SENSE = 252,
    BT_ISCSI_MAX_BLOCK = 65536,
};

/* What the LUN says about itself. Limits of 0: none stated. */
struct bt_iscsi_lun {
    uint64_t blocks;
    uint32_t block_size; /* bytes; a power of two from 512 to 65536 */
    uint32_t flags;
    uint32_t max_transfer;          /* blocks of one READ or WRITE */
    uint32_t max_unmap;             /* blocks of one UNMAP */
    uint64_t max_write_same;        /* blocks */
    uint32_t max_copy;              /* bytes of one segment of EXTENDED COPY */
    unsigned char designator[24];   /* bytes 4 to 27 of a CSCD descriptor: code set, type, length, identifier; or 0 */
    char vendor[9], product[17];
};

/* Strings end with a null byte, are at most BT_ISCSI_MAX_STRING long, and may be NULL where that makes sense. */
struct bt_iscsi_options {
    const char *initiator;
    const char *portal; /* numeric address and port */
    const char *target;
    const char *user, *password;
    const char *mutual_user, *mutual_password;
    int lun;
    int header_digest; /* enum iscsi_header_digest: what is offered, in the order of preference */
    int data_digest;   /* the same for data */
    uint32_t isid;     /* 24 bits: a session that comes back with the same one replaces what is left of the old */
    uint32_t isid_qualifier;
};

bt_iscsi_link *bt_iscsi_link_new(void);
/* Connects, logs in and inquires. Waits, at most timeout_ms; call it on a thread that may. 0 or -errno, then
 * bt_iscsi_link_error says what went wrong. */
int bt_iscsi_link_open(bt_iscsi_link *link, const struct bt_iscsi_options *options, int timeout_ms);
/* Ends bt_iscsi_link_open on another thread soon. */
void bt_iscsi_link_cancel(bt_iscsi_link *link);
const char *bt_iscsi_link_error(bt_iscsi_link *link);
void bt_iscsi_link_lun(bt_iscsi_link *link, struct bt_iscsi_lun *out);
void bt_iscsi_link_free(bt_iscsi_link *link);

/* Results of SESSION events; the session's number is above the low byte. */
enum bt_iscsi_event {
    BT_ISCSI_LOST = 1,    /* the connection; see bt_iscsi_reason */
    BT_ISCSI_RESIZED = 2, /* the device has a new size */
    BT_ISCSI_CHANGED = 3, /* the LUN has another block size: the device answers EIO until it is opened again */
};

struct bt_iscsi_settings {
    int lun;
    int sessions;      /* session i belongs to I/O thread i modulo their number */
    int timeout;       /* seconds that one command may take; 0: no limit */
    bool no_flush;     /* cache.no-flush */
    const char *place; /* portal and target: LUNs of the same place may be copied between */
};

/* api: bt_device_api() of the core. datapath, object: the core's. event_tag: for SESSION events. NULL and errno. */
void *bt_iscsi_new(const void *api, void *datapath, uint64_t tag, uint64_t event_tag,
                   const struct bt_iscsi_settings *settings, const struct bt_iscsi_lun *lun);
/* Gives the session a link that is open, and owns it from here on. */
void bt_iscsi_attach(void *object, int session, bt_iscsi_link *link);
/* Requests of the session fail, those that wait and new ones, until it gets a link. */
void bt_iscsi_give_up(void *object, int session);
/* Why the session lost its connection. */
void bt_iscsi_reason(void *object, int session, char *out, size_t size);
/* Logs out. Requests fail from here on. DONE with this cookie. To be called once, before the object is released. */
void bt_iscsi_close(void *object, uint64_t cookie);

/* A command of the user's, through session 0. data_in or data_out, not both. Buffers, and this, stay valid until the
 * DONE event with its cookie: 0, then status, sense and data_in_length are set; or -errno. */
struct bt_iscsi_command {
    unsigned char cdb[16];
    int cdb_length;
    void *data_out;
    uint32_t data_out_length;
    void *data_in;
    uint32_t data_in_length; /* how much there is room for, then how much has come */
    int status;              /* SAM */
    int sense_length;
    unsigned char sense[252];
};
void bt_iscsi_command(void *object, struct bt_iscsi_command *command, uint64_t cookie);

struct bt_iscsi_counters {
    uint64_t connections;
    uint64_t resent;          /* commands sent again over a new connection */
    uint64_t retried;         /* commands sent again because of their status */
    uint64_t unit_attentions;
    uint64_t timeouts;
    uint64_t copied;          /* bytes, by EXTENDED COPY */
};
void bt_iscsi_counters(void *object, struct bt_iscsi_counters *out);

/* cffi: end */

#endif
