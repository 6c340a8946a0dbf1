/* What Go's runtime does since 1.14. Each worker thread runs goroutines, which here are loops
 * without a call, a safe point or an end. A monitor thread (Go's sysmon) wakes every few
 * milliseconds, sees a worker that is still at the goroutine it had before, and sends SIGURG to
 * that thread; the handler takes the goroutine off and the worker goes on with the next. So
 * progress needs interrupts that land in the loops: without one the monitor's sleep never ends. */
#include "guest.h"
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>

enum { WORKERS = 2, GOROUTINES = 3, SLICES = 12, NAP_US = 2000 };

struct goroutine {
    volatile uint64_t steps;
    int slices; /* how often it was taken off */
};

struct worker {
    struct goroutine goroutine[GOROUTINES];
    volatile int thread;
    volatile int running; /* a goroutine is: the handler may take it off */
    volatile uint64_t tick; /* counts switches, for the monitor */
    uint64_t seen; /* the monitor's last look at it */
    sigjmp_buf scheduler;
    pthread_t handle;
};

static struct worker workers[WORKERS];
static __thread struct worker *self;
static volatile int at_work = WORKERS;

static void preempt(int signal)
{
    (void)signal;
    if (!self->running)
        return;
    self->running = 0;
    siglongjmp(self->scheduler, 1);
}

static _Noreturn void go(struct goroutine *goroutine)
{
    for (;;)
        if (++goroutine->steps % 3 == 0)
            goroutine->steps++;
}

/* Runs the goroutines in turn until each has had its slices. */
static void *work(void *argument)
{
    static __thread volatile int turn;
    self = argument;
    self->thread = (int)syscall(SYS_gettid);
    if (sigsetjmp(self->scheduler, 1)) {
        self->goroutine[turn % GOROUTINES].slices++;
        turn++;
    }
    self->tick++;
    if (turn < GOROUTINES * SLICES) {
        self->running = 1;
        go(&self->goroutine[turn % GOROUTINES]);
    }
    __atomic_fetch_sub(&at_work, 1, __ATOMIC_SEQ_CST);
    return NULL;
}

/* Returns how many signals it sent. */
static unsigned monitor(void)
{
    const struct timespec nap = {0, NAP_US * 1000};
    unsigned sent = 0;
    while (at_work > 0) {
        nanosleep(&nap, NULL);
        for (int i = 0; i < WORKERS; i++) {
            struct worker *worker = &workers[i];
            uint64_t tick = worker->tick;
            if (worker->running && worker->seen == tick) {
                /* It may have been preempted by the signal before, and be gone: no error. */
                if (syscall(SYS_tgkill, getpid(), worker->thread, SIGURG) < 0 && errno != ESRCH)
                    must(-1, "tgkill");
                sent++;
            }
            worker->seen = tick;
        }
    }
    return sent;
}

int main(void)
{
    uint64_t before = now_ns(), steps = 0;
    setvbuf(stdout, NULL, _IOLBF, 0);
    printf("golike: %d workers, each with %d goroutines that never stop\n", WORKERS, GOROUTINES);
    signal(SIGURG, preempt);
    for (int i = 0; i < WORKERS; i++) {
        errno = pthread_create(&workers[i].handle, NULL, work, &workers[i]);
        must(-errno, "pthread_create");
    }
    unsigned sent = monitor();
    for (int i = 0; i < WORKERS; i++)
        pthread_join(workers[i].handle, NULL);
    for (int i = 0; i < WORKERS; i++)
        for (int j = 0; j < GOROUTINES; j++) {
            struct goroutine *goroutine = &workers[i].goroutine[j];
            printf("golike: goroutine %d.%d was preempted %d times\n", i, j, goroutine->slices);
            steps += goroutine->steps;
        }
    printf("golike: time: %lu ns; %u signals, %lu steps\n", now_ns() - before, sent, steps);
    puts("golike: every goroutine had its turns");
    restart();
}
