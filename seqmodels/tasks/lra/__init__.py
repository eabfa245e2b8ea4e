"""Long Range Arena (arXiv 2011.04006): data of its tasks, generated or loaded. No training in here."""

from seqmodels.tasks.lra.examples import Batch, Examples, Pixels
from seqmodels.tasks.lra.registry import (
    TASKS,
    DataOptions,
    Task,
    TaskData,
    default_folder,
    generate_task,
    load_task,
    task_named,
)
from seqmodels.tasks.lra.shards import DataError

__all__ = [
    "TASKS",
    "Batch",
    "DataError",
    "DataOptions",
    "Examples",
    "Pixels",
    "Task",
    "TaskData",
    "default_folder",
    "generate_task",
    "load_task",
    "task_named",
]
