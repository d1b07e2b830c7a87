"""Work done in processes that may die: a kernel's fault, a hang or a lack of memory costs its own task and no other.

A GPU whose context met an illegal access answers nothing more in that process, and a kernel that never ends cannot be
stopped from within; so tasks run in children, and this process, which holds no task, keeps what they answer.
"""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

Task = tuple[str, Any]  # a key, and what the work is given
Record = dict[str, Any]
Make = Callable[..., Callable[[Any], Record]]
SPOILT = "spoilt"  # a record with this key comes from a process that is not to be used again
STARTS = 3  # children that may die before their first task, one after another, until the machine is at fault


@dataclass
class _Child:
    """`task`: what it works on; None while it starts."""

    process: BaseProcess
    pipe: Connection
    deadline: float
    task: Task | None = None

    def give(self, task: Task, patience: float) -> None:
        self.task, self.deadline = task, time.monotonic() + patience
        with contextlib.suppress(OSError):  # it died between two tasks, which is heard in its turn
            self.pipe.send(task[1])

    def hear(self) -> Record:
        """Its answer ({} once it has started), or why there is none; SPOILT where it must be replaced."""
        if self.pipe.poll():
            try:
                return dict(self.pipe.recv())
            except (EOFError, OSError):
                self.process.join(5)
                return {"reason": f"the process died (exit code {self.process.exitcode})", SPOILT: True}
        return {"reason": "no answer in time: killed", SPOILT: True}

    def stop(self) -> None:
        self.process.kill()
        self.process.join(5)
        self.pipe.close()


def _serve(make: Make, arguments: tuple[Any, ...], pipe: Connection) -> None:
    """A child: one answer to each task. An exception of the work is an answer too."""
    work = make(*arguments)
    pipe.send({})
    while True:
        given = pipe.recv()
        try:
            answer = work(given)
        except Exception as problem:
            answer = {"reason": f"{type(problem).__name__}: {problem}"[:300], SPOILT: True}
        pipe.send(answer)


def _start(make: Make, arguments: tuple[Any, ...], patience: float) -> _Child:
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA where its parent did
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(make, arguments, there), daemon=True)
    process.start()
    there.close()
    return _Child(process, here, time.monotonic() + patience)


def results(
    tasks: Sequence[Task], make: Make, arguments: tuple[Any, ...], workers: int, end: float, patience: float
) -> Iterator[tuple[str, Record]]:
    """(key, record) of each task as it is done, until `end` (time.monotonic()); unfinished tasks are left out.

    `make(*arguments)` gives a child its work, a function of a task's second half. A child that dies, or is silent for
    `patience` seconds, is replaced, and its task's record is the reason. RuntimeError where no child starts.
    """
    todo, children, dead = collections.deque(tasks), list[_Child](), 0
    try:
        while (todo or any(c.task for c in children)) and time.monotonic() < end:
            while len(children) < workers and sum(c.task is None for c in children) < len(todo):
                children.append(_start(make, arguments, patience))
            soonest = min(end, *(c.deadline for c in children))
            ready = wait([c.pipe for c in children], max(0.0, soonest - time.monotonic()))
            for child in [c for c in children if c.pipe in ready or time.monotonic() > c.deadline]:
                record = child.hear()
                spoilt = bool(record.pop(SPOILT, False))
                if child.task is not None:
                    yield child.task[0], record
                else:
                    dead = dead + 1 if spoilt else 0
                    if dead == STARTS:
                        raise RuntimeError(f"{dead} processes in a row did not start: {record['reason']}")
                if spoilt or not todo:
                    child.stop()
                    children.remove(child)
                else:
                    child.give(todo.popleft(), patience)
    finally:
        for child in children:
            child.stop()
