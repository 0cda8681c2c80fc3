"""Processes forked from a server that has imported everything: importing it anew in each costs seconds of CPU."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import BaseContext
from pathlib import Path

from hpc_supcon import cli

PRELOADED = [
    "hpc_supcon.cli", "hpc_supcon.stages.pretrain", "hpc_supcon.stages.probe", "hpc_supcon.stages.prune",
    "hpc_supcon.stages.embeddings", "hpc_supcon.pages.page", "torch.utils.tensorboard", "tests.docs.shell",
    "pytest", "hypothesis", "sklearn.metrics", "sklearn.neighbors", "PIL.Image", "tests.fault.injector",
]  # fmt: skip
# Forking the process of the tests itself would be unsafe: it has run OpenMP threads.
FORK_SERVER = multiprocessing.get_context("forkserver")
if multiprocessing.parent_process() is None:
    FORK_SERVER.set_forkserver_preload(PRELOADED)
    # There is one server, and its first user chooses what it imports; a loader would choose less.
    BaseContext.set_forkserver_preload = lambda self, names: None  # type: ignore[method-assign]

RUN_TIMEOUT_S = 600
"""A run takes seconds; one that takes this long hangs, however busy the machine is."""


class Ranks:
    """`main()` with `arguments` as its command line, on several ranks as torchrun would start them.

    A single rank gets no variables of a launcher. All of them write to the file `stderr`.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        stderr: Path,
        ranks: int = 1,
        *,
        environment: Mapping[str, object] | None = None,
        main: Callable[[], None] = cli.main,
    ) -> None:
        self.arguments, self._stderr = list(arguments), stderr
        stderr.unlink(missing_ok=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.ranks = []
        for rank in range(ranks):
            variables = dict(environment or {})
            if ranks > 1:
                variables |= {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "RANK": rank, "LOCAL_RANK": rank}
                variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            process = FORK_SERVER.Process(target=_run, args=(list(arguments), variables, str(stderr), main))
            process.start()
            self.ranks.append(process)

    def end(self, within_s: float = RUN_TIMEOUT_S) -> list[int]:
        """Exit codes in rank order, of ranks that must end by themselves."""
        for process in self.ranks:
            process.join(within_s)
        left = [rank for rank, process in enumerate(self.ranks) if process.exitcode is None]
        self.kill()
        assert not left, f"ranks {left} have not ended after {within_s} s\n{self.stderr}"
        return [process.exitcode for process in self.ranks]

    def kill(self) -> None:
        """SIGKILL every rank that still runs, and wait for its end."""
        for process in self.ranks:
            process.kill()
        for process in self.ranks:
            process.join()

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()


def _run(arguments: list[str], environment: dict[str, object], stderr: str, main: Callable[[], None]) -> None:
    with Path(stderr).open("a") as file:
        os.dup2(file.fileno(), 2)
    os.environ |= {key: str(value) for key, value in environment.items()}
    sys.argv[1:] = arguments
    main()
