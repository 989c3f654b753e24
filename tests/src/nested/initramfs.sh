#!/bin/busybox sh
# The first program of an emulated host: loads the modules, finds the root disk, hands over to /sbin/nested-init.
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
while read -r module; do
    insmod "/modules/$module.ko" || echo "nested-host: cannot load $module" >/dev/kmsg
done </modules/order
for _ in $(seq 100); do [ -b /dev/vda ] && break; usleep 100000; done
mount -t ext4 -o noatime,nobarrier /dev/vda /root || { echo "nested-host: no root disk" >/dev/kmsg; poweroff -f; }
mkdir -p /root/proc /root/sys /root/dev /root/run
mount --move /proc /root/proc
mount --move /sys /root/sys
mount --move /dev /root/dev
mount -t tmpfs -o mode=755 run /root/run
cp -r /nested /root/run/nested
exec switch_root /root /sbin/nested-init
