/* Enters the kernel again and again, by a system call that does nothing and by page faults, and says
 * what that took. The last argument is how many system calls there are (before it come words of the
 * command line that the kernel does not know); there is a fault for each ten. */
#include "guest.h"

#include <sys/mman.h>

#define PAGE 4096
#define PAGES 500

int main(int argc, char **argv)
{
    long calls = atol(argv[argc - 1]);
    if (calls <= 0)
        calls = 100000;
    for (int i = 0; i < 3; i++) {
        uint64_t before = now_ns();
        for (long call = 0; call < calls; call++)
            syscall(SYS_getppid);
        uint64_t calls_ns = now_ns() - before;

        char *pages = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        must(pages == MAP_FAILED ? -1 : 0, "mmap");
        must(madvise(pages, PAGES * PAGE, MADV_NOHUGEPAGE), "madvise");
        before = now_ns();
        long faults = calls / 10;
        for (long fault = 0; fault < faults; fault++) {
            /* A read finds the page of zeroes, so that the fault itself is most of the work. */
            (void)*(volatile char *)(pages + fault % PAGES * PAGE);
            if (fault % PAGES == PAGES - 1)
                must(madvise(pages, PAGES * PAGE, MADV_DONTNEED), "madvise");
        }
        uint64_t faults_ns = now_ns() - before;
        must(munmap(pages, PAGES * PAGE), "munmap");
        printf("entries: %ld calls %lu ns, %ld faults %lu ns\n", calls, calls_ns, faults, faults_ns);
    }
    restart();
}
