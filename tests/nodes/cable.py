"""A cable between two network namespaces: `cable.py PID PID`, of a process in each, makes an interface eth0 in both and
carries the packets. Each line `SECONDS PART` of its input says how late they come, and which part of them is lost."""

import ctypes
import fcntl
import heapq
import os
import random
import selectors
import struct
import sys
import time

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
CLONE_NEWNET = 0x40000000


def plug(pid: int) -> int:
    """An interface eth0 in the network of a process, whose packets are read from and written to the file returned."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/proc/{pid}/ns/net", "rb") as network:
        if libc.setns(network.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"the network of process {pid} cannot be entered")
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH", b"eth0", IFF_TAP | IFF_NO_PI))
    return tap


def main() -> None:
    ends = [plug(int(pid)) for pid in sys.argv[1:]]
    selector = selectors.DefaultSelector()
    for descriptor in (0, *ends):
        selector.register(descriptor, selectors.EVENT_READ)
    delay, loss, chance = 0.0, 0.0, random.Random(0)
    on_the_way: list[tuple[float, int, int, bytes]] = []
    count = 0
    while True:
        wait = max(on_the_way[0][0] - time.monotonic(), 0) if on_the_way else None
        for key, _ in selector.select(wait):
            if key.fd == 0:
                line = os.read(0, 100).split()
                if not line:
                    return
                delay, loss = float(line[0]), float(line[1])
                os.write(1, b"set\n")
                continue
            try:
                packet = os.read(key.fd, 70000)
            except (BlockingIOError, OSError):
                continue
            if chance.random() >= loss:
                count += 1
                other = ends[1 - ends.index(key.fd)]
                heapq.heappush(on_the_way, (time.monotonic() + delay, count, other, packet))
        while on_the_way and on_the_way[0][0] <= time.monotonic():
            _, _, end, packet = heapq.heappop(on_the_way)
            try:
                os.write(end, packet)
            except OSError:  # the interface is down, or its queue is full: the packet is lost
                pass


if __name__ == "__main__":
    main()
