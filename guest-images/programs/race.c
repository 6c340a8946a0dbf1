/* A bank with a bug. Tellers, each a process of its own, move money between the accounts of a
 * shared ledger, and each keeps a trail of its transfers. At closing time process 1 audits: every
 * account must hold what its transfers add up to. If one does not, process 1 gives up, and the
 * kernel panics, for it cannot live without process 1.
 *
 * Nothing here is set to fail. transfer() holds no lock, so it is wrong only when the
 * scheduler takes the processor away at one certain place and another teller touches the same
 * accounts meanwhile: rarely. The next run will probably be fine. That is the kind of bug that one
 * wants a recording of. */
#include "guest.h"

/* The odds. A timer tick (250 a second) hands the processor to the next teller. The tick
 * arrives at one of the places where a teller asks for the time: of LOOKS + 2 of them, on average,
 * one is inside transfer(). So with open hours of T ticks
 *     odds of a tick in transfer() = 1 - (1 - 1 / (LOOKS + 2)) ** T
 * which here is 7 in 100, and the speed of the machine matters little: both are counts. On a fast
 * machine the others make thousands of transfers in a tick, so it is nearly certain that they touch
 * the same accounts meanwhile. Where a look takes 100 us, they make one now and then, and hardly
 * ever at the same time, for customers come at random: the odds are smaller there.
 * To tune: LOOKS and OPEN_MS. */
enum {
    TELLERS = 4,
    ACCOUNTS = 8,
    DEPOSIT = 1000,
    OPEN_MS = 32,
    LOOKS = 112,
    AT_LEAST = 1, /* transfers of each teller */
    TRAIL = 1 << 16, /* records that one teller can leave */
};

struct record {
    uint64_t time_ns;
    int from, to;
    long amount;
};

struct teller {
    uint64_t random;
    unsigned records;
    struct record trail[TRAIL];
};

struct bank {
    long balance[ACCOUNTS];
    struct teller teller[TELLERS];
};

static unsigned draw(struct teller *me, unsigned below)
{
    me->random = me->random * 6364136223846793005u + 1442695040888963407u;
    return (unsigned)(me->random >> 33) % below;
}

/* The bug. What was read before the audit record is written back after it, and to make the
 * record takes a system call. */
static void transfer(struct bank *bank, struct teller *me, int from, int to, long amount)
{
    long from_balance = bank->balance[from];
    long to_balance = bank->balance[to];

    if (from_balance < amount)
        return;
    me->trail[me->records++] = (struct record){now_ns(), from, to, amount};
    bank->balance[from] = from_balance - amount;
    bank->balance[to] = to_balance + amount;
}

/* No customer: the teller looks at the clock. Counted rather than timed: see the odds. */
static uint64_t wait_for_customer(struct teller *me)
{
    uint64_t time_ns = now_ns();
    for (unsigned looks = draw(me, 2 * LOOKS + 1); looks > 0; looks--)
        time_ns = now_ns();
    return time_ns;
}

static void serve(struct bank *bank, struct teller *me, uint64_t closing_ns)
{
    while ((wait_for_customer(me) < closing_ns || me->records < AT_LEAST) && me->records < TRAIL) {
        int from = (int)draw(me, ACCOUNTS);
        int to = (from + 1 + (int)draw(me, ACCOUNTS - 1)) % ACCOUNTS;
        transfer(bank, me, from, to, 1 + (long)draw(me, 50));
    }
}

/* Compares the ledger with what the tellers wrote down. Returns how many accounts are wrong. */
static int audit(const struct bank *bank)
{
    long should[ACCOUNTS], sum = 0;
    unsigned transfers = 0;
    int wrong = 0;

    for (int i = 0; i < ACCOUNTS; i++)
        should[i] = DEPOSIT;
    for (int t = 0; t < TELLERS; t++) {
        const struct teller *teller = &bank->teller[t];
        for (unsigned i = 0; i < teller->records; i++) {
            should[teller->trail[i].from] -= teller->trail[i].amount;
            should[teller->trail[i].to] += teller->trail[i].amount;
        }
        transfers += teller->records;
    }
    for (int i = 0; i < ACCOUNTS; i++) {
        sum += bank->balance[i];
        if (bank->balance[i] == should[i])
            continue;
        printf("race: account %d holds %ld, but its transfers add up to %ld\n", i,
               bank->balance[i], should[i]);
        wrong++;
    }
    printf("race: %u transfers by %d tellers; the bank had %d and has %ld\n", transfers, TELLERS,
           ACCOUNTS * DEPOSIT, sum);
    return wrong;
}

int main(void)
{
    struct bank *bank = shared_memory(sizeof *bank);
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (int i = 0; i < ACCOUNTS; i++)
        bank->balance[i] = DEPOSIT;

    uint64_t closing_ns = now_ns() + OPEN_MS * 1000000ull;
    puts("race: the bank opens");
    for (int t = 0; t < TELLERS; t++) {
        bank->teller[t].random = closing_ns + (uint64_t)t;
        if (must(fork(), "fork") == 0) {
            serve(bank, &bank->teller[t], closing_ns);
            _exit(0);
        }
    }
    while (wait(NULL) > 0)
        ;

    if (audit(bank) != 0) {
        puts("race: the books do not balance");
        return 1; /* process 1 ends: "Attempted to kill init!" */
    }
    puts("race: ok");
    restart();
}
