// SPDX-License-Identifier: MIT OR Apache-2.0
/* A kernel module that asks the CPU what no recorder may let it find out by itself: the time-stamp
 * counter, ten thousand times, features, CR4. It asks wherever a module's code can be: in its
 * parameters' functions, which run before everything else, in its beginning, which the kernel frees,
 * in what stays, across the edge of two pages, and in its end. All that it read goes into a
 * checksum. */
#include <linux/init.h>
#include <linux/kernel.h>
#include <linux/linkage.h>
#include <linux/module.h>

#define READS 10000

/* FNV-1a. */
static u64 sum = 0xcbf29ce484222325ull;
static u64 last;
static unsigned long reads, backwards;

static void take(const void *data, size_t size)
{
	const u8 *byte = data;

	while (size--)
		sum = (sum ^ *byte++) * 0x100000001b3ull;
}

static void take_time(u64 now)
{
	reads++;
	if (now < last)
		backwards++;
	last = now;
	take(&now, sizeof(now));
}

static __always_inline u64 read_tsc(void)
{
	u32 low, high;

	asm volatile("rdtsc" : "=a"(low), "=d"(high));
	return (u64)high << 32 | low;
}

static __always_inline u64 read_tscp(void)
{
	u32 low, high, aux;

	asm volatile("rdtscp" : "=a"(low), "=d"(high), "=c"(aux));
	take(&aux, sizeof(aux));
	return (u64)high << 32 | low;
}

/* An RDTSC whose second byte is on the next page, which may be anywhere in memory. */
u64 read_across_pages(void);
asm(".pushsection .text\n"
    ".balign 4096\n"
    ".type read_across_pages, @function\n"
    "read_across_pages:\n"
    "jmp 1f\n"
    ".skip 4090, 0xcc\n"
    "1: rdtsc\n"
    "shl $32, %rdx\n"
    "or %rdx, %rax\n" ASM_RET ".size read_across_pages, . - read_across_pages\n"
    ".popsection\n");

static noinline void read_cpu(void)
{
	u32 leaf, words[4];
	unsigned long cr4;

	for (leaf = 0; leaf < 8; leaf++) {
		asm volatile("cpuid"
			     : "=a"(words[0]), "=b"(words[1]), "=c"(words[2]), "=d"(words[3])
			     : "a"(leaf), "c"(0));
		take(words, sizeof(words));
	}
	asm volatile("mov %%cr4, %0" : "=r"(cr4));
	pr_info("tsc: CR4.TSD is %lu\n", cr4 >> 2 & 1);
	asm volatile("pause");
}

static int set_early(const char *text, const struct kernel_param *param)
{
	int i;

	for (i = 0; i < 10; i++)
		take_time(read_tsc());
	pr_info("tsc: %lu reads before the beginning\n", reads);
	return 0;
}

static const struct kernel_param_ops early = {
	.set = set_early,
};
module_param_cb(early, &early, NULL, 0);

static noinline void read_all(void)
{
	int i;

	for (i = 0; i < READS; i++)
		take_time(read_tsc());
	for (i = 0; i < READS / 10; i++)
		take_time(read_tscp());
	for (i = 0; i < READS / 100; i++)
		take_time(read_across_pages());
}

static int __init begin(void)
{
	take_time(read_tsc());
	read_all();
	read_cpu();
	take_time(read_tsc());
	pr_info("tsc: %lu reads, %lu went backwards, last %llu, checksum %016llx\n", reads,
		backwards, last, sum);
	return backwards ? -EIO : 0;
}

static void __exit end(void)
{
	take_time(read_tsc());
	pr_info("tsc: %lu reads at the end, checksum %016llx\n", reads, sum);
}

module_init(begin);
module_exit(end);
MODULE_DESCRIPTION("Reads the time-stamp counter wherever a module's code can be");
MODULE_LICENSE("Dual MIT/GPL");
