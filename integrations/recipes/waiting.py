"""Processes of one command that know whether the others are there, so that none waits for one that is gone.

Within :func:`together` each process has a thread that holds a connection to the main one. The end of a process closes its connection,
which the main process notices at once and tells all. One that leaves with an error says so before. The others then end too, within
seconds and with one line, whatever they do at that time. The thread also sends a sign of life every few seconds, for a machine that was
switched off and closed nothing.

Within :func:`alone` the main process works while the others wait for its word. They wait as long as it lives and need no time limit:
that of the process group is then only for the collectives of ordinary steps.

What the main thread of a process does when another is gone decides how it ends:

- It waits in :func:`alone`, or in a collective of gloo, which fails at once: it raises.
- It computes, or loads data: it is interrupted by a signal after a few seconds, and raises.
- It is where no signal reaches it, in a collective of NCCL say: the thread prints the line and ends the process.

The connections use the address ``MASTER_ADDR`` of the process group and a free port. A random word that went through the process group
keeps others out.
"""

import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

from geomreg.cache_build import ProcessGoneError

__all__ = ["alone", "together"]

JOIN = 60.0  # seconds for all processes to be connected: they have just met in the process group
BEAT = 5.0  # seconds between signs of life
LIMIT = 300.0  # seconds without any: a thread may be kept waiting by code that holds the interpreter, the writing of a large file say
OWN = 2.0  # seconds for news of another process after an error that may come from its end
GRACE = 5.0  # seconds in which a process may end by itself, with its own error, when another is gone
END = 20.0  # seconds after the signal in which it must have ended
_SIGNAL = getattr(signal, "SIGURG", None)  # ignored by default, so that one that comes too late does no harm
_LONGEST = 600  # characters of an error that is passed on


class _InterruptedError(BaseException):
    """Ends what the main thread does; no code that takes broken samples for what they are may catch it."""


class _GoneError(RuntimeError):
    """Another process is gone, which all know."""


@contextmanager
def together(accelerator: Accelerator | PartialState, name: str, advice: str) -> Iterator[None]:
    """Within, the end of one process ends all; to be entered and left by all of them. A single process does nothing here.

    Args:
        accelerator: of the processes.
        name: of the command, for messages.
        advice: what to do where a process was killed, for messages.

    Raises:
        RuntimeError: another process failed or was killed, or the processes cannot connect to the main one.
    """
    if accelerator.num_processes == 1:
        yield
        return
    watch = _Watch(name, advice, accelerator.process_index, _connected(name, accelerator))
    _WATCHES.append(watch)
    try:
        with watch.interrupting():
            yield
            watch.leaving.set()
    except BaseException as error:
        watch.leaving.set()
        wrong = watch.cause(error)
        if wrong is None:
            watch.tell(wrong=f"{name}: expected all processes to go on, got an error on rank {watch.rank}: {_in_short(error)}")
            raise
        raise RuntimeError(wrong) from error
    finally:
        _WATCHES.remove(watch)
        watch.close()


@contextmanager
def alone(accelerator: Accelerator | PartialState) -> Iterator[bool]:
    """Within, the main process works alone; the others wait at the end of the block as long as it lives.

    Nothing in the block may be a collective. Outside of :func:`together` the others wait in a collective, with its time limit.

    Yields:
        Whether this is the main process.
    """
    watch = next(iter(_WATCHES), None)
    yield accelerator.is_main_process
    if accelerator.num_processes == 1:
        return
    if watch is None:
        accelerator.wait_for_everyone()
    elif accelerator.is_main_process:
        watch.end_block()
    else:
        watch.wait_for_block()


@dataclass
class _Peer:
    """A process at the other end of a connection."""

    rank: int
    connection: socket.socket
    read: bytes = b""
    silent: int = 0  # beats of our own since it was heard


class _Watch:
    """The connections of a process, its thread, and what is known of the others.

    Args:
        name: of the command.
        advice: where a process was killed.
        rank: of this process.
        connections: by rank; the main process has one to each other, these to the main one.

    Attributes:
        leaving: the main thread is about to leave by itself.
        wrong: what ended another process, as a whole line.
    """

    def __init__(self, name: str, advice: str, rank: int, connections: dict[int, socket.socket]) -> None:
        self.name, self.advice, self.rank = name, advice, rank
        self.leaving, self.wrong = threading.Event(), None
        self.begun = self.ended = 0  # blocks in which the main process works alone
        self.news, self.sending = threading.Condition(), threading.Lock()
        self.peers = {key: _Peer(key, connection) for key, connection in connections.items()}
        self.closed, (self.woken, self.waking) = False, socket.socketpair()
        self.interrupted: int | None = None  # the thread that signals go to
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.woken, selectors.EVENT_READ)
        for peer in self.peers.values():
            peer.connection.settimeout(10.0)
            self.selector.register(peer.connection, selectors.EVENT_READ, peer)
        self.thread = threading.Thread(target=self._run, name=f"{name}: other processes", daemon=True)
        self.thread.start()

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Within, the calling thread can be interrupted, if it is the program's main one."""
        if _SIGNAL is None or threading.current_thread() is not threading.main_thread():
            yield
            return

        def interrupt(number: int, frame: Any) -> None:
            if not self.leaving.is_set():
                raise _InterruptedError

        before, self.interrupted = signal.signal(_SIGNAL, interrupt), threading.get_ident()
        try:
            yield
        finally:
            signal.signal(_SIGNAL, signal.SIG_DFL if before is None else before)

    def cause(self, error: BaseException) -> str | None:
        """What ended another process, if that is why this one ends; else the error is its own."""
        if isinstance(error, (_InterruptedError, _GoneError)):
            return self.wrong
        torchs = isinstance(error, (dist.DistError, ProcessGoneError)) or (type(error) is RuntimeError and ": expected " not in str(error))
        if not torchs:
            return None
        with self.news:  # a collective may fail before the thread has heard of it
            self.news.wait_for(lambda: self.wrong is not None, OWN)
        return self.wrong

    def end_block(self) -> None:
        """By the main process: its block is done."""
        self._check()
        self.ended += 1
        self.tell(ended=self.ended)

    def wait_for_block(self) -> None:
        """By the others."""
        self.begun += 1
        with self.news:
            self.news.wait_for(lambda: self.ended >= self.begun or self.wrong is not None)
            done = self.ended >= self.begun
        if not done:  # else what comes next may end this process too, with an error of its own
            self._check()

    def _check(self) -> None:
        if self.wrong is not None:
            raise _GoneError(self.wrong)

    def tell(self, **message: Any) -> None:
        """Send to all at the other ends; who is gone is found by the thread."""
        line = (json.dumps(message) + "\n").encode() if message else b"\n"
        with self.sending:
            for peer in list(self.peers.values()):
                with suppress(OSError):
                    peer.connection.sendall(line)

    def close(self) -> None:
        """Say that this process leaves in order, and end the thread."""
        self.leaving.set()
        self.tell(leaves=True)
        self.closed = True
        self.waking.send(b"\n")
        self.thread.join(GRACE)
        self.forget()

    def forget(self) -> None:
        """Close what this process has of the connections."""
        self.selector.close()
        for connection in (self.woken, self.waking, *(peer.connection for peer in self.peers.values())):
            connection.close()

    def _run(self) -> None:
        """Listen until this process leaves or another is gone."""
        due = time.monotonic() + BEAT
        while not self.closed and self.wrong is None:
            for key, _ in self.selector.select(max(0.0, due - time.monotonic())):
                if key.data is not None:
                    self._hear(key.data)
            if time.monotonic() >= due:
                due = time.monotonic() + BEAT  # counted from now: after a stop of this process the others have time to be heard
                self._beat()
        if self.wrong is not None:
            self._end()

    def _hear(self, peer: _Peer) -> None:
        """What a peer says; nothing more means that it is gone."""
        try:
            found = peer.connection.recv(1 << 16)
        except OSError:
            found = b""
        peer.silent = 0
        *lines, peer.read = (peer.read + found).split(b"\n")
        for line in filter(None, lines):
            message = json.loads(line)
            if "leaves" in message:
                self._drop(peer)
                return
            with self.news:
                self.ended = message.get("ended", self.ended)
                self.news.notify_all()
            if "wrong" in message:
                self._learn(message["wrong"])
        if not found:
            self._drop(peer)
            self._learn(self._killed(peer, "none any more on rank {}: it was killed"))

    def _drop(self, peer: _Peer) -> None:
        self.selector.unregister(peer.connection)
        with self.sending:
            del self.peers[peer.rank]
        peer.connection.close()

    def _beat(self) -> None:
        self.tell()
        for peer in list(self.peers.values()):
            peer.silent += 1
            if peer.silent * BEAT > LIMIT:
                self._learn(self._killed(peer, f"no sign of life from rank {{}} for {LIMIT:.0f} s"))

    def _killed(self, peer: _Peer, what: str) -> str:
        return f"{self.name}: expected all processes to go on, got {what.format(peer.rank)}. {self.advice}"

    def _learn(self, wrong: str) -> None:
        """The first that went wrong is the cause of all else."""
        with self.news:
            if self.wrong is None:
                self.wrong = wrong
                self.tell(wrong=wrong)
            self.news.notify_all()

    def _end(self) -> None:
        """See to it that the main thread ends."""
        if self.leaving.wait(GRACE):
            return
        if self.interrupted is not None and _SIGNAL is not None:
            signal.pthread_kill(self.interrupted, _SIGNAL)
            if self.leaving.wait(END):
                return
        self._exit()

    def _exit(self) -> NoReturn:
        sys.stdout.flush()
        print(f"geomreg: {self.wrong}", file=sys.stderr, flush=True)
        os._exit(2)


_WATCHES: list[_Watch] = []  # of this process: none or one


def _forget_in_child() -> None:
    """A loading process that lives on must not keep its parent's connections open."""
    while _WATCHES:
        _WATCHES.pop().forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def _in_short(error: BaseException) -> str:
    """On one line; of an error in a loading process what it raised."""
    text = str(error)
    if "Original Traceback" in text:
        text = text.rpartition(f"\n{type(error).__name__}: ")[2]
    return " ".join(text.split())[:_LONGEST] or type(error).__name__


def _connected(name: str, accelerator: Accelerator | PartialState) -> dict[int, socket.socket]:
    """Connections of the main process with all others."""
    server, offer = None, [None]
    address = os.environ.get("MASTER_ADDR") or socket.gethostname()
    if accelerator.is_main_process:
        server = _listening(address)
        offer = [(address, server.getsockname()[1], secrets.token_hex(16))]
    broadcast_object_list(offer)
    address, port, word = offer[0]
    until, found = time.monotonic() + JOIN, {}
    try:
        if server is None:
            found[0] = socket.create_connection((address, port), JOIN)
            found[0].sendall(f"{word} {accelerator.process_index}\n".encode())
            return found
        with server:
            while len(found) < accelerator.num_processes - 1:
                server.settimeout(max(0.1, until - time.monotonic()))
                connection, _ = server.accept()
                rank = _greeted(connection, word)
                if rank is None:
                    connection.close()
                else:
                    found[rank] = connection
            return found
    except OSError as error:
        for connection in found.values():
            connection.close()
        raise RuntimeError(
            f"{name}: expected all processes to connect to the main one at {address}, got {error}. Set MASTER_ADDR to an address of it "
            "that all machines reach, and let them connect on free ports."
        ) from error


def _listening(address: str) -> socket.socket:
    """For processes of this machine alone where the address says so."""
    if address == "localhost" or address.startswith("127."):
        return socket.create_server((address, 0))
    with suppress(OSError):
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _greeted(connection: socket.socket, word: str) -> int | None:
    """The rank of who knows the word."""
    connection.settimeout(10.0)
    read = b""
    with suppress(OSError):
        while not read.endswith(b"\n") and len(read) < 100 and (more := connection.recv(100)):
            read += more
    said, _, rank = read.decode("ascii", "replace").strip().partition(" ")
    return int(rank) if secrets.compare_digest(said.encode(), word.encode()) and rank.isdigit() else None
