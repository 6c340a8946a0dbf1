/* Computes for a fixed number of steps without a system call, a time read or any other reason
 * to leave the guest: what a monitor must be able to interrupt, and a replay to hurry through.
 * About two seconds on a processor of 3 GHz. */
#include "guest.h"

#define STEPS 1500000000u

int main(void)
{
    uint64_t state = 88172645463325252u, before = now_ns();
    for (uint32_t step = 0; step < STEPS; step++) {
        /* xorshift64 (Marsaglia 2003): each step needs the one before. */
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
    }
    printf("spin: %u steps, result %016lx, %lu ns\n", STEPS, state, now_ns() - before);
    restart();
}
