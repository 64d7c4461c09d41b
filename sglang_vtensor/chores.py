"""What the worker does for the memory, without state for single requests: pages are created where requests will begin
or go on, and idle ones are given back.

The driver is called without the lock: a page is in the worker's hand meanwhile, and nobody is placed in its frame.
Whatever comes of the call, it is let go of; what the driver did not do is tried again later, and everything else goes
on.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sglang_vtensor.vmm import VMMError
from sglang_vtensor.worker import patience

if TYPE_CHECKING:
    from sglang_vtensor.backing import Ahead, Backing
    from sglang_vtensor.memory import KVMemory
    from sglang_vtensor.worker import Worker

#: Whether the device is short for others is asked so often.
LOOK_SECONDS = 1.0
#: Frames that running requests come to next are remembered up to so many, the latest ones.
MOST_HINTS = 4096


class Chores:
    """The worker's tasks for one memory; `turn` does one of them."""

    def __init__(self, memory: KVMemory, worker: Worker) -> None:
        self.memory = memory
        self.worker = worker
        self._look_at = 0.0
        self._device_low = False
        self._ahead: Ahead | None = None  # in hand
        self._hints: deque[int] = deque(maxlen=MOST_HINTS)  # frames that running requests come to next

    # For the scheduling thread, with the lock.

    def handed_out(self, placed: Sequence[Sequence[int]]) -> None:
        """Requests got these frames. The worker is to remember the frame behind each request."""
        for frames in placed:
            if frames and (behind := self.memory.placement.room_behind(frames[-1])) is not None:
                self._hints.append(behind)

    def wait_for(self, frames: set[int]) -> None:
        """Wait until the worker has let go of these frames, if it is just giving one of them memory."""
        until = patience()
        while self._ahead is not None and self._ahead.frame in frames and self.worker.wait(until):
            pass

    # One turn.

    def turn(self) -> bool:
        """Do one thing. False if there was nothing to do, or it was refused."""
        if any(map(self._back, self.memory.stores)):
            return True
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + LOOK_SECONDS
            self._device_low = self.memory.vmm.low()
        with self.worker.lock:
            able = self.memory.budget.by_age(self.memory.stores)
        return any(map(self._trim, able + [store for store in self.memory.stores if store not in able]))

    def _back(self, backing: Backing) -> bool:
        with self.worker.lock:
            ahead = None if self._device_low else self._begin_ahead(backing)
            if ahead is None:
                return False
            self._ahead = ahead if backing in self.memory.backings else None
            self.worker.took()

        def let_go(_: bool, refusal: VMMError | None) -> None:
            self._ahead = None
            was = backing.refusal
            backing.finish_back(ahead)
            if refusal is not None:
                backing.refusal = refusal
            if backing.refusal is not was:
                self.memory.supply.answered(backing, was)

        with self.worker.calling(ahead.frame, let_go, quiet=True):
            backing.back(ahead)
        return ahead.done

    def _begin_ahead(self, backing: Backing) -> Ahead | None:
        """While the reserve is not full, the next frame that is to have memory before it is needed: one that a running
        request comes to next, or that a new one begins with. Of states, which have no reserve, one slot while it is to
        be seen whether the driver gives again."""
        memory = self.memory
        if not memory.wants_page(backing) or memory.budget.taken + backing.page_bytes > memory.allowance_bytes:
            return None
        if backing not in memory.backings:  # any slot of a state is as good as another
            slots = range(1, backing.placement.num_frames)
            bare = (slot for slot in slots if backing.placement.is_vacant(slot) and not backing.has_page(slot))
            slot = next(bare, None)
            return None if slot is None else backing.begin_back(slot)
        placement = memory.placement
        while self._hints:
            frame = self._hints[0]
            if placement.is_vacant(frame) and not backing.has_page(frame):
                return backing.begin_back(frame)
            if placement.is_vacant(frame) and not all(other.has_page(frame) for other in memory.backings):
                break  # it is the turn of another side
            self._hints.popleft()
        begin = placement.next_without(backing.has_page)
        return None if begin is None else backing.begin_back(begin)

    def _trim(self, backing: Backing) -> bool:
        with self.worker.lock:
            kept = self.memory.kept_now(backing, device_low=self._device_low)
            leaving = backing.begin_trim(*kept) or backing.begin_again(self.worker.due)
            if leaving is None:
                return False
            self.worker.took()

        def let_go(done: bool, _: VMMError | None) -> None:
            backing.finish_trim(leaving, done=done)

        with self.worker.calling(leaving.frame, let_go, quiet=False):
            backing.release(leaving)
        return True
