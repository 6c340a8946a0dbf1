/* Turns itself off. With a kernel module at /button.ko, which has to be the kernel's own driver of
 * the power button, it waits until that is pressed. */
#include "guest.h"

/* How often the kernel has seen the power button pressed. */
static long presses(void)
{
    char text[64] = "";
    int file = must(open("/sys/firmware/acpi/interrupts/ff_pwr_btn", O_RDONLY), "ff_pwr_btn");
    must(read(file, text, sizeof text - 1), "ff_pwr_btn");
    close(file);
    return strtol(text, NULL, 10);
}

int main(void)
{
    int module = open("/button.ko", O_RDONLY);
    if (module >= 0) {
        mount_all();
        must(syscall(SYS_finit_module, module, "", 0), "finit_module");
        puts("off: waiting for the power button");
        fflush(stdout);
        while (presses() == 0)
            usleep(20000);
        puts("off: pressed");
    }
    puts("off: good night");
    power_off();
}
