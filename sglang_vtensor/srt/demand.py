"""What requests need memory for, and which of them comes first where servers have turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_vtensor.srt.runtime import Runtime

#: So many waiting requests are what a server wants memory for.
WANTED_REQUESTS = 16
#: Where nothing could begin for so long, requests are tried with what there is, and so often.
PATIENCE_SECONDS, TRY_SECONDS = 5.0, 0.05


@dataclass(frozen=True, slots=True)
class Demand:
    """Requests that memory is for. Of the answers that the running ones may give, SGLang keeps the share
    `new_token_ratio` free before it admits others."""

    waiting: Sequence[Req]
    running: Sequence[Req] = ()
    new_token_ratio: float = 0.0
    #: Whose prompt is computed in part.
    chunked: Req | None = None
    #: Nobody goes on before the engine does: what its requests hold stays.
    paused: bool = False


class Turn:
    """Of the request that is to come to its end whatever the neighbours want, or else nothing here would."""

    def __init__(self) -> None:
        self.first: Req | None = None
        #: When it began to wait, in microseconds of the machine's monotonic clock.
        self.since = 0

    def take(self, demand: Demand) -> Req | None:
        """Whose turn it is, if anybody's. The next one waits for the turns of the others. But a queue that is only put
        in another order stays where it is: the one that came first waits in it yet."""
        first = self._comes_first(demand)
        if first is not self.first:
            if not any(req is self.first for req in demand.waiting):
                self.since = time.monotonic_ns() // 1000
            self.first = first
        return first

    def _comes_first(self, demand: Demand) -> Req | None:
        """If nothing runs, who was retracted, or else the next one; or the only one that runs, or whose prompt is
        computed in part. It stays that until it has ended, also if others begin beside it: it would be retracted, and
        then come first again."""
        begun = [req for req in demand.running if not req.finished()]
        if demand.chunked is not None:
            begun.append(demand.chunked)
        if self.first in begun:
            return self.first
        if len(begun) > 1:
            return None
        retracted = (req for req in demand.waiting if req.is_retracted)
        return next(chain(begun, retracted, demand.waiting), None)

    def end(self) -> None:
        """Nobody lacks anything: there are no turns."""
        self.first = None


class Patience:
    """Where nothing could begin for a while, requests are tried although the driver has refused: an answer may be
    shorter than SGLang keeps room for. They are until one of them is retracted again, or the driver gives."""

    def __init__(self) -> None:
        self.is_over = False
        #: Whether this is one of the times at which they are tried.
        self.tries = False
        #: The last time that somebody ran, began or was retracted, or nobody waited.
        self._since = self._try_at = 0.0
        self._retracted: set[tuple[str, int]] = set()

    def look(self, retracted: Sequence[Req], *, stuck: bool, short: bool) -> None:
        """`retracted` are those that wait to go on; `stuck`: nothing runs, and somebody waits; `short`: the driver
        refused when it was last asked."""
        now, seen = time.monotonic(), {(req.rid, req.retraction_count) for req in retracted}
        again = bool(seen - self._retracted)
        if seen:
            self._retracted = seen
        if again or not stuck:
            self._since = now
        over = now >= self._since + PATIENCE_SECONDS
        self.is_over = over or (self.is_over and short and not again)
        self.tries = self.is_over and stuck and now >= self._try_at
        if self.tries:
            self._try_at = now + TRY_SECONDS

    def begins(self) -> None:
        """Somebody began."""
        self._since = time.monotonic()


def demanded(runtime: Runtime, demand: Demand) -> int:
    """Bytes that must be free for SGLang to admit what waits at the head of the queue, if anything does: it keeps room
    also for the answers, for what runs as it estimates them, and for what is to begin whole, with a page."""
    from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS

    heads = demand.waiting[:WANTED_REQUESTS]
    if not heads:
        return 0

    def answer(req: Req) -> int:
        return max(0, min(req.sampling_params.max_new_tokens - len(req.output_ids), CLIP_MAX_NEW_TOKENS))

    tokens = float(sum(map(answer, heads)))
    for req in demand.running if demand.chunked is None else [*demand.running, demand.chunked]:
        if req.finished():  # there until SGLang decodes again, in some versions
            continue
        tokens += answer(req) * (1.0 if req.sampling_params.ignore_eos else demand.new_token_ratio)
        # What chunks of its prompt are yet to come.
        tokens += len(req.origin_input_ids) + len(req.output_ids) - runtime.sglang.allocated(req)
    layout = runtime.memory.layout
    to_begin = sum(bytes_to_go_on(runtime, req) for req in heads)
    return to_begin + (len(heads) + layout.pages_for(int(tokens))) * layout.page_bytes


def bytes_to_go_on(runtime: Runtime, req: Req) -> int:
    """What a request needs to begin or to go on."""
    return runtime.bytes_for(len(req.origin_input_ids) + len(req.output_ids) + 1)
