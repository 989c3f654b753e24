# Behind src/emulated.sh: a Debian guest that says its time, again and again. Wants $kernel and $initrd.

# wait_for NAME PATTERN [COUNT]: until the guest's console has so many lines with it.
wait_for() {
    tries=0
    until [ "$(grep -c "$2" "$runs/$1/console.log" 2>/dev/null)" -ge "${3:-1}" ]; do
        tries=$((tries + 1))
        [ $tries -lt 300 ] || fail "$1 did not say: $2"
        sleep 0.5
    done
}

# type_in NAME TEXT: a line on the guest's console.
type_in() {
    printf '%s\n' "$2" | timeout 3 vmm console "$1" >/dev/null 2>&1
}

line='console=ttyS0 quiet tsc=reliable panic=-1 us.run=shell'

# boot NAME CPUS PACE: to its shell, with a checkpoint each PACE seconds meanwhile, each a delta on the one before: $taken of them.
boot() {
    vmm run --name "$1" --kernel "$kernel" --initrd "$initrd" --cmdline "$line" --memory 256M --cpus "$2" --detach || fail "it does not run"
    taken=0
    # The whole line: the console's file grows by pieces.
    until grep -q 'us: up.*run=' "$runs/$1/console.log"; do
        sleep "$3"
        vmm checkpoint "$1" >/dev/null || fail "checkpoint while it boots"
        taken=$((taken + 1))
        [ $taken -lt 600 ] || fail "it does not boot"
    done
    grep -q "us: up.*cpus=$2" "$runs/$1/console.log" || fail "it has not $2 processors"
    echo "booted, $taken checkpoints on the way"
}

# beat CPUS: what the guest's shell is to do: say its time, whether each of its processors still works, and whether its kernel
# has complained.
beat() {
    masks=$(at=0; while [ $at -lt "$1" ]; do printf '%x ' $((1 << at)); at=$((at + 1)); done)
    echo "n=0; while :; do n=\$((n+1)); for c in $masks; do taskset \$c true || echo BAD processor \$c; done; echo wall=\$(date +%s); echo up=\$(cut -d. -f1 /proc/uptime); dmesg | grep -E \"BUG|lockup|rcu.*stall\" && echo BAD kernel; echo beat=\$n; usleep 200000; done"
}
