#!/usr/bin/env bash
# Records in one box, copies the recording elsewhere, and replays it in a box started afresh.
set -euo pipefail
scripts=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
work=$(dirname "$scripts")/.cache/two-boxes
rm -rf "$work"
mkdir -p "$work"
"$scripts/box" "$HINDSIGHT_BIN" record -o "$work/first" --kernel "$HINDSIGHT_KERNEL" \
    --initrd "$HINDSIGHT_IMAGES/boot.cpio" >"$work/console" </dev/null
cp -r "$work/first" "$work/copied"
rm -r "$work/first"
"$scripts/box" "$HINDSIGHT_BIN" replay "$work/copied" --verify memory >"$work/replayed" </dev/null
cmp "$work/console" "$work/replayed"
rm -rf "$work"
