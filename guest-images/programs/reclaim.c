/* A guest that swaps for as long as it runs: three processes with more memory between them than the machine
 * has, of which each uses some far more than the rest, over swap on compressed RAM. They write, read, fork,
 * and ask for pages to be forgotten; so the kernel is kept choosing what to evict, by its lists and by what
 * it believes to be in use. What it chose shows in the counters that are printed at the end, and in how long
 * everything takes.
 *
 * From the kernel's command line: `seconds=N` (60), and `mglru=7` or `mglru=0` for the multi-generational
 * LRU where the kernel has it. `mib=N` (104) is what each process has. */
#include "guest.h"

#include <stdbool.h>
#include <sys/swap.h>

enum { WORKERS = 3, SWAP_MIB = 768 };
#define PAGE 4096u
#define MIB (1u << 20)

static uint64_t number(const char *name, uint64_t otherwise)
{
    const char *text = getenv(name);
    return text ? strtoull(text, NULL, 0) : otherwise;
}

static bool put(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    long size = (long)strlen(text);
    bool done = write(fd, text, (size_t)size) == size;
    close(fd);
    return done;
}

/* The head of a swap area (Linux, include/linux/swap.h, union swap_header). */
static void make_swap(const char *path)
{
    static uint32_t head[PAGE / 4];
    head[256] = 1;
    head[257] = SWAP_MIB * (MIB / PAGE) - 1;
    memcpy((char *)head + PAGE - 10, "SWAPSPACE2", 10);
    int fd = (int)must(open(path, O_WRONLY), path);
    must(pwrite(fd, head, sizeof head, 0), path);
    close(fd);
    must(swapon(path, 0), "swapon");
}

static uint64_t next(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

/* A page that packs well but is no other's. */
static void fill(uint64_t *page, uint64_t value)
{
    for (unsigned i = 0; i < PAGE / 8; i++)
        page[i] = i % 8 ? value : value * i;
}

/* Reads /proc/self/smaps to the end: which pages it says are referenced is what the kernel sees of them. */
static uint64_t referenced(void)
{
    FILE *file = fopen("/proc/self/smaps_rollup", "r");
    char line[128];
    unsigned long long kib = 0;
    while (file && fgets(line, sizeof line, file))
        sscanf(line, "Referenced: %llu kB", &kib);
    if (file)
        fclose(file);
    return kib;
}

static void work(unsigned self, uint64_t bytes, uint64_t until_ns)
{
    uint64_t pages = bytes / PAGE, state = 0x9e3779b97f4a7c15u * (self + 1);
    char *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        must(-1, "mmap");
    /* One of them has small pages only, so that both kinds are reclaimed. */
    if (self == 0)
        madvise(memory, bytes, MADV_NOHUGEPAGE);
    for (uint64_t page = 0; page < pages; page++)
        fill((uint64_t *)(memory + page * PAGE), page + self);
    uint64_t sum = CHECKSUM_START, rounds = 0;
    while (rounds < 16 || now_ns() < until_ns) {
        for (int i = 0; i < 200; i++) {
            uint64_t drawn = next(&state);
            /* Seven of eight go to the first eighth. */
            uint64_t page = drawn % (drawn >> 61 ? pages / 8 : pages);
            uint64_t *at = (uint64_t *)(memory + page * PAGE);
            if (drawn >> 40 & 3)
                sum = sum * 31 + at[drawn >> 32 & 511];
            else
                at[drawn >> 32 & 511] = drawn;
        }
        rounds++;
        char *part = memory + next(&state) % (pages - 512) * PAGE;
        switch (rounds % 16) {
        case 3: /* A child shares all of it, and changes a few pages. */
            fflush(stdout);
            int child = (int)must(fork(), "fork");
            if (child == 0) {
                for (int i = 0; i < 300; i++)
                    memory[next(&state) % bytes]++;
                _exit(0);
            }
            must(waitpid(child, NULL, 0), "waitpid");
            break;
        case 6:
            madvise(part, 256 * PAGE, MADV_COLD);
            break;
        case 9:
            madvise(part, 256 * PAGE, MADV_PAGEOUT);
            break;
        case 12:
            sum = sum * 31 + referenced();
            break;
        case 14:
            put("/proc/self/clear_refs", "1");
            break;
        }
    }
    printf("reclaim: process %u: %llu rounds, sum %016llx\n", self, (unsigned long long)rounds,
           (unsigned long long)sum);
    fflush(stdout);
    _exit(0);
}

static void print_counters(void)
{
    static const char *const shown[] = {"pswpin", "pswpout", "pgscan", "pgsteal", "pgactivate",
                                        "pgdeactivate", "pgrefill", "workingset", "pgfault",
                                        "thp_", "oom_kill"};
    FILE *file = fopen("/proc/vmstat", "r");
    char name[64];
    unsigned long long count, sum = CHECKSUM_START;
    while (file && fscanf(file, "%63s %llu", name, &count) == 2) {
        sum = checksum(sum, &count, sizeof count);
        for (unsigned i = 0; i < sizeof shown / sizeof *shown; i++)
            if (strncmp(name, shown[i], strlen(shown[i])) == 0 && count)
                printf("reclaim: %s %llu\n", name, count);
    }
    printf("reclaim: all counters %016llx\n", sum);
}

int main(void)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    mount_all();
    load_modules();
    char text[32];
    snprintf(text, sizeof text, "%dM", SWAP_MIB);
    if (!put("/sys/block/zram0/disksize", text))
        must(-1, "/sys/block/zram0/disksize");
    make_swap("/dev/zram0");
    const char *mglru = getenv("mglru");
    if (mglru && !put("/sys/kernel/mm/lru_gen/enabled", mglru))
        printf("reclaim: this kernel has no multi-generational LRU\n");
    put("/proc/self/oom_score_adj", "-1000");
    uint64_t bytes = number("mib", 104) * MIB;
    uint64_t until_ns = now_ns() + number("seconds", 60) * 1000000000u;
    for (unsigned i = 0; i < WORKERS; i++)
        if (must(fork(), "fork") == 0)
            work(i, bytes, until_ns);
    int status, bad = 0;
    while (wait(&status) > 0)
        bad += status != 0;
    print_counters();
    printf("reclaim: done, %d of %d processes failed\n", bad, WORKERS);
    restart();
}
