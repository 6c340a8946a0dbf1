// SPDX-License-Identifier: MIT OR Apache-2.0
/* A kernel module with a bug: it follows a null pointer as it is loaded. */
#include <linux/init.h>
#include <linux/module.h>

static int *volatile nowhere;

static int __init begin(void)
{
	return *nowhere;
}

module_init(begin);
MODULE_DESCRIPTION("Follows a null pointer");
MODULE_LICENSE("Dual MIT/GPL");
