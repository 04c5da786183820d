/* SPDX-License-Identifier: Apache-2.0 */
/* Connecting, logging in and inquiring: on a thread that may wait, with a limit for all of it. What the target says
 * about its LUN is checked here, once. */
#define _GNU_SOURCE
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "internal.h"

#define STEP_MS 500 /* libiscsi looks at its timers only when it is called */
#define MAX_ATTEMPTS 20
#define MAX_REDIRECTS 4
#define BUSY_US 20000
#define MIN_BLOCK 512
#define MAX_BLOCK 65536

/* VPD pages, SPC-4 7.8, SBC-3 6.6 */
enum vpd_page {
    VPD_PAGES = 0x00,
    VPD_IDENTIFICATION = 0x83,
    VPD_LIMITS = 0xb0,
    VPD_DEVICE = 0xb1,
    VPD_PROVISION = 0xb2,
};

__attribute__((format(printf, 3, 4)))
static int failed(struct bt_iscsi_link *link, int error, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(link->error, sizeof link->error, format, args);
    va_end(args);
    return error;
}

static void drop_context(struct bt_iscsi_link *link)
{
    if (link->ctx)
        iscsi_destroy_context(link->ctx);
    guard_free(link->guard);
    link->ctx = NULL;
    link->guard = NULL;
}

bt_iscsi_link *bt_iscsi_link_new(void)
{
    struct bt_iscsi_link *link = calloc(1, sizeof *link);
    if (!link)
        return NULL;
    link->cancel_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (link->cancel_fd < 0) {
        free(link);
        return NULL;
    }
    return link;
}

void bt_iscsi_link_cancel(bt_iscsi_link *link)
{
    uint64_t one = 1;
    ssize_t n = write(link->cancel_fd, &one, sizeof one);
    (void)n;
}

const char *bt_iscsi_link_error(bt_iscsi_link *link) { return link->error; }
void bt_iscsi_link_lun(bt_iscsi_link *link, struct bt_iscsi_lun *out) { *out = link->lun; }

void bt_iscsi_link_free(bt_iscsi_link *link)
{
    drop_context(link);
    if (link->task)
        scsi_free_scsi_task(link->task);
    close(link->cancel_fd);
    free(link);
}

/* ---- waiting ---- */

/* Why it cannot be connected: libiscsi would only say that it does not try again. */
static int connect_error(struct bt_iscsi_link *link)
{
    int error = 0;
    socklen_t length = sizeof error;
    if (getsockopt(iscsi_get_fd(link->ctx), SOL_SOCKET, SO_ERROR, &error, &length) < 0 || !error)
        return 0;
    return failed(link, -error, "%s", strerror(error));
}

static int service(struct bt_iscsi_link *link, int events)
{
    int error = !link->guard && (events & (POLLERR | POLLHUP)) ? connect_error(link) : 0;
    if (error)
        return error;
    if (!link->guard)
        return iscsi_service(link->ctx, events) < 0
                   ? failed(link, -ECONNRESET, "%s", iscsi_get_error(link->ctx))
                   : 0;
    int ret = events & ~POLLOUT ? guard_pull(link->guard) : 0;
    return ret < 0 ? failed(link, ret, "%s", guard_error(link->guard)) : 0;
}

static int wait_once(struct bt_iscsi_link *link)
{
    uint64_t now = bt_now_ns();
    if (now >= link->until_ns)
        return failed(link, -ETIMEDOUT, "no answer in time");
    if (link->guard && guard_push(link->guard) < 0)
        return failed(link, -ECONNRESET, "%s", guard_error(link->guard));
    int left = (int)bt_min((link->until_ns - now) / MS + 1, STEP_MS);
    struct pollfd fds[2] = {{.fd = link->cancel_fd, .events = POLLIN}, {.fd = iscsi_get_fd(link->ctx)}};
    fds[1].events = (short)iscsi_which_events(link->ctx);
    if (link->guard)
        fds[1] = (struct pollfd){.fd = guard_fd(link->guard), .events = (short)guard_events(link->guard)};
    if (poll(fds, 2, left) < 0 && errno != EINTR)
        return failed(link, -errno, "poll: %s", strerror(errno));
    if (fds[0].revents)
        return failed(link, -ECANCELED, "given up");
    return service(link, fds[1].revents);
}

static int wait_for_answer(struct bt_iscsi_link *link)
{
    int ret = 0;
    while (ret == 0 && !link->answer.here)
        ret = wait_once(link);
    return ret;
}

static void has_status(struct iscsi_context *ctx, int status, void *data, void *private)
{
    struct bt_iscsi_link *link = private;
    (void)ctx, (void)data;
    link->answer.here = true;
    link->answer.status = status;
}

static int make_context(struct bt_iscsi_link *link, const struct bt_iscsi_options *options)
{
    struct iscsi_context *ctx = link->ctx = iscsi_create_context(options->initiator);
    if (!ctx)
        return failed(link, -ENOMEM, "no iSCSI context for initiator name '%s'", options->initiator);
    iscsi_set_noautoreconnect(ctx, 1);
    iscsi_set_isid_random(ctx, options->isid, options->isid_qualifier);
    if (iscsi_set_targetname(ctx, options->target) || iscsi_set_session_type(ctx, ISCSI_SESSION_NORMAL) ||
        iscsi_set_header_digest(ctx, options->header_digest) ||
        (options->user && iscsi_set_initiator_username_pwd(ctx, options->user, options->password)) ||
        (options->mutual_user && iscsi_set_target_username_pwd(ctx, options->mutual_user, options->mutual_password)))
        return failed(link, -EINVAL, "%s", iscsi_get_error(ctx));
    return 0;
}

/* What has been started comes to an end: 0 and link->answer.status, or -errno. */
static int finish_step(struct bt_iscsi_link *link, int started)
{
    if (started)
        return failed(link, -ECONNREFUSED, "%s", iscsi_get_error(link->ctx));
    int ret = wait_for_answer(link);
    if (ret == 0 && link->answer.status != SCSI_STATUS_GOOD && link->answer.status != SCSI_STATUS_REDIRECT)
        ret = failed(link, -ECONNREFUSED, "%s", iscsi_get_error(link->ctx));
    return ret;
}

static int set_guard(struct bt_iscsi_link *link, const struct bt_iscsi_options *options)
{
    link->guard = guard_new(options->header_digest, options->data_digest);
    int ret = link->guard ? guard_insert(link->guard, link->ctx) : -ENOMEM;
    return ret < 0 ? failed(link, ret, "%s", strerror(-ret)) : 0;
}

static int log_in_at(struct bt_iscsi_link *link, const struct bt_iscsi_options *options, const char *portal)
{
    int ret = make_context(link, options);
    link->answer.here = false;
    if (ret == 0)
        ret = finish_step(link, iscsi_connect_async(link->ctx, portal, has_status, link));
    if (ret == 0)
        ret = set_guard(link, options);
    link->answer.here = false;
    if (ret == 0)
        ret = finish_step(link, iscsi_login_async(link->ctx, has_status, link));
    return ret;
}

/* A target may send us to another address. */
static int log_in(struct bt_iscsi_link *link, const struct bt_iscsi_options *options)
{
    char portal[BT_ISCSI_MAX_STRING + 1];
    snprintf(portal, sizeof portal, "%s", options->portal);
    for (int i = 0; i < MAX_REDIRECTS; i++) {
        int ret = log_in_at(link, options, portal);
        if (ret < 0 || link->answer.status == SCSI_STATUS_GOOD)
            return ret;
        snprintf(portal, sizeof portal, "%s", iscsi_get_target_address(link->ctx));
        drop_context(link);
    }
    return failed(link, -ELOOP, "it is elsewhere, wherever one looks");
}

/* ---- commands that ask ---- */

static void has_data(struct iscsi_context *ctx, int status, void *data, void *private)
{
    struct bt_iscsi_link *link = private;
    struct scsi_task *task = data;
    (void)ctx;
    link->answer.here = true;
    link->answer.status = status;
    link->answer.length = 0;
    if (!task)
        return;
    link->answer.sense = task->sense;
    if (status == SCSI_STATUS_GOOD && task->datain.data && task->datain.size > 0) {
        link->answer.length = (uint32_t)bt_min((uint64_t)task->datain.size, sizeof link->answer.data);
        memcpy(link->answer.data, task->datain.data, link->answer.length);
    }
}

/* Asks once. What comes is in link->answer. The task of a command without an answer is freed after the context. */
static int ask_once(struct bt_iscsi_link *link, const unsigned char *cdb, int cdb_length, uint32_t room)
{
    struct scsi_task *task = scsi_create_task(cdb_length, (unsigned char *)cdb, SCSI_XFER_READ, (int)room);
    if (!task)
        return failed(link, -ENOMEM, "no memory");
    link->task = task;
    memset(&link->answer, 0, sizeof link->answer);
    if (iscsi_scsi_command_async(link->ctx, link->lun_number, task, has_data, NULL, link))
        return failed(link, -ECONNRESET, "%s", iscsi_get_error(link->ctx));
    int ret = wait_for_answer(link);
    if (ret == 0) {
        link->task = NULL;
        scsi_free_scsi_task(task);
    }
    return ret;
}

/* 0: link->answer holds it. 1: the LUN does not know the command. -errno: it is of no use. */
static int ask(struct bt_iscsi_link *link, const unsigned char *cdb, int cdb_length, uint32_t room)
{
    for (int i = 0; i < MAX_ATTEMPTS; i++) {
        int ret = ask_once(link, cdb, cdb_length, room);
        if (ret < 0 || link->answer.status == SCSI_STATUS_GOOD)
            return ret;
        if (link->answer.status == SCSI_STATUS_CHECK_CONDITION) {
            if (link->answer.sense.key == SCSI_SENSE_ILLEGAL_REQUEST)
                return 1;
            if (link->answer.sense.key == SCSI_SENSE_UNIT_ATTENTION)
                continue;
            return failed(link, -EIO, "command %#x: %s", cdb[0], iscsi_get_error(link->ctx));
        }
        if (link->answer.status == SCSI_STATUS_RESERVATION_CONFLICT)
            return 1; /* another has it, and may yet let us read */
        if (link->answer.status >= SCSI_STATUS_CANCELLED)
            return failed(link, -ECONNRESET, "command %#x: %s", cdb[0], iscsi_get_error(link->ctx));
        if (link->answer.status != SCSI_STATUS_BUSY && link->answer.status != SCSI_STATUS_TASK_SET_FULL)
            return failed(link, -EIO, "command %#x: status %#x", cdb[0], link->answer.status);
        usleep(BUSY_US);
    }
    return failed(link, -EBUSY, "command %#x: the LUN is busy", cdb[0]);
}

/* ---- what the LUN is ---- */

static void copy_text(char *out, const unsigned char *text, size_t length)
{
    for (size_t i = 0; i < length; i++)
        out[i] = text[i] >= 0x20 && text[i] < 0x7f ? (char)text[i] : '?';
    while (length && (out[length - 1] == ' ' || out[length - 1] == '?'))
        length--;
    out[length] = 0;
}

/* SPC-4 6.6.2 */
static int ask_standard(struct bt_iscsi_link *link)
{
    const unsigned char cdb[6] = {INQUIRY, 0, 0, 0, 36};
    int ret = ask(link, cdb, sizeof cdb, 36);
    const unsigned char *data = link->answer.data;
    if (ret < 0)
        return ret;
    if (ret > 0 || link->answer.length < 36)
        return failed(link, -EIO, "the answer to INQUIRY is too short");
    if (data[0] >> 5)
        return failed(link, -ENODEV, "there is no LUN %d", link->lun_number);
    if (data[0] & 0x1f)
        return failed(link, -ENODEV, "LUN %d is not a disk (device type %d)", link->lun_number, data[0] & 0x1f);
    link->lun.flags |= data[5] & 0x08 ? BT_ISCSI_COPY : 0;
    copy_text(link->lun.vendor, data + 8, 8);
    copy_text(link->lun.product, data + 16, 16);
    return 0;
}

static int set_capacity(struct bt_iscsi_link *link, uint64_t last, uint32_t block_size)
{
    link->lun.block_size = block_size;
    link->lun.blocks = last + 1;
    if (block_size < MIN_BLOCK || block_size > MAX_BLOCK || (block_size & (block_size - 1)))
        return failed(link, -EIO, "blocks of %u bytes are not supported", block_size);
    if (last >= INT64_MAX / block_size)
        return failed(link, -EIO, "%llu blocks are too many", (unsigned long long)last);
    return 0;
}

/* SBC-3 5.16, and 5.15 for what is older */
static int ask_capacity(struct bt_iscsi_link *link)
{
    const unsigned char cdb16[16] = {SERVICE_ACTION_IN_16, SA_READ_CAPACITY_16, [13] = 32};
    const unsigned char cdb10[10] = {READ_CAPACITY_10};
    int ret = ask(link, cdb16, sizeof cdb16, 32);
    const unsigned char *data = link->answer.data;
    if (ret < 0)
        return ret;
    if (ret == 0 && link->answer.length >= 16) {
        link->lun.flags |= data[14] & 0x80 ? BT_ISCSI_PROVISIONED : 0;
        link->lun.flags |= data[14] & 0x40 ? BT_ISCSI_READS_ZEROS : 0;
        return set_capacity(link, get64(data), get32(data + 8));
    }
    if (ret == 0)
        return failed(link, -EIO, "the answer to READ CAPACITY is too short");
    ret = ask(link, cdb10, sizeof cdb10, 8);
    if (ret < 0)
        return ret;
    if (ret > 0 || link->answer.length < 8)
        return failed(link, -EIO, "it does not tell its capacity");
    return set_capacity(link, get32(data), get32(data + 4));
}

/* SPC-4 6.11; all mode pages, of which the caching page (SBC-3 6.5.5) is looked at. */
static int ask_mode(struct bt_iscsi_link *link)
{
    const unsigned char cdb[6] = {MODE_SENSE_6, 0x08, 0x3f, 0, 255};
    int ret = ask(link, cdb, sizeof cdb, 255);
    const unsigned char *data = link->answer.data;
    link->lun.flags |= BT_ISCSI_WRITE_CACHE;
    if (ret == -EIO || ret == -EBUSY) /* it answers, and may be reserved by another: that is no reason not to open */
        return 0;
    if (ret != 0 || link->answer.length < 4)
        return ret < 0 ? ret : 0;
    uint32_t end = (uint32_t)bt_min(link->answer.length, data[0] + 1u);
    link->lun.flags |= data[2] & 0x80 ? BT_ISCSI_READ_ONLY : 0;
    link->lun.flags |= data[2] & 0x10 ? BT_ISCSI_DPOFUA : 0;
    for (uint32_t at = 4u + data[3]; at + 3 < end;) {
        if ((data[at] & 0x7f) == 0x08 && !(data[at + 2] & 0x04))
            link->lun.flags &= ~(uint32_t)BT_ISCSI_WRITE_CACHE;
        at += data[at] & 0x40 ? 4u + get16(data + at + 2) : 2u + data[at + 1];
    }
    return 0;
}

/* ---- vital product data ---- */

/* The bytes of the page behind its header; 0: it has none. */
static int ask_page(struct bt_iscsi_link *link, enum vpd_page page)
{
    const unsigned char cdb[6] = {INQUIRY, 1, (unsigned char)page, 0, 255};
    int ret = ask(link, cdb, sizeof cdb, 255);
    if (ret < 0 && ret != -EIO && ret != -EBUSY)
        return ret;
    if (ret != 0 || link->answer.length < 4 || link->answer.data[1] != page)
        return 0;
    return (int)bt_min(link->answer.length - 4, get16(link->answer.data + 2));
}

static void take_limits(struct bt_iscsi_link *link, uint32_t length)
{
    const unsigned char *data = link->answer.data;
    struct bt_iscsi_lun *lun = &link->lun;
    if (length >= 12)
        lun->max_transfer = get32(data + 8);
    if (length >= 20)
        lun->max_unmap = get32(data + 20);
    if (length >= 40)
        lun->max_write_same = get64(data + 36);
}

static void take_provision(struct bt_iscsi_link *link, uint32_t length)
{
    const unsigned char flags = link->answer.data[5];
    if (length < 2)
        return;
    link->lun.flags |= flags & 0x80 ? BT_ISCSI_UNMAP : 0;
    link->lun.flags |= flags & 0x40 ? BT_ISCSI_SAME_UNMAP : 0;
    link->lun.flags |= flags & 0x20 ? BT_ISCSI_SAME10_UNMAP : 0;
}

/* The designator that names the LUN best, in the form of bytes 4 to 27 of a CSCD descriptor (SPC-4 7.8.6, 6.4.6). */
static void take_designator(struct bt_iscsi_link *link, uint32_t length)
{
    static const int rank[16] = {[3] = 4 /* NAA */, [2] = 3 /* EUI-64 */, [1] = 2 /* T10 vendor */, [0] = 1};
    const unsigned char *data = link->answer.data + 4;
    int best = 0;
    for (uint32_t at = 0; at + 4 <= length && at + 4 + data[at + 3] <= length; at += 4u + data[at + 3]) {
        const unsigned char *found = data + at;
        int of_lun = (found[1] >> 4 & 3) == 0, quality = rank[found[1] & 15];
        if (!of_lun || quality <= best || found[3] > 20)
            continue;
        best = quality;
        memset(link->lun.designator, 0, sizeof link->lun.designator);
        link->lun.designator[0] = found[0] & 15;
        link->lun.designator[1] = found[1] & 15;
        link->lun.designator[3] = found[3];
        memcpy(link->lun.designator + 4, found + 4, found[3]);
    }
}

static int ask_pages(struct bt_iscsi_link *link)
{
    bool has[256] = {false};
    int length = ask_page(link, VPD_PAGES);
    for (int i = 0; i < length; i++)
        has[link->answer.data[4 + i]] = true;
    if (length >= 0 && has[VPD_LIMITS] && (length = ask_page(link, VPD_LIMITS)) > 0)
        take_limits(link, (uint32_t)length);
    if (length >= 0 && has[VPD_PROVISION] && (link->lun.flags & BT_ISCSI_PROVISIONED) &&
        (length = ask_page(link, VPD_PROVISION)) > 0)
        take_provision(link, (uint32_t)length);
    if (length >= 0 && has[VPD_DEVICE] && (length = ask_page(link, VPD_DEVICE)) >= 2)
        link->lun.flags |= get16(link->answer.data + 4) != 1 ? BT_ISCSI_ROTATES : 0;
    if (length >= 0 && has[VPD_IDENTIFICATION] && (length = ask_page(link, VPD_IDENTIFICATION)) > 0)
        take_designator(link, (uint32_t)length);
    return length < 0 ? length : 0;
}

/* SPC-4 6.19: RECEIVE COPY OPERATING PARAMETERS. A copy manager that does not tell its limits is not used. */
static int ask_copy_manager(struct bt_iscsi_link *link)
{
    const unsigned char cdb[16] = {RECEIVE_COPY, SA_COPY_PARAMETERS, [13] = 64};
    if (!(link->lun.flags & BT_ISCSI_COPY))
        return 0;
    int ret = ask(link, cdb, sizeof cdb, 64);
    const unsigned char *data = link->answer.data;
    if (ret < 0)
        return ret;
    bool usable = ret == 0 && link->answer.length >= 20 && get16(data + 8) >= 2 && get16(data + 10) >= 1;
    link->lun.max_copy = usable ? get32(data + 16) : 0;
    if (!usable || (link->lun.max_copy && link->lun.max_copy < link->lun.block_size))
        link->lun.flags &= ~(uint32_t)BT_ISCSI_COPY;
    return 0;
}

int bt_iscsi_link_open(bt_iscsi_link *link, const struct bt_iscsi_options *options, int timeout_ms)
{
    link->until_ns = bt_now_ns() + (uint64_t)timeout_ms * MS;
    link->lun_number = options->lun;
    int ret = log_in(link, options);
    if (ret == 0)
        ret = ask_standard(link);
    if (ret == 0)
        ret = ask_capacity(link);
    if (ret == 0)
        ret = ask_mode(link);
    if (ret == 0)
        ret = ask_pages(link);
    if (ret == 0)
        ret = ask_copy_manager(link);
    return ret;
}
