/* Processes that keep the processor, but come by the kernel now and then: they compute, touch a
 * fresh page (a fault), give pages back (madvise, munmap), ask who they are. None of it waits or
 * gives way, and none of it leaves the guest. Each handover of the baton needs the processor to be
 * taken away; it suffices to take it where the kernel is entered. */
#include "guest.h"

enum { PROCESSES = 3, ROUNDS = 50, PAGES = 32, PAGE = 4096, STEPS = 20000 };

struct shared {
    volatile unsigned baton;
    volatile uint64_t order;
    volatile uint64_t entries[PROCESSES], result[PROCESSES];
};

struct walker {
    volatile uint64_t *region;
    unsigned next;
    uint64_t state, dirty, entries;
};

static uint64_t compute(uint64_t state)
{
    for (int step = 0; step < STEPS; step++) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        if (state & 1)
            state++;
    }
    return state;
}

/* Computes, and then enters the kernel in one way or another. */
static void step(struct walker *me)
{
    me->state = compute(me->state);
    me->entries++;
    if (me->next < PAGES) {
        /* A fault. The page is new, so it must be zero. */
        volatile uint64_t *page = me->region + me->next++ * (PAGE / sizeof *me->region);
        me->dirty |= *page;
        *page = me->state;
        return;
    }
    me->next = 0;
    switch (me->entries % 3) {
    case 0:
        must(madvise((void *)me->region, PAGES * PAGE, MADV_DONTNEED), "madvise");
        break;
    case 1:
        syscall(SYS_getppid);
        /* fall through */
    default:
        must(munmap((void *)me->region, PAGES * PAGE), "munmap");
        me->region = mmap((void *)me->region, PAGES * PAGE, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (me->region == MAP_FAILED)
            must(-1, "mmap");
    }
}

static void walk(struct shared *shared, unsigned number)
{
    struct walker me = {.state = 88172645463325252u + number, .next = PAGES};
    me.region = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
                     0);
    if (me.region == MAP_FAILED)
        must(-1, "mmap");
    for (int round = 0; round < ROUNDS; round++) {
        do
            step(&me);
        while (shared->baton != number);
        shared->order = checksum(shared->order, &number, sizeof number);
        shared->baton = (number + 1) % PROCESSES;
    }
    shared->entries[number] = me.entries;
    shared->result[number] = me.state;
    _exit(me.dirty != 0);
}

int main(void)
{
    struct shared *shared = shared_memory(sizeof *shared);
    uint64_t before = now_ns();
    int status, unclean = 0;
    shared->order = CHECKSUM_START;
    setvbuf(stdout, NULL, _IOLBF, 0);
    printf("entries: %d processes pass a baton %d times\n", PROCESSES, PROCESSES * ROUNDS);
    for (unsigned i = 0; i < PROCESSES; i++)
        if (must(fork(), "fork") == 0)
            walk(shared, i);
    while (wait(&status) > 0)
        unclean += status != 0;
    for (int i = 0; i < PROCESSES; i++)
        printf("entries: time: process %d entered %lu times, result %016lx\n", i,
               shared->entries[i], shared->result[i]);
    printf("entries: time: %lu ns\n", now_ns() - before);
    printf("entries: all passed, order %016lx, %d found a page that was not clean\n",
           shared->order, unclean);
    restart();
}
