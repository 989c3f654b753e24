# Behind src/emulated.sh and beating.sh, a Debian guest with four vCPUs: sh four.sh KERNEL INITRAMFS
# It boots while checkpoints are taken, and goes on in another process with all its processors.
kernel=$1 initrd=$2

boot web 4 2
wait_for web '/ #'
type_in web "$(beat 4)"
wait_for web '^beat=2'
point=$(vmm checkpoint web | cut -d: -f1)
[ -n "$point" ] || fail "checkpoint"
vmm stop web || fail "stop"
vmm restore --name after "$point" --from /var/lib/understudy/vms/web --detach || fail "restore $point"
wait_for after '^beat=' 3
! grep BAD "$runs/after/console.log" || fail "the guest complains"
echo "all is well"
