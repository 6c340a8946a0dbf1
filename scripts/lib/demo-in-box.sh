#!/usr/bin/env bash
# The part of the demo that needs a KVM that can record: HINDSIGHT KERNEL INITRD DIRECTORY.
set -euo pipefail
hindsight=$1 kernel=$2 initrd=$3 directory=$4
crash=$directory/crash

say() { printf '\n== %s\n' "$*"; }

for run in $(seq 1 60); do
    say "run $run: recording Debian's own kernel, with four processes that race"
    summary=$directory/summary
    "$hindsight" record --force -o "$crash" --kernel "$kernel" --initrd "$initrd" \
        >"$directory/console" 2>"$summary" || { cat "$summary"; exit 1; }
    grep -a '^race:' "$directory/console" || true
    cat "$summary"
    if grep -q 'kernel panic' "$summary"; then
        break
    fi
    if [ "$run" -eq 60 ]; then
        echo "the bank lost no money in 60 runs: no crash to show" >&2
        exit 1
    fi
done

for replay in 1 2 3; do
    say "replay $replay of the run that crashed"
    "$hindsight" replay "$crash" >"$directory/replayed"
    if ! cmp "$directory/console" "$directory/replayed"; then
        echo "the console of the replay differs" >&2
        exit 1
    fi
    echo "the console is the same, byte for byte; it ends:"
    tail -n 4 "$directory/replayed" | cut -c 1-110
done

say "what the recording is"
"$hindsight" inspect "$crash"
