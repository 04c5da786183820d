/* SPDX-License-Identifier: Apache-2.0 */
/* SCSI commands: given to libiscsi, answered, sent again where their status says so, with bounds. */
#include "internal.h"

#define MAX_ATTENTIONS 10
#define MAX_ABORTED 3

static const uint16_t busy_ms[] = {8, 32, 128, 512, 2048, 8192};
#define MAX_BUSY (sizeof busy_ms / sizeof *busy_ms)

/* ---- lists ---- */

void list_append(struct list *list, struct command *command)
{
    command->next = NULL;
    command->pprev = list->tail;
    *list->tail = command;
    list->tail = &command->next;
    list->count++;
}

void list_remove(struct list *list, struct command *command)
{
    *command->pprev = command->next;
    if (command->next)
        command->next->pprev = command->pprev;
    else
        list->tail = command->pprev;
    list->count--;
}

/* ---- making ---- */

struct command *command_new(struct session *session, void (*done)(struct command *, int))
{
    struct command *command = session->free;
    if (command)
        session->free = command->next;
    else if (!(command = malloc(sizeof *command)))
        return NULL;
    memset(command, 0, offsetof(struct command, iov_inline));
    command->iov_allocated = NULL;
    command->bounce = NULL;
    command->session = session;
    command->done = done;
    return command;
}

void command_free(struct command *command)
{
    free(command->iov_allocated);
    free(command->bounce);
    command->next = command->session->free;
    command->session->free = command;
}

void command_data(struct command *command, int direction, void *data, uint32_t length)
{
    command->direction = (uint8_t)direction;
    command->length = length;
    command->iov_inline[0] = (struct iovec){.iov_base = data, .iov_len = length};
    command->iov = command->iov_inline;
    command->iovcnt = 1;
}

/* A vector that the kernel would not take whole. */
static int bounce_vector(struct command *command, struct bt_io *io, uint64_t at)
{
    void *memory = malloc(command->length);
    if (!memory)
        return -ENOMEM;
    if (command->direction == SCSI_XFER_WRITE)
        command->session->node->api->iov_to_buffer(io->iov, io->iovcnt, at, memory, command->length);
    command_data(command, command->direction, memory, command->length);
    command->bounce = memory;
    return 0;
}

int command_vector(struct command *command, int direction, struct bt_io *io, uint64_t at, uint32_t length)
{
    const int inline_count = sizeof command->iov_inline / sizeof *command->iov_inline;
    const struct bt_device_api *api = command->session->node->api;
    command->direction = (uint8_t)direction;
    command->length = length;
    command->iov = io->iov;
    command->iovcnt = io->iovcnt;
    if (length == io->length && io->iovcnt <= BT_ISCSI_MAX_VECTOR)
        return 0;
    command->iov = command->iov_inline;
    command->iovcnt = api->iov_slice(io->iov, io->iovcnt, at, length, command->iov, inline_count);
    if (command->iovcnt >= 0)
        return 0;
    command->iov_allocated = command->iov = malloc(BT_ISCSI_MAX_VECTOR * sizeof *io->iov);
    if (!command->iov)
        return -ENOMEM;
    command->iovcnt = api->iov_slice(io->iov, io->iovcnt, at, length, command->iov, BT_ISCSI_MAX_VECTOR);
    return command->iovcnt >= 0 ? 0 : bounce_vector(command, io, at);
}

/* ---- answers ---- */

/* As QEMU translates it (scsi/utils.c), but for what a write protected LUN answers: EROFS. */
int sense_errno(const struct scsi_sense *sense)
{
    switch ((int)sense->key) {
    case SCSI_SENSE_NO_SENSE:
    case SCSI_SENSE_RECOVERED_ERROR:
        return 0;
    case SCSI_SENSE_UNIT_ATTENTION:
        return -EAGAIN;
    case SCSI_SENSE_COMMAND_ABORTED:
        return -ECANCELED;
    case SCSI_SENSE_NOT_READY:
    case SCSI_SENSE_ILLEGAL_REQUEST:
    case SCSI_SENSE_DATA_PROTECTION:
        break;
    default:
        return -EIO;
    }
    switch (sense->ascq) {
    case SCSI_SENSE_ASCQ_PARAMETER_LIST_LENGTH_ERROR:
    case SCSI_SENSE_ASCQ_INVALID_OPERATION_CODE:
    case SCSI_SENSE_ASCQ_INVALID_FIELD_IN_CDB:
    case SCSI_SENSE_ASCQ_INVALID_FIELD_IN_PARAMETER_LIST:
        return -EINVAL;
    case SCSI_SENSE_ASCQ_LBA_OUT_OF_RANGE:
    case ASCQ_SPACE_ALLOCATION_FAILED:
        return -ENOSPC;
    case SCSI_SENSE_ASCQ_LOGICAL_UNIT_NOT_SUPPORTED:
        return -ENXIO;
    case SCSI_SENSE_ASCQ_MEDIUM_NOT_PRESENT:
    case SCSI_SENSE_ASCQ_MEDIUM_NOT_PRESENT_TRAY_CLOSED:
    case SCSI_SENSE_ASCQ_MEDIUM_NOT_PRESENT_TRAY_OPEN:
        return -ENOMEDIUM;
    case SCSI_SENSE_ASCQ_WRITE_PROTECTED:
    case SCSI_SENSE_ASCQ_HARDWARE_WRITE_PROTECTED:
    case SCSI_SENSE_ASCQ_SOFTWARE_WRITE_PROTECTED:
        return -EROFS;
    default:
        return -EIO;
    }
}

bool command_is_whole(const struct command *command)
{
    bool all_here = command->direction != SCSI_XFER_READ || command->received == command->length;
    return all_here && (command->task.residual_status != SCSI_RESIDUAL_UNDERFLOW || !command->task.residual);
}

static void finish(struct command *command, int result)
{
    unsigned char *data = command->task.datain.data; /* sense data, which libiscsi leaves to us */
    command->done(command, result);
    free(data);
}

void command_fail(struct command *command, int result)
{
    command->task.datain.data = NULL;
    command->task.status = SCSI_STATUS_ERROR;
    command->done(command, result);
}

static void again(struct command *command, uint64_t delay_ns)
{
    struct session *session = command->session;
    free(command->task.datain.data);
    atomic_fetch_add_explicit(&session->node->retried, 1, memory_order_relaxed);
    session_retry_later(session, command, delay_ns);
}

static void again_if_busy(struct command *command, int error)
{
    if (command->busy < MAX_BUSY)
        again(command, busy_ms[command->busy++] * MS);
    else
        finish(command, error);
}

static void again_if_aborted(struct command *command)
{
    if (command->aborted++ < MAX_ABORTED)
        again(command, 0);
    else
        finish(command, -ECANCELED);
}

/* SPC-4 5.14, 4.5.6: the command was not done; something has changed, which may be the size. */
static void attention(struct command *command)
{
    struct session *session = command->session;
    atomic_fetch_add_explicit(&session->node->unit_attentions, 1, memory_order_relaxed);
    switch (command->task.sense.ascq >> 8) {
    case 0x29: /* power on, reset, nexus loss */
    case 0x2a: /* parameters or capacity changed */
    case 0x3f: /* inquiry data or reported LUNs changed */
        session_refresh(session);
    }
    if (command->attentions++ < MAX_ATTENTIONS)
        again(command, 0);
    else
        finish(command, command->raw ? 0 : -EIO);
}

static void check_condition(struct command *command)
{
    const struct scsi_sense *sense = &command->task.sense;
    if (sense->key == SCSI_SENSE_UNIT_ATTENTION)
        attention(command);
    else if (command->raw)
        finish(command, 0);
    else if (sense->key == SCSI_SENSE_COMMAND_ABORTED)
        again_if_aborted(command);
    else if (sense->key == SCSI_SENSE_NOT_READY && sense->ascq == ASCQ_BECOMING_READY)
        again_if_busy(command, -EIO);
    else
        finish(command, sense_errno(sense));
}

bool command_asked(struct command *command, uint64_t length)
{
    command->asked += length;
    command->unsent++;
    return command->asked <= 2ull * command->length;
}

void command_settle(struct command *command)
{
    struct session *session = command->session;
    list_remove(&session->sent, command);
    session->held -= command->held;
    if (session->waiting.head) /* there is room for one more */
        session->node->api->defer(session->thread, &session->kick);
    switch (command->task.status) {
    case SCSI_STATUS_GOOD:
    case SCSI_STATUS_CONDITION_MET:
        finish(command, 0);
        break;
    case SCSI_STATUS_CHECK_CONDITION:
        check_condition(command);
        break;
    case SCSI_STATUS_BUSY:
    case SCSI_STATUS_TASK_SET_FULL:
        again_if_busy(command, command->raw ? 0 : -EBUSY);
        break;
    case SCSI_STATUS_TASK_ABORTED:
        again_if_aborted(command);
        break;
    case SCSI_STATUS_RESERVATION_CONFLICT:
        finish(command, command->raw ? 0 : -EBADE);
        break;
    default: /* a broken rule of the protocol */
        finish(command, -EIO);
    }
}

static bool is_good(int status) { return status == SCSI_STATUS_GOOD || status == SCSI_STATUS_CONDITION_MET; }

static void answered(struct iscsi_context *ctx, int status, void *data, void *private)
{
    struct command *command = private;
    struct session *session = command->session;
    (void)data;
    if (session->dying)
        return;
    if (status == SCSI_STATUS_CANCELLED) { /* the connection is lost; it stays where it is, to be sent again */
        session_break(session, "%s", iscsi_get_error(ctx));
        return;
    }
    bool sent = output_has(guard_output(session->guard), command);
    if (!sent || (command->unsent && is_good(status))) { /* it stays, too */
        free(command->task.datain.data);
        command->task.datain.data = NULL;
        session_break(session, "the target has done command %#x before all of it was sent", command->cdb[0]);
        return;
    }
    session->answering = true;
    command->task.status = status;
    command->held = command->unsent;
    if (command->held)
        session->held++;
    else
        command_settle(command);
}

/* ---- sending ---- */

bool command_send(struct command *command)
{
    struct session *session = command->session;
    struct scsi_task *task = &command->task;
    memset(task, 0, sizeof *task);
    memcpy(task->cdb, command->cdb, sizeof task->cdb);
    task->cdb_size = command->cdb_length;
    task->xfer_dir = command->direction;
    task->expxferlen = (int)command->length;
    if (command->direction == SCSI_XFER_READ) /* the guard fills it in */
        scsi_task_set_iov_in(task, (struct scsi_iovec *)command->iov, command->iovcnt);
    else if (command->direction == SCSI_XFER_WRITE)
        scsi_task_set_iov_out(task, (struct scsi_iovec *)command->iov, command->iovcnt);
    command->sent_ns = bt_now_ns();
    command->received = 0;
    command->asked = 0;
    command->unsent = 0;
    command->ended = command->held = false;
    return iscsi_scsi_command_async(session->ctx, session->node->lun_number, task, answered, NULL, command) == 0;
}

void command_start(struct command *command)
{
    struct session *session = command->session;
    if (session->state == UP || session->state == DOWN) {
        list_append(&session->waiting, command);
        session->node->api->defer(session->thread, &session->kick);
    } else {
        command_fail(command, -EIO);
    }
}
