"""Training progress: a bar on a terminal, a line now and then anywhere else."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import Progress
from transformers import TrainerCallback

from unimed.progress import bar

LINES = 10  # lines of a whole run where there is no terminal


class TrainingProgress(TrainerCallback):
    """Progress of the main process; the others show nothing."""

    def __init__(self, console: Console):
        self.console, self.note = console, ""
        self.progress: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.progress = bar(self.console)
        self.task = self.progress.add_task("training", total=state.max_steps, completed=state.global_step, note="")
        self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress is None:
            return
        self.progress.update(self.task, completed=state.global_step, note=self.note)
        if not self.console.is_terminal and state.global_step % max(state.max_steps // LINES, 1) == 0:
            note = f", {self.note}" if self.note else ""
            self.console.print(f"training: step {state.global_step} of {state.max_steps}{note}", highlight=False)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.note = f"loss {logs['loss']:.3f}"

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress is not None:
            self.progress.stop()
