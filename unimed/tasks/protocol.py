"""Two protocols: `released` is the published code with its oddities, `standard` what the field means by the task and its metric."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from unimed.records.text import MAX_WORDS
from unimed.tasks.task import TASKS, Task

ProtocolName = Literal["released", "standard"]


@dataclass(frozen=True)
class Protocol:
    """max_words: where texts end (0: nowhere). context: text questions come with options and abstracts.

    strict: a table shows the strict scores.
    """

    max_words: int
    context: bool
    strict: bool

    def metric(self, task: Task) -> str:
        """The metric that stands for a task in a table."""
        return task.strict if self.strict else task.headline

    def metrics(self, tags: Iterable[str]) -> dict[str, str]:
        """Tag -> metric, for these tasks."""
        return {tag: self.metric(TASKS[tag]) for tag in tags}


RELEASED = Protocol(max_words=MAX_WORDS, context=False, strict=False)
STANDARD = Protocol(max_words=0, context=True, strict=True)
PROTOCOLS: dict[ProtocolName, Protocol] = {"released": RELEASED, "standard": STANDARD}
