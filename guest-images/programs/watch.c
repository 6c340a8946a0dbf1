/* What gdb and perf do with the CPU's debug registers, in processes that are preempted meanwhile by others
 * that compute: a tracer sets four watchpoints in its child and counts the stops, steps the child through a
 * stretch of known length, and two processes count the writes to four words of their own each. Each prints
 * how many there were and how many were counted. */
#include "guest.h"

#include <linux/hw_breakpoint.h>
#include <linux/perf_event.h>
#include <signal.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/user.h>

enum { WORDS = 4, STOPS = 25, WRITES = 500, TURNS = 100, BUSY = 2, COUNTERS = 2 };

static volatile uint64_t words[WORDS];
static int all_counted = 1;

/* Branches between two writes, so that a preemption falls between them. */
static void compute(void)
{
    for (volatile int i = 0; i < 200; i++)
        ;
}

static void write_each(int times)
{
    for (int i = 0; i < times; i++) {
        for (int w = 0; w < WORDS; w++) {
            compute();
            words[w] = (uint64_t)i;
        }
        /* Where only entries into the kernel can be counted, a preemption needs some. */
        getppid();
    }
}

/* For good. */
static void be_busy(void)
{
    for (;;) {
        for (volatile int i = 0; i < 50000; i++)
            ;
        getppid();
    }
}

/* The stretch that is stepped through: between two breakpoints, one MOV and TURNS times two instructions. */
static void stretch(void)
{
    __asm__ volatile("int3\n"
                     "mov %0, %%ecx\n"
                     "1: dec %%ecx\n"
                     "jnz 1b\n"
                     "int3" ::"i"(TURNS)
                     : "ecx", "cc");
}

static pid_t child(void)
{
    fflush(stdout);
    pid_t pid = (pid_t)must(fork(), "fork");
    if (pid == 0)
        must(prctl(PR_SET_PDEATHSIG, SIGKILL), "prctl");
    return pid;
}

static void report(const char *what, long happened, long counted)
{
    printf("watch: %s: %ld, %ld counted\n", what, happened, counted);
    fflush(stdout);
    all_counted &= happened == counted;
}

/* Debug register N of a stopped child (x86: struct user). */
static long debug_register(int n)
{
    return (long)offsetof(struct user, u_debugreg) + n * (long)sizeof(long);
}

/* Lets the child go on as `request` says; how it stopped, or -1 if it has ended. */
static int go_on(pid_t pid, int request)
{
    int status;
    must(ptrace(request, pid, 0, 0), "ptrace");
    must(waitpid(pid, &status, 0), "waitpid");
    return WIFSTOPPED(status) ? WSTOPSIG(status) : -1;
}

static void trace(void)
{
    pid_t pid = child();
    if (pid == 0) {
        must(ptrace(PTRACE_TRACEME, 0, 0, 0), "traceme");
        raise(SIGSTOP);
        write_each(STOPS);
        stretch();
        _exit(0);
    }
    int status;
    must(waitpid(pid, &status, 0), "waitpid");
    long dr7 = 0;
    for (int w = 0; w < WORDS; w++) {
        must(ptrace(PTRACE_POKEUSER, pid, debug_register(w), &words[w]), "address");
        /* Intel SDM vol. 3, 17.2.4: enabled, on writes of eight bytes. */
        dr7 |= 1L << (2 * w) | 9L << (16 + 4 * w);
    }
    must(ptrace(PTRACE_POKEUSER, pid, debug_register(7), dr7), "dr7");
    long hits[WORDS] = {0};
    int signal;
    /* The first stop without a hit is the breakpoint at the stretch. */
    while ((signal = go_on(pid, PTRACE_CONT)) == SIGTRAP) {
        long dr6 = ptrace(PTRACE_PEEKUSER, pid, debug_register(6), 0);
        if (!(dr6 & 0xf))
            break;
        for (int w = 0; w < WORDS; w++)
            hits[w] += dr6 >> w & 1;
        /* A breakpoint instruction leaves it as it is. */
        must(ptrace(PTRACE_POKEUSER, pid, debug_register(6), 0), "dr6");
    }
    for (int w = 0; w < WORDS; w++)
        report("writes to a word that is watched", STOPS, hits[w]);
    struct user_regs_struct at;
    must(ptrace(PTRACE_GETREGS, pid, 0, &at), "getregs");
    /* MOV, DEC and JNZ have 5, 2 and 2 bytes, and the breakpoint that follows one. */
    unsigned long end = at.rip + 10;
    long steps = -1;
    while (signal == SIGTRAP && at.rip != end) {
        signal = go_on(pid, PTRACE_SINGLESTEP);
        must(ptrace(PTRACE_GETREGS, pid, 0, &at), "getregs");
        steps++;
    }
    report("instructions stepped", 1 + 2 * TURNS, steps);
    if (go_on(pid, PTRACE_CONT) != -1)
        report("ends of the child", 1, 0);
}

static int open_counter(volatile uint64_t *word)
{
    struct perf_event_attr attr = {
        .type = PERF_TYPE_BREAKPOINT,
        .size = sizeof attr,
        .bp_type = HW_BREAKPOINT_W,
        .bp_addr = (uintptr_t)word,
        .bp_len = HW_BREAKPOINT_LEN_8,
        .exclude_kernel = 1,
    };
    return (int)must(syscall(SYS_perf_event_open, &attr, 0, -1, -1, 0), "perf_event_open");
}

static void count(long *counted)
{
    int counter[WORDS];
    for (int w = 0; w < WORDS; w++)
        counter[w] = open_counter(&words[w]);
    write_each(WRITES);
    for (int w = 0; w < WORDS; w++)
        must(read(counter[w], &counted[w], sizeof counted[w]), "read");
}

int main(void)
{
    pid_t busy[BUSY];
    for (int i = 0; i < BUSY; i++) {
        busy[i] = child();
        if (busy[i] == 0)
            be_busy();
    }
    puts("watch: as a debugger does");
    trace();
    puts("watch: as perf does");
    long *counted = shared_memory(COUNTERS * WORDS * sizeof *counted);
    for (int i = 0; i < COUNTERS; i++)
        if (child() == 0) {
            count(counted + i * WORDS);
            _exit(0);
        }
    for (int i = 0; i < COUNTERS; i++)
        must(wait(NULL), "wait");
    for (int i = 0; i < COUNTERS * WORDS; i++)
        report("writes to a word that is counted", WRITES, counted[i]);
    for (int i = 0; i < BUSY; i++)
        kill(busy[i], SIGKILL);
    puts(all_counted ? "watch: all were counted" : "watch: NOT all were counted");
    restart();
}
