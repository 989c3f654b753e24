# Behind src/emulated.sh, what tests/linux.rs does with a guest's clocks in the emulated host: bash clock.sh KERNEL INITRAMFS TORTURE GAP
# The guest compares its clock with this host's all the time, to the millisecond, and says BAD when it is off by more than 50.
kernel=$1 initrd=$2 torture=$3 gap=$4

# said NAME KEY: the newest value of the worker `time`, 0 before the first.
said() {
    value=$(tr -d '\r' <"$runs/$1/console.log" | sed '$d' | sed -n "s/^torture time .*$2=\([0-9]*\).*/\1/p" | tail -n 1)
    echo "${value:-0}"
}

# answered NAME COUNT WHAT: until the guest has had so many answers more.
answered() {
    # From the first that is said on: a restored guest goes on counting.
    wanted=0 tries=0
    until [ "$(said "$1" answers)" -ge "$wanted" ] && [ "$wanted" -gt 0 ]; do
        have=$(said "$1" answers)
        [ "$wanted" -gt 0 ] || [ "$have" = 0 ] || wanted=$((have + $2))
        tries=$((tries + 1))
        [ $tries -lt 480 ] || fail "$1 $3"
        sleep 0.5
    done
    ! grep BAD "$runs/$1/console.log" || fail "$1: $(grep BAD "$runs/$1/console.log")"
}

"$torture" peer listen=0.0.0.0:7500 >/run/peer.log &
number=0
for clock in kvm-clock tsc; do
    number=$((number + 1))
    here=172.16.$number.1 there=172.16.$number.2
    for tap in "tap-$clock" "tap-$clock-2"; do ip tuntap add "$tap" mode tap && ip link set "$tap" address 06:00:00:00:01:0$number up; done
    ip address add $here/24 dev "tap-$clock"
    line="console=ttyS0 quiet tsc=reliable panic=-1 us.run=torture us.clock=$clock us.ip=$there/24 us.time=$here:7500 us.mib=1 us.late_ms=200000 us.stuck_s=200"
    vmm run --name "$clock" --kernel "$kernel" --initrd "$initrd" --cmdline "$line" --memory 160M --net "0=tap-$clock" --detach ||
        fail "it does not run"
    answered "$clock" 45 "did not boot, or asked nobody"
    vmm pause "$clock" || fail "pause"
    point=$(vmm checkpoint "$clock" | cut -d: -f1)
    vmm stop "$clock" || fail "stop"
    sleep "$gap"
    ip address del $here/24 dev "tap-$clock"
    ip address add $here/24 dev "tap-$clock-2"
    vmm restore --name "$clock-after" "$point" --from "/var/lib/understudy/vms/$clock" --bind "net:0=tap-$clock-2" --detach || fail "restore"
    # Two windows of answers, so that one has none from before.
    answered "$clock-after" 45 "asked nobody after the restore"
    echo "clock=$clock gap_s=$gap off_us=$(said "$clock-after" off_us) most_us=$(said "$clock-after" most_us) took_us=$(said "$clock-after" took_us)"
    [ "$(grep -c "source=$clock" "$runs/$clock-after/console.log")" -gt 0 ] || fail "it does not run on $clock"
    vmm stop "$clock-after"
done
echo "all is well"
