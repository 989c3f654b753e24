# Behind src/emulated.sh, what tests/linux.rs does with large guests in the emulated host: sh large.sh KERNEL INITRAMFS CPUS MEMORY
# It boots, is checkpointed, and goes on in another process with all its processors and memory.
kernel=$1 initrd=$2 cpus=$3 memory=$4

# wait_for NAME PATTERN WHAT: until its console has a line with it.
wait_for() {
    tries=0
    until grep -q "$2" "$runs/$1/console.log" 2>/dev/null; do
        tries=$((tries + 1))
        [ $tries -lt 1200 ] || fail "$1 $3"
        sleep 0.5
    done
}

line="console=ttyS0 quiet tsc=reliable panic=-1 us.run=torture us.mib=16 us.beat_ms=3000 us.late_ms=120000 us.stuck_s=240"
vmm run --name large --kernel "$kernel" --initrd "$initrd" --cmdline "$line" --memory "$memory" --cpus "$cpus" --detach || fail "it does not run"
wait_for large "us: up .*cpus=$cpus " "did not boot"
echo "up: $(grep -o 'cpus=.* clock' "$runs/large/console.log")"
wait_for large 'torture clock beat=2 ' "did not work"
point=$(vmm checkpoint large)
echo "$point"
vmm stop large || fail "stop"
vmm restore --name after "${point%%:*}" --from /var/lib/understudy/vms/large --detach || fail "restore"
wait_for after 'torture clock beat' "did not go on"
# The worker of each processor, and the one of the memory, still work.
moves() { [ "$(tr -d '\r' <"$runs/after/console.log" | sed -n "s/^torture $1 beat=[0-9]* [a-z]*=\([0-9]*\).*/\1/p" | sort -un | wc -l)" -gt 1 ]; }
for worker in memory $(seq 0 $((cpus - 1)) | sed 's/^/registers-/'); do
    tries=0
    until moves "$worker"; do
        tries=$((tries + 1))
        [ $tries -lt 240 ] || fail "after the restore $worker stands still"
        sleep 0.5
    done
done
! grep BAD "$runs"/*/console.log || fail "the guest complains"
vmm stop after
echo "all is well"
