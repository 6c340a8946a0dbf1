#!/usr/bin/env bash
# A recording is checked by the schedulers of docs/fleet.md: `fleet.sh parallel N` (in scripts/test), in N stretches if
# it is right, and `fleet.sh slurm` (in scripts/soak --fleet), to be run where recordings replay. The schedulers are in
# namespaces of their own: nothing of theirs stays. A recording that is right is found right, one with a flipped bit is
# named by one stretch, and a stretch whose host fails once is tried again.
set -euo pipefail
scripts=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
if [ -z "${HINDSIGHT_FLEET-}" ]; then
    export HINDSIGHT_FLEET=1
    exec unshare --net --uts --mount --pid --fork --kill-child --mount-proc "$0" "$@"
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export PATH=$work/bin:$PATH FLEET_WORK=$work

fail() {
    echo "fleet: $*" >&2
    head -n 100 "$work"/*.out "$work"/*.log 2>/dev/null >&2 || true
    exit 1
}
# expect CODE COMMAND...
expect() {
    local expected=$1 status=0
    shift
    "$@" || status=$?
    [ "$status" -eq "$expected" ] || fail "expected exit code $expected of $*, found $status"
}

# A program that its host fails once, at stretch 3.
mkdir bin
cat >bin/hindsight <<'WRAPPER'
#!/bin/sh
case "$*" in
    *3/8*) if [ -e "$FLEET_WORK/fails" ]; then rm "$FLEET_WORK/fails"; exit 5; fi ;;
esac
exec "$HINDSIGHT_BIN" "$@"
WRAPPER
chmod +x bin/hindsight

expect 0 hindsight record -o right --kernel "$HINDSIGHT_KERNEL" --initrd "$HINDSIGHT_IMAGES/hello.cpio" \
    >console.log 2>record.log </dev/null
expect 0 hindsight index right 2>index.log
cp -r right damaged
middle=$(($(stat -c %s damaged/journal) / 2))
byte=$(od -An -t u1 -j "$middle" -N 1 damaged/journal)
printf "\\x$(printf %02x $((byte ^ 16)))" | dd of=damaged/journal bs=1 seek="$middle" conv=notrunc status=none

# named_by_one FILE...: of the verdicts on the damaged recording one says that it is damaged.
named_by_one() {
    local verdicts
    expect 3 hindsight verify damaged --json --collect "$@" >collected
    verdicts=$(grep -o '"verdict":"[^"]*"' collected | cut -d '"' -f 4)
    [ "$(wc -l <<<"$verdicts")" = 8 ] || fail "expected 8 verdicts: $verdicts"
    [ "$(grep -c '^cut short$' <<<"$verdicts")" = 1 ] || fail "expected one that is cut short: $verdicts"
    # One that begins in the damaged frame cannot begin.
    [ "$(grep -Evc '^(cut short|equal|empty|not checked)$' <<<"$verdicts")" = 0 ] || fail "$verdicts"
    grep -q '^equal$' <<<"$verdicts" || fail "none is equal: $verdicts"
    echo "the damaged recording: $(sort <<<"$verdicts" | uniq -c | tr -s ' \n' ' ')"
}

with_parallel() {
    local stretches=$1
    expect 0 "$scripts/fleet/parallel-verify" right "$stretches" right.json --jobs 2
    touch fails
    expect 3 "$scripts/fleet/parallel-verify" damaged 8 damaged.json --jobs 2
    [ ! -e fails ] || fail "stretch 3 did not fail"
    named_by_one damaged.json
    # Two are lost: that is said of them, and it is no verdict on the recording.
    sed '2d;5d' right.json >some.json
    [ "$stretches" -lt 8 ] || expect 5 hindsight verify right --collect some.json
}

# One machine that is controller and node, with a configuration of its own.
start_slurm() {
    hostname localhost
    ip link set lo up
    # With 127.0.0.1 alone the C library finds no address for anything.
    ip address add 10.99.99.99/32 dev lo
    mkdir munge state spool
    dd if=/dev/urandom of=munge/key bs=1 count=128 status=none
    chmod 600 munge/key
    munged --force --key-file="$work/munge/key" --socket="$work/munge/socket" --pid-file="$work/munge/pid" \
        --log-file="$work/munge.log" --seed-file="$work/munge/seed"
    # A task that is queued again waits for the credential of its first try to expire.
    cat >slurm.conf <<CONF
ClusterName=fleet
SlurmctldHost=localhost
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$work/munge/socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmdParameters=config_overrides
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.log
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2 RealMemory=8192
PartitionName=main Nodes=localhost Default=YES MaxTime=INFINITE State=UP
CONF
    printf 'CgroupPlugin=cgroup/v1\nCgroupMountpoint=%s\nCgroupAutomount=no\n' "$work/cgroup" >cgroup.conf
    export SLURM_CONF=$work/slurm.conf
    slurmctld
    slurmd
    local tries=0
    until sinfo --noheader | grep -q idle; do
        tries=$((tries + 1))
        [ "$tries" -lt 100 ] || fail "slurm does not start"
        sleep 0.5
    done
}

with_slurm() {
    start_slurm
    local name code array
    for name in right damaged; do
        code=0
        [ "$name" = right ] || code=3
        [ "$name" = right ] && touch fails
        array=$(sbatch --parsable --array=1-8 --output="$name-%a.out" \
            "$scripts/fleet/slurm-stretch" "$work/$name" "$work/verdicts-$name")
        expect "$code" sbatch --wait --dependency="afterany:$array" --output="$name-collect.out" \
            "$scripts/fleet/slurm-collect" "$work/$name" "$work/verdicts-$name"
        cat "$name-collect.out"
    done
    [ ! -e fails ] || fail "stretch 3 did not fail"
    grep -q 'queued again' right-3.out || fail "stretch 3 was not queued again"
    named_by_one verdicts-damaged/*.json
}

case ${1-} in
    parallel) with_parallel "$2" ;;
    slurm) with_slurm ;;
    *) fail "expected parallel or slurm" ;;
esac
echo "fleet: $1 finds the right recording right and the damaged one damaged"
