"""A connection of every rank to the first one, by which all know within seconds that a rank of another machine is gone,
and one between every two machines, by which they know that those do not reach each other.

Whether a machine is still there the kernels ask each other (TCP keep-alive), so that a rank that saves, compiles or
holds Python's lock for minutes is not taken for lost. That a process has ended, its kernel says at once.
"""

import errno
import logging
import os
import secrets
import selectors
import socket
import time
from collections.abc import Mapping, Sequence

import torch.distributed as dist

from hyena_dist.parallel.groups import Axis
from hyena_dist.runtime.launcher import first_address
from hyena_dist.runtime.peers import Peer, name_ranks

logger = logging.getLogger(__name__)

UNREACHABLE_SECONDS = 30.0
"""Until a machine that answers nothing is taken for lost. A network that loses or delays packets is heard again sooner:
after five retries, which a loss of 5 % needs once in a million times."""
OPEN_SECONDS = 20.0
"""For making the connections."""

ENDED, UNREACHABLE, FAILED, FOLLOWED, DONE = "ended", "unreachable", "failed", "followed", "done"
"""What becomes of a rank: it ended without a word, as a killed one; its machine does not answer; it failed by itself;
it ended because of another rank; it has reached its end."""
CUT = "cut"
"""`cut 3`: the machine of rank 3 does not reach that of the rank, though the first rank reaches both."""
_WORST_FIRST = (UNREACHABLE, ENDED, FAILED, CUT, FOLLOWED)


class Heartbeat:
    """Tells which ranks are lost, and which say nothing. `listen` is for one thread, of which it takes the sleep.

    The first rank hears of every other, and passes it on. The first rank of each machine hears of those of the others,
    too. A run on one machine opens no connection: there the processes themselves can be watched.

    Args:
        axis: all ranks, over gloo.
        peers: all ranks, by rank.
        unreachable: seconds until a machine that does not answer is lost.
    """

    def __init__(self, axis: Axis, peers: Sequence[Peer], *, unreachable: float = UNREACHABLE_SECONDS) -> None:
        self._axis, self._peers, self._unreachable = axis, peers, unreachable
        self.lost: dict[int, str] = {}
        """What became of each rank that is gone, in the order in which this rank heard of them."""
        self._heard: dict[int, float] = {}
        self._connections: dict[int, socket.socket] = {}
        self._unread: dict[int, bytes] = {}
        self._selector = selectors.DefaultSelector()
        self._awake, self._waker = socket.socketpair()
        self._selector.register(self._awake, selectors.EVENT_READ, None)
        self._pid = os.getpid()

    def connect(self) -> None:
        """Connect. Collective. A rank that cannot be connected is named, and then is not watched."""
        elsewhere = [any(not peer.local for peer in self._peers)] * self._axis.size
        if self._axis.size > 1:  # one rank may see all processes where another sees only its own
            dist.all_gather_object(elsewhere, elsewhere[0], group=self._axis.group)
        if not any(elsewhere):
            return
        problems: list[str | None] = [None] * self._axis.size
        dist.all_gather_object(problems, self._connect(), group=self._axis.group)
        self._connect_machines()
        for connection in self._connections.values():
            connection.setblocking(False)
        for rank, connection in self._connections.items():
            self._selector.register(connection, selectors.EVENT_READ, rank)
            self._heard[rank] = time.monotonic()
        os.register_at_fork(after_in_child=self._disown)
        if self._axis.rank == 0:
            for peer, problem in zip(self._peers, problems, strict=True):
                if problem is not None:
                    logger.warning("%s cannot be connected to %s (%s): that one of them is lost will be known only "
                                   "after the minutes of DEEPSPEED_TIMEOUT; open the network's ports between them",
                                   peer, self._peers[0], problem)

    def listen(self, seconds: float) -> None:
        """Say to the others that this rank is there, and hear what they say in this time."""
        for rank in list(self._connections):
            self._send(rank, b"\n")
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                if key.data is None:
                    self._awake.recv(64)
                    return
                self._hear(key.data)

    def silent(self, seconds: float) -> dict[int, float]:
        """The ranks of other machines that have said nothing for so long, and for how long; of those that this rank
        hears itself."""
        now = time.monotonic()
        return {rank: now - heard for rank, heard in self._heard.items()
                if now - heard >= seconds and rank in self._connections and not self._peers[rank].local}

    def wake(self) -> None:
        """End a `listen`; from any thread."""
        self._waker.send(b".")

    def say(self, word: str) -> None:
        """Tell the others how this rank is about to end; from any thread, after which nothing else is said."""
        line = f"{self._axis.rank} {word}\n".encode()
        for rank in list(self._connections):
            self._send(rank, line, lose=False)

    def close(self) -> None:
        """When no thread listens any more."""
        for connection in [*self._connections.values(), self._awake, self._waker]:
            connection.close()
        self._connections = {}
        self._selector.close()
        self._pid = 0

    def _connect(self) -> str | None:
        """Of the first rank with all others. Returns what went wrong; collective."""
        own: list[tuple[int, str] | None] = [None]
        server = None
        if self._axis.rank == 0:
            server = _listening()
            own = [(server.getsockname()[1], secrets.token_hex(8))]
        dist.broadcast_object_list(own, group=self._axis.group, group_src=0)
        assert own[0] is not None
        port, token = own[0]
        if server is not None:
            with server:
                self._accept(server, token, set(range(1, self._axis.size)))
            return None
        return self._call(0, first_address() or self._peers[0].host, port, token)

    def _connect_machines(self) -> None:
        """Of the first ranks of all machines but the first one, whose first rank has its connections. Collective."""
        firsts = {peer.machine: peer.rank for peer in reversed(self._peers)}
        server = None
        door: tuple[str, int, str] | None = None
        if self._axis.rank in firsts.values() and 0 in self._connections:
            server = _listening()
            address = self._connections[0].getsockname()[0]  # of the interface that leads to the other machines
            door = address, server.getsockname()[1], secrets.token_hex(8)
        doors = [door] * self._axis.size
        dist.all_gather_object(doors, door, group=self._axis.group)
        if server is None or door is None:
            return
        there = [rank for rank, its in enumerate(doors) if its is not None]
        with server:
            for rank in there[:there.index(self._axis.rank)]:
                if (problem := self._call(rank, *doors[rank])) is not None:  # type: ignore[misc]
                    logger.warning("%s cannot be connected to %s (%s)", self._peers[self._axis.rank],
                                   self._peers[rank], problem)
            self._accept(server, door[2], {rank for rank in there if rank > self._axis.rank})

    def _call(self, rank: int, address: str, port: int, token: str) -> str | None:
        """Connect to a rank that accepts. Returns what went wrong."""
        try:
            connection = socket.create_connection((address, port), timeout=OPEN_SECONDS)
            _keep_alive(connection, self._unreachable)
            connection.sendall(f"{token} {self._axis.rank:8d}\n".encode())
            self._connections[rank] = connection
        except OSError as error:
            return error.strerror or str(error)
        return None

    def _accept(self, server: socket.socket, token: str, ranks: set[int]) -> None:
        """Until these ranks are there, or their time is over: then they say themselves why they are not."""
        deadline = time.monotonic() + OPEN_SECONDS
        while not ranks <= self._connections.keys():
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                return
            _keep_alive(connection, self._unreachable)
            connection.settimeout(5.0)
            try:
                hello = connection.recv(len(token) + 10, socket.MSG_WAITALL).decode(errors="replace").split()
            except OSError:
                hello = []
            if len(hello) == 2 and hello[0] == token:
                self._connections[int(hello[1])] = connection
            else:  # somebody else, who tries ports
                connection.close()

    def _hear(self, rank: int) -> None:
        if rank not in self._connections:  # lost since it was found to have something to say
            return
        try:
            received = self._connections[rank].recv(4096)
        except BlockingIOError:
            return
        except OSError as error:
            return self._lose(rank, _how(error))
        if not received:
            return self._lose(rank, ENDED)
        self._heard[rank] = time.monotonic()
        *lines, self._unread[rank] = (self._unread.get(rank, b"") + received).split(b"\n")
        for line in lines:
            if line:
                about, _, word = line.decode().partition(" ")
                self._note(int(about), word)

    def _note(self, rank: int, word: str) -> None:
        """What became of a rank; the first rank tells the others. The first word counts: what follows is the end of the
        connection. Only of a rank that one machine does not reach the first rank may hear more: that none does."""
        if rank == self._axis.rank or not self.lost.get(rank, CUT).startswith(CUT):
            return
        if word != DONE:
            self.lost[rank] = word
        elif rank in self._connections:
            self._drop(rank)
        if self._axis.rank == 0 and word != DONE:
            for other in list(self._connections):
                if other != rank:
                    self._send(other, f"{rank} {word}\n".encode())

    def _lose(self, rank: int, how: str) -> None:
        self._drop(rank)
        if 0 in (rank, self._axis.rank):
            self._note(rank, how)
        elif how == UNREACHABLE:  # that it has ended the first rank says
            self._note(rank, f"{CUT} {self._axis.rank}")
            self._send(0, f"{rank} {CUT} {self._axis.rank}\n".encode())

    def _drop(self, rank: int) -> None:
        connection = self._connections.pop(rank)
        self._selector.unregister(connection)
        connection.close()

    def _send(self, rank: int, line: bytes, *, lose: bool = True) -> None:
        try:
            self._connections[rank].send(line)
        except BlockingIOError:  # it has stood still for hours
            pass
        except (KeyError, OSError) as error:
            if lose and isinstance(error, OSError):
                self._lose(rank, _how(error))

    def _disown(self) -> None:
        """A forked child, as a reader of data is one, would keep the connections open after this process was killed."""
        if self._pid not in (0, os.getpid()):
            self._pid = 0
            for connection in self._connections.values():
                connection.close()
            self._connections = {}


def describe(lost: Mapping[int, str], peers: Sequence[Peer]) -> str | None:
    """Which ranks are gone, by names, and what to do; None: none is. Those that ended because of others are named only
    where nothing else is known."""
    for how in _WORST_FIRST:
        which = sorted(rank for rank, word in lost.items() if word.partition(" ")[0] == how)
        if not which:
            continue
        if how == CUT:
            one, other = peers[which[0]], peers[int(lost[which[0]].split()[1])]
            return (f"{one} and {other} cannot reach each other any more, though both reach {peers[0]}: the network "
                    f"between hosts {one.host} and {other.host} is cut (a cable, a route, a firewall); resume with the "
                    "same command once it is mended")
        hosts = [peer.host for peer in peers]
        places = sorted({hosts[rank] for rank in which})
        alone = len(which) == 1
        who = str(peers[which[0]]) if alone else " and ".join(
            name_ranks([rank for rank in which if hosts[rank] == host], hosts) for host in places)
        if how == UNREACHABLE:
            return (f"{who} cannot be reached any more: host {', '.join(places)} is down, or the network between it "
                    "and this one is; resume with the same command once it is back")
        what = {ENDED: "ended", FAILED: "failed", FOLLOWED: "ended because of another rank"}[how]
        return (f"{who} {'has' if alone else 'have'} {what}, and this rank waits for {'it' if alone else 'them'}: "
                f"{'its log says' if alone else 'their logs say'} why; resume with the same command")
    return None


def _how(error: OSError) -> str:
    return ENDED if error.errno in (errno.ECONNRESET, errno.EPIPE, errno.EBADF) else UNREACHABLE


def _listening() -> socket.socket:
    """On a free port of every interface, as the connection may come by any."""
    try:
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    except (OSError, ValueError):  # a machine without IPv6
        return socket.create_server(("", 0), backlog=4096)


def _keep_alive(connection: socket.socket, unreachable: float) -> None:
    """Let the kernels find out whether the other machine is there, both when nothing is said and when something that
    was said is not acknowledged."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, seconds in (("TCP_KEEPIDLE", unreachable / 6), ("TCP_KEEPINTVL", unreachable / 6)):
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), max(int(seconds), 1))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 5)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * unreachable))
