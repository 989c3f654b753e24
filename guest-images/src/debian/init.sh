#!/bin/busybox sh
# The init of the Debian guest. Words of the kernel's command line tell it what to do:
#
#   us.run=shell      a shell on the console (the default); leaving it ends the guest
#   us.run=idle       waits; a line `poweroff` or `reboot` on the console ends it, `torture ..` and
#                     `understudy-checkpoint ..` run that
#   us.run=torture    everything that `torture all` does
#   us.disk=DEVICE    an ext4 disk to mount at /mnt: vda ..; torture keeps its records there
#   us.root=DEVICE    an ext4 disk with a Debian root, in which all of this runs
#   us.ip=A.B.C.D/N   the address of eth0; us.gateway=A.B.C.D
#   us.peer=A.B.C.D:P the other end of torture's stream; its address is pinged
#   us.time=A.B.C.D:P the peer whose clock the guest's is compared with; us.time_ms=N
#   us.seconds=N      torture ends after so long; us.mib=N, us.records=N: its memory and records
#   us.then=poweroff|reboot|stay   what follows when what runs has ended (poweroff)
#   us.clock=NAME     the clock source to use: kvm-clock, tsc ..
#   us.stress=1       stress-ng besides torture, where the root disk has it
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root TERM=linux
/bin/busybox mkdir -p /bin /proc /sys /dev /mnt /root /tmp /run
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev 2>/dev/null
exec </dev/console >/dev/console 2>&1

run=shell after=poweroff disk= root= ip= gateway= peer= clock= stress= keys=
for word in $(cat /proc/cmdline); do
    value=${word#*=}
    case $word in
    us.run=*) run=$value ;;
    us.then=*) after=$value ;;
    us.disk=*) disk=$value ;;
    us.root=*) root=$value ;;
    us.ip=*) ip=$value ;;
    us.gateway=*) gateway=$value ;;
    us.peer=*) peer=$value ;;
    us.clock=*) clock=$value ;;
    us.stress=*) stress=$value ;;
    us.seconds=* | us.mib=* | us.records=* | us.beat_ms=* | us.late_ms=* | us.stuck_s=* | us.seed=* | us.time=* | us.time_ms=*)
        keys="$keys ${word#us.}" ;;
    us.*) echo "BAD init unknown word $word" ;;
    esac
done

while read -r module; do
    insmod "/modules/$module.ko" || echo "BAD init cannot load $module"
done </modules/order

# A disk is there when its driver has found it, which insmod does not wait for.
wait_for_disk() {
    tries=0
    while [ ! -b "/dev/$1" ] && [ $tries -lt 100 ]; do usleep 100000; tries=$((tries + 1)); done
}
inside=
if [ -n "$root" ]; then
    mkdir -p /root-disk
    wait_for_disk "$root"
    if mount -t ext4 "/dev/$root" /root-disk; then
        inside="chroot /root-disk"
        mkdir -p /root-disk/mnt
        for folder in proc sys dev; do mount --bind /$folder /root-disk/$folder; done
        mount -t tmpfs tmp /root-disk/tmp
        cp /bin/torture /root-disk/tmp/torture
    else
        echo "BAD init cannot mount /dev/$root"
    fi
fi
if [ -n "$disk" ]; then
    wait_for_disk "$disk"
    if mount -t ext4 "/dev/$disk" /mnt; then keys="$keys file=/mnt/records"; else echo "BAD init cannot mount /dev/$disk"; fi
    [ -z "$inside" ] || mount --bind /mnt /root-disk/mnt
fi
ip link set lo up
if [ -n "$ip" ]; then
    ip address add "$ip" dev eth0 && ip link set eth0 up || echo "BAD init cannot set up eth0"
    [ -z "$gateway" ] || ip route add default via "$gateway"
fi
[ -z "$peer" ] || keys="$keys peer=$peer ping=${peer%:*}"
source=/sys/devices/system/clocksource/clocksource0
[ -z "$clock" ] || echo "$clock" >$source/current_clocksource || echo "BAD init no clock source $clock"

torture=torture
[ -z "$inside" ] || torture="$inside /tmp/torture"
echo "us: up kernel=$(uname -r) cpus=$(nproc) memory_kib=$(awk '/MemTotal/ {print $2}' /proc/meminfo)" \
    "clock=$(cat $source/current_clocksource) run=$run"
case $run in
shell)
    # A session of its own, so that the console is its terminal and ^C works.
    setsid cttyhack $inside /bin/sh ;;
idle)
    while read -r line; do
        case $line in
        poweroff | reboot) after=$line; break ;;
        "torture "* | understudy-checkpoint*) $line ;;
        "") ;;
        *) echo "us: unknown: $line" ;;
        esac
    done ;;
torture)
    [ -z "$stress" ] || $inside stress-ng --cpu 1 --vm 1 --vm-bytes 32M --pipe 1 --verify --quiet &
    # shellcheck disable=SC2086 # They are words.
    $torture all $keys
    echo "us: torture status=$?" ;;
*) echo "BAD init unknown us.run=$run" ;;
esac

[ -z "$disk" ] || umount /mnt 2>/dev/null || mount -o remount,ro /mnt
[ -z "$root" ] || mount -o remount,ro /root-disk
sync
echo "us: end $after"
case $after in
reboot) reboot -f ;;
stay) while :; do sleep 3600; done ;;
*) poweroff -f ;;
esac
