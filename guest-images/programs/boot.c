/* The guest of the end-to-end tests: a little of everything that a replay can get wrong, each
 * with a line on the console that would show it. */
#include "guest.h"
#include <ctype.h>
#include <poll.h>
#include <signal.h>
#include <sys/random.h>
#include <sys/time.h>
#include <sys/utsname.h>

static volatile sig_atomic_t alarms;

static void on_alarm(int signal)
{
    (void)signal;
    alarms++;
}

static void show_file(const char *path, int whole)
{
    static char text[65536];
    int file = must(open(path, O_RDONLY), path);
    size_t size = 0;
    ssize_t part;
    while ((part = read(file, text + size, sizeof text - 1 - size)) > 0)
        size += (size_t)part;
    close(file);
    text[size] = 0;
    if (whole)
        printf("boot: %s: %s", path, text);
    printf("boot: %s: %zu bytes, checksum %016lx\n", path, size,
           checksum(CHECKSUM_START, text, size));
}

static void identify(void)
{
    struct utsname name;
    must(uname(&name), "uname");
    printf("boot: %s %s %s %s\n", name.sysname, name.release, name.version, name.machine);
    show_file("/proc/uptime", 1);
    show_file("/proc/meminfo", 0);
}

/* Starts another program and waits for it. */
static void run(const char *path)
{
    int status;
    fflush(stdout);
    pid_t child = must(fork(), "fork");
    if (child == 0) {
        execl(path, path, (char *)NULL);
        must(-1, path);
    }
    must(waitpid(child, &status, 0), "waitpid");
    printf("boot: %s ended with status %d\n", path, status);
}

/* Children that write to one pipe as they are scheduled: the order of arrival is the
 * scheduler's, and so a matter of timing. */
static void talk(void)
{
    enum { CHILDREN = 4, WORDS = 25 };
    int ends[2];
    uint64_t word, sum = CHECKSUM_START, words = 0;
    must(pipe(ends), "pipe");
    fflush(stdout);
    for (uint64_t child = 0; child < CHILDREN; child++) {
        if (must(fork(), "fork") != 0)
            continue;
        close(ends[0]);
        for (uint64_t i = 0; i < WORDS; i++) {
            word = child << 56 ^ now_ns();
            must(write(ends[1], &word, sizeof word), "write");
            if (i % 8 == child)
                usleep(500);
        }
        _exit(0);
    }
    close(ends[1]);
    while (read(ends[0], &word, sizeof word) == sizeof word) {
        sum = checksum(sum, &word, sizeof word);
        words++;
    }
    close(ends[0]);
    while (wait(NULL) > 0)
        ;
    printf("boot: pipe: %lu words, checksum %016lx\n", words, sum);
}

static void sleep_a_little(void)
{
    for (int i = 0; i < 3; i++) {
        uint64_t before = now_ns();
        usleep(20000);
        printf("boot: slept %lu ns\n", now_ns() - before);
    }
}

static void be_interrupted(void)
{
    struct itimerval every = {{0, 5000}, {0, 5000}}, never = {{0, 0}, {0, 0}};
    uint64_t before = now_ns(), turns = 0;
    signal(SIGALRM, on_alarm);
    must(setitimer(ITIMER_REAL, &every, NULL), "setitimer");
    while (alarms < 5) {
        turns++;
        if (now_ns() - before > 2000000000) {
            puts("boot: alarm: the timer never came");
            break;
        }
    }
    must(setitimer(ITIMER_REAL, &never, NULL), "setitimer");
    printf("boot: alarm: %d in %lu ns, %lu turns\n", (int)alarms, now_ns() - before, turns);
}

static void be_random(void)
{
    unsigned char bytes[16];
    /* Insecure means: do not wait until the kernel trusts its pool, which in a machine
     * without a source of randomness takes a second. */
    must(getrandom(bytes, sizeof bytes, GRND_INSECURE), "getrandom");
    printf("boot: random: ");
    for (size_t i = 0; i < sizeof bytes; i++)
        printf("%02x", bytes[i]);
    printf("\n");
}

static void tell_time(void)
{
    struct timespec real;
    must(clock_gettime(CLOCK_REALTIME, &real), "clock_gettime");
    printf("boot: clock: real %ld.%09ld, since boot %lu ns\n", real.tv_sec, real.tv_nsec,
           now_ns());
}

/* One line, if somebody types one within 200 ms. The test does, or does not. */
static void echo(void)
{
    char line[256];
    struct pollfd console = {.fd = 0, .events = POLLIN};
    printf("type:\n");
    fflush(stdout);
    if (must(poll(&console, 1, 200), "poll") == 0) {
        puts("boot: nobody typed");
        return;
    }
    ssize_t size = must(read(0, line, sizeof line), "read");
    for (ssize_t i = 0; i < size; i++)
        line[i] = (char)toupper((unsigned char)line[i]);
    while (size > 0 && line[size - 1] == '\n')
        size--;
    printf("boot: typed %.*s at %lu ns\n", (int)size, line, now_ns());
}

int main(void)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    mount_all();
    identify();
    run("/bin/tsc");
    talk();
    sleep_a_little();
    be_interrupted();
    be_random();
    tell_time();
    show_file("/proc/interrupts", 0);
    show_file("/proc/stat", 0);
    echo();
    puts("boot: done");
    restart();
}
