/* SPDX-License-Identifier: Apache-2.0 */
/* What the measuring clients share: the workload's options, where the next request goes, and the report.
 *
 * To be included once, by a program that defines PROGRAM. It does no I/O. */
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define MAX_SAMPLES (1u << 22)
#define MAX_UNITS (1u << 26)

static struct {
    const char *socket, *export, *op;
    uint64_t bs, span, stride, ios;
    unsigned qd, connections;
    double secs;
    bool poll, structured, verify;
    int pid;
} config = {.export = "", .op = "randread", .bs = 4096, .qd = 32, .connections = 1, .secs = 2};

static bool is_write, is_random, stopping;
static uint64_t issued, completed, next_place;
static uint32_t *places;                /* --stride with a random operation: every unit once */
static uint32_t *samples, sample_count; /* ns / 16 */
static uint64_t random_state = 88172645463325252ull;

static _Noreturn void die(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fputs(PROGRAM ": ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    exit(1);
}

static uint64_t clock_ns(clockid_t clock)
{
    struct timespec t;
    if (clock_gettime(clock, &t) < 0)
        die("clock: %s", strerror(errno));
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t now_ns(void) { return clock_ns(CLOCK_MONOTONIC); }

/* CPU time of all threads of the server, those that have ended too. A clock tick (10 ms) would be too coarse for
 * short runs, and threads come and go in servers that have pools. */
static uint64_t server_cpu_ns(void)
{
    clockid_t clock;
    if (!config.pid)
        return 0;
    int error = clock_getcpuclockid(config.pid, &clock);
    if (error)
        die("--pid %d: %s", config.pid, strerror(error));
    return clock_ns(clock);
}

static uint64_t next_random(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    return random_state ^= random_state << 17;
}

/* ---- data ---- */

/* Written data differ from block to block, but are not made anew for each request: that would measure the client. */
static void fill_random(uint8_t *data, size_t length)
{
    for (size_t i = 0; i + 8 <= length; i += 8) {
        uint64_t word = next_random();
        memcpy(data + i, &word, 8);
    }
}

/* --verify: every 8 bytes say where they belong. */
static uint64_t pattern_word(uint64_t offset) { return offset * 0x9e3779b97f4a7c15ull; }

static void fill_pattern(uint8_t *data, uint64_t offset)
{
    for (uint64_t i = 0; i < config.bs; i += 8) {
        uint64_t word = pattern_word(offset + i);
        memcpy(data + i, &word, 8);
    }
}

/* Of a block at `offset`, the bytes `data` that begin `at` bytes into it. */
static void check_pattern(const uint8_t *data, uint64_t offset, uint64_t at, size_t length)
{
    for (size_t i = (8 - at % 8) % 8; i + 8 <= length; i += 8) {
        uint64_t want = pattern_word(offset + at + i);
        if (memcmp(data + i, &want, 8))
            die("wrong data at %" PRIu64, offset + at + i);
    }
}

/* ---- places ---- */

static uint64_t unit(void) { return config.stride ? config.stride : config.bs; }

static uint64_t choose_offset(void)
{
    uint64_t units = config.span / unit();
    if (places)
        return places[next_place++ % units] * unit();
    return (is_random ? next_random() % units : next_place++ % units) * unit();
}

static void shuffle_places(void)
{
    uint64_t units = config.span / unit();
    if (units > MAX_UNITS || !(places = malloc(units * sizeof *places)))
        die("--stride: too many places");
    for (uint64_t i = 0; i < units; i++)
        places[i] = (uint32_t)i;
    for (uint64_t i = units - 1; i > 0; i--) {
        uint64_t other = next_random() % (i + 1);
        uint32_t place = places[i];
        places[i] = places[other];
        places[other] = place;
    }
}

/* Once the size is known: where requests may go. */
static void prepare_span(uint64_t size)
{
    if (!config.span || config.span > size)
        config.span = size;
    if (config.span < unit() || unit() < config.bs)
        die("the disk, or --stride, is smaller than one request");
    if (config.stride && is_random)
        shuffle_places();
}

static bool may_issue(void) { return !stopping && (!config.ios || issued < config.ios); }

/* ---- the report ---- */

struct measured {
    double seconds;
    uint64_t server_ns, client_ns;
};

static void record(uint64_t ns)
{
    if (sample_count < MAX_SAMPLES)
        samples[sample_count++] = (uint32_t)(ns / 16 < UINT32_MAX ? ns / 16 : UINT32_MAX);
    completed++;
}

static int by_value(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

static double percentile(double p)
{
    return sample_count ? samples[(uint32_t)(p * (sample_count - 1))] * 16.0 / 1000 : 0;
}

static double mean_us(void)
{
    double sum = 0;
    for (uint32_t i = 0; i < sample_count; i++)
        sum += samples[i] * 16.0 / 1000;
    return sample_count ? sum / sample_count : 0;
}

/* One JSON object; `more` is put at its end. */
static void report(struct measured m, const char *more)
{
    double ios = completed ? (double)completed : 1;
    qsort(samples, sample_count, sizeof *samples, by_value);
    printf("{\"op\":\"%s\",\"bs\":%" PRIu64 ",\"qd\":%u,\"seconds\":%.4f,\"ios\":%" PRIu64
           ",\"iops\":%.0f,\"mibps\":%.1f,\"lat_us\":{\"mean\":%.2f,\"p50\":%.2f,\"p99\":%.2f,\"p99.9\":%.2f},"
           "\"backend_cpu_us_per_io\":%.3f,\"client_cpu_us_per_io\":%.3f%s}\n",
           config.op, config.bs, config.qd, m.seconds, completed, (double)completed / m.seconds,
           (double)completed * (double)config.bs / m.seconds / (1 << 20), mean_us(), percentile(0.5), percentile(0.99),
           percentile(0.999), (double)m.server_ns / 1000 / ios, (double)m.client_ns / 1000 / ios, more);
}

/* ---- options ---- */

static uint64_t bytes(const char *text)
{
    char *end;
    uint64_t value = strtoull(text, &end, 10);
    int shift = *end == 'k' ? 10 : *end == 'm' ? 20 : *end == 'g' ? 30 : *end == 't' ? 40 : 0;
    if (end == text || (shift ? end[1] : end[0]) || value > UINT64_MAX >> shift)
        die("'%s' is not a number", text);
    return value << shift;
}

/* Takes the options named in `names`, by the letters below; false at one that is not known. */
static bool parse_options(int argc, char **argv, const struct option *names)
{
    for (int c; (c = getopt_long(argc, argv, "", names, NULL)) != -1;) {
        switch (c) {
        case 's': config.socket = optarg; break;
        case 'x': config.export = optarg; break;
        case 'o': config.op = optarg; break;
        case 'b': config.bs = bytes(optarg); break;
        case 'q': config.qd = (unsigned)bytes(optarg); break;
        case 'c': config.connections = (unsigned)bytes(optarg); break;
        case 't': config.secs = atof(optarg); break;
        case 'n': config.ios = bytes(optarg); break;
        case 'S': config.span = bytes(optarg); break;
        case 'd': config.stride = bytes(optarg); break;
        case 'P': config.poll = true; break;
        case 'r': config.structured = true; break;
        case 'v': config.verify = true; break;
        case 'p': config.pid = (int)bytes(optarg); break;
        default: return false;
        }
    }
    is_write = strstr(config.op, "write") != NULL;
    is_random = strncmp(config.op, "rand", 4) == 0;
    return optind == argc && config.socket && config.qd && config.bs && config.bs % 8 == 0 &&
           (is_write || strstr(config.op, "read"));
}

/* ---- the run ---- */

/* The program's: keeps requests in flight until the time is over or --ios are done, and waits for the last. */
static void run(uint64_t until);

/* So that reads find the pattern: one pass of writes over the span. */
static void write_pattern(void)
{
    uint64_t ios = config.ios;
    bool was_random = is_random;
    is_write = true;
    is_random = false;
    config.ios = config.span / unit();
    run(UINT64_MAX);
    is_write = false;
    is_random = was_random;
    config.ios = ios;
    issued = completed = next_place = 0;
    sample_count = 0;
    stopping = false;
}

static struct measured measure(void)
{
    if (!(samples = malloc(MAX_SAMPLES * sizeof *samples)))
        die("no memory");
    memset(samples, 1, MAX_SAMPLES * sizeof *samples); /* no page faults while it measures */
    if (config.verify && !is_write)
        write_pattern();
    uint64_t server = server_cpu_ns(), client = clock_ns(CLOCK_PROCESS_CPUTIME_ID), start = now_ns();
    run(config.ios ? UINT64_MAX : start + (uint64_t)(config.secs * 1e9));
    return (struct measured){(double)(now_ns() - start) / 1e9, server_cpu_ns() - server,
                             clock_ns(CLOCK_PROCESS_CPUTIME_ID) - client};
}
