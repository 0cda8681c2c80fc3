"""What a stage is given: its device, its time, its file, and the numbers of the stages before it."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...errors import HpcSupconError
from .plan import STAGES
from .record import Record, read


@dataclass
class Work:
    """One stage at work in its own process."""

    record: Record
    device: torch.device
    deadline: float
    """On time.monotonic's clock, which is the same in all processes."""
    out: Path
    """The folder with the files of all stages."""
    data: Path | None
    """CIFAR-10 or the like: an image folder of small JPEGs."""
    failed: list[str] = field(default_factory=list)
    """What could not be measured because of an error."""

    @property
    def kind(self) -> str:
        """cpu or cuda."""
        return self.device.type

    @property
    def is_small(self) -> bool:
        """On a CPU everything is measured in miniature: it tests the command."""
        return self.kind == "cpu"

    @property
    def threads(self) -> int | None:
        """Of a CPU: small tensors gain nothing from a second one. None: PyTorch's own choice."""
        return 1 if self.is_small else None

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def has_time(self, what: str, seconds: float) -> bool:
        """Whether about `seconds` are left; otherwise `what` is noted as skipped."""
        if self.left() >= seconds:
            return True
        self.record.skip(what, f"takes about {seconds:.0f} s, {max(0.0, self.left()):.0f} s were left")
        return False

    def skip(self, what: str, why: str) -> None:
        print(f"{what}: skipped: {why}", flush=True)
        self.record.skip(what, why)

    @contextmanager
    def measuring(self, what: str) -> Iterator[None]:
        """`what` is one of several things to measure: an error in it leaves the others to be measured.

        What this machine cannot do (a missing package, a full memory) is noted as skipped. Any other error is printed
        and noted, and fails the stage at its end.
        """
        try:
            yield
        except HpcSupconError as error:
            self.skip(what, str(error))
        except torch.OutOfMemoryError:
            self.skip(what, f"out of memory{self._others()}")
        except Exception as error:  # not the end of it: `failed` fails the stage
            traceback.print_exc()
            self.record.fail(what, traceback.format_exception_only(error)[-1].strip().splitlines()[0])
            self.failed.append(what)
        finally:
            if self.kind == "cuda":
                torch.cuda.empty_cache()

    def _others(self) -> str:
        """How much of the GPU's memory other processes have, if much."""
        if self.kind == "cpu":
            return ""
        free, whole = torch.cuda.mem_get_info(self.device)
        others = whole - free - torch.cuda.memory_reserved(self.device)
        return f"; other processes hold {others / 2**30:.1f} GiB of the GPU" if others > 2 << 30 else ""

    def earlier(self, stage: str) -> dict[str, Any]:
        """The content of another stage's file; empty without one."""
        path = self.out / next(s.file for s in STAGES if s.name == stage)
        return read(path) if path.exists() else {}
