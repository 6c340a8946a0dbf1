/* Enters the kernel many times by a system call that does nothing, and many times by a
 * page fault, and says what each entry took: the price of counting them. */
#include "guest.h"

#include <sys/mman.h>

#define CALLS 100000
#define PAGES 2000
#define ROUNDS 10
#define PAGE 4096

int main(void)
{
    for (int i = 0; i < 5; i++) {
        uint64_t before = now_ns();
        for (int call = 0; call < CALLS; call++)
            syscall(SYS_getppid);
        uint64_t calls = now_ns() - before;

        char *pages = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        must(pages == MAP_FAILED ? -1 : 0, "mmap");
        must(madvise(pages, PAGES * PAGE, MADV_NOHUGEPAGE), "madvise");
        before = now_ns();
        for (int round = 0; round < ROUNDS; round++) {
            /* Reads: each finds the page of zeroes, so the fault itself is most of the work. */
            for (int page = 0; page < PAGES; page++)
                (void)*(volatile char *)(pages + page * PAGE);
            must(madvise(pages, PAGES * PAGE, MADV_DONTNEED), "madvise");
        }
        uint64_t faults = now_ns() - before;
        must(munmap(pages, PAGES * PAGE), "munmap");
        printf("entries: %d calls %lu ns, %d faults %lu ns\n", CALLS, calls, PAGES * ROUNDS, faults);
    }
    restart();
}
