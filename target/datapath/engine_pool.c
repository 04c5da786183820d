/* SPDX-License-Identifier: Apache-2.0 */
/* Worker threads for work that blocks and has no asynchronous form, and for aio=threads. Workers start on
 * demand, up to a limit, and stay; work beyond that waits in one queue, first come first served. */
#define _GNU_SOURCE
#include <signal.h>

#include "core.h"

struct bt_pool {
    pthread_mutex_t lock;
    pthread_cond_t more;
    struct bt_work *head, **tail;
    unsigned queued;
    unsigned idle; /* workers in wait, the ones signalled but not awake yet included */
    bool stop;
    unsigned count, max;
    pthread_t workers[];
};

struct bt_pool *bt_pool_new(unsigned max_workers)
{
    struct bt_pool *pool = calloc(1, sizeof *pool + max_workers * sizeof pool->workers[0]);
    if (!pool)
        return NULL;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->more, NULL);
    pool->tail = &pool->head;
    pool->max = max_workers;
    return pool;
}

static void work_finished(struct bt_message *message, struct bt_thread *thread)
{
    struct bt_work *work = BT_CONTAINER(message, struct bt_work, message);
    (void)thread;
    work->done(work);
}

static void do_work(struct bt_work *work)
{
    work->run(work);
    work->message.fn = work_finished;
    bt_thread_post(work->thread, &work->message);
}

/* The oldest work, waiting for it; NULL when the pool is stopped and empty. */
static struct bt_work *take_work(struct bt_pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    while (!pool->head && !pool->stop) {
        pool->idle++;
        pthread_cond_wait(&pool->more, &pool->lock);
        pool->idle--;
    }
    struct bt_work *work = pool->head;
    if (work) {
        pool->head = work->next;
        pool->queued--;
        if (!pool->head)
            pool->tail = &pool->head;
    }
    pthread_mutex_unlock(&pool->lock);
    return work;
}

static void *worker_main(void *arg)
{
    struct bt_pool *pool = arg;
    for (struct bt_work *work; (work = take_work(pool));)
        do_work(work);
    return NULL;
}

/* Workers take no signals but the ones that their own memory accesses raise. */
static int worker_start(struct bt_pool *pool)
{
    sigset_t all, old;
    sigfillset(&all);
    sigdelset(&all, SIGBUS);
    sigdelset(&all, SIGSEGV);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int err = pthread_create(&pool->workers[pool->count], NULL, worker_main, pool);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (err)
        return -err;
    pthread_setname_np(pool->workers[pool->count], "bt-worker");
    pool->count++;
    return 0;
}

void bt_pool_submit(bt_datapath *dp, struct bt_work *work)
{
    struct bt_pool *pool = dp->pool;
    pthread_mutex_lock(&pool->lock);
    if (pool->queued >= pool->idle && pool->count < pool->max)
        (void)worker_start(pool); /* not startable now: those that run will come to it */
    bool nobody = pool->count == 0;
    if (!nobody) {
        work->next = NULL;
        *pool->tail = work;
        pool->tail = &work->next;
        pool->queued++;
    }
    bool wake = pool->idle > 0;
    pthread_mutex_unlock(&pool->lock);
    if (wake)
        pthread_cond_signal(&pool->more);
    if (nobody)
        do_work(work); /* late for others on this thread, but done */
}

int bt_pool_ready(bt_datapath *dp)
{
    struct bt_pool *pool = dp->pool;
    pthread_mutex_lock(&pool->lock);
    int ret = pool->count ? 0 : worker_start(pool);
    pthread_mutex_unlock(&pool->lock);
    return ret;
}

void bt_pool_free(struct bt_pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    pool->stop = true;
    pthread_mutex_unlock(&pool->lock);
    pthread_cond_broadcast(&pool->more);
    for (unsigned i = 0; i < pool->count; i++)
        pthread_join(pool->workers[i], NULL);
    pthread_cond_destroy(&pool->more);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}
