/* A guest on a network. Its card's driver is in modules, which it loads; its address comes by DHCP,
 * or from the word address=A.B.C.D/BITS of the kernel's command line. Then it answers on port 7:
 * a datagram with itself, a connection's line with its number, itself in upper case and the time.
 * The line "quit" ends the guest. With the word "spin", a program that computes, and enters the kernel
 * seldom, runs beside it. */
#include "guest.h"
#include <arpa/inet.h>
#include <ctype.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <net/route.h>
#include <netinet/ip.h>
#include <netinet/udp.h>
#include <poll.h>
#include <stdbool.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#define CARD "eth0"
#define PORT 7

struct lease {
    struct in_addr address, mask, router;
};

/* One ioctl about the card. */
static void card(int fd, unsigned long request, struct ifreq *about, const char *what)
{
    strcpy(about->ifr_name, CARD);
    must(ioctl(fd, request, about), what);
}

static void card_up(int fd)
{
    struct ifreq about = {0};
    card(fd, SIOCGIFFLAGS, &about, "SIOCGIFFLAGS");
    about.ifr_flags |= IFF_UP;
    card(fd, SIOCSIFFLAGS, &about, "SIOCSIFFLAGS");
}

static void set_address(int fd, unsigned long request, struct in_addr address, const char *what)
{
    struct ifreq about = {0};
    struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr = address};
    memcpy(&about.ifr_addr, &in, sizeof in);
    card(fd, request, &about, what);
}

static void configure(int fd, const struct lease *lease)
{
    set_address(fd, SIOCSIFADDR, lease->address, "SIOCSIFADDR");
    set_address(fd, SIOCSIFNETMASK, lease->mask, "SIOCSIFNETMASK");
    if (!lease->router.s_addr)
        return;
    struct rtentry route = {.rt_flags = RTF_UP | RTF_GATEWAY};
    struct sockaddr_in any = {.sin_family = AF_INET}, router = any;
    router.sin_addr = lease->router;
    memcpy(&route.rt_dst, &any, sizeof any);
    memcpy(&route.rt_genmask, &any, sizeof any);
    memcpy(&route.rt_gateway, &router, sizeof router);
    must(ioctl(fd, SIOCADDRT, &route), "SIOCADDRT");
}

/* ---- DHCP (RFC 2131) ------------------------------------------------------------------------ */

enum { DISCOVER = 1, OFFER, REQUEST, ACK = 5 };
static const uint8_t COOKIE[] = {99, 130, 83, 99};

struct dhcp {
    uint8_t op, hardware, length, hops;
    uint32_t transaction;
    uint16_t seconds, flags;
    struct in_addr client, yours, next, relay;
    uint8_t address[16], server_name[64], file[128];
    uint8_t options[312];
} __attribute__((packed));

/* Finds an option and copies it, or returns false. */
static bool option(const struct dhcp *message, uint8_t kind, void *to, size_t size)
{
    const uint8_t *at = message->options + 4, *end = message->options + sizeof message->options;
    while (at + 2 <= end && *at != 255) {
        if (*at == 0) {
            at++;
            continue;
        }
        if (at + 2 + at[1] > end)
            break;
        if (*at == kind && at[1] >= size) {
            memcpy(to, at + 2, size);
            return true;
        }
        at += 2 + at[1];
    }
    return false;
}

/* Sends a message and waits for the answer of this kind, and again. */
static struct dhcp ask(int out, int in, const struct dhcp *message, uint8_t wanted)
{
    struct sockaddr_in all = {.sin_family = AF_INET, .sin_port = htons(67)};
    all.sin_addr.s_addr = INADDR_BROADCAST;
    for (int attempt = 0; attempt < 20; attempt++) {
        must(sendto(out, message, sizeof *message, 0, (struct sockaddr *)&all, sizeof all), "DHCP");
        for (;;) {
            struct pollfd wait = {.fd = in, .events = POLLIN};
            if (must(poll(&wait, 1, 1000), "poll") == 0)
                break;
            struct {
                struct iphdr ip;
                struct udphdr udp;
                struct dhcp dhcp;
            } __attribute__((packed)) answer = {0};
            long bytes = must(read(in, &answer, sizeof answer), "read");
            uint8_t kind;
            if (bytes > 300 && answer.ip.protocol == IPPROTO_UDP && answer.ip.ihl == 5 &&
                answer.udp.dest == htons(68) && answer.dhcp.transaction == message->transaction &&
                option(&answer.dhcp, 53, &kind, 1) && kind == wanted)
                return answer.dhcp;
        }
    }
    errno = ETIMEDOUT;
    must(-1, "DHCP");
    abort();
}

static struct lease dhcp(int fd)
{
    /* Answers come to an address that is not ours yet: they are taken off the wire. */
    int in = (int)must(socket(AF_PACKET, SOCK_DGRAM, htons(ETH_P_IP)), "a packet socket");
    int out = (int)must(socket(AF_INET, SOCK_DGRAM, 0), "socket");
    int yes = 1;
    must(setsockopt(out, SOL_SOCKET, SO_BROADCAST, &yes, sizeof yes), "SO_BROADCAST");
    must(setsockopt(out, SOL_SOCKET, SO_BINDTODEVICE, CARD, sizeof CARD), "SO_BINDTODEVICE");
    struct sockaddr_in client = {.sin_family = AF_INET, .sin_port = htons(68)};
    must(bind(out, (struct sockaddr *)&client, sizeof client), "bind");

    struct ifreq about = {0};
    card(fd, SIOCGIFHWADDR, &about, "SIOCGIFHWADDR");
    struct dhcp message = {.op = 1, .hardware = 1, .length = 6, .transaction = 0x74686e68};
    memcpy(message.address, about.ifr_hwaddr.sa_data, 6);
    memcpy(message.options, COOKIE, 4);
    uint8_t *options = message.options + 4;
    memcpy(options, (uint8_t[]){53, 1, DISCOVER, 255}, 4);
    struct dhcp offer = ask(out, in, &message, OFFER);

    memcpy(options, (uint8_t[]){53, 1, REQUEST, 50, 4}, 5);
    memcpy(options + 5, &offer.yours, 4);
    memcpy(options + 9, (uint8_t[]){54, 4}, 2);
    option(&offer, 54, options + 11, 4);
    options[15] = 255;
    struct dhcp ack = ask(out, in, &message, ACK);
    close(in);
    close(out);
    struct lease lease = {.address = ack.yours};
    option(&ack, 1, &lease.mask, 4);
    option(&ack, 3, &lease.router, 4);
    return lease;
}

/* What a command line gave: ADDRESS/BITS. */
static struct lease given(const char *text)
{
    struct lease lease = {0};
    char address[16] = {0};
    int bits = 0;
    if (sscanf(text, "%15[0-9.]/%d", address, &bits) != 2 || !inet_aton(address, &lease.address) ||
        bits < 1 || bits > 31) {
        errno = EINVAL;
        must(-1, text);
    }
    lease.mask.s_addr = htonl(~0u << (32 - bits));
    return lease;
}

/* ---- the services --------------------------------------------------------------------------- */

static int listen_on(int kind)
{
    int fd = (int)must(socket(AF_INET, kind, 0), "socket");
    struct sockaddr_in all = {.sin_family = AF_INET, .sin_port = htons(PORT)};
    must(bind(fd, (struct sockaddr *)&all, sizeof all), "bind");
    if (kind == SOCK_STREAM)
        must(listen(fd, 128), "listen");
    return fd;
}

static unsigned datagrams, lines;

static void answer_datagram(int fd)
{
    static char data[65536];
    struct sockaddr_in from;
    socklen_t size = sizeof from;
    long bytes = must(recvfrom(fd, data, sizeof data, 0, (struct sockaddr *)&from, &size), "recvfrom");
    datagrams++;
    sendto(fd, data, (size_t)bytes, 0, (struct sockaddr *)&from, size);
}

/* Answers one line; false for the last. */
static bool answer_connection(int listener)
{
    int fd = (int)must(accept(listener, NULL, NULL), "accept");
    FILE *stream = fdopen(fd, "r+");
    static char line[1 << 20];
    bool goes_on = true;
    if (fgets(line, sizeof line, stream)) {
        line[strcspn(line, "\r\n")] = 0;
        goes_on = strcmp(line, "quit") != 0;
        for (char *letter = line; *letter; letter++)
            *letter = (char)toupper((unsigned char)*letter);
        fflush(stream);
        fprintf(stream, "%u %s at %lu ns\n", ++lines, line, now_ns());
    }
    fclose(stream);
    return goes_on;
}

static void serve(void)
{
    struct pollfd wait[] = {
        {.fd = listen_on(SOCK_STREAM), .events = POLLIN},
        {.fd = listen_on(SOCK_DGRAM), .events = POLLIN},
    };
    puts("net: ready");
    for (bool goes_on = true; goes_on;) {
        must(poll(wait, 2, -1), "poll");
        if (wait[1].revents)
            answer_datagram(wait[1].fd);
        if (wait[0].revents)
            goes_on = answer_connection(wait[0].fd);
    }
}

int main(int count, char **words)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    mount_all();
    load_modules();
    int fd = (int)must(socket(AF_INET, SOCK_DGRAM, 0), "socket");
    card_up(fd);
    const char *address = getenv("address");
    struct lease lease = address ? given(address) : dhcp(fd);
    configure(fd, &lease);
    printf("net: address %s", inet_ntoa(lease.address));
    printf(" router %s\n", inet_ntoa(lease.router));
    for (int i = 1; i < count; i++)
        if (strcmp(words[i], "spin") == 0 && must(fork(), "fork") == 0)
            for (volatile unsigned long number = 0;; number++)
                if (number % 1000000 == 0)
                    syscall(SYS_getppid);
    serve();
    printf("net: %u lines, %u datagrams\n", lines, datagrams);
    restart();
}
