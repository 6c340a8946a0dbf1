/* Answers each line typed on the console with its number, its upper case and the time; "quit"
 * ends the guest. */
#include "guest.h"
#include <ctype.h>

int main(void)
{
    char line[256];
    unsigned number = 0;
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("input: ready");
    while (fgets(line, sizeof line, stdin)) {
        line[strcspn(line, "\r\n")] = 0;
        if (strcmp(line, "quit") == 0)
            break;
        for (char *letter = line; *letter; letter++)
            *letter = (char)toupper((unsigned char)*letter);
        printf("input: %u %s at %lu ns\n", ++number, line, now_ns());
    }
    printf("input: %u lines\n", number);
    restart();
}
