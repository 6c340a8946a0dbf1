#!/usr/bin/env bash
# A counter that cannot be relied on must be noticed: by the doctor, by the recorder, or by the
# replay, in words; and never by a replay that is wrong and calls itself equal.
set -euo pipefail
scripts=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
work=$(dirname "$scripts")/.cache/unkind
rm -rf "$work"
mkdir -p "$work"
box() { "$scripts/box" --pmu "$@" </dev/null; }
record=("$HINDSIGHT_BIN" record --force --quiet --kernel "$HINDSIGHT_KERNEL" --preempt branches)

# expect STATUS PATTERN COMMAND...: what the command says must hold the pattern.
expect() {
    local status=0 wanted=$1 pattern=$2
    shift 2
    "$@" >"$work/said" 2>&1 || status=$?
    if [ "$status" -ne "$wanted" ] || ! grep -q -- "$pattern" "$work/said"; then
        cat "$work/said"
        echo "expected status $wanted and \"$pattern\", found status $status: $*" >&2
        exit 1
    fi
    grep -m 1 -- "$pattern" "$work/said"
}

echo "instructions, which each interrupt adds to:"
expect 4 'does not count exactly' box --pmu-knob pmu-count-interrupts=on \
    "${record[@]}" --event r00c0 -o "$work/r" --initrd "$HINDSIGHT_IMAGES/hello.cpio"
box --pmu-knob pmu-count-interrupts=on "$HINDSIGHT_BIN" doctor --event r00c0 >"$work/said" || true
grep -m 1 'drifts' "$work/said"

echo "perf throttles:"
# Whether it does depends on the moment; that it may is told in any case.
status=0
box --pmu-knob throttle=on "${record[@]}" --patience 0 -o "$work/r" \
    --initrd "$HINDSIGHT_IMAGES/threads.cpio" >"$work/said" 2>&1 || status=$?
grep -m 1 'throttle' "$work/said"
case $status in
    0) expect 0 'replay equal' box "$HINDSIGHT_BIN" replay --quiet "$work/r" ;;
    4 | 5) grep -m 1 'throttled' "$work/said" ;;
    *)
        cat "$work/said"
        exit 1
        ;;
esac

echo "a margin below the skid:"
box "${record[@]}" --patience 0 -o "$work/r" --initrd "$HINDSIGHT_IMAGES/threads.cpio"
expect 5 'branches on, at rip' box --pmu-knob pmu-skid=2000 \
    "$HINDSIGHT_BIN" replay --quiet --margin 3 "$work/r"
expect 0 'replay equal' box --pmu-knob pmu-skid=200 "$HINDSIGHT_BIN" replay --quiet "$work/r"
rm -rf "$work"
