#!/bin/busybox sh
# The first process of the box: what runs inside QEMU before, around and after the command.
# It is in the initramfs that scripts/box builds; `box` in the environment names the directory,
# on the host, of this run, and `throttle` says whether perf may throttle (the kernel hands
# unknown words of its command line to init).
#
# Two stages. The first, in the initramfs, loads drivers and puts the host's tree under an
# overlay. The second, in that tree, runs the command and carries its three streams.

# shellcheck shell=dash # busybox's is near enough
# shellcheck disable=SC2154 # box and throttle come from the kernel
bb=/bin/busybox
fail() {
    echo "box: $*" >/dev/console
    $bb reboot -f
    exit 1 # Never reached, unless reboot failed: then the kernel panics, which does as well.
}

first_stage() {
    $bb mkdir -p /dev /proc /sys /lower /layer /new
    $bb mount -t devtmpfs dev /dev
    while read -r module options; do
        # shellcheck disable=SC2086 # the options are words
        $bb insmod "/modules/$module" $options || fail "cannot load $module"
    done </modules/list

    # The host's tree may be read and never written; whatever the command writes outside the
    # shared directories lands in memory and goes when the machine goes. Nobody else changes
    # the tree while the box runs, or so we may suppose: cache=loose is fast.
    options=trans=virtio,version=9p2000.L,msize=524288,access=any
    $bb mount -t 9p -o "ro,$options,cache=loose" root /lower || fail "cannot mount the host's tree"
    $bb mount -t tmpfs -o size=75% layer /layer
    $bb mkdir /layer/upper /layer/work
    $bb mount -t overlay -o lowerdir=/lower,upperdir=/layer/upper,workdir=/layer/work root /new ||
        fail "cannot lay the overlay"

    for directory in proc sys dev run tmp; do
        [ -d "/new/$directory" ] || $bb mkdir "/new/$directory"
    done
    $bb mount -t proc proc /new/proc
    $bb mount -t sysfs sys /new/sys
    $bb mount -t debugfs debug /new/sys/kernel/debug
    $bb mount -t devtmpfs dev /new/dev
    $bb mkdir -p /new/dev/pts /new/dev/shm
    $bb mount -t devpts -o mode=620,ptmxmode=666 pts /new/dev/pts
    $bb mount -t tmpfs shm /new/dev/shm
    $bb mount -t tmpfs -o mode=755 run /new/run
    $bb mount -t tmpfs -o size=75%,mode=1777 tmp /new/tmp
    for link in fd:/proc/self/fd stdin:fd/0 stdout:fd/1 stderr:fd/2; do
        $bb ln -sf "${link#*:}" "/new/dev/${link%%:*}"
    done

    # The second stage needs a shell that no shared directory can cover.
    $bb mkdir /new/run/box
    $bb cp /bin/busybox /init "/lower$box/command" "/lower$box/shared" /new/run/box/ ||
        fail "cannot read $box"
    # cache=mmap: what the command writes is on the host when write() returns, even if the
    # machine is killed the moment after.
    while read -r tag path; do
        $bb mkdir -p "/new$path"
        $bb mount -t 9p -o "rw,$options,cache=mmap" "$tag" "/new$path" || fail "cannot mount $path"
    done </new/run/box/shared
    exec $bb switch_root -c /dev/console /new /run/box/busybox sh /run/box/init second
}

# The counters and the state of port N: QEMU tells a port late that its other end is open, and
# a read before that would look like end of file.
port_state() { $bb sed -n "s/^$2: //p" /sys/kernel/debug/virtio-ports/vport*p"$1"; }

# Kills every process but init and those given. Again and again: a process may have forked
# between the look and the kill.
kill_others() {
    again=yes
    while [ $again = yes ]; do
        again=no
        for process in /proc/[0-9]*; do
            id=${process#/proc/}
            case " 1 $* " in *" $id "*) continue ;; esac
            # Only the living with an address space have a program: no kernel thread, no zombie.
            $bb readlink "$process/exe" >/dev/null 2>&1 || continue
            kill -KILL "$id" 2>/dev/null && again=yes
        done
    done
}

second_stage() {
    bb=/run/box/busybox
    $bb ip link set lo up
    echo always >/sys/kernel/mm/transparent_hugepage/enabled
    # perf drops counts, and says so nowhere, when it thinks that interrupts come too often or
    # take too long. The rate first: with the time limit off, Linux refuses to change it.
    if [ "$throttle" = off ]; then
        echo 100000000 >/proc/sys/kernel/perf_event_max_sample_rate
        echo 0 >/proc/sys/kernel/perf_cpu_time_max_percent
    fi
    echo -1 >/proc/sys/kernel/perf_event_paranoid
    ulimit -n 65536
    ulimit -l unlimited

    for port in 1 2 3 4; do
        until [ "$(port_state $port host_connected)" = 1 ]; do $bb usleep 5000; done
    done
    cd /run/box || fail "no /run/box"
    $bb mkfifo in out err
    $bb cat /dev/vport*p1 >in 2>/dev/null &
    $bb cat out >"$(echo /dev/vport*p2)" &
    out=$!
    $bb cat err >"$(echo /dev/vport*p3)" &
    err=$!

    $bb setsid "$bb" sh ./command <in >out 2>err &
    wait $!
    code=$?

    # What the command left running would keep its output open for ever.
    kill_others $out $err
    wait $out $err
    $bb sync
    while read -r _ path; do $bb umount "$path" 2>/dev/null; done <shared
    # The ports acknowledge a write before the host has consumed it. So say how much there is:
    # the host counts, and switches us off when it has it all.
    echo "exit $code $(port_state 2 bytes_sent) $(port_state 3 bytes_sent)" >"$(echo /dev/vport*p4)"
    while :; do $bb sleep 3600; done
}

if [ "${1-}" = second ]; then second_stage; else first_stage; fi
