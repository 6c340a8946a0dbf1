/* Two processes that meet again and again. Who comes first waits for the other by looking at a
 * variable, and does nothing else: no system call, no fault, no time read. A machine that cannot take
 * the processor away in the middle of such a loop never gets to the second meeting, and can
 * only say so. */
#include "guest.h"

enum { MEETINGS = 100 };

/* The last meeting that each has come to. A cache line for each is not needed: one processor. */
struct place {
    volatile unsigned here[2];
    volatile uint64_t looks[2];
};

static void meet(struct place *place, int me)
{
    for (unsigned meeting = 1; meeting <= MEETINGS; meeting++) {
        uint64_t looked = 0;
        place->here[me] = meeting;
        while (place->here[!me] < meeting)
            looked++;
        place->looks[me] += looked;
    }
}

int main(void)
{
    struct place *place = shared_memory(sizeof *place);
    uint64_t before = now_ns();
    int status;
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("quiet: two processes, each of which waits for the other without a word");
    pid_t child = must(fork(), "fork");
    meet(place, child == 0);
    if (child == 0)
        _exit(0);
    must(waitpid(child, &status, 0), "waitpid");
    printf("quiet: time: %lu ns; looks %lu and %lu\n", now_ns() - before, place->looks[0],
           place->looks[1]);
    printf("quiet: met %d times\n", MEETINGS);
    restart();
}
