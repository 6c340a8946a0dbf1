/* A guest with a disk: an ext4 file system on all of /dev/vda, as vmm's tests make it. It reads the file
 * "large" to its end, adds "added" and "directory/inside", removes "removed", writes "modified" anew and
 * a few bytes in the middle of "middle", and ends. With the word "wait" on the kernel's command line it
 * waits for a line on its console before it touches a file; with "crash" it leaves the disk in use when it ends. */
#include "guest.h"

#define DISK "/disk/"

static void put(const char *path, int flags, off_t offset, const char *text)
{
    int fd = (int)must(open(path, O_WRONLY | flags, 0644), path);
    long size = (long)strlen(text);
    if (must(pwrite(fd, text, (size_t)size, offset), path) != size) {
        printf("%s: no room\n", path);
        _exit(1);
    }
    must(close(fd), path);
}

static uint64_t read_all(const char *path)
{
    static char buffer[1 << 16];
    int fd = (int)must(open(path, O_RDONLY), path);
    uint64_t sum = CHECKSUM_START;
    long size;
    while ((size = must(read(fd, buffer, sizeof buffer), path)) > 0)
        sum = checksum(sum, buffer, (size_t)size);
    close(fd);
    return sum;
}

int main(int count, char **words)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    mount_all();
    load_modules();
    mkdir("/disk", 0755);
    // Whatever ext it is, the driver of ext4 reads it.
    must(mount("/dev/vda", "/disk", "ext4", MS_NOATIME, NULL), "mount /dev/vda");
    printf("disk: mounted\n");
    char line[80];
    int crash = 0;
    for (int i = 1; i < count; i++) {
        if (strcmp(words[i], "wait") == 0 && !fgets(line, sizeof line, stdin))
            must(-1, "stdin");
        crash |= strcmp(words[i], "crash") == 0;
    }
    printf("disk: large %016llx\n", (unsigned long long)read_all(DISK "large"));
    put(DISK "added", O_CREAT | O_EXCL, 0, "added\n");
    must(mkdir(DISK "directory", 0755), "mkdir");
    put(DISK "directory/inside", O_CREAT | O_EXCL, 0, "inside\n");
    must(unlink(DISK "removed"), "unlink");
    put(DISK "modified", O_TRUNC, 0, "modified by the guest\n");
    put(DISK "middle", 0, 30000, "the middle");
    sync();
    if (!crash)
        must(umount("/disk"), "umount");
    printf("disk: done\n");
    restart();
}
