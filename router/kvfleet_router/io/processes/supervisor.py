"""Keeps processes running: starts them, starts those that die again, ends them in order. Synchronous, without an event loop.

The supervisor does nothing else, so that forking it is safe at any time, and nothing that goes wrong in a process goes wrong
here. A process that dies is started again at once; one that keeps dying, after pauses that grow to MAX_PAUSE_S. Where all those
that serve keep dying, it gives up: whoever started it shall see that.

On SIGTERM or SIGINT all processes get SIGTERM, those of an order later when the ones before have ended; another signal is
passed on (routers cut what is left). Should the supervisor itself be killed, the kernel sends them SIGTERM (on Linux).
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType

log = logging.getLogger("kvfleet.router")

SOUND_S = 10.0
"""A process that lived for so long was started well."""
MIN_PAUSE_S, MAX_PAUSE_S = 0.1, 5.0
MAX_FAILURES = 8
"""So many times in a row, with all pauses about 7 s, each of those that serve may die."""
TICK_S = 0.5
_PR_SET_PDEATHSIG = 1


@dataclass(slots=True, eq=False)
class Task:
    """One process to be kept running."""

    name: str
    run: Callable[[], None]
    """What it does; in the new process."""
    order: int = 0
    """When it is ended: the lower ones first."""
    on_failure: Callable[[], None] = lambda: None
    """Called here when it keeps dying, before it is started again."""
    pid: int = 0
    """0: it does not run."""
    started_at: float = 0.0
    restart_at: float = 0.0
    failures: int = field(default=0)


class Supervisor:
    def __init__(self, tasks: Sequence[Task], *, on_leaving: Callable[[], None] = lambda: None) -> None:
        """`on_leaving` is called once, before the processes are told to end."""
        self._tasks = tasks
        self._on_leaving = on_leaving
        self._signals: list[int] = []
        self._leaving = False
        self._ending: set[int] = set()
        """Processes that were told to end."""
        self._exit_code = 0

    def run(self) -> int:
        """Until all have ended after a signal (0), or until it gave up (1)."""
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)
        previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        previous[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda number, frame: None)
        old_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            for task in self._tasks:
                self._start(task)
            while True:
                self._reap()
                self._obey()
                if self._leaving and not any(task.pid for task in self._tasks):
                    return self._exit_code
                self._restart()
                select.select([reader], [], [], self._pause_s())
                with contextlib.suppress(BlockingIOError):
                    reader.recv(4096)
        finally:
            signal.set_wakeup_fd(old_fd)
            for number, handler in previous.items():
                signal.signal(number, handler)
            reader.close()
            writer.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)

    def _obey(self) -> None:
        """Pass signals on; once leaving, end one order after the other."""
        while self._signals:
            self._signals.pop()
            if not self._leaving:
                self._leave()
            else:
                self._ending.clear()  # once more
        if self._leaving:
            running = [task for task in self._tasks if task.pid]
            first = min((task.order for task in running), default=0)
            for task in running:
                if task.order == first and task.pid not in self._ending:
                    self._ending.add(task.pid)
                    os.kill(task.pid, signal.SIGTERM)

    def _leave(self) -> None:
        self._leaving = True
        self._on_leaving()

    def _reap(self) -> None:
        for task in self._tasks:
            if not task.pid:
                continue
            pid, status = os.waitpid(task.pid, os.WNOHANG)
            if not pid:
                continue
            task.pid = 0
            if self._leaving:
                continue
            code = os.waitstatus_to_exitcode(status)
            self._failed(task, f"ended ({f'signal {-code}' if code < 0 else f'exit code {code}'})")
        now = time.monotonic()
        if not self._leaving and all(_keeps_dying(task, now) for task in self._tasks if not task.order):
            log.error("all processes keep ending, %d times each: the errors above say why", MAX_FAILURES)
            self._exit_code = 1
            self._leave()

    def _failed(self, task: Task, how: str) -> None:
        now = time.monotonic()
        task.failures = 1 if now - task.started_at > SOUND_S else task.failures + 1
        pause_s = 0.0 if task.failures == 1 else min(MIN_PAUSE_S * 2.0 ** (task.failures - 2), MAX_PAUSE_S)
        task.restart_at = now + pause_s
        log.error("%s %s: it is started again%s", task.name, how, f" in {pause_s:g} s" if pause_s else "")
        if task.failures > 1:
            task.on_failure()

    def _restart(self) -> None:
        for task in self._tasks:
            if not self._leaving and not task.pid and time.monotonic() >= task.restart_at:
                self._start(task)

    def _pause_s(self) -> float:
        """Until the next is to be started again, TICK_S at most."""
        now = time.monotonic()
        due = [] if self._leaving else [task.restart_at - now for task in self._tasks if not task.pid]
        return max(min([TICK_S, *due]), 0.0)

    def _start(self, task: Task) -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        parent = os.getpid()
        task.started_at = time.monotonic()
        try:
            task.pid = os.fork()
        except OSError as error:  # no memory, or too many processes, for now
            self._failed(task, f"cannot be started ({error.strerror})")
            return
        if task.pid:
            return
        code = 70
        try:
            _become_child(parent)
            task.run()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except OSError as error:
            log.error("%s failed: %s", task.name, error)
        except BaseException:
            log.exception("%s failed", task.name)
        finally:
            logging.shutdown()
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(code)


def _keeps_dying(task: Task, now: float) -> bool:
    return task.failures >= MAX_FAILURES and not (task.pid and now - task.started_at > SOUND_S)


def _become_child(parent: int) -> None:
    """Signals as a fresh process has them; a group of its own, so that Ctrl-C at a terminal reaches the supervisor alone."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died meanwhile
        os._exit(1)
