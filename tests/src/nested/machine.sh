#!/bin/sh
# The init of an emulated host. What it is to do is in /run/nested: `host` (its number), `hosts` (how many there
# are), `environment`, `command`. It speaks with nested-host through the port `control`, a line each:
#
#   we say  `ready`       the machine is up
#   it says `run`         run the command (only to host 1)
#   we say  `status N`    the command has ended
#   it says `end`         put the results on the disk for them, if there is one, and power off
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root TERM=dumb
host=$(cat /run/nested/host) hosts=$(cat /run/nested/hosts)
mkdir -p /tmp /root /results /var/tmp /dev/pts /dev/shm
chmod 1777 /tmp /var/tmp
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t cgroup2 cgroup /sys/fs/cgroup
ln -sf /proc/self/fd /dev/fd
ulimit -n 65536
hostname "host-$host"
ip link set lo up
# A guest that waits must not burn what little CPU there is.
echo 0 >/sys/module/kvm/parameters/halt_poll_ns
if [ "$hosts" -gt 1 ]; then
    # The first network is only for `on-host`; a test may do to the second what it likes.
    ip address add "10.78.0.$host/24" dev eth0
    ip link set eth0 up
    ip address add "10.77.0.$host/24" dev eth1
    ip link set eth1 up
fi

mkdir -p /run/ports
for name in /sys/class/virtio-ports/*/name; do
    port=${name%/name}
    ln -s "/dev/${port##*/}" "/run/ports/$(cat "$name")"
done
exec 3<>/run/ports/control
. /run/nested/environment
export NESTED_HOST="$host" NESTED_HOSTS="$hosts"
[ "$hosts" -gt 1 ] && on-host --serve "10.78.0.$host" >/dev/kmsg 2>&1 &
echo ready >&3
while read -r order <&3; do
    case $order in
    run)
        setsid sh /run/nested/command </run/ports/stdin >/run/ports/stdout 2>/run/ports/stderr 3<&-
        echo "status $?" >&3 ;;
    end)
        [ -b /dev/vdb ] && tar -cf /dev/vdb -C /results .
        break ;;
    *) echo "nested-host: unknown order '$order'" >/dev/kmsg ;;
    esac
done
sync
poweroff -f
