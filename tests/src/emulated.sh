# What the scripts of tests/tests that run in an emulated host begin with.
set -u
runs=/run/understudy

# What the emulated processor is known to do by itself (emulated.rs) ends with status 75: a guest that faults or hangs early.
fail() {
    echo "FAILED: $*"
    for log in "$runs"/*/console.log "$runs"/*/vmm.log; do echo "--- $log"; tail -n 40 "$log"; done
    grep -q 'triple fault' "$runs"/*/vmm.log && exit 75
    case $* in *'not boot'* | *'us: up'*) exit 75 ;; esac
    exit 1
}
