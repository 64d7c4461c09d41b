"""A server that starts where others hold the device: before it has a KV cache, it asks them for what it needs.

It tells of itself as they do (`neighbours`): what it wants is what it has not taken yet of what weights, graphs and
activations need. With less it cannot come up, so it has a turn as a request that is alone has: in that the others give
what is idle, what is cached, and what their requests hold as these end. When its KV cache is there, that tells instead.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path

from sglang_vtensor.neighbours import Neighbours, Record, allowed

logger = logging.getLogger(__name__)

#: For a context, graphs, activations and workspaces, beside weights.
BESIDE_BYTES = 6 << 30
#: It tells so often; it waits for room until none has come for so long, or for so much longer where the others hold
#: what it needs.
TELL_SECONDS, PATIENCE_SECONDS, ANSWER_SECONDS = 0.1, 3.0, 60.0
#: However much comes meanwhile: others may take what others give.
MOST_SECONDS = 600.0
#: Files that weights are in.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
#: All weights once more, as they were published at first.
_AGAIN = "consolidated"


def weights_bytes(folder: str | Path) -> int:
    """What the files of weights in a model's folder take, or its one file; 0 for what is no folder: they are yet to be
    fetched. The largest kind counts, where there are several: only one is read."""
    path = Path(folder)
    if path.is_file():
        return path.stat().st_size
    # Not what points nowhere, as in a cache that was cleared in part.
    files = [file for file in path.iterdir() if file.suffix in _WEIGHTS and file.is_file()] if path.is_dir() else []
    files = [file for file in files if not file.name.startswith(_AGAIN)] or files
    sizes = [sum(file.stat().st_size for file in files if file.suffix == kind) for kind in _WEIGHTS]
    return max(sizes)


class Arrival:
    """Of a server that needs `needed` bytes of the device to come up, `held()` of which it has taken, while `free()`
    bytes are free for anybody."""

    def __init__(
        self, neighbours: Neighbours, needed: int, *, held: Callable[[], int], free: Callable[[], int]
    ) -> None:
        self.neighbours = neighbours
        self._needed, self._held, self._free = needed, held, free
        self._since = time.monotonic_ns() // 1000
        #: What it had taken when that grew, or when it waited, and when that was.
        self._had, self._moved_at = held(), time.monotonic()
        self._over = threading.Event()
        self._lock = threading.Lock()  # two threads have to do with the neighbours
        self._tell()
        self._thread = threading.Thread(target=self._keep_telling, name="vtensor-arrival", daemon=True)
        self._thread.start()

    @property
    def wanted(self) -> int:
        """What it has not taken yet."""
        return max(0, self._needed - self._held())

    def _tell(self) -> None:
        """It has its turn while it waits or takes memory: what it has not taken for long it may never need, or not yet,
        as where weights are fetched first."""
        held = self._held()
        if held > self._had:
            self._had, self._moved_at = held, time.monotonic()
        with self._lock:
            self.neighbours.tell(self._record())

    def _record(self) -> Record:
        wanted = self.wanted
        alone = wanted if time.monotonic() < self._moved_at + ANSWER_SECONDS else 0
        return Record(wanted=wanted, alone=alone, since=self._since if alone else 0)

    def _keep_telling(self) -> None:
        while not self._over.wait(TELL_SECONDS):
            self._tell()

    def wait(self) -> bool:
        """Until there is room for what it wants, and no other one's turn; False where no more comes. Alone on a device
        it does not look."""
        last, since, said, begun = -1, 0.0, False, time.monotonic()
        while (others := self._others()) and not self._has_room(others, free := self._free()):
            now = self._moved_at = time.monotonic()
            # Also what one holds that tells nothing now: it may be in a long batch.
            patience = ANSWER_SECONDS if free + self._held_by(others) >= self.wanted else PATIENCE_SECONDS
            came, last = free > last, free
            if came and now < begun + MOST_SECONDS:
                since = now
            elif now >= since + PATIENCE_SECONDS and not said and patience > PATIENCE_SECONDS:
                said = True
                logger.info("waiting until requests of other servers on this device end: %d bytes wanted", self.wanted)
            elif now >= since + patience:
                logger.warning(
                    "weights and what is beside them need %d bytes of this device, %d are free, and the other servers "
                    "on it %s: this one may not come up. End or limit one of them (sglang-vtensor limit)",
                    self.wanted,
                    free,
                    "give no more" if free < self.wanted else "have waited for these longer",
                )
                self._moved_at = -math.inf  # its turn is over, until it takes memory
                return False
            time.sleep(TELL_SECONDS)
        return True

    def _has_room(self, others: list[Record], free: int) -> bool:
        holds = allowed(self._record(), others, free)
        return free >= self.wanted and (holds is None or holds >= self.wanted)

    def others_hold(self) -> int:
        """Bytes that the KV caches of the others hold: they give them when this one needs them, as far as they can."""
        return self._held_by(self._others())

    @staticmethod
    def _held_by(others: list[Record]) -> int:
        return sum(other.backed for other in others)

    def _others(self) -> list[Record]:
        with self._lock:
            return self.neighbours.others()

    def over(self) -> None:
        """It is up, or ends: it wants nothing any more."""
        self._over.set()
        self._thread.join()
        self.neighbours.close()
