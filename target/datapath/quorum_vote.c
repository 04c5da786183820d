/* SPDX-License-Identifier: Apache-2.0 */
/* The quorum's votes on data and on errors, and what it reports. Of versions with as many votes the one that came up
 * last wins, as in QEMU (block/quorum.c). */
#include "quorum_internal.h"

/* ---- reports ---- */

static bool alike(const struct bt_quorum_report *a, const struct bt_quorum_report *b)
{
    return a->type == b->type && a->op == b->op && a->child == b->child;
}

/* Under the lock. The place of one that is alike, or a new one. */
static struct bt_quorum_report *place(struct bt_quorum *quorum, const struct bt_quorum_report *report)
{
    for (int i = 0; i < quorum->reports_count; i++)
        if (alike(&quorum->reports[i], report))
            return &quorum->reports[i];
    if (quorum->reports_count == BT_QUORUM_REPORTS)
        memmove(quorum->reports, quorum->reports + 1, --quorum->reports_count * sizeof *report);
    return &quorum->reports[quorum->reports_count++];
}

static void report(struct bt_quorum *quorum, const struct bt_quorum_report *report)
{
    struct bt_event event = {.type = BT_EVENT_SESSION, .tag = quorum->session_tag};
    pthread_mutex_lock(&quorum->lock);
    *place(quorum, report) = *report;
    bool tell = !quorum->told;
    quorum->told = true;
    pthread_mutex_unlock(&quorum->lock);
    if (tell)
        bt_event_send(quorum->device.base.dp, &event);
}

bool bt_quorum_report(bt_object *object, struct bt_quorum_report *out)
{
    struct bt_quorum *quorum = (struct bt_quorum *)object;
    pthread_mutex_lock(&quorum->lock);
    bool some = quorum->reports_count != 0;
    if (some) {
        *out = quorum->reports[0];
        memmove(quorum->reports, quorum->reports + 1, (size_t)--quorum->reports_count * sizeof *out);
    }
    quorum->told = some;
    pthread_mutex_unlock(&quorum->lock);
    return some;
}

static struct bt_quorum_report report_on(const struct bt_quorum_op *op, enum bt_quorum_report_type type)
{
    return (struct bt_quorum_report){
        .type = type, .op = op->io->op, .offset = op->io->offset + op->at, .length = op->length};
}

void bt_quorum_report_bad(struct bt_quorum_op *op, const struct bt_quorum_part *part)
{
    struct bt_quorum_report bad = report_on(op, BT_QUORUM_BAD);
    if (bt_quorum_is(op->quorum, BT_QUORUM_BLKVERIFY))
        return;
    bad.child = part->request.object->tag;
    bad.error = -part->result;
    report(op->quorum, &bad);
}

void bt_quorum_report_failure(struct bt_quorum_op *op)
{
    struct bt_quorum_report failure = report_on(op, BT_QUORUM_FAILURE);
    if (!bt_quorum_is(op->quorum, BT_QUORUM_BLKVERIFY))
        report(op->quorum, &failure);
}

int bt_quorum_stop(struct bt_quorum_op *op, enum bt_quorum_report_type why, uint64_t at)
{
    struct bt_quorum_report end = {.type = why, .op = op->io->op, .offset = op->io->offset, .length = op->io->length};
    end.at = op->io->offset + op->at + at;
    end.error = -op->parts[0].result;
    end.other = -op->parts[1].result;
    if (!atomic_exchange(&op->quorum->stopped, true))
        report(op->quorum, &end);
    return -EIO;
}

/* ---- versions ----
 * A version is what some parts have in common; its number is that of the first of them. */

/* The version with most votes; votes: by version, 0 for what is none. */
static int most_votes(const int *votes, int count)
{
    int winner = 0;
    for (int i = count - 1; i >= 0; i--)
        if (votes[i] > votes[winner] || (votes[i] == votes[winner] && i > winner))
            winner = i;
    return winner;
}

int bt_quorum_first(struct bt_quorum_op *op)
{
    for (int i = 0; i < op->count; i++)
        if (op->parts[i].result == 0)
            return i;
    return -1;
}

static int error_version(const struct bt_quorum_op *op, int part)
{
    int i = 0;
    while (op->parts[i].result != op->parts[part].result)
        i++;
    return i;
}

int bt_quorum_count(struct bt_quorum_op *op)
{
    int votes[BT_QUORUM_MAX_CHILDREN] = {0}, good = 0;
    for (int i = 0; i < op->count; i++)
        if (op->parts[i].result == 0)
            good++;
        else
            votes[error_version(op, i)]++;
    if (good >= op->quorum->threshold || good == op->count)
        return 0;
    return op->parts[most_votes(votes, op->count)].result;
}

static bool same_data(const struct bt_quorum_op *op, int a, int b)
{
    return memcmp(op->parts[a].iov.iov_base, op->parts[b].iov.iov_base, op->length) == 0;
}

bool bt_quorum_unanimous(struct bt_quorum_op *op)
{
    int first = bt_quorum_first(op);
    for (int i = first + 1; i < op->count; i++)
        if (op->parts[i].result == 0 && !same_data(op, first, i))
            return false;
    return true;
}

int bt_quorum_elect(struct bt_quorum_op *op)
{
    int version[BT_QUORUM_MAX_CHILDREN], votes[BT_QUORUM_MAX_CHILDREN] = {0};
    for (int i = 0; i < op->count; i++) {
        if (op->parts[i].result != 0)
            continue;
        version[i] = 0;
        while (version[i] < i && !(votes[version[i]] && same_data(op, version[i], i)))
            version[i]++;
        votes[version[i]]++;
    }
    int winner = most_votes(votes, op->count);
    if (votes[winner] < op->quorum->threshold)
        return -EIO;
    for (int i = 0; i < op->count; i++)
        op->parts[i].bad = op->parts[i].result == 0 && version[i] != winner;
    return winner;
}

uint64_t bt_quorum_difference(struct bt_quorum_op *op)
{
    const unsigned char *a = op->parts[0].iov.iov_base, *b = op->parts[1].iov.iov_base;
    uint64_t at = 0;
    while (at < op->length && a[at] == b[at])
        at++;
    return at;
}
