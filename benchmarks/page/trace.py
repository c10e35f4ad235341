"""The tasks of a page's main thread, read from the browser's own trace."""

import json
from dataclasses import dataclass

CATEGORIES = ["toplevel", "disabled-by-default-devtools.timeline"]
_TASK = "ThreadControllerImpl::RunTask"


@dataclass(frozen=True)
class Task:
    """A task of the main thread of a page's process."""

    wall: float
    """Milliseconds of the wall clock."""
    processor: float
    """Milliseconds of processor time of the thread itself."""


def main_thread_tasks(trace: bytes) -> list[Task]:
    """Returns the tasks of the busiest renderer's main thread, the longest first.

    Args:
        trace: A trace as Chromium writes it, in JSON, with CATEGORIES.
    """
    events = json.loads(trace)["traceEvents"]
    mains = {
        (event["pid"], event["tid"])
        for event in events
        if event.get("name") == "thread_name" and event["args"].get("name") == "CrRendererMain"
    }
    tasks: dict[tuple[int, int], list[Task]] = {main: [] for main in mains}
    for event in events:
        thread = (event.get("pid"), event.get("tid"))
        if event.get("ph") == "X" and event.get("name") == _TASK and thread in tasks:
            tasks[thread].append(Task(event["dur"] / 1000, event.get("tdur", 0) / 1000))
    assert tasks, "the trace has no renderer"
    busiest = max(tasks.values(), key=lambda own: sum(task.wall for task in own))
    return sorted(busiest, key=lambda task: task.wall, reverse=True)
