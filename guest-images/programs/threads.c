/* Threads that wait for each other as a spin lock does: by looking at a variable, with no system
 * call, no time read and no PAUSE. One processor serves them all, so nothing moves unless it is
 * taken from whoever spins: each handover of the baton needs a timer tick that lands in user
 * mode. */
#include "guest.h"
#include <pthread.h>

enum { THREADS = 3, ROUNDS = 80 };

/* Whoever holds the baton may touch what is below it. */
static volatile unsigned baton;
static uint64_t order = CHECKSUM_START;
static uint64_t looks[THREADS];

static void *runner(void *argument)
{
    unsigned me = (unsigned)(uintptr_t)argument;
    uint64_t looked = 0;
    for (int round = 0; round < ROUNDS; round++) {
        while (baton != me)
            looked++;
        order = checksum(order, &me, sizeof me);
        baton = (me + 1) % THREADS;
    }
    looks[me] = looked;
    return NULL;
}

int main(void)
{
    pthread_t threads[THREADS];
    uint64_t before = now_ns();
    setvbuf(stdout, NULL, _IOLBF, 0);
    printf("threads: %d threads pass a baton %d times\n", THREADS, THREADS * ROUNDS);
    for (uintptr_t i = 0; i < THREADS; i++) {
        errno = pthread_create(&threads[i], NULL, runner, (void *)i);
        must(-errno, "pthread_create");
    }
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    /* How often each looked counts its branches: an interrupt one branch off shows here. */
    printf("threads: time: %lu ns; looks %lu, %lu, %lu\n", now_ns() - before, looks[0], looks[1],
           looks[2]);
    printf("threads: all passed, order %016lx\n", order);
    restart();
}
