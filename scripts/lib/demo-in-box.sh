#!/usr/bin/env bash
# The part of the demo that needs a KVM that can record: HINDSIGHT KERNEL INITRD DIRECTORY.
set -euo pipefail
hindsight=$1 kernel=$2 initrd=$3 directory=$4
crash=$directory/crash

say() { printf '\n== %s\n' "$*"; }

say "recording Debian's own kernel, with four processes that race, until it crashes"
"$hindsight" record --force -o "$crash" --until-crash=60 --chaos \
    --kernel "$kernel" --initrd "$initrd" >"$directory/consoles"
# The consoles of the runs before it stand above that of the run that crashed.
grep -a '^race:' "$directory/consoles" | tail -n 3

for replay in 1 2 3; do
    say "replay $replay of the run that crashed"
    "$hindsight" replay "$crash" >"$directory/replayed"
    if ! tail -c "$(stat -c %s "$directory/replayed")" "$directory/consoles" |
        cmp - "$directory/replayed"; then
        echo "the console of the replay differs" >&2
        exit 1
    fi
    echo "the console is the same, byte for byte; it ends:"
    tail -n 4 "$directory/replayed" | cut -c 1-110
done

say "what the recording is"
"$hindsight" inspect "$crash"
