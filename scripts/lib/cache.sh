# shellcheck shell=bash
# Where dear things are kept from one checkout to the next. To be sourced.

# shared_cache ELSE: makes and prints the user's cache directory, by the rule of the program itself
# (vmm/src/session/kernel_cache.rs): $HINDSIGHT_CACHE, else hindsight in $XDG_CACHE_HOME, else in
# $HOME/.cache. Where that is none or cannot be written, the directory ELSE.
shared_cache() {
    local directory
    if [ -n "${HINDSIGHT_CACHE+set}" ]; then
        directory=$HINDSIGHT_CACHE
    elif [ -n "${XDG_CACHE_HOME-}" ]; then
        directory=$XDG_CACHE_HOME/hindsight
    else
        directory=${HOME:+$HOME/.cache/hindsight}
    fi
    if [ -z "$directory" ] || ! mkdir -p -- "$directory" 2>/dev/null || [ ! -w "$directory" ]; then
        directory=$1
        mkdir -p -- "$directory" || return
    fi
    (cd -- "$directory" && pwd -P)
}
