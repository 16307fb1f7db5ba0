"""``romancy worker --processes N``: start worker processes, replace those that die, stop all together."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from typing import Any, Protocol

from romancy.errors import ConfigurationError

FIRST_RESTART_S = 0.5
LONGEST_RESTART_S = 30.0
EARLY_S = 5.0
"""A process that ends within this time after its start has an early end."""
MOST_EARLY_ENDS = 5
USUAL_STOP_S = 30.0
LAST_WORDS_S = 1.0


class Tell(Protocol):
    """Told of each event: in words for people, with facts for programs."""

    def __call__(self, event: str, words: str, **facts: Any) -> None: ...


def restart_delay_s(early_ends: int) -> float:
    """How long to wait before the next start, after so many early ends in a row: twice as long each time."""
    doublings = min(max(early_ends - 1, 0), 16)
    return min(FIRST_RESTART_S * 2.0**doublings, LONGEST_RESTART_S)


class Member:
    """One worker process, as its parent sees it.

    Attributes:
        has_failed: it told why it can't run; people have read it.
    """

    def __init__(
        self, number: int, process: asyncio.subprocess.Process, lifeline: asyncio.StreamWriter, tell: Tell
    ) -> None:
        self.number = number
        self.process = process
        self.has_failed = False
        self.started_at: float | None = None
        self._lifeline = lifeline
        self._stop_s = USUAL_STOP_S
        self._tell = tell

    async def listen(self, reader: asyncio.StreamReader, on_started: asyncio.Event) -> None:
        """Hear what it tells, until its end of the line is closed."""
        async for line in reader:
            message = json.loads(line)
            if message["message"] == "failed":
                self.has_failed = True
            else:
                self.started_at = asyncio.get_running_loop().time()
                self._stop_s = message["stop_s"]
                on_started.set()

    def stop(self) -> None:
        """Ask it to stop in good order; kill it if it takes longer than it said."""
        if not self._lifeline.is_closing():
            self._lifeline.close()
            asyncio.get_running_loop().call_later(self._stop_s, self._kill_late)

    def kill(self) -> None:
        """End it at once; others take over what it was at."""
        if self.process.returncode is None:
            self.process.kill()

    def _kill_late(self) -> None:
        if self.process.returncode is None:
            words = f"process {self.number} has not stopped within {self._stop_s:g} s and is killed"
            self._tell("process_killed", words, process=self.number, pid=self.process.pid)
            self.kill()

    def is_well(self) -> bool:
        """Whether it runs, and has done so for a while."""
        return self.process.returncode is None and not self.ended_early()

    def ended_early(self) -> bool:
        """Whether it ended, if it ended now, soon after its start."""
        return self.started_at is None or asyncio.get_running_loop().time() - self.started_at < EARLY_S


class Crew:
    """The worker processes of one command.

    Args:
        target: the app, as ``romancy worker`` takes it. Only the processes import it.
        count: how many processes.
        options: further options of each.
    """

    def __init__(self, target: str, count: int, options: list[str], tell: Tell) -> None:
        self._target = target
        self._count = count
        self._options = options
        self._tell = tell
        self._members: dict[int, Member] = {}
        self._signals: list[int] = []
        self._is_asked = asyncio.Event()
        self._has_begun = asyncio.Event()
        self._exit_code = 0

    async def run(self) -> int:
        """Run until a signal comes; returns the exit code.

        Raises:
            ConfigurationError: the processes die as soon as they start.
        """
        loop = asyncio.get_running_loop()
        for caught in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(caught, self._on_signal, caught)
        words = f"{self._count} worker processes of {self._target} start; Ctrl+C or SIGTERM stops them"
        self._tell("starting", words, processes=self._count, pid=os.getpid())
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(1, self._count + 1):
                    group.create_task(self._keep(number))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        finally:
            for caught in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(caught)
        if self._signals:
            self._tell("stopped", f"all {self._count} worker processes have stopped", processes=self._count)
        return self._exit_code

    def _on_signal(self, number: int) -> None:
        self._signals.append(number)
        if len(self._signals) > 1:
            self._exit_code = 128 + number
            for member in self._members.values():
                member.kill()
            return
        words = f"{len(self._members)} worker processes are asked to stop; once more to end them at once"
        self._tell("stopping", words, processes=len(self._members))
        self._stop()

    def _stop(self) -> None:
        self._is_asked.set()
        for member in self._members.values():
            member.stop()

    async def _keep(self, number: int) -> None:
        """See to it that there is a process of this number, until all are asked to stop."""
        if number > 1:
            # The first brings the tables up to date, and tells of mistakes that all of them would tell of.
            await self._first_has_begun()
        early_ends = 0
        while not self._is_asked.is_set():
            member = await self._run_one(number)
            if self._is_asked.is_set():
                return
            if member.has_failed and not self._has_begun.is_set():
                self._exit_code = 1
                self._stop()
                return
            early_ends = early_ends + 1 if member.ended_early() else 0
            if early_ends >= MOST_EARLY_ENDS and not any(other.is_well() for other in self._members.values()):
                raise ConfigurationError(
                    f"worker processes end as soon as they start, process {number} {early_ends} times in a row, at "
                    f"last {_how(member)}: mend what they tell above, then start again"
                )
            delay_s = restart_delay_s(early_ends)
            words = f"process {number} ended {_how(member)}; another one starts in {delay_s:g} s"
            self._tell(
                "process_ended", words, process=number, pid=member.process.pid,
                exit_code=member.process.returncode, restart_in_s=delay_s,
            )  # fmt: skip
            await self._pause(delay_s)

    async def _run_one(self, number: int) -> Member:
        """A process from its start to its end."""
        mine, its = socket.socketpair()
        reader, lifeline = await asyncio.open_connection(sock=mine)
        try:
            with its:
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-P", "-m", "romancy", "worker", self._target, "--process", f"{number}",
                    *self._options, stdin=its.fileno(), process_group=0,
                )  # fmt: skip
            member = self._members[number] = Member(number, process, lifeline, self._tell)
            return await self._until_ended(member, reader)
        finally:
            lifeline.close()

    async def _until_ended(self, member: Member, reader: asyncio.StreamReader) -> Member:
        listening = asyncio.create_task(member.listen(reader, self._has_begun))
        try:
            if self._is_asked.is_set():
                member.stop()
            await member.process.wait()
            # The end of the line tells that all is heard; but a process of the user's may hold it open.
            await asyncio.wait([listening], timeout=LAST_WORDS_S)
        finally:
            member.stop()
            await member.process.wait()
            listening.cancel()
            del self._members[member.number]
        return member

    async def _first_has_begun(self) -> None:
        waits = [asyncio.create_task(event.wait()) for event in (self._has_begun, self._is_asked)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._is_asked.wait()
        except TimeoutError:
            return


def _how(member: Member) -> str:
    code = member.process.returncode or 0
    if code >= 0:
        return f"with exit code {code}"
    return f"by {signal.Signals(-code).name}" if -code in {*signal.Signals} else f"by signal {-code}"
