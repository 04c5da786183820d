/* SPDX-License-Identifier: Apache-2.0 */
/* Single cases of the file device: wrong options, errors, a failed sync, large requests, many
 * vectors; and the functions on I/O vectors.
 *
 * test_file_cases DIRECTORY: makes and removes files in DIRECTORY. */
#define _GNU_SOURCE
#include "file_common.h"

static int do_op(bt_datapath *dp, bt_object *object, int op, uint32_t flags, uint64_t offset, uint64_t length,
                 void *buffer)
{
    struct bt_event event;
    CHECK(bt_submit(dp, 0, object, op, flags, offset, length, buffer, 42) == 0);
    wait_event(dp, BT_EVENT_DONE, &event);
    return (int)event.result;
}

/* A failed sync of cached data is never forgotten: /dev/full takes no sync. */
static void test_failed_sync(void)
{
    bt_datapath *dp = start_datapath();
    int fd = open("/dev/full", O_RDWR | O_CLOEXEC);
    char byte = 1;
    bt_object *file = bt_file_new(dp, 1, fd, 0, 0, BT_ENGINE_THREADS, 1, 1);
    CHECK(file);
    CHECK(do_op(dp, file, BT_WRITE, 0, 0, 1, &byte) == -ENOSPC);
    CHECK(do_op(dp, file, BT_FLUSH, 0, 0, 0, NULL) == -EINVAL);
    CHECK(do_op(dp, file, BT_FLUSH, 0, 0, 0, NULL) == -EINVAL);
    release(dp, file);
    file = bt_file_new(dp, 1, fd, 0, BT_FILE_NO_FLUSH, BT_ENGINE_THREADS, 1, 1);
    CHECK(do_op(dp, file, BT_FLUSH, 0, 0, 0, NULL) == 0);
    release(dp, file);
    close(fd);
    bt_datapath_free(dp);
}

static void test_options(void)
{
    bt_datapath *dp = start_datapath();
    int fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    CHECK(!bt_file_new(dp, 1, fd, 0, 0, BT_ENGINE_NATIVE, 1, 1) && errno == EINVAL);
    CHECK(!bt_file_new(dp, 1, fd, 0, 0, 7, 1, 1) && errno == EINVAL);
    CHECK(!bt_file_new(dp, 1, fd, 0, BT_FILE_DIRECT, BT_ENGINE_THREADS, 3, 1) && errno == EINVAL);
    CHECK(!bt_file_new(dp, 1, fd, 0, 0, BT_ENGINE_THREADS, 512, 1) && errno == EINVAL);
    CHECK(!bt_file_new(dp, 1, -1, 0, 0, BT_ENGINE_THREADS, 1, 1) && errno == EBADF);
    close(fd);
    bt_datapath_free(dp);
}

/* Cached writes that wait go to the engine for a while; --wrap lets them. */
static _Atomic bool slow_writes;

ssize_t __real_pwritev(int fd, const struct iovec *iov, int n, off_t at);
ssize_t __wrap_pwritev(int fd, const struct iovec *iov, int n, off_t at);
ssize_t __wrap_pwritev(int fd, const struct iovec *iov, int n, off_t at)
{
    if (atomic_load(&slow_writes))
        usleep(2000);
    return __real_pwritev(fd, iov, n, at);
}

static void test_slow_writes(const char *directory)
{
    char path[PATH_MAX], data[512] = "x";
    int fd = open_file(directory, path, false);
    bt_datapath *dp = start_datapath();
    bt_object *file = bt_file_new(dp, 1, fd, 0, 0, BT_ENGINE_THREADS, 1, 1);
    struct bt_counters before = {0}, after;
    atomic_store(&slow_writes, true);
    for (int i = 0; i < 50 && !before.engine_done; i++) { /* the third, unless this machine is very busy */
        CHECK(do_op(dp, file, BT_WRITE, 0, 0, sizeof data, data) == 0);
        bt_object_counters(file, &before);
    }
    CHECK(before.inline_done >= 2 && before.engine_done == 1);
    atomic_store(&slow_writes, false);
    usleep(120000);
    for (int i = 0; i < 100; i++)
        CHECK(do_op(dp, file, BT_WRITE, 0, 0, sizeof data, data) == 0);
    bt_object_counters(file, &after);
    CHECK(after.inline_done > before.inline_done);
    release(dp, file);
    bt_datapath_free(dp);
    close(fd);
    unlink(path);
}

/* Larger than a bounce buffer, more vectors than one system call takes, errors from the kernel. */
static void test_large(const char *directory, int engine, bool direct)
{
    enum { LENGTH = (3 << 20) + 1001 };
    char path[PATH_MAX];
    int fd = open_file(directory, path, direct);
    if (fd < 0) {
        unlink(path);
        return;
    }
    bt_datapath *dp = start_datapath();
    uint32_t align = direct ? 512 : 1;
    bt_object *file = bt_file_new(dp, 1, fd, 0, direct ? BT_FILE_DIRECT : 0, engine, align, align);
    unsigned char *out = malloc(LENGTH), *in = malloc(LENGTH);
    for (int i = 0; i < LENGTH; i++)
        out[i] = (unsigned char)(i * 17 >> 3);
    CHECK(do_op(dp, file, BT_WRITE, BT_FUA, 3333, LENGTH, out) == 0);
    CHECK(bt_object_size(file) == 3333 + LENGTH);
    CHECK(do_op(dp, file, BT_READ, 0, 3333, LENGTH, in) == 0);
    CHECK(memcmp(in, out, LENGTH) == 0);
    CHECK(do_op(dp, file, BT_READ, 0, LENGTH, LENGTH, in) == 0);
    CHECK(memcmp(in, out + LENGTH - 3333, 3333) == 0);
    for (int i = 3333; i < LENGTH; i++)
        CHECK(in[i] == 0);
    CHECK(do_op(dp, file, BT_READ, 0, 1 << 30, 4096, in) == 0 && in[0] == 0 && in[4095] == 0);
    CHECK(do_op(dp, file, BT_WRITE, 0, UINT64_MAX - 100, 512, out) < 0);
    struct stat st;
    CHECK(fstat(fd, &st) == 0 && st.st_size == 3333 + LENGTH);
    release(dp, file);
    close(fd);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    file = bt_file_new(dp, 1, fd, LENGTH, 0, BT_ENGINE_THREADS, 1, 1);
    CHECK(do_op(dp, file, BT_WRITE, 0, 0, 512, out) == -EBADF);
    release(dp, file);
    close(fd);
    bt_datapath_free(dp);
    free(out);
    free(in);
    unlink(path);
}

/* What the device is asked with more vectors than one system call takes; on its thread. */
struct many {
    struct bt_message message;
    struct bt_device *device;
    int op, result;
    struct iovec iov[IOV_MAX + 500];
    _Atomic bool done;
};

static void many_done(struct bt_io *io, int result)
{
    struct many *many = io->owner;
    many->result = result;
    atomic_store(&many->done, true);
}

static void many_start(struct bt_message *message, struct bt_thread *thread)
{
    struct many *many = BT_CONTAINER(message, struct many, message);
    struct bt_io *io = bt_io_get(thread, IOV_MAX + 500);
    io->device = many->device;
    io->owner = many;
    io->done = many_done;
    io->op = (uint8_t)many->op;
    io->length = (IOV_MAX + 500) * 512;
    memcpy(io->iov, many->iov, sizeof many->iov);
    bt_io_submit(io);
}

static void test_many_vectors(const char *directory, int engine, bool direct)
{
    char path[PATH_MAX];
    int fd = open_file(directory, path, direct);
    bt_datapath *dp = start_datapath();
    bt_object *file =
        fd < 0 ? NULL : bt_file_new(dp, 1, fd, 0, direct ? BT_FILE_DIRECT : 0, engine, direct ? 512 : 1, 1);
    unsigned char *memory = NULL;
    CHECK(posix_memalign((void **)&memory, 4096, (IOV_MAX + 500) * 512) == 0);
    struct many *many = calloc(1, sizeof *many);
    many->device = (struct bt_device *)file;
    many->message.fn = many_start;
    for (int write = 1; file && write >= 0; write--) {
        for (int i = 0; i < IOV_MAX + 500; i++) {
            many->iov[i] = (struct iovec){.iov_base = memory + 512 * (IOV_MAX + 499 - i), .iov_len = 512};
            memset(memory + 512 * i, write ? i : 0, 512);
        }
        many->op = write ? BT_WRITE : BT_READ;
        atomic_store(&many->done, false);
        bt_thread_post(bt_thread_get(dp, 0), &many->message);
        while (!atomic_load(&many->done))
            usleep(100);
        CHECK(many->result == 0);
    }
    for (int i = 0; file && i < (IOV_MAX + 500) * 512; i++)
        CHECK(memory[i] == (unsigned char)(i / 512));
    if (file)
        release(dp, file);
    bt_datapath_free(dp);
    free(many);
    free(memory);
    close(fd);
    unlink(path);
}

static void test_iov(void)
{
    unsigned char a[100], b[100];
    struct iovec iov[] = {{a, 10}, {a + 50, 0}, {a + 20, 30}, {a + 60, 5}}, out[3];
    for (int i = 0; i < 100; i++)
        a[i] = (unsigned char)i;
    CHECK(bt_iov_slice(iov, 4, 5, 37, out, 3) == 3);
    CHECK(out[0].iov_base == a + 5 && out[0].iov_len == 5 && out[2].iov_base == a + 60 && out[2].iov_len == 2);
    CHECK(bt_iov_slice(iov, 4, 5, 37, out, 2) == -E2BIG);
    CHECK(bt_iov_slice(iov, 4, 10, 30, out, 3) == 1 && out[0].iov_base == a + 20 && out[0].iov_len == 30);
    bt_iov_to_buffer(iov, 4, 8, b, 10);
    CHECK(b[0] == 8 && b[1] == 9 && b[2] == 20 && b[9] == 27);
    bt_iov_zero(iov, 4, 9, 2);
    CHECK(a[8] == 8 && a[9] == 0 && a[10] == 10 && a[20] == 0 && a[21] == 21);
    bt_iov_from_buffer(iov, 4, 9, "xyz", 3);
    CHECK(a[9] == 'x' && a[20] == 'y' && a[21] == 'z' && a[22] == 22);
    unsigned char zeros[4096] = {0};
    for (size_t length = 0; length < 70; length++)
        for (size_t at = 0; at <= length; at++) {
            struct iovec z[] = {{zeros + 3, length / 3}, {zeros + 100, length - length / 3}};
            zeros[at < length / 3 ? 3 + at : 100 + at - length / 3] = at < length;
            CHECK(bt_iov_is_zero(z, 2, 0, length) == (at == length));
            memset(zeros, 0, 200);
        }
}

int main(int argc, char **argv)
{
    if (argc < 2)
        fail("usage: test_file_cases DIRECTORY");
    test_iov();
    test_options();
    test_failed_sync();
    test_slow_writes(argv[1]);
    int last = bt_probe_io_uring() ? BT_ENGINE_IO_URING : BT_ENGINE_NATIVE;
    for (int engine = BT_ENGINE_THREADS; engine <= last; engine++)
        for (int direct = engine == BT_ENGINE_NATIVE; direct <= 1; direct++) {
            test_large(argv[1], engine, direct);
            test_many_vectors(argv[1], engine, direct);
        }
    puts("ok");
    return 0;
}
