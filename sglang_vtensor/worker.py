"""The worker: a thread that does what memory needs and no batch waits for, one thing at a time.

It takes a thing in hand under the lock, calls the driver without it, and lets go of the thing under it again, whatever
came of the call. Who needs just that thing waits for it, but not for ever: a call may not return.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

from sglang_vtensor.vmm import VMMError

logger = logging.getLogger(__name__)

#: After the driver refused, it is left alone for this long.
RETRY_SECONDS = 1.0
#: Minimum time between two warnings of one kind: beside another process the driver may refuse many times a second.
WARN_SECONDS = 60.0
#: So long the scheduling thread waits, at most, for what the worker has in hand: a call of the driver takes
#: microseconds.
PATIENCE_SECONDS = 10.0
#: How long a thread with nothing to do leaves the interpreter to the worker at a time: what a request that arrives just
#: then waits.
GIVE_WAY_SECONDS = 0.001


class Worker:
    """Calls `turn` as long as that does something, and again when it is woken or `retry_seconds` are over. `attach` is
    called once in each thread. Without `start`, there is no thread, and the owner takes turns itself."""

    def __init__(self, turn: Callable[[], bool], attach: Callable[[], None]) -> None:
        self.lock = threading.RLock()
        self.retry_seconds = RETRY_SECONDS
        self.failures = 0
        self.seconds = 0.0
        #: Of these, within calls of the driver.
        self.driver_seconds = 0.0
        self._take = turn
        self._attach = attach
        self._settled = threading.Condition(self.lock)  # it has let go of something
        self._wake = threading.Event()
        self._turn = threading.Lock()  # held while it does one thing
        self._paused = False
        self._working = False
        self._closing = False
        self._due_at = float("inf")  # it waits until then, or until it is woken
        self._took_at = 0.0  # when it last took something in hand
        self._missed_at = 0.0  # of which of these times it was said that it does not let go
        self._warn_at = 0.0
        # The frames for which the driver did not do what was asked, and until when they are left alone: each by itself,
        # so that one which never succeeds holds up no other.
        self._again_at: dict[int, float] = {}
        self._thread: threading.Thread | None = None

    # In its turns.

    def due(self, frame: int) -> bool:
        """Whether a frame is not left alone now, after a failure."""
        return time.monotonic() >= self._again_at.get(frame, 0.0)

    def took(self) -> None:
        """It has taken something in hand, under the lock."""
        self._took_at = time.monotonic()

    @contextlib.contextmanager
    def calling(self, frame: int, let_go: Callable[[bool, VMMError | None], None], *, quiet: bool) -> Iterator[None]:
        """Around a call of the driver for the page that is in hand. Afterwards `let_go(done, refusal)` is called under
        the lock, whatever came of the call. A refusal of a call that is not `quiet` is counted and logged here, and the
        frame is left alone for a while; the caller reports that of a `quiet` one."""
        done, refusal = False, None
        start = time.perf_counter()
        try:
            yield
            done = True
            self._again_at.pop(frame, None)
        except VMMError as error:
            refusal = error
            now = time.monotonic()
            if not quiet:
                self.failures += 1
                self._again_at[frame] = now + self.retry_seconds
            if not quiet and now >= self._warn_at:
                self._warn_at = now + WARN_SECONDS
                logger.error("%s; the worker tries it again every %g s", error, self.retry_seconds)
        finally:
            self.driver_seconds += time.perf_counter() - start
            with self._settled:
                let_go(done, refusal)
                self._settled.notify_all()

    # For other threads.

    def wait(self, until: float) -> bool:
        """Wait, with the lock, until it has let go of something. False at `until` (as `time.monotonic` counts), and
        where it has kept what it has in hand for longer than any call of the driver takes: then whoever waits is to do
        without."""
        left = min(until, self._took_at + PATIENCE_SECONDS) - time.monotonic()
        if left > 0 and self._settled.wait(left):
            return True
        if self._missed_at != self._took_at:
            self._missed_at = self._took_at
            logger.error(
                "for %g s the worker has not let go of a page that is needed: a call of the driver does not return. "
                "Requests wait until there is another one; restart the server if this goes on",
                PATIENCE_SECONDS,
            )
        return False

    def wake(self) -> None:
        """There is something to do. A thread that died, of whatever got past `_work`, is replaced."""
        self._wake.set()
        if self._thread is not None and not self._thread.is_alive() and not self._closing:
            self.failures += 1
            logger.error("the worker died, and a new one is started: look for its traceback above")
            self.start()

    def give_way(self) -> bool:
        """Sleep for a moment if the worker may have something to do. For a caller that has nothing more urgent. Returns
        whether it slept.

        It wants the interpreter after each call of the driver. A thread that never waits, and gives it up for moments
        only, as one that polls a socket does, takes it back before the other one has woken up.
        """
        if self._thread is None:
            return False
        if not self._thread.is_alive():
            self.wake()
        if not (self._working or self._wake.is_set() or time.monotonic() >= self._due_at):
            return False
        time.sleep(GIVE_WAY_SECONDS)
        return True

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """It does nothing meanwhile. For the capture of a CUDA graph, which fails if any thread of the process makes a
        call that might wait for it. Raises `VMMError` where a call of the worker's does not return."""
        self._paused = True  # first, or it might take turn after turn before this thread gets one
        try:
            if not self._turn.acquire(timeout=PATIENCE_SECONDS):
                raise VMMError("pause", f"the worker's call has not returned for {PATIENCE_SECONDS:g} s")
            try:
                yield
            finally:
                self._turn.release()
        finally:
            self._paused = False
            self.wake()

    def start(self) -> None:
        self._thread = threading.Thread(target=self._work, name="vtensor-worker", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(PATIENCE_SECONDS)

    # The thread.

    def _work(self) -> None:
        attached = False
        while not self._closing:
            self._working = True
            start = time.perf_counter()
            try:
                if not attached:
                    self._attach()
                    attached = True
                if self._take_turn():
                    self.seconds += time.perf_counter() - start
                    continue
            except Exception:
                # The scheduling thread does without it what a batch needs; only what is given back waits for it.
                self.failures += 1
                logger.exception("the worker failed; it tries again in %g s", self.retry_seconds)
            self._due_at = time.monotonic() + self.retry_seconds
            self._working = False
            self._wake.wait(self.retry_seconds)
            self._wake.clear()

    def _take_turn(self) -> bool:
        if self._paused:
            return False
        with self._turn:
            return self._take()


def patience() -> float:
    """Until when the scheduling thread waits for the worker, from now on."""
    return time.monotonic() + PATIENCE_SECONDS
