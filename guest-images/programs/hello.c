/* The smallest guest: one line, and a reboot. */
#include "guest.h"

int main(void)
{
    puts("hello from user space");
    restart();
}
