/* SPDX-License-Identifier: Apache-2.0 */
/* The guard stands between libiscsi and the target: libiscsi's descriptor is one end of a pair of local sockets, and
 * here is the other. That is for two reasons.
 *
 * What a target says is checked before libiscsi sees it, which believes a lot: it would queue Data-Out for whatever
 * range an R2T names, in pieces of whatever size the login has set (0 too), read sense data past their end, keep
 * Data-In that never ends, and take data that were left out for data that came. And many PDUs move at once: what
 * libiscsi writes PDU by PDU is sent together, what comes is received together, and the data of Data-In go straight
 * to where they belong; libiscsi is told of them by a header without data.
 *
 * It also has what libiscsi lacks: data digests. Data that have one do not go straight to where they belong: a client
 * that changes its buffer meanwhile would break the connection, which is not its own.
 *
 * Names on the wire: RFC 7143 section 11. The way to the target: guard_out.c; keys of the login: guard_text.c.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "guard.h"

#define SEGMENT_MAX 262144u           /* what libiscsi declares as its MaxRecvDataSegmentLength */
#define ASKED_MAX (256u << 10)        /* data of all answers before the link is a session's */
#define DIRECT_MIN 4096u              /* from so many bytes on data are received where they belong */
#define DIRECT_VECTORS 64
#define PULLS 16                      /* receives in a row, before others on the thread have their turn */
#define PINGS_MAX 1024                /* of the target's, to which the answers have not gone out */
#define SENSE_MIN 18
#define SENSE_MAX 252

enum opcode {
    NOP_IN = 0x20,
    SCSI_RESPONSE = 0x21,
    LOGIN_RESPONSE = 0x23,
    DATA_IN = 0x25,
    LOGOUT_RESPONSE = 0x26,
    R2T = 0x31,
    ASYNC_MESSAGE = 0x32,
    REJECT = 0x3f,
};

int guard_refuse(struct guard *guard, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(guard->error, sizeof guard->error, format, args);
    va_end(args);
    return -EPROTO;
}

int guard_socket_failed(struct guard *guard, int error)
{
    snprintf(guard->error, sizeof guard->error, "%s", error ? strerror(error) : "the target has closed it");
    return error ? -error : -ECONNRESET;
}

const char *guard_error(const struct guard *guard) { return guard->error; }
const struct output *guard_output(const struct guard *guard) { return &guard->output; }
int guard_fd(const struct guard *guard) { return guard->tcp; }
int guard_events(const struct guard *guard) { return POLLIN | (guard->blocked ? POLLOUT : 0); }

void guard_serve(struct guard *guard, struct session *session) { guard->session = session; }

struct guard *guard_new(int header_digest, int data_digest)
{
    struct guard *guard = malloc(sizeof *guard);
    if (!guard)
        return NULL;
    memset(guard, 0, offsetof(struct guard, rx));
    guard->tcp = guard->inner = -1;
    guard->header_offer = header_digest;
    guard->data_offer = data_digest;
    guard->header_digests = header_digest; /* libiscsi takes its offer for agreed where the target is silent on it */
    return guard;
}

void guard_free(struct guard *guard)
{
    if (!guard)
        return;
    close(guard->tcp);
    close(guard->inner);
    free(guard);
}

int guard_insert(struct guard *guard, struct iscsi_context *ctx)
{
    int ends[2], fd = iscsi_get_fd(ctx), size = 1 << 20;
    guard->ctx = ctx;
    guard->tcp = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    if (guard->tcp < 0 || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) < 0)
        return -errno;
    guard->inner = ends[1];
    int ret = dup3(ends[0], fd, O_CLOEXEC) < 0 ? -errno : 0;
    close(ends[0]);
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    return ret;
}

/* ---- to libiscsi ---- */

/* Lets it read all that it was given. */
static int flush_out(struct guard *guard)
{
    uint32_t at = 0;
    int unread = INT_MAX;
    while (at < guard->out_length || unread > 0) {
        int before = unread;
        uint32_t left = guard->out_length - at;
        ssize_t n = left ? send(guard->inner, guard->out + at, left, MSG_NOSIGNAL) : 0;
        if (n < 0 && errno != EAGAIN)
            return guard_socket_failed(guard, errno);
        at += n > 0 ? (uint32_t)n : 0;
        if (iscsi_service(guard->ctx, POLLIN) < 0)
            return guard_refuse(guard, "%s", iscsi_get_error(guard->ctx));
        if (guard->session && guard->session->broken)
            break;
        if (ioctl(iscsi_get_fd(guard->ctx), FIONREAD, &unread) < 0 || (n <= 0 && unread >= before))
            return guard_refuse(guard, "libiscsi does not take an answer");
    }
    guard->out_length = 0;
    return 0;
}

/* Hands on a PDU: its header, which says how long the data are, and the data with their padding. */
static int hand_on(struct guard *guard, unsigned char *header, const unsigned char *data, uint32_t length)
{
    uint32_t padded = pdu_padded(length);
    if (OUT_BYTES - guard->out_length < BHS + DIGEST + padded) {
        int ret = flush_out(guard);
        if (ret < 0)
            return ret;
    }
    unsigned char *out = guard->out + guard->out_length;
    header[5] = 0;
    put16(header + 6, (uint16_t)length);
    memcpy(out, header, BHS);
    out += BHS;
    if (guard->header_digests && guard->logged_in) {
        digest_put(crc32c(0, header, BHS), out);
        out += DIGEST;
    }
    memset(out + length, 0, padded - length);
    if (length)
        memcpy(out, data, length);
    guard->out_length = (uint32_t)(out + padded - guard->out);
    return 0;
}

/* ---- checks of what the target says ---- */

static int take_login(struct guard *guard, unsigned char *header, const unsigned char *data, uint32_t length)
{
    char text[SMALL_MAX + 1];
    memcpy(text, data, length);
    text[length] = 0;
    bool last = (header[1] & 0x83) == 0x83 && header[36] == 0; /* T, NSG full feature phase, Status-Class 0 */
    int ret = guard_check_text(guard, text, length);
    if (ret == 0 && last)
        ret = guard_check_digests(guard);
    if (ret == 0 && guard->data_offer) /* a libiscsi that had data digests would begin with its own */
        length = text_without(text, length, "DataDigest=");
    if (ret == 0)
        ret = hand_on(guard, header, (unsigned char *)text, length);
    if (ret == 0 && last) /* before libiscsi asks anything, whose answer may have a digest */
        ret = flush_out(guard);
    if (last)
        guard->logged_in = true;
    return ret;
}

/* Sense data, with two bytes of their length before them (11.4.7.2), as long as libiscsi reads them. */
static int take_sense(struct guard *guard, unsigned char *header, const unsigned char *data, uint32_t length)
{
    unsigned char sense[2 + SENSE_MAX] = {0};
    uint32_t there = length < 2 ? 0 : (uint32_t)bt_min(bt_min(get16(data), length - 2), SENSE_MAX);
    if (!there)
        return guard_refuse(guard, "CHECK CONDITION without sense data");
    memcpy(sense + 2, data + 2, there);
    there = (uint32_t)bt_max(there, SENSE_MIN);
    if ((sense[2] & 0x7f) >= 0x72) /* descriptors: their length, and one of theirs, may reach out */
        sense[2 + 7] = 0;
    put16(sense, (uint16_t)there);
    return hand_on(guard, header, sense, there + 2);
}

static int take_r2t(struct guard *guard, unsigned char *header)
{
    struct command *command = session_find_open(guard->session, get32(header + 16), SCSI_XFER_WRITE);
    uint64_t offset = get32(header + 40), length = get32(header + 44);
    if (!command || !length || offset + length > command->length)
        return guard_refuse(guard, "the target asks for data that no command has (R2T)");
    if (!command_asked(command, length))
        return guard_refuse(guard, "the target asks for the same data again and again (R2T)");
    return hand_on(guard, header, NULL, 0);
}

/* PDUs other than Data-In, which are here as a whole. */
static int take_small(struct guard *guard, unsigned char *header, const unsigned char *data, uint32_t length)
{
    enum opcode opcode = header[0] & 0x3f;
    if (!guard->logged_in)
        return opcode == LOGIN_RESPONSE ? take_login(guard, header, data, length)
                                        : guard_refuse(guard, "PDU %#x in the login phase", opcode);
    switch (opcode) {
    case SCSI_RESPONSE:
        session_ends(guard->session, get32(header + 16));
        if (header[2]) { /* the target has failed at it (11.4.3); libiscsi would take its status for good */
            header[1] &= 0x80;
            header[2] = 0;
            header[3] = SCSI_STATUS_TASK_ABORTED;
        }
        return header[3] == SCSI_STATUS_CHECK_CONDITION ? take_sense(guard, header, data, length)
                                                        : hand_on(guard, header, NULL, 0);
    case R2T:
        return take_r2t(guard, header);
    case NOP_IN:
        if (get32(header + 20) != UINT32_MAX && ++guard->pings > PINGS_MAX)
            return guard_refuse(guard, "the target pings, and reads no answers");
        return hand_on(guard, header, NULL, 0);
    case LOGOUT_RESPONSE:
    case ASYNC_MESSAGE:
        return hand_on(guard, header, NULL, 0);
    case REJECT:
        if (length < BHS)
            return guard_refuse(guard, "the target rejects what it does not name");
        session_ends(guard->session, get32(data + 16));
        return hand_on(guard, header, data, BHS);
    default:
        return guard_refuse(guard, "PDU %#x is not one of a target, or not of now", header[0]);
    }
}

/* ---- Data-In ---- */

/* To a link's question: libiscsi collects it. */
static int take_answer(struct guard *guard, unsigned char *header, const unsigned char *data, uint32_t length)
{
    guard->asked += BHS + length;
    if (guard->asked > ASKED_MAX)
        return guard_refuse(guard, "the target answers more than was asked");
    return hand_on(guard, header, data, length);
}

static int begin_data(struct guard *guard, const unsigned char *header, uint32_t length)
{
    struct command *command = session_find_open(guard->session, get32(header + 16), SCSI_XFER_READ);
    uint64_t offset = get32(header + 40);
    if (!command || (length && offset != command->received) || length > command->length - command->received)
        return guard_refuse(guard, "the target sends data that no command wants, or not in their order (Data-In)");
    if ((header[1] & 0x01) && header[3] == SCSI_STATUS_CHECK_CONDITION) /* libiscsi would not miss the sense data */
        return guard_refuse(guard, "CHECK CONDITION without sense data (Data-In)");
    command->ended = header[1] & 0x01;
    guard->command = command;
    guard->data_left = length;
    guard->data_crc = 0;
    guard->tail = pdu_padded(length) - length + (guard->data_digests && length ? DIGEST : 0);
    memcpy(guard->header, header, BHS);
    return 0;
}

/* Where the next data go. */
static int data_vector(struct guard *guard, struct iovec *iov, uint32_t length)
{
    const struct bt_device_api *api = guard->session->node->api;
    struct command *command = guard->command;
    int count = api->iov_slice(command->iov, command->iovcnt, command->received, length, iov, DIRECT_VECTORS);
    return count < 0 ? DIRECT_VECTORS : count; /* too many: the first ones are filled in */
}

static void data_came(struct guard *guard, uint64_t n)
{
    guard->command->received += (uint32_t)n;
    guard->data_left -= (uint32_t)n;
}

/* Data that have been received with other things, or that have a digest. */
static void copy_data(struct guard *guard)
{
    struct command *command = guard->command;
    const unsigned char *data = guard->rx + guard->rx_start;
    uint32_t n = (uint32_t)bt_min(guard->data_left, guard->rx_end - guard->rx_start);
    guard->session->node->api->iov_from_buffer(command->iov, command->iovcnt, command->received, data, n);
    if (guard->data_digests)
        guard->data_crc = crc32c(guard->data_crc, data, n);
    guard->rx_start += n;
    data_came(guard, n);
}

/* 1: there may be more. 0: not now. */
static int receive_data(struct guard *guard)
{
    struct iovec iov[DIRECT_VECTORS];
    struct msghdr message = {.msg_iov = iov, .msg_iovlen = (size_t)data_vector(guard, iov, guard->data_left)};
    ssize_t n = recvmsg(guard->tcp, &message, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return 0;
    if (n <= 0)
        return guard_socket_failed(guard, n < 0 ? errno : 0);
    data_came(guard, (uint64_t)n);
    return 1;
}

static int wrong_digest(struct guard *guard, const unsigned char *header)
{
    return guard_refuse(guard, "the data digest of a PDU is wrong (opcode %#x)", header[0] & 0x3f);
}

/* The data in hand. 1: all of the PDU is there. */
static int go_on_with_data(struct guard *guard)
{
    copy_data(guard);
    const unsigned char *tail = guard->rx + guard->rx_start;
    if (guard->data_left || guard->rx_end - guard->rx_start < guard->tail)
        return 0;
    if (guard->tail >= DIGEST) {
        uint32_t padding = guard->tail - DIGEST;
        if (!digest_is(crc32c(guard->data_crc, tail, padding), tail + padding))
            return wrong_digest(guard, guard->header);
    }
    guard->rx_start += guard->tail;
    guard->command = NULL;
    int ret = hand_on(guard, guard->header, NULL, 0);
    return ret < 0 ? ret : 1;
}

/* ---- PDUs ---- */

static int check_header(struct guard *guard, const unsigned char *header, uint32_t length)
{
    if (guard_header_bytes(guard) > BHS && !digest_is(crc32c(0, header, BHS), header + BHS))
        return guard_refuse(guard, "the header digest of a PDU is wrong");
    bool data_in = (header[0] & 0x3f) == DATA_IN && guard->session;
    if (header[4])
        return guard_refuse(guard, "a PDU has additional header segments");
    if (length > (data_in ? SEGMENT_MAX : SMALL_MAX))
        return guard_refuse(guard, "a PDU of %u bytes", length);
    return 0;
}

/* One PDU of what was received. 1: taken. 0: it is not all there. */
static int take_pdu(struct guard *guard)
{
    if (guard->command)
        return go_on_with_data(guard);
    unsigned char *header = guard->rx + guard->rx_start, *data;
    uint32_t there = guard->rx_end - guard->rx_start;
    uint32_t header_bytes = guard_header_bytes(guard);
    if (there < header_bytes)
        return 0;
    uint32_t length = pdu_length(header);
    int ret = check_header(guard, header, length);
    if (ret < 0)
        return ret;
    bool data_in = (header[0] & 0x3f) == DATA_IN && guard->logged_in;
    data = header + header_bytes;
    if (data_in && guard->session) {
        guard->rx_start += header_bytes;
        ret = begin_data(guard, header, length);
        return ret < 0 ? ret : go_on_with_data(guard);
    }
    uint32_t padded = pdu_padded(length), digest = length && guard->data_digests && guard->logged_in ? DIGEST : 0;
    if (there < header_bytes + padded + digest)
        return 0;
    if (digest && !digest_is(crc32c(0, data, padded), data + padded))
        return wrong_digest(guard, header);
    guard->rx_start += header_bytes + padded + digest;
    ret = data_in ? take_answer(guard, header, data, length) : take_small(guard, header, data, length);
    return ret < 0 ? ret : 1;
}

static int take_pdus(struct guard *guard)
{
    int ret = 1;
    while (ret > 0 && !(guard->session && guard->session->broken))
        ret = take_pdu(guard);
    if (guard->rx_start == guard->rx_end)
        guard->rx_start = guard->rx_end = 0;
    return ret < 0 ? ret : 0;
}

/* 1: something came, and there may be more. 0: not now. */
static int receive(struct guard *guard)
{
    if (guard->command && guard->rx_start == guard->rx_end && guard->data_left >= DIRECT_MIN &&
        !guard->data_digests)
        return receive_data(guard);
    if (guard->rx_start && RX_BYTES - guard->rx_end < SMALL_MAX + BHS + 2 * DIGEST) {
        memmove(guard->rx, guard->rx + guard->rx_start, guard->rx_end - guard->rx_start);
        guard->rx_end -= guard->rx_start;
        guard->rx_start = 0;
    }
    uint32_t room = RX_BYTES - guard->rx_end;
    ssize_t n = recv(guard->tcp, guard->rx + guard->rx_end, room, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return 0;
    if (n <= 0)
        return guard_socket_failed(guard, n < 0 ? errno : 0);
    guard->rx_end += (uint32_t)n;
    return (uint32_t)n == room ? 1 : 2;
}

/* libiscsi has been told what came before the data in hand: that may have been the end of their command. */
static int check_command(struct guard *guard)
{
    if (!guard->command || session_find(guard->session, get32(guard->header + 16)) == guard->command)
        return 0;
    guard->command = NULL;
    return guard_refuse(guard, "the target sends data of a command that it has answered (Data-In)");
}

int guard_pull(struct guard *guard)
{
    int ret = 1;
    for (int i = 0; i < PULLS && ret == 1; i++) {
        ret = receive(guard);
        int taken = ret > 0 ? take_pdus(guard) : 0;
        if (taken < 0)
            return taken;
    }
    int flushed = guard->out_length ? flush_out(guard) : 0;
    if (flushed == 0)
        flushed = check_command(guard);
    return flushed < 0 ? flushed : ret < 0 ? ret : 0;
}
