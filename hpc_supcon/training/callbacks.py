"""Callbacks of a training: functions of a user that see its numbers, and may stop it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..distributed.collectives import gather_objects, propagate_errors
from ..distributed.watchdog import current_watchdog
from ..errors import CallbackError, first_line

Method = Callable[[int, Mapping[str, float]], None]


class StopTraining(Exception):
    """Raised by a callback: training saves a checkpoint after this step and ends, as by early stopping.

    Args:
        reason: what the run folder and the terminal tell of it.

    Raises:
        Nothing by itself. Where it is raised outside of a `Callback`'s methods, it is an error like any other.

    Source:
        Keras' and Lightning's callbacks stop in the same place: after the step that is under way.
    """

    def __init__(self, reason: str = "a callback") -> None:
        super().__init__(reason)
        self.reason = reason


class Callback:
    """What a training calls. Override what you need; the others do nothing.

    Every rank has its own and calls it with the same numbers, those of rank 0: under torchrun a callback that prints
    or writes should do so on rank 0 alone. It must not change the random state, and may not use collectives unless
    it does so on every rank. Numbers are as in metrics.jsonl: losses without a unit, accuracies as fractions, times
    in seconds, rates in images per second.

    Args:
        step: number of optimizer steps so far, counted from 1.
        epoch: number of epochs so far, counted from 1.
        metrics: name -> number.

    Raises:
        StopTraining: raised by a method to end the training after this step, with a checkpoint, on all ranks even if
            one rank alone raises it. Every other exception ends the run with CallbackError, which names the callback.

    Source:
        The names are this package's; the order within a step is on_step, on_epoch, on_evaluation.
    """

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """After each logged step (every `log.every_steps` steps): loss, lr, epoch, images_per_s, grad_norm, ..."""

    def on_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """After the last step of each epoch: the numbers of the last logged step, none if there was none."""

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """After each validation (`validation.every_epochs`, `every_steps`): loss, accuracy where there is one, ..."""

    def on_end(self, step: int, metrics: Mapping[str, float]) -> None:
        """Once, after the last step of a training that was not interrupted: the numbers of the last logged step."""


class Callbacks:
    """Calls all callbacks of a training; all methods are collective. Without callbacks they do nothing."""

    def __init__(self, callbacks: Sequence[Callback] = ()) -> None:
        self._callbacks = tuple(callbacks)
        self._last: dict[str, float] = {}
        self.reason: str | None = None
        """Why a callback stops the training; the same on every rank."""

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._last = dict(metrics)
        self._call("on_step", step, metrics)

    def epoch(self, epoch: int) -> None:
        self._call("on_epoch", epoch, self._last)

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._call("on_evaluation", step, metrics)

    def end(self, step: int) -> None:
        self._call("on_end", step, self._last)

    def _call(self, method: str, count: int, metrics: Mapping[str, Any]) -> None:
        """Raises CallbackError, on all ranks."""
        if not self._callbacks:
            return
        shared: dict[str, Any] = gather_objects(dict(metrics))[0]  # speeds are each rank's own
        reason: str | None = None
        # a debugger, or a plot, may take longer than a step may
        with propagate_errors(), current_watchdog().phase("callback"):
            for callback in self._callbacks:
                reason = reason or _told(getattr(callback, method), callback, count, shared)
        self.reason = self.reason or next(filter(None, gather_objects(reason)), None)


def _told(method: Method, callback: Callback, count: int, metrics: Any) -> str | None:
    """The reason with which the callback stops the training, if it does."""
    try:
        method(count, dict(metrics))
    except StopTraining as stop:
        return stop.reason
    except Exception as error:
        name = f"{type(callback).__qualname__}.{method.__name__}"
        raise CallbackError(
            f"callback {name} raised {type(error).__name__} at {count}: {first_line(error)}; the run ends, and "
            "goes on from its last checkpoint when it is resumed"
        ) from error
    return None
