"""What tests/firecracker_client.rs does in the emulated host: python client.py KERNEL INITRAMFS TORTURE

A client library for Firecracker's API, firecracker-python from PyPI, drives `vmm` through its socket: a Debian guest with a
disk and a network card is configured, started, paused, snapshotted, and restored in another process. It says `all is well` last.
"""

import os
import re
import subprocess
import sys
import sysconfig
import time
import types

# Of the library what speaks to the socket; the rest of it makes images with Docker and networks with iptables.
library = types.ModuleType("firecracker")
library.__path__ = [os.path.join(sysconfig.get_path("purelib"), "firecracker")]
sys.modules["firecracker"] = library

from firecracker.api import Api  # noqa: E402
from firecracker.exceptions import APIError  # noqa: E402

KERNEL, INITRAMFS, TORTURE = sys.argv[1:4]
LIMIT = 240  # seconds
LINE = (
    "console=ttyS0 quiet panic=-1 us.run=torture us.disk=vda us.ip=172.16.0.2/24 us.peer=172.16.0.1:7500 "
    "us.mib=2 us.records=64 us.late_ms=120000"
)


def run(*words):
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def fail(text):
    """Status 75 is the emulated processor's own end (src/emulated.rs)."""
    print(f"FAILED: {text}", file=sys.stderr)
    sys.exit(75 if "triple fault" in text else 1)


class Monitor:
    """A `vmm` that waits at its socket, as Firecracker does."""

    def __init__(self, name):
        self.socket, self.log = f"/run/{name}.sock", f"/run/{name}.log"
        words = ["vmm", "run", "--api-sock", self.socket, "--store", f"/run/{name}-store"]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.until("its socket", lambda: os.path.exists(self.socket))
        self.api = Api(self.socket)

    def said(self):
        with open(self.log, "rb") as log:
            return log.read().decode(errors="replace")

    def until(self, what, condition):
        deadline = time.monotonic() + LIMIT
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                fail(f"{self.socket}: {what} did not come: {self.said()[-3000:]}")
            time.sleep(0.2)

    def total(self, worker, key):
        """The guest's newest running total, 0 before the first whole line of it."""
        found = re.findall(rf"^torture {worker} .*\b{key}=(\d+)\b.*\r?\n", self.said(), re.M)
        return int(found[-1]) if found else 0

    def state(self):
        return self.api.describe.get().json()["state"]

    def end(self):
        self.api.close()
        self.process.terminate()
        self.process.wait(60)


def refused(what, call, text):
    """The library shows Firecracker's `fault_message`."""
    try:
        call()
    except APIError as error:
        if "API fault" in str(error) and text in str(error):
            return
        fail(f"{what}: refused as {error}")
    fail(f"{what} was not refused")


for tap, mode in [("tap0", "tap"), ("tap1", "tap")]:
    run("ip", "tuntap", "add", tap, "mode", mode)
run("ip", "address", "add", "172.16.0.1/24", "dev", "tap0")
run("ip", "link", "set", "tap0", "up")
run("truncate", "-s", "32M", "/run/disk")
run("mke2fs", "-q", "-t", "ext4", "/run/disk")
peer = subprocess.Popen([TORTURE, "peer", "listen=0.0.0.0:7500"], stdout=subprocess.DEVNULL)

first = Monitor("first")
api = first.api
assert first.state() == "Not started", first.state()
assert "firecracker_version" in api.version.get().json()
api.boot.put(kernel_image_path=KERNEL, initrd_path=INITRAMFS, boot_args=LINE)
api.machine_config.put(vcpu_count=1, mem_size_mib=192)
api.drive.put(drive_id="data", path_on_host="/run/disk", is_root_device=False, is_read_only=False)
api.network.put(iface_id="eth0", host_dev_name="tap0", guest_mac="06:00:ac:10:00:02")
refused("MMDS", lambda: api.mmds_config.put(version="V2", network_interfaces=["eth0"]), "not supported")
refused("a disk that is not there", lambda: api.drive.put(drive_id="no", path_on_host="/run/none", is_root_device=False), "/run/none")
refused("a start of nothing", lambda: api.actions.put(action_type="SendCtrlAltDel"), "SendCtrlAltDel")
config = api.vm_config.get().json()
assert config["machine-config"]["vcpu_count"] == 1 and config["drives"][0]["drive_id"] == "data", config
api.actions.put(action_type="InstanceStart")
assert first.state() == "Running"
first.until("work on disk and network", lambda: first.total("disk", "synced") > 3 and first.total("tcp", "received") > 100)
print("configured and started", flush=True)

api.vm.patch(state="Paused")
assert first.state() == "Paused"
synced = first.total("disk", "synced")
api.create_snapshot.put(mem_file_path="/run/memory", snapshot_path="/run/snapshot")
assert os.path.getsize("/run/snapshot") > 1 << 20 and os.path.exists("/run/memory")
print("paused and snapshotted", flush=True)
first.end()

# In another process, as the library's MicroVM.snapshot does it. The same address moves to another TAP.
run("ip", "address", "del", "172.16.0.1/24", "dev", "tap0")
run("ip", "address", "add", "172.16.0.1/24", "dev", "tap1")
run("ip", "link", "set", "tap1", "up")
second = Monitor("second")
load = {
    "enable_diff_snapshots": True,
    "mem_backend": {"backend_type": "File", "backend_path": "/run/memory"},
    "snapshot_path": "/run/snapshot",
    "resume_vm": True,
}
refused("a snapshot without its TAP", lambda: second.api.load_snapshot.put(**load), "net:eth0")
second.api.load_snapshot.put(**load, network_overrides=[{"iface_id": "eth0", "host_dev_name": "tap1"}])
assert second.state() == "Running"
second.until("work after the restore", lambda: second.total("disk", "synced") > synced + 3 and second.total("tcp", "received") > 0)
received = second.total("tcp", "received")
second.until("the same stream", lambda: second.total("tcp", "received") > received)
second.api.vm.patch(state="Paused")
second.api.vm.patch(state="Resumed")
second.until("work after a pause", lambda: second.total("disk", "synced") > synced + 6)
assert "BAD" not in second.said(), second.said()[-3000:]
second.end()
peer.terminate()
print("all is well")
