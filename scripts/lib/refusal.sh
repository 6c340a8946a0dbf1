#!/usr/bin/env bash
# On a KVM that cannot record, `record` must say so at once, name the way out, and leave nothing.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
status=0
"$HINDSIGHT_BIN" record -o "$directory/r" --kernel "$HINDSIGHT_KERNEL" \
    --initrd "$HINDSIGHT_IMAGES/hello.cpio" >/dev/null 2>"$directory/stderr" </dev/null || status=$?
cat "$directory/stderr"
if [ "$status" -ne 4 ]; then
    echo "expected exit code 4, found $status" >&2
    exit 1
fi
grep -q doctor "$directory/stderr"
[ ! -e "$directory/r/journal" ]
