"""Training in several processes, as torchrun starts them: what the main process does for all, and what all add up."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from unimed.errors import UserError

T = TypeVar("T")


def on_main(body: Callable[[], T]) -> T:
    """Runs `body` in the main process only and returns its result in every process.

    Where it raises, no process goes on: the main process raises the error, the others exit with code 2.
    """
    state = PartialState()
    if state.num_processes == 1:
        return body()
    failure: Exception | None = None
    outcome: list = [None, True]
    if state.is_main_process:
        try:
            outcome = [body(), False]
        except (UserError, OSError) as error:
            failure = error
    broadcast_object_list(outcome)
    result, failed = outcome
    if failure is not None:
        raise failure
    if failed:
        raise SystemExit(2)
    return result


def is_main() -> bool:
    return bool(PartialState().is_main_process)


def main_first() -> AbstractContextManager[None]:
    """The main process goes through the block before the others do."""
    return PartialState().main_process_first()


def end() -> None:
    """Takes leave of the other processes, at the end of a program."""
    if PartialState().num_processes > 1:
        PartialState().wait_for_everyone()
        PartialState().destroy_process_group()


def gather(value: T) -> list[T]:
    """The values of all processes, by rank."""
    return [value] if PartialState().num_processes == 1 else gather_object([value])
