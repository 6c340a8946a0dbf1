/* What the programs of the guests share. Each is a first process, or started by one: no
 * shell, no libraries, a serial console. A failed call has nobody to tell but the console, so
 * must() says what failed and ends the process, which for process 1 is a kernel panic. */
#ifndef GUEST_H
#define GUEST_H

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static inline long must(long result, const char *what)
{
    if (result < 0) {
        printf("%s: %s\n", what, strerror(errno));
        fflush(stdout);
        _exit(1);
    }
    return result;
}

/* The time since boot, by the system call itself: the guests run with vdso=0, and so does a
 * guest that was started without it. Always inline, for chaos tells places by who calls syscall(). */
static inline __attribute__((always_inline)) uint64_t now_ns(void)
{
    struct timespec t;
    must(syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &t), "clock_gettime");
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

/* FNV-1a: one differing bit in what was read shows on the console. */
#define CHECKSUM_START 0xcbf29ce484222325u
static inline uint64_t checksum(uint64_t sum, const void *data, size_t size)
{
    const unsigned char *byte = data;
    while (size--)
        sum = (sum ^ *byte++) * 0x100000001b3u;
    return sum;
}

static inline void mount_all(void)
{
    static const char *const places[] = {"proc", "sys", "dev"};
    static const char *const kinds[] = {"proc", "sysfs", "devtmpfs"};
    for (int i = 0; i < 3; i++) {
        char path[8];
        snprintf(path, sizeof path, "/%s", places[i]);
        mkdir(path, 0755);
        if (mount(kinds[i], path, kinds[i], 0, NULL) < 0 && errno != EBUSY)
            must(-1, path);
    }
}

/* Loads the modules that the image brings for the kernel that runs, in the order of their list. One that
 * finds no hardware is one of several ways to do the same. */
static inline void load_modules(void)
{
    struct utsname kernel;
    must(uname(&kernel), "uname");
    char path[256], name[128];
    snprintf(path, sizeof path, "/modules/%s/list", kernel.release);
    FILE *list = fopen(path, "r");
    if (!list)
        must(-1, path);
    while (fscanf(list, "%127s", name) == 1) {
        snprintf(path, sizeof path, "/modules/%s/%s", kernel.release, name);
        int fd = (int)must(open(path, O_RDONLY | O_CLOEXEC), path);
        if (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST && errno != ENODEV)
            must(-1, path);
        close(fd);
    }
    fclose(list);
}

/* Zeroed memory, all of it present, that children share with their parent. */
static inline void *shared_memory(size_t size)
{
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE,
                        MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (memory == MAP_FAILED)
        must(-1, "mmap");
    return memory;
}

/* Ends a guest that has done its work: a reboot, which the monitor sees as the end. A program
 * that is tried out elsewhere is no first process, and must not take the machine down. */
static inline void restart(void)
{
    fflush(stdout);
    if (getpid() != 1)
        exit(0);
    sync();
    must(reboot(RB_AUTOBOOT), "reboot");
}

/* Ends a guest by turning it off, where it can be. */
static inline void power_off(void)
{
    fflush(stdout);
    if (getpid() != 1)
        exit(0);
    sync();
    must(reboot(RB_POWER_OFF), "power off");
}

#endif
