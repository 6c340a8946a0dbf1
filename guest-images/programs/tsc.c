/* Reads the time-stamp counter from user mode, ten thousand times and two ways. A monitor that
 * loses or invents one value changes the checksum; one that answers from two clocks is caught
 * going backwards. */
#include "guest.h"
#include <x86intrin.h>

#define READS 5000

struct range {
    uint64_t least, most;
};

static uint64_t last, sum = CHECKSUM_START;
static unsigned long backwards;

static void take(struct range *deltas, uint64_t value)
{
    if (last != 0) {
        uint64_t delta = value - last;
        if (value < last)
            backwards++;
        if (delta < deltas->least)
            deltas->least = delta;
        if (delta > deltas->most)
            deltas->most = delta;
    }
    last = value;
    sum = checksum(sum, &value, sizeof value);
}

int main(void)
{
    struct range rdtsc = {UINT64_MAX, 0}, rdtscp = {UINT64_MAX, 0};
    unsigned processor = 0;
    for (int i = 0; i < READS; i++)
        take(&rdtsc, __rdtsc());
    for (int i = 0; i < READS; i++)
        take(&rdtscp, __rdtscp(&processor));
    printf("tsc: rdtsc %d reads, delta %lu to %lu\n", READS, rdtsc.least, rdtsc.most);
    printf("tsc: rdtscp %d reads, delta %lu to %lu, processor %u\n", READS, rdtscp.least,
           rdtscp.most, processor);
    printf("tsc: %lu went backwards, last %lu, checksum %016lx\n", backwards, last, sum);
    return backwards != 0;
}
