"""A cable between network namespaces: `cable.py PID PID...`, of a process in each, makes an interface eth0 in all of
them and carries the packets. It has two ends, or more as a hub has.

Each line `SECONDS PART [END-END ...]` of its input says how late packets come, which part of them is lost, and between
which ends, numbered as given, none arrive. The answer is how many were lost so far.
"""

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
    taps = [plug(int(pid)) for pid in sys.argv[1:]]
    selector = selectors.DefaultSelector()
    for descriptor in (0, *taps):
        selector.register(descriptor, selectors.EVENT_READ)
    delay, loss, chance = 0.0, 0.0, random.Random(0)
    cut: set[frozenset[int]] = set()
    on_the_way: list[tuple[float, int, int, bytes]] = []
    count, lost = 0, 0
    while True:
        wait = max(on_the_way[0][0] - time.monotonic(), 0) if on_the_way else None
        for key, _ in selector.select(wait):
            if key.fd == 0:
                line = os.read(0, 100).decode().split()
                if not line:
                    return
                delay, loss = float(line[0]), float(line[1])
                cut = {frozenset(map(int, pair.split("-"))) for pair in line[2:]}
                os.write(1, f"{lost}\n".encode())
                continue
            try:
                packet = os.read(key.fd, 70000)
            except (BlockingIOError, OSError):
                continue
            sender = taps.index(key.fd)
            if chance.random() < loss:
                lost += 1
                continue
            for end, tap in enumerate(taps):  # who it is not for passes over it
                if end != sender and frozenset((end, sender)) not in cut:
                    count += 1
                    heapq.heappush(on_the_way, (time.monotonic() + delay, count, tap, packet))
        while on_the_way and on_the_way[0][0] <= time.monotonic():
            _, _, tap, packet = heapq.heappop(on_the_way)
            try:
                os.write(tap, packet)
            except OSError:  # the interface is down, or its queue is full: the packet is lost
                pass


if __name__ == "__main__":
    main()
