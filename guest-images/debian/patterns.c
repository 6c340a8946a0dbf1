// Writes a pattern to so many MiB of memory and checks it, twice: the second time from the end.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define PAGE 4096

static uint64_t pattern(uint64_t page, uint64_t round)
{
	uint64_t x = (page + 1) * 0x9e3779b97f4a7c15ull + round;
	x ^= x >> 31;
	return x * 0xbf58476d1ce4e5b9ull;
}

int main(int argc, char **argv)
{
	uint64_t pages = (argc > 1 ? strtoull(argv[1], NULL, 10) : 64) * (1048576 / PAGE);
	uint64_t *memory = aligned_alloc(PAGE, pages * PAGE);
	uint64_t sum = 0;

	if (!memory) {
		perror("aligned_alloc");
		return 1;
	}
	for (uint64_t round = 0; round < 2; round++) {
		for (uint64_t page = 0; page < pages; page++)
			for (int word = 0; word < PAGE / 8; word += 64)
				memory[page * PAGE / 8 + word] = pattern(page, round + word);
		for (uint64_t i = 0; i < pages; i++) {
			uint64_t page = round ? pages - 1 - i : i;
			for (int word = 0; word < PAGE / 8; word += 64) {
				uint64_t found = memory[page * PAGE / 8 + word];
				if (found != pattern(page, round + word)) {
					printf("page %llu is wrong\n", (unsigned long long)page);
					return 1;
				}
				sum += found;
			}
		}
	}
	printf("%llu pages, sum %016llx\n", (unsigned long long)pages, (unsigned long long)sum);
	return 0;
}
