"""A server that starts where others hold the device: before it has a KV cache, it asks them for what it needs.

It tells of itself as they do (`neighbours`): what it wants is what it has not taken yet of what weights, graphs and
activations need. So they give what is idle, and what is cached. When its KV cache is there, that tells instead.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from sglang_vtensor.neighbours import Neighbours, Record

logger = logging.getLogger(__name__)

#: For a context, graphs, activations and workspaces, beside weights.
BESIDE_BYTES = 6 << 30
#: It tells so often; it waits for room until none has come for so long.
TELL_SECONDS, PATIENCE_SECONDS = 0.1, 3.0
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
    files = [file for file in path.iterdir() if file.suffix in _WEIGHTS] if path.is_dir() else []
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
        with self._lock:
            self.neighbours.tell(Record(wanted=self.wanted))

    def _keep_telling(self) -> None:
        while not self._over.wait(TELL_SECONDS):
            self._tell()

    def wait(self) -> bool:
        """Until there is room for what it wants; False where no more comes. Alone on a device it does not look."""
        most, until = -1, 0.0
        while self._others() and (free := self._free()) < self.wanted:
            now = time.monotonic()
            if free > most:
                most, until = free, now + PATIENCE_SECONDS
            elif now >= until:
                logger.warning(
                    "weights and what is beside them need %d bytes of this device, %d are free, and the other servers "
                    "on it give no more: this one may not come up. End or limit one of them (sglang-vtensor limit)",
                    self.wanted,
                    free,
                )
                return False
            time.sleep(TELL_SECONDS)
        return True

    def others_hold(self) -> int:
        """Bytes that the KV caches of the others hold: they give them when this one needs them, as far as they can."""
        return sum(other.backed for other in self._others())

    def _others(self) -> list[Record]:
        with self._lock:
            return self.neighbours.others()

    def over(self) -> None:
        """It is up, or ends: it wants nothing any more."""
        self._over.set()
        self._thread.join()
        self.neighbours.close()
