/* A program that never asks for anything, beside a timer that interrupts it. Three loops, none
 * with a system call: one that ends when the handler has run often enough, one that computes for
 * ever and is left by the handler, by siglongjmp, and one like that with nothing in it, not even
 * a conditional branch. And a child that only its handler can end. If no interrupt lands in user
 * mode, each of them is the last. */
#include "guest.h"
#include <setjmp.h>
#include <signal.h>
#include <sys/time.h>

enum { COUNTED = 60, LEFT = 30, EMPTY = 30, EVERY_US = 4000 };

static volatile sig_atomic_t alarms, inside; /* a loop to be left */
static volatile uint64_t turns;
static sigjmp_buf way_out;

static void count(int signal)
{
    (void)signal;
    alarms++;
}

static void leave(int signal)
{
    (void)signal;
    if (!inside)
        return;
    inside = 0;
    siglongjmp(way_out, 1);
}

static void end(int signal)
{
    (void)signal;
    _exit(7);
}

/* Every EVERY_US microseconds, or never. */
static void ring(void (*handler)(int), long every_us)
{
    struct itimerval timer = {{0, every_us}, {0, every_us}};
    signal(SIGALRM, handler);
    must(setitimer(ITIMER_REAL, &timer, NULL), "setitimer");
}

static void count_alarms(void)
{
    ring(count, EVERY_US);
    while (alarms < COUNTED)
        turns++;
    ring(SIG_IGN, 0);
    printf("timer: %d alarms or more while it counted\n", COUNTED);
}

static void leave_a_computation(void)
{
    static volatile int left;
    ring(leave, EVERY_US);
    if (sigsetjmp(way_out, 1))
        left++;
    if (left < LEFT) {
        uint64_t state = 88172645463325252u;
        inside = 1;
        for (;;) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            if (state & 1)
                turns++;
        }
    }
    ring(SIG_IGN, 0);
    printf("timer: %d times out of a computation without end\n", left);
}

static void leave_nothing(void)
{
    static volatile int left;
    ring(leave, EVERY_US);
    if (sigsetjmp(way_out, 1))
        left++;
    if (left < EMPTY) {
        inside = 1;
        for (;;)
            ;
    }
    ring(SIG_IGN, 0);
    printf("timer: %d times out of an empty loop\n", left);
}

static void end_a_child(void)
{
    int status;
    pid_t child = must(fork(), "fork");
    if (child == 0) {
        ring(end, EVERY_US);
        for (;;)
            ;
    }
    must(waitpid(child, &status, 0), "waitpid");
    printf("timer: a child in an empty loop ended with status %d\n", WEXITSTATUS(status));
}

int main(void)
{
    uint64_t before = now_ns();
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("timer: four loops without a system call");
    count_alarms();
    leave_a_computation();
    leave_nothing();
    end_a_child();
    printf("timer: time: %lu ns; %lu turns\n", now_ns() - before, turns);
    puts("timer: all left");
    restart();
}
