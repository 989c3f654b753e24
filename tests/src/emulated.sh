# What the scripts of tests/tests that run in an emulated host begin with.
set -u
runs=/run/understudy
# The status of what the emulated processor is known to do by itself (emulated.rs): a guest that faults or hangs early.
emulation=75
# That of every other failure; a script may have its own.
failed=1

fail() {
    echo "FAILED: $*"
    for log in "$runs"/*/console.log "$runs"/*/vmm.log; do echo "--- $log"; tail -n 40 "$log"; done
    grep -q 'triple fault' "$runs"/*/vmm.log && exit $emulation
    case $* in *'not boot'* | *'us: up'*) exit $emulation ;; esac
    exit $failed
}
