# What `torture moves` does, on the first of two emulated hosts: bash moves.sh IMAGE MOVES KILLS CPUS SEED
# IMAGE: the folder of the Debian guest. A line `move ..` for each move, `kill ..` for each failover, `all is well` in the end.
set -u
image=$1 moves=$2 kills=$3 cpus=$4 seed=$5
tls=/etc/understudy/tls data=/var/lib/understudy/agent
export UNDERSTUDY_LOG=info

fail() {
    echo "FAILED: $*"
    for host in 1 2; do
        echo "--- host $host"
        at $host bash -c "tail -n 15 /run/agent.log; for log in $data/run/*/console.log $data/run/*/vmm.log; do
            echo \"- \$log\"; grep -a BAD \$log | head -n 5; tail -n 15 \$log; done" 2>&1
    done
    exit 1
}

# at HOST COMMAND..: runs it on that host.
at() {
    host=$1
    shift
    if [ "$host" = 1 ]; then "$@"; else on-host "$host" "$@"; fi
}

# until_true WHAT SECONDS COMMAND..: until it succeeds.
until_true() {
    what=$1 left=$(($2 * 2))
    shift 2
    until "$@" >/run/until.log 2>&1; do
        left=$((left - 1))
        [ $left -gt 0 ] || fail "$what: $(tail -n 3 /run/until.log)"
        sleep 0.5
    done
}

# now: milliseconds since this host was started.
now() { awk '{ print int($1 * 1000) }' /proc/uptime; }

# said HOST VM START KEY: the largest KEY=number of the guest's lines that begin so, 0 before the first.
said() {
    at "$1" cat "$data/run/$2/console.log" 2>/dev/null | tr -d '\r' | sed '$d' |
        awk -v start="$3" -v key="$4=" 'index($0, start) == 1 { for (i = 1; i <= NF; i++) if (index($i, key) == 1) {
            v = substr($i, length(key) + 1) + 0; if (v > most) most = v } } END { print most + 0 }'
}

# beats HOST VM N: waits until it has said N heartbeats more.
beats() {
    wanted=$(($(said "$1" "$2" 'torture clock' beat) + $3))
    until_true "the guest $2 on host $1 stands still at beat $((wanted - $3))" 300 has_beaten "$1" "$2" $wanted
}
has_beaten() { [ "$(said "$1" "$2" 'torture clock' beat)" -ge "$3" ]; }

# bad_lines HOST VM: its findings.
bad_lines() { at "$1" bash -c "grep -a -E 'BAD|rcu.*stall|soft lockup' $data/run/$2/console.log" 2>/dev/null; }

# random BELOW: the next number of the seed.
random() {
    seed=$(((seed * 1103515245 + 12345) % 2147483648))
    echo $((seed / 65536 % $1))
}

# Certificates, a bridge with the host's address and the guest's TAP, an agent: on both.
standby ca init /run/ca >/dev/null || fail "no authority"
for host in 1 2; do
    standby ca issue "host-$host" --ca /run/ca --address "10.77.0.$host" --role execute,store,operator >/dev/null || fail "no certificate"
    tar -C "/run/ca/host-$host" -cf - . | at $host bash -c "mkdir -p $tls && tar -C $tls -xf -" || fail "no certificate on host $host"
    at $host bash -c "ip link add br0 type bridge && ip address flush dev eth1 && ip link set eth1 master br0 &&
        ip address add 10.77.0.$host/24 dev br0 && ip link set br0 up &&
        for tap in tap-web tap-db; do ip tuntap add \$tap mode tap && ip link set \$tap master br0 && ip link set \$tap up; done" ||
        fail "no network on host $host"
done
registry=embedded
for host in 1 2; do
    at $host bash -c "UNDERSTUDY_LOG=info standby serve --listen 10.77.0.$host:7400 --data $data --registry $registry \
        --bind net:0=tap-{vm} --keep last=3 >/run/agent.log 2>&1 </dev/null &" || fail "no agent"
    until_true "no agent on host $host" 60 at $host standby status --agent 10.77.0.$host:7400
    registry=10.77.0.1:7400
done
"$image/torture" peer listen=0.0.0.0:7500 beat_ms=5000 >/run/peer.log 2>&1 &

# start VM ADDRESS WORDS..: on host 1, where the agent would have put it.
start() {
    vm=$1 address=$2
    shift 2
    truncate -s 48M "/run/$vm.disk" && mke2fs -q -t ext4 "/run/$vm.disk" || fail "no disk"
    vmm run --name "$vm" --kernel "$image/vmlinuz" --initrd "$image/initramfs.cpio" --memory 160M --cpus "$cpus" --rng \
        --cmdline "console=ttyS0 quiet panic=-1 us.run=torture us.disk=vda us.ip=$address/24 us.mib=2 us.records=256 us.beat_ms=1000 us.late_ms=120000 us.stuck_s=120 $*" \
        --disk "root=/run/$vm.disk" --net "0=tap-$vm" --run-dir $data/run --detach \
        --protect-to 10.77.0.1:7400,10.77.0.2:7400 --every 5s --delta-cache 32M || fail "$vm does not run"
    beats 1 "$vm" 3
}

# promote VM HOST: it goes on there.
promote() { at "$2" standby promote "$1" --agent "10.77.0.$2:7400" >/run/promote.log 2>&1 || fail "promote $1 on host $2: $(cat /run/promote.log)"; }

start web 10.77.0.101 us.peer=10.77.0.1:7500
echo "up cpus=$cpus kernel=$(uname -r)"
host=1
for move in $(seq "$moves"); do
    sleep "$(random 3).$(random 10)"
    began=$(now)
    at $host vmm stop web --run-dir $data/run --drain 3m >/run/stop.log 2>&1 || fail "stop web on host $host: $(cat /run/stop.log)"
    stopped=$(now)
    host=$((3 - host))
    promote web $host
    running=$(now)
    beats $host web 3
    found=$(bad_lines $host web)
    [ -z "$found" ] || fail "after move $move: $found"
    grep -q BAD /run/peer.log && fail "the stream's other end after move $move: $(grep BAD /run/peer.log)"
    echo "move $move host=$host stop_ms=$((stopped - began)) takeover_ms=$((running - stopped))" \
        "synced=$(said $host web 'torture disk' synced) received=$(said $host web 'torture tcp' received) pages=$(said $host web 'torture memory' checked)" \
        "registers=$(said $host web 'torture registers-0' stretches) bad=$(said $host web 'torture clock' bad)"
done
[ "$moves" = 0 ] || [ "$(said $host web 'torture tcp' received)" -gt 1000 ] || fail "the stream carried nothing"
at $host vmm stop web --run-dir $data/run --drain 3m || fail "stop web"

# check_disk HOST VM SYNCED: its file system is clean and has the records up to that one.
check_disk() {
    at "$1" cp /run/$2/disks/root.raw /run/after.raw || fail "no disk of $2 on host $1: $(at "$1" ls -R /run/$2)"
    # The journal of a file system that was not unmounted is replayed, as at its next mount; nothing else may be found.
    at "$1" e2fsck -fp /run/after.raw >/run/fsck.log 2>&1
    [ $? -le 1 ] || fail "e2fsck: $(cat /run/fsck.log)"
    at "$1" e2fsck -fn /run/after.raw >/run/fsck.log 2>&1 || fail "e2fsck again: $(cat /run/fsck.log)"
    at "$1" debugfs -R 'dump /records /run/records' /run/after.raw 2>/dev/null
    found=$(at "$1" "$image/torture" check file=/run/records) || fail "records: $found"
    newest=${found#*newest=}
    [ "$newest" -ge "$3" ] || fail "record $3 was on disk before the last committed checkpoint, and $newest is the newest"
}

# status HOST VM KEY: of its state there: its process, or an epoch; 0 while there is none. No other VM runs there.
status() {
    case $3 in
    pid) pattern='"pid": *\([0-9]*\)' ;;
    newest) pattern="\"name\": *\"$2\/[0-9]*\/\([0-9]*\)\"" ;;
    committed) pattern="\"committed\": *\"$2\/[0-9]*\/\([0-9]*\)\"" ;;
    esac
    value=$(at "$1" vmm ps --json --run-dir $data/run | sed -n "s/.*$pattern.*/\1/p" | head -n 1)
    echo "${value:-0}"
}
has_committed() { [ "$(status "$1" "$2" committed)" -ge "$3" ]; }

[ "$kills" = 0 ] || start db 10.77.0.102
host=1
synced=0
for kill in $(seq "$kills"); do
    beats $host db 2
    # What is taken from here on has these records.
    synced=$(said $host db 'torture disk' synced)
    until_true "db commits nothing on host $host" 300 has_committed $host db $(($(status $host db newest) + 2))
    sleep "0.$(random 10)"
    at $host kill -9 "$(status $host db pid)" || fail "kill db on host $host"
    host=$((3 - host))
    promote db $host
    beats $host db 2
    found=$(bad_lines $host db)
    [ -z "$found" ] || fail "after kill $kill: $found"
    [ "$(said $host db 'torture disk' synced)" -ge "$synced" ] || fail "record $synced was on disk before the last committed checkpoint"
    echo "kill $kill host=$host synced=$(said $host db 'torture disk' synced)"
done
if [ "$kills" != 0 ]; then
    at $host kill -9 "$(status $host db pid)"
    host=$((3 - host))
    # Nobody runs it: what its disk was at the last committed checkpoint.
    at $host vmm restore db --from $data/store --name after --store /run/after --bind net:0=tap-db --run-dir /run/after-run --detach ||
        fail "restore a copy of db"
    at $host vmm stop after --run-dir /run/after-run || fail "stop the copy of db"
    check_disk $host after $synced
    echo "disk clean records=$newest synced=$synced"
fi
echo "all is well"
