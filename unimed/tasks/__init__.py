"""Tasks: one file each with its prompts, its reading of an answer, its metrics and its majority answer.

`TASKS` lists them in the order of tables, logs and plots.
"""

from unimed.tasks import caption, cls, identify, qa, refer, vqa
from unimed.tasks.task import TASKS, Task

__all__ = ["TASKS", "Task"]

TASKS.update({file.TASK.tag: file.TASK for file in (vqa, refer, identify, caption, cls, qa)})
