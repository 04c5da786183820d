/* SPDX-License-Identifier: Apache-2.0 */
/* Fuzz target: the iSCSI guard, between a target that says what the input says and a libiscsi that believes it all.
 *
 * Nothing reaches libiscsi that is not what the guard promises (guard.c); data go nowhere but to commands that are
 * under way, and those of a PDU whose digest was wrong are never told of; what goes out has digests that are right.
 *
 * Input: what is offered, then steps. */
#define _GNU_SOURCE
#include "fuzz.h"
#include "iscsi/digest.c"
#include "iscsi/guard.c"
#include "iscsi/guard_out.c"
#include "iscsi/guard_text.c"
#include "iscsi/output.c"

#define COMMANDS 5u
#define WRONG 0xdead5a5au /* residual count of a PDU that has a wrong digest */
#define TAIL 70000u

static const struct {
    uint8_t direction;
    uint32_t length;
    int pieces;
} kinds[COMMANDS] = {
    {SCSI_XFER_READ, 8192, 2},   {SCSI_XFER_READ, 100000, 3}, {SCSI_XFER_WRITE, 65536, 1},
    {SCSI_XFER_READ, 512, 1},    {SCSI_XFER_READ, 262144, 100},
};

const char *fuzz_trace;
static struct command *commands[COMMANDS]; /* NULL: answered */
static struct node node;
static struct session session;
static struct guard *guard;
static int peer, inner;    /* the target's end; libiscsi's */
static bool forged, ended; /* bytes that may be anything were sent */
static bool in_login;
static unsigned char from_libiscsi[1 << 17], from_guard[1 << 17], at_peer[1 << 18];
static uint32_t to_write, peer_length, had; /* had: of from_guard */

static unsigned char pattern(uint32_t offset) { return (unsigned char)(offset * 7 + (offset >> 8) + 1); }

/* ---- the session ---- */

struct command *session_find(struct session *of, uint32_t itt)
{
    (void)of;
    return itt < COMMANDS ? commands[itt] : NULL;
}

struct command *session_find_open(struct session *of, uint32_t itt, int direction)
{
    struct command *command = of ? session_find(of, itt) : NULL;
    return command && command->direction == direction && !command->ended ? command : NULL;
}

void session_ends(struct session *of, uint32_t itt)
{
    struct command *command = of ? session_find(of, itt) : NULL;
    if (command)
        command->ended = true;
}

bool command_asked(struct command *command, uint64_t length)
{
    command->asked += length;
    command->unsent++;
    return command->asked <= 2ull * command->length;
}

static void make_command(uint32_t i)
{
    struct command *command = commands[i] = calloc(1, sizeof *command);
    command->direction = kinds[i].direction;
    command->length = kinds[i].length;
    command->iovcnt = kinds[i].pieces;
    command->iov = command->iov_allocated = calloc((size_t)kinds[i].pieces, sizeof *command->iov);
    uint32_t left = kinds[i].length;
    for (int piece = 0; piece < kinds[i].pieces; piece++) {
        uint32_t n = piece + 1 < kinds[i].pieces ? left / 3 : left;
        command->iov[piece] = (struct iovec){malloc(n ? n : 1), n};
        left -= n;
    }
}

static void drop_command(uint32_t i)
{
    struct command *command = commands[i];
    if (!command)
        return;
    commands[i] = NULL;
    for (int piece = 0; piece < command->iovcnt; piece++)
        free(command->iov[piece].iov_base);
    free(command->iov_allocated);
    free(command);
}

static void check_data(const struct command *command)
{
    uint32_t at = 0;
    for (int piece = 0; !forged && piece < command->iovcnt; piece++)
        for (size_t i = 0; i < command->iov[piece].iov_len && at < command->received; i++, at++)
            CHECK(((unsigned char *)command->iov[piece].iov_base)[i] == pattern(at));
}

/* ---- libiscsi ---- */

int iscsi_get_fd(struct iscsi_context *ctx) { (void)ctx; return inner; }
const char *iscsi_get_error(struct iscsi_context *ctx) { (void)ctx; return "error"; }
int iscsi_which_events(struct iscsi_context *ctx) { (void)ctx; return to_write ? POLLOUT : 0; }

static bool digests_now(bool agreed) { return agreed && !in_login; }

static int take_handed(unsigned char *header, const unsigned char *data, uint32_t length)
{
    uint32_t itt = get32(header + 16);
    struct command *command = !in_login && guard->session ? session_find(NULL, itt) : NULL;
    enum opcode opcode = header[0] & 0x3f;
    CHECK(!header[4]);
    if (!forged && !in_login && (guard->data_digests || guard->header_digests))
        CHECK(get32(header + 44) != WRONG);
    if (in_login) {
        CHECK(opcode == LOGIN_RESPONSE && length <= SMALL_MAX);
        if (guard->data_offer)
            CHECK(length < 12 || !memmem(data, length, "\0DataDigest=", 12));
        if ((header[1] & 0x83) == 0x83 && header[36] == 0)
            in_login = false;
        return 0;
    }
    if (guard->session && (opcode == DATA_IN || opcode == R2T || opcode == SCSI_RESPONSE) && !command)
        return -1; /* libiscsi gives up, too */
    if (opcode == SCSI_RESPONSE && header[3] == SCSI_STATUS_CHECK_CONDITION)
        CHECK(length >= 2 + SENSE_MIN && length <= 2 + SENSE_MAX && get16(data) + 2u == length);
    else if (guard->session && opcode != REJECT)
        CHECK(!length);
    if (opcode == R2T) {
        uint64_t end = (uint64_t)get32(header + 40) + get32(header + 44);
        CHECK(command && command->direction == SCSI_XFER_WRITE && end <= command->length);
    }
    if (guard->session && (opcode == SCSI_RESPONSE || (opcode == DATA_IN && header[1] & 1))) {
        CHECK(command->ended);
        check_data(command);
        drop_command(itt);
    }
    return 0;
}

int iscsi_service(struct iscsi_context *ctx, int events)
{
    (void)ctx;
    if (events & POLLOUT) {
        ssize_t n = send(inner, from_libiscsi, to_write, MSG_NOSIGNAL);
        if (n > 0) {
            memmove(from_libiscsi, from_libiscsi + n, to_write - (uint32_t)n);
            to_write -= (uint32_t)n;
        }
        return 0;
    }
    ssize_t n = recv(inner, from_guard + had, sizeof from_guard - had, MSG_DONTWAIT);
    had += n > 0 ? (uint32_t)n : 0;
    uint32_t at = 0;
    while (had - at >= BHS) {
        unsigned char *header = from_guard + at;
        uint32_t bytes = BHS + (digests_now(guard->header_digests) ? DIGEST : 0), length = pdu_length(header);
        if (had - at < bytes + pdu_padded(length))
            break;
        if (bytes > BHS)
            CHECK(digest_is(crc32c(0, header, BHS), header + BHS));
        at += bytes + pdu_padded(length);
        if (take_handed(header, header + bytes, length) < 0)
            return -1;
    }
    memmove(from_guard, from_guard + at, had - at);
    had -= at;
    return 0;
}

/* libiscsi has a PDU to send. */
static void write_pdu(uint8_t opcode, uint8_t flags, uint32_t length)
{
    unsigned char *pdu = from_libiscsi + to_write;
    if (sizeof from_libiscsi - to_write < BHS + DIGEST + length + 4)
        return;
    memset(pdu, 0, BHS);
    pdu[0] = opcode;
    pdu[1] = flags;
    put32(pdu + 4, length);
    unsigned char *data = pdu + BHS;
    if (digests_now(guard->header_digests)) {
        digest_put(crc32c(0, pdu, BHS), data);
        data += DIGEST;
    }
    for (uint32_t i = 0; i < pdu_padded(length); i++)
        data[i] = i < length ? pattern(i) : 0;
    to_write = (uint32_t)(data + pdu_padded(length) - from_libiscsi);
}

static void write_login(struct input *input)
{
    static const char text[] = "InitiatorName=i\0DataDigest=None\0HeaderDigest=None\0";
    unsigned char *pdu = from_libiscsi + to_write;
    uint32_t length = take8(input) % sizeof text, flags = take8(input);
    if (to_write > 4096)
        return;
    memset(pdu, 0, BHS + sizeof text + 4);
    pdu[0] = 0x43;
    pdu[1] = (unsigned char)flags;
    put32(pdu + 4, length);
    memcpy(pdu + BHS, text, length);
    to_write += BHS + pdu_padded(length);
}

/* ---- the target ---- */

static void check_outgoing(void)
{
    ssize_t n = recv(peer, at_peer + peer_length, sizeof at_peer - peer_length, MSG_DONTWAIT);
    peer_length += n > 0 ? (uint32_t)n : 0;
    uint32_t at = 0;
    while (peer_length - at >= BHS) {
        unsigned char *header = at_peer + at;
        bool login = (header[0] & 0x3f) == 3;
        uint32_t bytes = BHS + (guard->header_digests && !login ? DIGEST : 0), length = pdu_length(header);
        uint32_t digest = guard->data_digests && !login && length ? DIGEST : 0;
        uint32_t padded = pdu_padded(length);
        if (peer_length - at < bytes + padded + digest)
            break;
        const unsigned char *data = header + bytes;
        for (uint32_t i = 0; !login && i < length; i++)
            CHECK(data[i] == pattern(i));
        if (digest)
            CHECK(digest_is(crc32c(0, data, padded), data + padded));
        if (login && guard->data_offer && (header[1] & STAGE) == OPERATIONAL)
            CHECK(memmem(data, length, guard_data_offer(guard), strlen(guard_data_offer(guard)) + 1));
        at += bytes + padded + digest;
    }
    memmove(at_peer, at_peer + at, peer_length - at);
    peer_length -= at;
}

static void target_sends(const unsigned char *bytes, size_t length)
{
    ssize_t n = send(peer, bytes, length, MSG_NOSIGNAL | MSG_DONTWAIT);
    ended |= n != (ssize_t)length;
}

static unsigned char answer[BHS + 2 * DIGEST + TAIL + 4];

/* flags: 1 wrong data digest, 2 wrong header digest, 4 only some of it now. The PDU's data are in place. */
static void send_answer(unsigned char *header, const unsigned char *data, uint32_t length, struct input *input)
{
    unsigned flags = take8(input);
    bool header_digest = guard->header_digests && guard->logged_in;
    bool data_digest = guard->data_digests && guard->logged_in && length;
    put32(header + 4, length);
    if ((flags & 2 && header_digest) || (flags & 1 && data_digest))
        put32(header + 44, WRONG);
    unsigned char *to = answer;
    memcpy(to, header, BHS);
    to += BHS;
    if (header_digest) {
        digest_put(crc32c(0, header, BHS) ^ (flags & 2 ? 1 : 0), to);
        to += DIGEST;
    }
    memcpy(to, data, length);
    memset(to + length, 0, pdu_padded(length) - length);
    uint32_t crc = crc32c(0, to, pdu_padded(length));
    to += pdu_padded(length);
    if (data_digest) {
        digest_put(crc ^ (flags & 1 ? 0x100 : 0), to);
        to += DIGEST;
    }
    size_t all = (size_t)(to - answer), now = flags & 4 ? bt_min(all, take16(input)) : all;
    target_sends(answer, now);
    if (now == all || ended)
        return;
    if (guard_pull(guard) < 0)
        ended = true;
    else
        target_sends(answer + now, all - now);
}

static void send_login(struct input *input)
{
    static const char *const values[] = {"", "None", "CRC32C", "Reject"};
    unsigned kind = take8(input);
    char text[400];
    unsigned char header[BHS] = {LOGIN_RESPONSE, kind & 64 ? 0x86 : 0x87};
    int n = 0;
    if (kind & 3)
        n += snprintf(text + n, sizeof text - (size_t)n, "HeaderDigest=%s", values[kind & 3]) + 1;
    if (kind >> 2 & 3)
        n += snprintf(text + n, sizeof text - (size_t)n, "DataDigest=%s", values[kind >> 2 & 3]) + 1;
    if (kind & 128) {
        unsigned more = take8(input);
        for (unsigned i = 0; i < more; i++)
            text[n++] = (char)take8(input);
    }
    header[36] = kind & 32 ? take8(input) : 0;
    send_answer(header, (unsigned char *)text, (uint32_t)n, input);
}

static void send_data(struct input *input)
{
    static unsigned char data[TAIL];
    uint32_t itt = take8(input), flags = take8(input), length = take16(input);
    struct command *command = session_find(NULL, itt);
    uint32_t offset = flags & 2 || !command ? take32(input) : command->received;
    unsigned char header[BHS] = {DATA_IN, (unsigned char)(flags & 0x81), 0, take8(input)};
    put32(header + 16, itt);
    put32(header + 40, offset);
    for (uint32_t i = 0; i < length; i++)
        data[i] = pattern(offset + i);
    send_answer(header, data, length, input);
}

static void send_other(struct input *input)
{
    unsigned char header[BHS] = {take8(input), take8(input), take8(input), take8(input)}, data[256];
    uint32_t length = take8(input);
    put32(header + 16, take8(input));
    put32(header + 20, take8(input));
    put32(header + 40, take32(input));
    put32(header + 44, take32(input) & 0x3ffff);
    header[4] = take8(input) == 255;
    for (uint32_t i = 0; i < length; i++)
        data[i] = take8(input);
    forged |= (header[0] & 0x3f) == DATA_IN;
    send_answer(header, data, length, input);
}

static void send_raw(struct input *input)
{
    unsigned char data[256];
    uint32_t length = take8(input);
    for (uint32_t i = 0; i < length; i++)
        data[i] = take8(input);
    forged = true;
    target_sends(data, length);
}

static void step(struct input *input)
{
    int ret = 0;
    switch (take8(input) % 8) {
    case 0:
        send_login(input);
        break;
    case 1:
    case 2:
        send_data(input);
        break;
    case 3:
        send_other(input);
        break;
    case 4:
        send_raw(input);
        break;
    case 5:
        if (guard->logged_in)
            write_pdu(take8(input) & 4 ? 5 : 1, take8(input), take16(input) % 40000); /* Data-Out, SCSI Command */
        else
            write_login(input);
        ret = guard_push(guard);
        check_outgoing();
        break;
    default:
        ret = guard_pull(guard);
    }
    ended |= ret < 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
    static const struct bt_device_api api = {.iov_slice = bt_iov_slice, .iov_from_buffer = bt_iov_from_buffer};
    struct input input = {bytes, size};
    unsigned offers = take8(&input);
    int ends[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends) == 0);
    inner = ends[0], peer = ends[1];
    ended = forged = false;
    in_login = true;
    to_write = peer_length = had = 0;
    guard = guard_new(offers & 3, offers >> 2 & 3);
    CHECK(guard && guard_insert(guard, NULL) == 0);
    node.api = &api;
    session = (struct session){.node = &node};
    for (uint32_t i = 0; i < COMMANDS; i++)
        make_command(i);
    while (input.left && !ended) {
        if (guard->logged_in && !guard->session && !(offers & 16))
            guard_serve(guard, &session);
        step(&input);
    }
    if (!ended)
        guard_pull(guard);
    guard_free(guard);
    close(inner);
    close(peer);
    for (uint32_t i = 0; i < COMMANDS; i++)
        drop_command(i);
    return 0;
}
