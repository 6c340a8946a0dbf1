# shellcheck shell=bash
# Installs what the other scripts need, and finds the kernels. To be sourced, not run.
#
# Everything comes from Debian's own archive. What is present is left alone, so that a second
# call costs a few milliseconds and needs neither root nor a network.

# What a stage of the work needs. The ordinary kernel runs the box (the cloud kernel has no 9p);
# the cloud kernel is the guest that is recorded.
packages_box=(linux-image-amd64 qemu-system-x86 busybox-static cpio kmod xz-utils)
packages_images=(linux-image-cloud-amd64 cpio gcc kmod libc6-dev)
# What images of a whole Debian are built with.
packages_debian=(mmdebstrap e2fsprogs zstd)
# What other releases' kernels are checked with.
packages_kernels=(debian-archive-keyring)
# What the tests of disks make images with.
packages_disks=(e2fsprogs fdisk)
# What the tests of networks drive guests with, and read what `hindsight pcap` writes with.
packages_network=(passt iproute2 tshark)
# What replays are debugged with.
packages_debugger=(gdb)
# What recordings are checked on many machines with.
packages_parallel=(parallel)
packages_slurm=(slurm-wlm munge)

# missing_packages NAME...: prints those of the names that are not installed, one per line.
missing_packages() {
    local name status
    for name in "$@"; do
        # Purged and half-installed packages have a status too; only this one will do.
        status=$(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null) || status=none
        [ "$status" = installed ] || printf '%s\n' "$name"
    done
}

# install_packages NAME...: installs what is missing. Quiet but for one line of progress; on
# failure the log of apt is shown and the status is 2.
install_packages() {
    local missing
    mapfile -t missing < <(missing_packages "$@")
    [ ${#missing[@]} -eq 0 ] || install_newest "${missing[@]}"
}

# install_newest NAME...: the same, and upgrades what is there to what the archive has now.
install_newest() {
    local missing=("$@") log
    if [ "$(id -u)" -ne 0 ]; then
        echo "missing packages, and only root may install them. Please run:" >&2
        echo "    apt-get install --no-install-recommends ${missing[*]}" >&2
        return 2
    fi
    if ! command -v apt-get >/dev/null; then
        echo "missing packages, and this is no Debian system: ${missing[*]}" >&2
        return 2
    fi
    echo "installing: ${missing[*]}" >&2
    log=$(mktemp)
    # The lists may be absent (a fresh container) or stale (a removed version): on either,
    # fetch them and try once more. We boot these kernels with initrds of our own, and
    # INITRD=No is what Debian's kernel hook honours; it saves a minute.
    # qemu-system-x86 conflicts with the qemu-utils of newer releases: -y lets apt remove it.
    if ! apt_install "${missing[@]}" >"$log" 2>&1; then
        if ! { apt-get -q update && apt_install "${missing[@]}"; } >>"$log" 2>&1; then
            tail -n 30 "$log" >&2
            rm -f "$log"
            echo "apt could not install: ${missing[*]}" >&2
            return 2
        fi
    fi
    rm -f "$log"
}

apt_install() {
    INITRD=No DEBIAN_FRONTEND=noninteractive apt-get -q -y --no-install-recommends \
        -o DPkg::Lock::Timeout=300 install "$@" </dev/null
}

# newest_kernel cloud|ordinary: prints the path of the newest such kernel in /boot. Status 1
# if there is none. PREEMPT_RT and unsigned builds are neither.
newest_kernel() {
    local path name found=()
    for path in /boot/vmlinuz-*-amd64; do
        [ -f "$path" ] || continue
        name=${path#/boot/vmlinuz-}
        case $1:$name in
            *:*-rt-amd64) ;;
            cloud:*-cloud-amd64) found+=("$path") ;;
            cloud:* | ordinary:*-cloud-amd64) ;;
            ordinary:*) found+=("$path") ;;
        esac
    done
    [ ${#found[@]} -gt 0 ] || return 1
    printf '%s\n' "${found[@]}" | sort -V | tail -n 1
}
