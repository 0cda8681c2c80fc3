"""A shell to type documentation into: hpc-supcon, torchrun and python in it are forked from the tests' fork server.

Importing PyTorch takes seconds in each new process. The commands on the shell's PATH are small scripts instead, which
send their arguments, environment, directory and open files to this process, and exit as the forked process does.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, reduction
from pathlib import Path
from typing import Any

from hpc_supcon import cli
from tests.docs import miniature
from tests.processes import FORK_SERVER, RUN_TIMEOUT_S

COMMANDS = ("hpc-supcon", "torchrun", "python", "python3")
MOST_RANKS = 2
"""torchrun starts no more, however many a page names."""
SOCKET = "TYPED_SOCKET"
MASTER = "TYPED_MASTER"
"""The variable with the MASTER_ADDR of jobs: only a local cluster's own processes know the names of its nodes."""
SCRIPT = f"""#!{sys.executable} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect(os.environ["{SOCKET}"])
request = {{"arguments": [sys.argv[0], *sys.argv[1:]], "folder": os.getcwd(), "environment": dict(os.environ),
    "pid": os.getpid()}}
text = json.dumps(request).encode()
socket.send_fds(server, [len(text).to_bytes(8, "big")], [0, 1, 2])
server.sendall(text)
answer = server.recv(1)
os._exit(answer[0] if answer else 1)
"""


class Stream:
    """A file descriptor that is passed to a process of the fork server."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __getstate__(self) -> Any:
        return reduction.DupFd(self.number)

    def __setstate__(self, passed: Any) -> None:
        self.number = passed.detach()


@dataclass
class Request:
    arguments: list[str]
    folder: str
    environment: dict[str, str]
    pid: int
    """Of the script in the shell."""


class Server:
    """Starts what the scripts ask for, until it is closed."""

    def __init__(self, folder: Path) -> None:
        self._starting = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / "socket"))
        self._listener.listen()
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name in COMMANDS:
            (self.bin / name).write_text(SCRIPT)
            (self.bin / name).chmod(0o755)
        (self.bin / "activate").write_text(f"PATH={self.bin}:$PATH\n")
        self.environment = {SOCKET: str(folder / "socket")}
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            size, descriptors, _, _ = socket.recv_fds(client, 8, 3)
            with client.makefile("rb") as file:
                text = file.read(int.from_bytes(size, "big"))
            processes = self._start(Request(**json.loads(text)), descriptors)
            for number in descriptors:
                os.close(number)
            left = {process.sentinel: process for process in processes}
            failed = 0
            while left:
                ready = connection.wait([*left, client], RUN_TIMEOUT_S)
                with self._starting:  # which also asks processes whether they have ended
                    for process in (left.pop(found) for found in ready if found in left):
                        process.join()
                        failed = failed or process.exitcode
                    if failed or client in ready or not ready:  # as torchrun does; or the script was killed
                        for process in left.values():
                            process.kill()
            client.sendall(bytes([failed % 256 if failed >= 0 else 128 - failed]))

    def _start(self, request: Request, descriptors: Sequence[int]) -> list[Any]:
        name, *arguments = request.arguments
        ranks = 1
        if Path(name).name == "torchrun":
            ranks, arguments = min(MOST_RANKS, int(arguments[1])), arguments[2:]
        processes = []
        for rank in range(ranks):
            variables = dict(request.environment)
            if Path(name).name == "torchrun":
                if rank == 0:
                    with socket.create_server(("127.0.0.1", 0)) as free:
                        port = free.getsockname()[1]
                variables |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
                variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
            own = Request([Path(name).name, *arguments], request.folder, variables, request.pid)
            process = FORK_SERVER.Process(target=_run, args=(own, [Stream(n) for n in descriptors], str(self.bin)))
            with self._starting:
                process.start()
            processes.append(process)
        return processes


@contextmanager
def serving() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="typed-", dir="/tmp") as folder:  # paths of sockets must be short
        server = Server(Path(folder))
        try:
            yield server
        finally:
            server.close()


def typed(script: str, server: Server, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Bash, to which `script` is typed in `folder`: it ends at the first command that fails."""
    (home := folder.with_name(f"{folder.name}-home")).mkdir()
    environment = {
        "PATH": f"{server.bin}:/usr/local/bin:/usr/bin:/bin", "HOME": str(home), "LANG": "C.UTF-8", "COLUMNS": "120",
        "OMP_NUM_THREADS": "1", **server.environment, **variables,
    }  # fmt: skip
    line = ["bash", "-e", "-u", "-o", "pipefail", "-c", script]
    return subprocess.run(
        line, check=False, cwd=folder, env=environment, capture_output=True, text=True, timeout=RUN_TIMEOUT_S
    )


def _run(request: Request, streams: list[Stream], commands: str) -> None:
    gc.freeze()  # what the server imported is not looked through again and again
    for number, stream in enumerate(streams):
        os.dup2(stream.number, number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - multiprocessing has closed it
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    if MASTER in os.environ and "SLURM_JOB_ID" in os.environ:
        os.environ["MASTER_ADDR"] = os.environ[MASTER]
    sys.executable = f"{commands}/python"  # also for processes that this one starts
    miniature.install()
    name, *arguments = request.arguments
    if name == "hpc-supcon":
        cli.main(arguments)
    if arguments[0] == "-u":
        del arguments[0]
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(arguments[1], {"__name__": "__main__"})
    elif arguments[0] == "-m":
        sys.argv = arguments[1:]
        if arguments[1].startswith("submitit."):
            os.getpid = lambda: request.pid  # by which it finds the files of a job
        sys.path.insert(0, str(Path.cwd()))
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).absolute().parent))
        runpy.run_path(arguments[0], run_name="__main__")
