/* Prints what a kernel prints when it panics, and has not. Told "panic", it has the kernel panic. */
#include "guest.h"

int main(int argc, char **argv)
{
    /* Words that the kernel does not know come first. */
    if (strcmp(argv[argc - 1], "panic") == 0) {
        puts("words: the first process ends here");
        return 1;
    }
    puts("[    0.500000] Kernel panic - not syncing: nothing of the kind");
    puts("[    0.500000] ---[ end Kernel panic - not syncing: nothing of the kind ]---");
    restart();
}
