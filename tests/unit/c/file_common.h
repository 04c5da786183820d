/* SPDX-License-Identifier: Apache-2.0 */
/* What the C tests of the file device share. */
#ifndef BT_TEST_FILE_COMMON_H
#define BT_TEST_FILE_COMMON_H

#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core.h"

#define THREADS 3

static inline void fail(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    _exit(1);
}

#define CHECK(condition)                                                                                     \
    do {                                                                                                     \
        if (!(condition))                                                                                    \
            fail("%s:%d: not true: %s", __FILE__, __LINE__, #condition);                                     \
    } while (0)

static inline bool is_device(const char *path)
{
    struct stat st;
    CHECK(stat(path, &st) == 0);
    return S_ISBLK(st.st_mode);
}

/* A new file in the directory, or the device itself. */
static inline int open_file(const char *directory, char *path, bool direct)
{
    int flags = O_RDWR | O_CLOEXEC | (direct ? O_DIRECT : 0);
    if (is_device(directory)) {
        snprintf(path, PATH_MAX, "%s", directory);
        return open(path, flags);
    }
    snprintf(path, PATH_MAX, "%s/test_file.XXXXXX", directory);
    int fd = mkstemp(path);
    CHECK(fd >= 0);
    close(fd);
    return open(path, flags);
}

static inline void remove_file(const char *path)
{
    if (!is_device(path))
        unlink(path);
}

static inline bt_datapath *start_datapath(void)
{
    bt_datapath *dp = bt_datapath_new();
    CHECK(dp);
    for (int i = 0; i < THREADS; i++)
        CHECK(bt_thread_new(dp, i == 0 ? 0 : 20000) == i);
    return dp;
}

static inline void wait_event(bt_datapath *dp, uint32_t type, struct bt_event *event)
{
    do {
        while (bt_events(dp, event, 1) == 0)
            usleep(100);
    } while (event->type != type);
}

static inline void release(bt_datapath *dp, bt_object *object)
{
    struct bt_event event;
    bt_object_unref(object);
    wait_event(dp, BT_EVENT_RELEASED, &event);
}

#endif
