# Behind src/emulated.sh and beating.sh, the whole life of a Debian guest: sh linux.sh KERNEL INITRAMFS CPUS PACE
# CPUS: of the guest. PACE: seconds between the checkpoints while it boots.
kernel=$1 initrd=$2 cpus=$3 pace=$4

# said NAME KEY: the value of the newest whole line KEY=value of the guest, which goes on: its last line may be half there.
said() {
    sed '$d' "$runs/$1/console.log" | sed -n "s/^$2=\([0-9]*\).*/\1/p" | tail -n 1
}

# until_said NAME TEXT WHAT COMMAND..: until the command's output has the text.
until_said() {
    name=$1 text=$2 what=$3
    shift 3
    tries=0
    until "$@" 2>&1 | grep -q "$text"; do
        tries=$((tries + 1))
        [ $tries -lt 120 ] || fail "$name: $what: $("$@" 2>&1)"
        sleep 0.5
    done
}

boot web "$cpus" "$pace"

# It restarts at its own wish, in the same process.
wait_for web '/ #'
type_in web 'reboot -f'
wait_for web "us: up.*cpus=$cpus" 2
echo "restarted"

# checkpoint CLOCK BEATS: of the guest on that clock source, beating. Leaves its name in $checkpoint.
source=/sys/devices/system/clocksource/clocksource0/current_clocksource
checkpoint() {
    type_in web "echo $1 > $source; echo source=\$(cat $source)"
    wait_for web "^source=$1"
    type_in web "$(beat "$cpus")"
    wait_for web '^beat=3' "$2"
    checkpoint=$(vmm checkpoint web | cut -d: -f1)
    [ -n "$checkpoint" ] || fail "checkpoint on clock source $1"
    type_in web "$(printf '\003')"
}
wait_for web '/ #' 2
checkpoint kvm-clock 1
with_kvm=$checkpoint
checkpoint tsc 2
with_tsc=$checkpoint
vmm stop web || fail "stop"
store=/var/lib/understudy/vms/web

# check NAME CHECKPOINT: it goes on elsewhere after a while, with the right time, which never goes back.
check() {
    vmm restore --check "$2" --from $store || fail "this host cannot run $2"
    vmm restore --name "$1" "$2" --from $store --detach || fail "restore $2"
    wait_for "$1" '^beat=' 4
    # Both now: until it is stopped the guest says later times.
    wall=$(said "$1" wall)
    host=$(date +%s)
    type_in "$1" "$(printf '\003')"
    behind=$((host - wall))
    # The newest line is a little old; the checkpoint is much older.
    [ $behind -ge -1 ] && [ $behind -lt 8 ] || fail "$2: the guest's time is $behind s behind the host's"
    sed -n 's/^up=//p' "$runs/$1/console.log" | sort -n -c || fail "$2: the guest's time went back"
    ! grep BAD "$runs/$1/console.log" || fail "$2: the guest complains"
    # Its kernel has heard of the new generation id.
    type_in "$1" "awk '/ACPI:Ged/ {print \"events=\" \$2+\$3+\$4+\$5}' /proc/interrupts"
    wait_for "$1" '^events=[1-9]'
}
sleep 12
check kvm "$with_kvm"
vmm stop kvm
check tsc "$with_tsc"
echo "restored on both clock sources"

# It knows how to switch itself off.
type_in tsc 'exit'
tries=0
while vmm ps | grep -q 'tsc .*running'; do
    tries=$((tries + 1))
    [ $tries -lt 120 ] || fail "it does not switch itself off"
    sleep 0.5
done
vmm ps | grep -q 'tsc .*ended' || fail "it did not end well: $(vmm ps)"

# A checkpoint from the middle of the boot boots on.
vmm restore --name middle "web/1/$(((taken + 1) / 2))" --from $store --detach || fail "restore from the middle of the boot"
wait_for middle "us: up.*cpus=$cpus"
vmm stop middle

# More devices.
vmm run --name app --kernel "$kernel" --initrd "$initrd" --cmdline "$line" --memory 256M --vsock 3 --balloon 0M --detach || fail "app does not run"
wait_for app '/ #'
# The guest gives memory back through its balloon, and has it again.
vmm balloon app 32M || fail "ask for memory"
until_said app '"actual_mib": *32[,}]' "no memory came back" vmm balloon app --json
vmm balloon app 0M || fail "let it have its memory"
until_said app '"actual_mib": *0[,}]' "the memory did not go back" vmm balloon app --json
# It finds the monitor over its stream sockets, which refuses a VM that nobody else would have.
type_in app 'understudy-checkpoint early'
wait_for app 'ERROR this VM is not protected'
point=$(vmm checkpoint app | cut -d: -f1)
vmm stop app || fail "stop app"
# Restored, and with a holder, it is told when that has what it asked for.
standby serve --listen 127.0.0.1:7400 --data /run/standby --name here --insecure-plaintext >/run/standby.log 2>&1 &
agent=$!
until_said standby '^here ' "no agent" standby status --agent 127.0.0.1:7400 --insecure-plaintext
vmm restore --name asks "$point" --from /var/lib/understudy/vms/app --detach --protect-to 127.0.0.1:7400 --every 5s --insecure-plaintext || fail "restore $point"
type_in asks 'understudy-checkpoint "from the guest"'
wait_for asks '^COMMITTED asks/'
named=$(sed -n 's/^COMMITTED \(asks[^ ]*\).*/\1/p' $runs/asks/console.log | tr -d '\r')
standby show "$named" --agent 127.0.0.1:7400 --insecure-plaintext | grep -q 'guest: from the guest' || fail "the guest's checkpoint has not its name"
vmm stop asks
kill $agent
echo "checkpoints that the guest asks for are committed"
echo "all is well"
