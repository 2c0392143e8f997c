"""Tasks: one file each with its prompts, its reading of an answer, its metrics and its majority answer.

`TASKS` lists them in the order of tables, logs and plots; `RELEASED_TASKS` are those that a recipe takes where it names none.
"""

from unimed.tasks import calculation, caption, cls, findings, identify, qa, refer, severity, vqa
from unimed.tasks.task import TASKS, Task

__all__ = ["RELEASED_TASKS", "TASKS", "Task"]

_RELEASED = (vqa, refer, identify, caption, cls, qa)
RELEASED_TASKS = tuple(file.TASK.tag for file in _RELEASED)
TASKS.update({file.TASK.tag: file.TASK for file in (*_RELEASED, severity, findings, calculation)})
