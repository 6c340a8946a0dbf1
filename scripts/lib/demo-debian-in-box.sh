#!/usr/bin/env bash
# The part of the demo of a whole Debian that needs a KVM that can record: HINDSIGHT SESSION DIRECTORY.
set -euo pipefail
hindsight=$1 session=$2 directory=$3
recording=$directory/recording

say() { printf '\n== %s\n' "$*"; }

say "recording Debian from power-on, through a login and what is typed there, to poweroff"
rm -rf "$recording"
"$session" "$recording" --net user >"$directory/console"
# The kernel may put a message of its own after the prompt.
sed -n '/debian login: /,/ip -brief/p' "$directory/console" | cut -c 1-110

say "replaying it"
"$hindsight" replay "$recording" >"$directory/replayed"
cmp "$directory/console" "$directory/replayed"
echo "the console is the same, byte for byte"

say "the console, with the guest's times; its last lines"
"$hindsight" console "$recording" | tail -n 4 | cut -c 1-110

say "what went over its network"
"$hindsight" pcap "$recording" -o "$directory/net.pcapng"
if command -v tshark >/dev/null; then
    tshark -r "$directory/net.pcapng" -c 6 2>/dev/null
fi

say "what the recording is"
"$hindsight" inspect "$recording"
