# shellcheck shell=bash
# Builds the program and says where it is. To be sourced after install.sh, with $checkout set.

# rust_target_dir: where cargo puts what it builds.
rust_target_dir() {
    printf '%s\n' "${CARGO_TARGET_DIR:-$checkout/target}"
}

# build_hindsight: builds the program for use; sets $hindsight to it.
build_hindsight() {
    if ! command -v cargo >/dev/null; then
        echo "cargo is missing: install Rust (rustup) first" >&2
        return 2
    fi
    (cd "$checkout" && cargo build --quiet --locked --release -p hindsight) || return
    hindsight=$(rust_target_dir)/release/hindsight
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
