"""Two protocols: `released` is the published code with its oddities, `standard` what the field means by the task and its metric."""

from collections.abc import Iterable
from dataclasses import dataclass

from unimed.records.policy import ProtocolName
from unimed.tasks.metrics import medmoe
from unimed.tasks.task import TASKS, Task


@dataclass(frozen=True)
class Protocol:
    """strict: a table shows the strict scores. `records.policy.Rules` says what a protocol means for the texts."""

    strict: bool

    def metric(self, task: Task) -> str:
        """The metric that stands for a task in a table."""
        return task.strict if self.strict else task.headline

    def metrics(self, tags: Iterable[str]) -> dict[str, str]:
        """Tag -> metric, for these tasks."""
        return {tag: self.metric(TASKS[tag]) for tag in tags}


RELEASED = Protocol(strict=False)
STANDARD = Protocol(strict=True)
SETS = {"medmoe": medmoe.score}  # further scores by the name of their protocol: row -> data set -> score
PROTOCOLS: dict[ProtocolName, Protocol] = {"released": RELEASED, "standard": STANDARD}
