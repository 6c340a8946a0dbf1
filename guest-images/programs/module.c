/* Loads kernel modules: one made for the purpose (modules/tsc), twice, so that the second stands in
 * the place of the first, and some as the distribution ships them. What the modules have to say
 * is in the kernel's messages; what comes of loading each is printed here. */
#include "guest.h"

static void load(const char *path, const char *parameters)
{
    int fd = must(open(path, O_RDONLY | O_CLOEXEC), path);
    long result = syscall(SYS_finit_module, fd, parameters, 0);
    printf("module: %s: %s\n", path, result < 0 ? strerror(errno) : "loaded");
    close(fd);
}

int main(void)
{
    for (int i = 0; i < 2; i++) {
        load("/lib/tsc.ko", "early=1");
        must(syscall(SYS_delete_module, "tsc", 0), "delete_module");
    }
    load("/lib/sha3_generic.ko", "");
    load("/lib/jitterentropy_rng.ko", "");
    load("/lib/zstd_compress.ko", "");
    puts("module: ok");
    restart();
}
