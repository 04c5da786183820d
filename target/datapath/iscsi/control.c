/* SPDX-License-Identifier: Apache-2.0 */
/* The device as Python sees it: made, given connections, asked to end; what it says back; commands of the user's. */
#include <stdio.h>

#include "internal.h"

#define MAX_TRANSFER (4u << 20) /* bytes of one READ or WRITE: more are sent side by side */

static void destroy(struct bt_object *object)
{
    struct node *node = (struct node *)object;
    for (unsigned i = 0; i < node->session_count; i++)
        session_destroy(&node->sessions[i]);
    pthread_mutex_destroy(&node->lock);
    free(node);
}

static const struct bt_object_ops object_ops = {.destroy = destroy};

static uint32_t transfer_limit(const struct bt_iscsi_lun *lun)
{
    uint64_t stated = (uint64_t)lun->max_transfer * lun->block_size;
    return (uint32_t)(stated ? bt_min(stated, MAX_TRANSFER) : MAX_TRANSFER);
}

void *bt_iscsi_new(const void *table, void *datapath, uint64_t tag, uint64_t event_tag,
                   const struct bt_iscsi_settings *settings, const struct bt_iscsi_lun *lun)
{
    const struct bt_device_api *api = table;
    bool valid = bt_device_api_fits(api) && settings->sessions >= 1 && settings->sessions <= BT_ISCSI_MAX_SESSIONS;
    struct node *node = valid ? calloc(1, sizeof *node) : NULL;
    int threads = 0;
    while (api->thread_get(datapath, threads))
        threads++;
    if (!node || !threads) {
        free(node);
        errno = valid ? ENOMEM : EINVAL;
        return NULL;
    }
    api->device_init(&node->device, datapath, &iscsi_device_ops, &object_ops, tag, lun->blocks * lun->block_size);
    node->api = api;
    node->event_tag = event_tag;
    node->lun_number = settings->lun;
    node->timeout_ns = (uint64_t)settings->timeout * SECOND;
    node->no_flush = settings->no_flush;
    snprintf(node->place, sizeof node->place, "%s", settings->place);
    pthread_mutex_init(&node->lock, NULL);
    node->lun = *lun;
    node->blocks = node->most_blocks = lun->blocks;
    node->max_transfer = transfer_limit(lun);
    node->session_count = (unsigned)settings->sessions;
    node->open_sessions = settings->sessions;
    for (int i = 0; i < settings->sessions; i++)
        session_init(&node->sessions[i], node, (unsigned)i, api->thread_get(datapath, i % threads));
    return node;
}

void bt_iscsi_counters(void *object, struct bt_iscsi_counters *out)
{
    struct node *node = object;
    out->connections = node->connections;
    out->resent = node->resent;
    out->retried = node->retried;
    out->unit_attentions = node->unit_attentions;
    out->timeouts = node->timeouts;
    out->copied = node->copied;
}

/* ---- to the sessions' threads ---- */

static void attach_here(struct bt_message *message, struct bt_thread *thread)
{
    struct bt_iscsi_link *link = BT_CONTAINER(message, struct bt_iscsi_link, message);
    struct session *session = link->session;
    struct node *node = session->node;
    (void)thread;
    session_attach(session, link);
    node->api->object_unref(&node->device.base);
}

void bt_iscsi_attach(void *object, int index, bt_iscsi_link *link)
{
    struct node *node = object;
    link->session = &node->sessions[index];
    link->message.fn = attach_here;
    node->api->object_ref(&node->device.base);
    node->api->thread_post(link->session->thread, &link->message);
}

struct notice {
    struct bt_message message;
    struct session *session;
};

static void give_up_here(struct bt_message *message, struct bt_thread *thread)
{
    struct notice *notice = BT_CONTAINER(message, struct notice, message);
    struct node *node = notice->session->node;
    (void)thread;
    session_give_up(notice->session);
    free(notice);
    node->api->object_unref(&node->device.base);
}

void bt_iscsi_give_up(void *object, int index)
{
    struct node *node = object;
    struct notice *notice = calloc(1, sizeof *notice);
    if (!notice)
        abort(); /* requests would wait for ever */
    notice->session = &node->sessions[index];
    notice->message.fn = give_up_here;
    node->api->object_ref(&node->device.base);
    node->api->thread_post(notice->session->thread, &notice->message);
}

void bt_iscsi_reason(void *object, int index, char *out, size_t size)
{
    struct node *node = object;
    pthread_mutex_lock(&node->lock);
    snprintf(out, size, "%s", node->sessions[index].reason);
    pthread_mutex_unlock(&node->lock);
}

static void close_here(struct bt_message *message, struct bt_thread *thread)
{
    (void)thread;
    session_close(BT_CONTAINER(message, struct session, close));
}

void bt_iscsi_close(void *object, uint64_t cookie)
{
    struct node *node = object;
    node->close_cookie = cookie;
    node->api->object_ref(&node->device.base);
    for (unsigned i = 0; i < node->session_count; i++) {
        node->sessions[i].close.fn = close_here;
        node->api->thread_post(node->sessions[i].thread, &node->sessions[i].close);
    }
}

void node_session_closed(struct node *node)
{
    if (atomic_fetch_sub(&node->open_sessions, 1) != 1)
        return;
    node->api->event_done(node->device.base.dp, node->close_cookie, 0);
    node->api->object_unref(&node->device.base);
}

/* ---- to Python ---- */

void node_event(struct session *session, enum bt_iscsi_event event)
{
    struct node *node = session->node;
    struct bt_event sent = {.type = BT_EVENT_SESSION,
                            .tag = node->event_tag,
                            .result = (int64_t)session->index << 8 | event};
    node->api->event_send(node->device.base.dp, &sent);
}

void node_set_blocks(struct session *session, uint64_t blocks, uint32_t block_size)
{
    struct node *node = session->node;
    if (block_size != node->lun.block_size) {
        if (!atomic_exchange(&node->changed, true))
            node_event(session, BT_ISCSI_CHANGED);
        return;
    }
    uint64_t most = atomic_load(&node->most_blocks);
    while (most < blocks && !atomic_compare_exchange_weak(&node->most_blocks, &most, blocks))
        ;
    if (atomic_exchange(&node->blocks, blocks) == blocks)
        return;
    node->api->object_set_size(&node->device.base, blocks * block_size);
    node_event(session, BT_ISCSI_RESIZED);
}

static void capacity_read(struct command *command, int result)
{
    struct session *session = command->session;
    const unsigned char *data = command->buffer;
    uint64_t last = get64(data);
    uint32_t block_size = get32(data + 8);
    session->refreshing = false;
    if (result == 0 && command->received >= 12 && block_size && last < INT64_MAX / block_size)
        node_set_blocks(session, last + 1, block_size);
    command_free(command);
}

/* SBC-3 5.16 */
void session_refresh(struct session *session)
{
    struct command *command = session->refreshing ? NULL : command_new(session, capacity_read);
    if (!command)
        return;
    session->refreshing = true;
    memset(command->buffer, 0, sizeof command->buffer);
    command->cdb[0] = SERVICE_ACTION_IN_16;
    command->cdb[1] = SA_READ_CAPACITY_16;
    command->cdb[13] = 32;
    command->cdb_length = 16;
    command->once = true; /* a new connection reads it anyway */
    command_data(command, SCSI_XFER_READ, command->buffer, 32);
    command_start(command);
}

/* ---- commands of the user's ---- */

struct user_command {
    struct bt_message message;
    struct node *node;
    struct bt_iscsi_command *command;
    uint64_t cookie;
};

static void user_end(struct user_command *user, int result)
{
    struct node *node = user->node;
    node->api->event_done(node->device.base.dp, user->cookie, result);
    node->api->object_unref(&node->device.base);
    free(user);
}

/* libiscsi leaves sense data with its length before it (RFC 7143 11.4.7.2). */
static void take_sense(struct bt_iscsi_command *out, const struct scsi_task *task)
{
    if (task->status != SCSI_STATUS_CHECK_CONDITION || !task->datain.data || task->datain.size < 2)
        return;
    uint64_t length = bt_min(get16(task->datain.data), (uint64_t)task->datain.size - 2);
    out->sense_length = (int)bt_min(length, sizeof out->sense);
    memcpy(out->sense, task->datain.data + 2, (size_t)out->sense_length);
}

static void user_done(struct command *command, int result)
{
    struct user_command *user = command->owner;
    struct bt_iscsi_command *out = user->command;
    out->status = command->task.status;
    if (result == 0)
        take_sense(out, &command->task);
    out->data_in_length = command->received;
    command_free(command);
    user_end(user, result);
}

static void user_start(struct bt_message *message, struct bt_thread *thread)
{
    struct user_command *user = BT_CONTAINER(message, struct user_command, message);
    struct bt_iscsi_command *in = user->command;
    struct command *command = command_new(&user->node->sessions[0], user_done);
    (void)thread;
    if (!command) {
        user_end(user, -ENOMEM);
        return;
    }
    command->owner = user;
    command->raw = true;
    command->once = true;
    memcpy(command->cdb, in->cdb, sizeof in->cdb);
    command->cdb_length = (uint8_t)in->cdb_length;
    if (in->data_out_length)
        command_data(command, SCSI_XFER_WRITE, in->data_out, in->data_out_length);
    else if (in->data_in_length)
        command_data(command, SCSI_XFER_READ, in->data_in, in->data_in_length);
    command_start(command);
}

void bt_iscsi_command(void *object, struct bt_iscsi_command *command, uint64_t cookie)
{
    struct node *node = object;
    struct user_command *user = calloc(1, sizeof *user);
    if (!user) {
        node->api->event_done(node->device.base.dp, cookie, -ENOMEM);
        return;
    }
    *user = (struct user_command){.node = node, .command = command, .cookie = cookie, .message.fn = user_start};
    node->api->object_ref(&node->device.base);
    node->api->thread_post(node->sessions[0].thread, &user->message);
}
