# shellcheck shell=bash
# Builds the program and says where it is. To be sourced after install.sh, with $checkout set.

# in_reach FILE: copies a built program to where the box sees it, wherever cargo built it (the box
# has a /tmp of its own), and prints the copy's path.
in_reach() {
    local copy
    copy=$checkout/.cache/bin/$(basename "$1")
    mkdir -p "$checkout/.cache/bin"
    cmp -s "$1" "$copy" || install "$1" "$copy"
    printf '%s\n' "$copy"
}

# built NAME: where cargo put a program of the release profile.
built() {
    printf '%s\n' "${CARGO_TARGET_DIR:-$checkout/target}/release/$1"
}

# build_hindsight: builds the program for use; sets $hindsight to it.
build_hindsight() {
    if ! command -v cargo >/dev/null; then
        echo "cargo is missing: install Rust (rustup) first" >&2
        return 2
    fi
    (cd "$checkout" && cargo build --quiet --locked --release -p hindsight-cli) || return
    hindsight=$(in_reach "$(built hindsight)")
}

# where_to_record: sets the array $recorder to what must stand before a command that records: nothing
# where this machine's own KVM will do, else the box.
where_to_record() {
    if "$hindsight" doctor >/dev/null 2>&1; then
        recorder=()
    else
        recorder=("$checkout/scripts/box")
    fi
}
