/* A loop under a timer that signals it every 1,000, 100, 10 and 1 microseconds. Where to handle a timer takes
 * longer than its period the loop gets on only in what the machine leaves it. */
#include "guest.h"
#include <signal.h>
#include <sys/time.h>

enum { STEPS = 2000000 };

static volatile sig_atomic_t alarms;
static volatile uint64_t steps;

static void count(int signal)
{
    (void)signal;
    alarms++;
}

static void every(int us)
{
    struct itimerval timer = {{0, us}, {0, us}};
    setitimer(ITIMER_REAL, &timer, NULL);
}

int main(void)
{
    static const int periods_us[] = {1000, 100, 10, 1};

    signal(SIGALRM, count);
    for (unsigned i = 0; i < sizeof periods_us / sizeof *periods_us; i++) {
        uint64_t before = now_ns();
        alarms = 0;
        every(periods_us[i]);
        for (steps = 0; steps < STEPS; steps++)
            ;
        every(0);
        printf("alarms: every %d us: %d signals, %lu ns\n", periods_us[i], (int)alarms, now_ns() - before);
    }
    restart();
}
