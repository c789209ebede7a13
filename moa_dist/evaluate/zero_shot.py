"""Lists the zero-shot tasks by the names that `moa-dist eval --tasks` accepts."""

from __future__ import annotations

from typing import Any

from moa_dist.evaluate.tasks.blimp import BLIMP
from moa_dist.evaluate.tasks.cloze import CLOZE
from moa_dist.evaluate.tasks.lambada import LAMBADA
from moa_dist.evaluate.tasks.piqa import PIQA
from moa_dist.evaluate.tasks.task import Task

TASKS: dict[str, Task[Any]] = {"blimp": BLIMP, "lambada": LAMBADA, "piqa": PIQA, "cbt": CLOZE}
