"""Who is admitted, as SGLang 0.5.23 asks: the allocator, the budget of a batch of prompts, and who fills it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder
from sglang.srt.mem_cache.prefill_budget import PrefillBudget

from sglang_vtensor.srt.admission import States, Windows, alone
from sglang_vtensor.srt.allocation import secure_decode
from sglang_vtensor.srt.allocator import VTensorAllocator
from sglang_vtensor.srt.scheduling import passes_over, spare

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


class CountedBudget(PrefillBudget):
    """Each request is charged for what it needs beside tokens, too: `counts` says what that is, and is made by `kind`.
    `candidate` is the request that is looked at, set by who asks for it (`Adder`)."""

    kind: type[Windows | States]
    candidate: Any = None

    def __init__(self, allocator: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(allocator, *args, **kwargs)
        self.counts: Any = self.kind(allocator.runtime)

    def _available_and_evictable(self) -> float:
        return self.counts.available(self.tree_cache.evictable_size())

    def _charge(self, tokens: float) -> None:
        self.total_offset += tokens
        self.current_offset += tokens


class WindowBudget(CountedBudget):
    """Of the side of windows."""

    kind = Windows

    def has_capacity(self) -> bool:
        return super().has_capacity() and self.counts.left() > 0

    def _pages(self, extend: int, new: int, chunk: int | None) -> int:
        return self.counts.wanted(self.candidate.prefix_len, extend, new, chunk)

    def _fits(self, tokens: float, room: float, pages: int) -> bool:
        return tokens + self.counts.as_tokens(pages) < room and pages <= self.counts.left()

    def check_prefill(
        self,
        *,
        extend_input_len: int,
        total_tokens: int,
        max_new_tokens: int,
        chunk_limit: int | None,
        **more: Any,
    ) -> tuple[bool, int | None]:
        pages = self._pages(extend_input_len, max_new_tokens, chunk_limit)
        fits = self._fits(total_tokens, self.remaining_total, pages)
        return (True, chunk_limit) if fits else (False, None)

    def can_allocate_prefill(
        self, *, paged_input: int, extend_input_len: int, max_new_tokens: int, chunk_limit: int | None
    ) -> bool:
        pages = self._pages(extend_input_len, max_new_tokens, chunk_limit)
        return self._fits(paged_input, min(self.remaining_current, self.remaining_total), pages)

    def reserve(
        self,
        extend_input_len: int,
        max_new_tokens: int,
        *,
        is_chunked_continuation: bool = False,
        chunk_limit: int | None = None,
        **more: Any,
    ) -> None:
        super().reserve(extend_input_len, max_new_tokens, **more)
        pages = self._pages(extend_input_len, max_new_tokens, chunk_limit)
        if is_chunked_continuation:
            pages -= self.counts.held(self.candidate)
        self._charge(self.counts.charge(pages))


class StateBudget(CountedBudget):
    """Of states."""

    kind = States

    def _fits(self, tokens: float, room: float) -> bool:
        return tokens + self.counts.wanted(self.candidate) < room and self.counts.left(self.candidate)

    def check_prefill(self, *, total_tokens: int, chunk_limit: int | None, **more: Any) -> tuple[bool, int | None]:
        fits = self._fits(total_tokens, self.remaining_total)
        return (True, chunk_limit) if fits else (False, None)

    def can_allocate_prefill(self, *, paged_input: int, **more: Any) -> bool:
        return self._fits(paged_input, min(self.remaining_current, self.remaining_total))

    def reserve(self, extend_input_len: int, max_new_tokens: int, **more: Any) -> None:
        super().reserve(extend_input_len, max_new_tokens, **more)
        self._charge(self.counts.charge(self.candidate))


class Allocator(VTensorAllocator):
    def create_prefill_budget(self, tree_cache: Any, *, num_mixed_decode_tokens: int = 0) -> PrefillBudget:
        """Admission counts without the memory that the driver refuses."""
        if self.runtime.states is not None:
            return StateBudget(self, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)
        if self.runtime.window is not None:
            return WindowBudget(self, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)
        budget = PrefillBudget(self, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)
        missing = self.runtime.missing_tokens()
        budget.total_offset += missing
        budget.current_offset += missing
        return budget

    def max_new_tokens_for_memory(
        self, input_tokens: int, max_new_tokens: int, *, token_capacity: int, **more: Any
    ) -> int | None:
        """With windows or states, so that admission has room for the request alone; None where it has none."""
        if self.runtime.ends is None:
            return super().max_new_tokens_for_memory(
                input_tokens, max_new_tokens, token_capacity=token_capacity, **more
            )
        left = alone(self.runtime) - input_tokens
        return min(max_new_tokens, left) if left >= 0 else None

    def check_decode_capacity(
        self, *, num_tokens: int, tree_cache: Any, requests: list[Req] | None = None, spec_algorithm: Any = None
    ) -> bool:
        if requests is None:  # a question, not a batch
            return super().check_decode_capacity(num_tokens=num_tokens, tree_cache=tree_cache)
        return secure_decode(self.runtime, tree_cache, requests)


class Adder(PrefillAdder):
    """An extend batch may have as many tokens as it may have, not as many pages: what its requests leave free in
    their last pages is memory, but no work. With pages of 128 tokens, prompts of 1,025 made batches a tenth too
    short."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A state is kept of whole pages of a chunk only.
        self.exact_chunk_fill = self.dllm_config is None and not self.tree_cache.supports_mamba()
        if self.windows is not None and self.running_batch is not None:
            running = [(req, self._get_running_request_total_token_offset(req)) for req in self.running_batch.reqs]
            self.memory_budget.total_offset += self.windows.growth(running)

    @property
    def windows(self) -> Any:
        """What counts windows; None where no layer sees one."""
        seen = self.token_to_kv_pool_allocator.runtime.window is not None
        return self.memory_budget.counts if seen else None

    def add_chunked_req(self, req: Req) -> Req | None:
        self.memory_budget.candidate = req
        return super().add_chunked_req(req)

    def add_one_req(self, req: Req, has_chunked_req: bool, truncation_align_size: int | None) -> AddReqResult:
        self.memory_budget.candidate = req
        if passes_over(self, req):
            return AddReqResult.CONTINUE
        return super().add_one_req(req, has_chunked_req, truncation_align_size)


def retract_decode(original: Callable[..., Any], batch: Any) -> Any:
    retracted, ratio, aborted = original(batch)
    spare(batch.token_to_kv_pool_allocator.runtime, retracted, aborted, may_wait=lambda req: req.beam_group is None)
    return retracted, ratio, aborted
