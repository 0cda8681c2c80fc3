"""How the ranks of a run find each other before there is a process group.

Rank 0 listens on a port that all ranks know or compute, and answers every connection with one line: which run it is,
and where the run's key-value store is. A rank that is answered something else, or nothing, has met another run or
another program. Where the port was computed, rank 0 takes the next free one, and the others look for it there.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from ..errors import RanksApart, first_line

START_TIMEOUT_S = 300.0
"""How long the ranks of a run wait for each other: nodes boot, and import PyTorch, at different times."""
ANSWER_TIMEOUT_S = 3.0
"""How long a rank waits for a connection and its answer."""
OCCUPIED_S = 8.0
"""After this time a port on which something else answers is taken to be occupied for good."""
POLL_INTERVAL_S = 0.1
_starts = count()
"""Every process of a run numbers its starts alike: one that calls several functions of the API has several."""
_GREETING = "hpc-supcon"
_ARRIVED, _CLASH, _NO_CLASH = "arrived", "clash", "-"


@dataclass(frozen=True)
class Meeting:
    """Where the ranks meet: the host of rank 0, the ports it may take there, and what tells this run from others."""

    rank: int
    world_size: int
    host: str
    ports: list[int]
    run: str
    agent: bool = False
    """Whether torchrun's agent keeps the store, at host and port, rather than rank 0."""

    @property
    def place(self) -> str:
        first, last = self.ports[0], self.ports[-1]
        return f"{self.host}:{first}" if first == last else f"{self.host}, ports {first} to {last},"


def meet(meeting: Meeting, message: str, timeout_s: float = START_TIMEOUT_S) -> tuple[Any, list[str]]:
    """(the store of the run, the messages of all ranks in rank order), once all ranks are there. Collective.

    Raises RanksApart, within seconds, where a port is occupied, a host unknown, or another process has this rank
    already; and after timeout_s where ranks are missing.
    """
    deadline = time.monotonic() + timeout_s
    _check_host(meeting.host)
    try:
        if meeting.agent:
            return _join(_connect(meeting, meeting.ports[0], deadline), meeting, message, deadline)
        if meeting.rank == 0:
            store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=_left(deadline))
            with _announced(meeting, store.port):
                return _join(store, meeting, message, deadline)
        return _join(_connect(meeting, _find_store(meeting, deadline), deadline), meeting, message, deadline)
    except RuntimeError as error:  # of the store: HpcSupconError is not one
        raise RanksApart(
            f"rank {meeting.rank}: rank 0 at {meeting.host} was lost while the ranks were starting; its own message "
            f"says why ({first_line(error)})"
        ) from error


def _check_host(host: str) -> None:
    """Raise RanksApart for a host without an address. On rank 0 too, which itself has no use for its name."""
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise RanksApart(
            f"the host of rank 0, {host}, is not known to {socket.gethostname()} ({error.strerror}): export "
            "MASTER_ADDR with a name or address that all nodes know"
        ) from error


@contextmanager
def _announced(meeting: Meeting, store_port: int) -> Iterator[None]:
    """Inside, a thread of rank 0 answers every connection with the run and the port of its store."""
    line = f"{_GREETING} {store_port} {meeting.run}\n".encode()
    with closing(_listen(meeting)) as listener:
        thread = threading.Thread(target=_answer, args=(listener, line), name="rendezvous", daemon=True)
        thread.start()
        try:
            yield
        finally:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # ends `accept`, which closing alone does not
            thread.join()


def _listen(meeting: Meeting) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    for port in meeting.ports:
        with suppress(OSError):
            return socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=meeting.world_size)
    raise RanksApart(
        f"rank 0 cannot listen at {meeting.place} of {socket.gethostname()}: occupied by another program or run; "
        "export MASTER_PORT with the number of a free port, the same for all ranks"
    )


def _answer(listener: socket.socket, line: bytes) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:  # closed
            return
        with connection, suppress(OSError):
            connection.sendall(line)


def _find_store(meeting: Meeting, deadline: float) -> int:
    """The port of the run's store, from whichever of the ports rank 0 took."""
    occupied_since: float | None = None
    while True:
        answers = []
        for port in meeting.ports:
            answer = _ask(meeting.host, port, deadline)
            greeting, _, rest = (answer or "").partition(" ")
            store_port, _, run = rest.partition(" ")
            if greeting == _GREETING and run == meeting.run:
                return int(store_port)
            answers.append(answer)
        now = time.monotonic()
        if None in answers:
            occupied_since = None
        elif occupied_since is None:
            occupied_since = now
        elif now - occupied_since > OCCUPIED_S:
            raise RanksApart(
                f"rank {meeting.rank}: {meeting.place} is occupied by another program or run, so rank 0 cannot be "
                "there; export MASTER_PORT with the number of a free port, the same for all ranks"
            )
        if now > deadline:
            raise RanksApart(
                f"rank {meeting.rank}: rank 0 does not answer at {meeting.place} within the time to start; see what "
                "it printed, and that MASTER_ADDR is its host"
            )
        time.sleep(POLL_INTERVAL_S)


def _ask(host: str, port: int, deadline: float) -> str | None:
    """What is answered at a port: a line, or "" by what says nothing; None where nothing listens."""
    timeout = max(0.1, min(ANSWER_TIMEOUT_S, deadline - time.monotonic()))
    try:
        connection = socket.create_connection((host, port), timeout=timeout)
    except OSError:
        return None
    with connection, suppress(OSError), connection.makefile("rb") as file:
        return file.readline(1000).decode(errors="replace").rstrip("\n")
    return ""


def _connect(meeting: Meeting, port: int, deadline: float) -> Any:
    timeout = _left(deadline)
    return TCPStore(meeting.host, port, is_master=False, wait_for_workers=False, timeout=timeout)


def _join(store: Any, meeting: Meeting, message: str, deadline: float) -> tuple[Any, list[str]]:
    """Wait until all ranks have come, each once."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's agent keeps its store over restarts
    store = PrefixStore(f"hpc_supcon/start/{attempt}/{next(_starts)}", store)
    store.compare_set(_CLASH, "", _NO_CLASH)
    if store.add(f"taken/{meeting.rank}", 1) > 1:
        place = f"{meeting.host}:{meeting.ports[0]}"
        found = f"two processes are rank {meeting.rank} of {meeting.world_size} at {place}: two runs were started "
        store.set(_CLASH, found + "with the same MASTER_ADDR and MASTER_PORT; give each its own MASTER_PORT")
    else:
        store.set(f"message/{meeting.rank}", message)
        store.add(_ARRIVED, 1)
    while True:
        clash = store.get(_CLASH).decode()
        if clash != _NO_CLASH:
            if meeting.rank == 0:
                time.sleep(5 * POLL_INTERVAL_S)  # rank 0 keeps the store, in which the others read this
            raise RanksApart(clash)
        if store.add(_ARRIVED, 0) == meeting.world_size:
            return store, [store.get(f"message/{rank}").decode() for rank in range(meeting.world_size)]
        if time.monotonic() > deadline:
            missing = [r for r in range(meeting.world_size) if not store.check([f"taken/{r}"])]
            raise RanksApart(f"ranks {', '.join(map(str, missing))} did not start in time; see what they printed")
        time.sleep(POLL_INTERVAL_S)


def _left(deadline: float) -> timedelta:
    return timedelta(seconds=max(1.0, deadline - time.monotonic()))
