"""SGLang 0.5.23: states of models with linear attention, in the memory of all pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from sglang.srt.mem_cache.memory_pool import MambaPool
from sglang.srt.runtime_context import get_context, get_schedule

from sglang_vtensor.srt.options import Refused
from sglang_vtensor.srt.state_side import StateSide
from sglang_vtensor.states import StateLayout
from sglang_vtensor.vmm import page_units

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_vtensor.srt.runtime import Runtime

#: Requests at a time that there are slots for at most; a slot that nobody needs is an address.
MOST_REQUESTS = 4096
#: States that are copied at a time: so many are there twice meanwhile, outside the budget.
COPIED = 4


def layers_with_states(model: Any) -> set[int]:
    """Those of a model's layers, by number, that keep a state and no K and V. `model` is SGLang's `ModelConfig`."""
    from sglang.srt.configs.hybrid_arch import mambaish_config

    config = mambaish_config(model)
    if config is None:
        return set()
    return set(range(model.num_hidden_layers)).difference(config.full_attention_layer_ids)


def refuse_dtype(model: Any) -> None:
    """Raise `Refused` where SGLang's mixer of Mamba-2 writes inputs of another dtype than its convolutions keep: it
    converts none. `model` is SGLang's `ModelConfig`."""
    from sglang.srt.configs.hybrid_arch import mamba2_config
    from sglang.srt.configs.mamba_utils import mamba2_state_dtype

    config = mamba2_config(model)
    if config is None or (conv := mamba2_state_dtype(config).conv) == model.dtype:
        return
    wanted = str(model.dtype).removeprefix("torch.")
    raise Refused(
        f"this model computes in {wanted}, and SGLang keeps the inputs of its Mamba layers in {conv}: set "
        f"SGLANG_MAMBA_CONV_DTYPE={wanted}, or give --dtype bfloat16"
    )


def layout(configurator: Any) -> StateLayout | None:
    """Of a state of this rank; None where the model has none."""
    config = configurator.mambaish_config
    if config is None:
        return None
    params = config.mamba2_cache_params
    return StateLayout(
        layers=len(params.layers),
        temporal=tuple(params.shape.temporal),
        temporal_dtype=params.dtype.temporal,
        conv=tuple(map(tuple, params.shape.conv)),
        conv_dtype=params.dtype.conv,
        granularity=page_units(configurator.device)[0],
    )


def slots_a_request() -> int:
    """A request's own state, and the copies that SGLang keeps beside it."""
    from sglang.srt.mem_cache.allocation_sizing import get_mamba_tracking_slots
    from sglang.srt.runtime_context import get_exec

    return 1 + int(
        get_mamba_tracking_slots(
            extra_buffer=get_exec().mamba.enable_mamba_extra_buffer,
            overlap=not get_schedule().disable_overlap_schedule,
            lazy=False,
        )
    )


def count_slots(configurator: Any, total_rest_memory: float) -> float:
    """In place of SGLang's share for states (GiB in, GiB out): all memory is for tokens and states alike. What the user
    says (--max-mamba-cache-size, --mamba-full-memory-ratio) bounds how many states there are."""
    state = layout(configurator)
    assert state is not None
    slots, ratio = get_schedule().max_mamba_cache_size, configurator.server_args.mamba_full_memory_ratio
    nbytes = int(total_rest_memory * (1 << 30))
    if slots is not None:
        slots //= configurator.attn_dp_size
    elif ratio is not None:
        slots = int(nbytes * ratio / (1 + ratio)) // state.page_bytes
    else:
        requests = min(MOST_REQUESTS, nbytes // (slots_a_request() * state.page_bytes))
        slots = requests * configurator._calculate_mamba_ratio()  # by which SGLang divides for requests at a time
    get_context().override("vtensor", max_mamba_cache_size=slots)
    return total_rest_memory - state.page_bytes / (1 << 30)  # of the padding slot


class StatePool(MambaPool):
    """SGLang's pool of states, over the slots of the memory. It is made before that, and `attach`ed to it later."""

    def __init__(self, *, size: int, mamba_layer_ids: Sequence[int], device: str, **_: Any) -> None:
        # The base constructor would allocate all states.
        self.size = size
        self.device = device
        self.mamba_layer_ids = list(mamba_layer_ids)
        self.num_mamba_layers = len(self.mamba_layer_ids)
        self.enable_custom_mem_pool = self.debug_memory_pool = False
        self.custom_mem_pool = self.conv_shard_groups = None
        self.conv_slice_axis = 0
        self.enable_linear_replayssm = self.enable_linear_replayssm_spec = False
        self.replayssm_is_kda = self.replayssm_spec_fold = False
        self.linear_replayssm_cache_len = 16
        self.replayssm_write_pos = self.replayssm_spec_write_pos = None
        self.replayssm_cache_base = self.replayssm_is_flush = None

    def attach(self, runtime: Runtime, state: StateLayout) -> None:
        assert runtime.memory.states is not None
        self._region = runtime.memory.states.region()
        conv, temporal = state.views(self._region)
        self._words = self._region.view(torch.int64)  # a page is whole granules
        self.mamba_cache = self.State(conv=conv, temporal=temporal)
        self.mem_usage = 0.0  # it is the memory's

    def clear_slots(self, indices: torch.Tensor) -> None:
        self._words[indices] = 0

    def copy_from(self, src_indices: torch.Tensor, dst_indices: torch.Tensor) -> None:
        for source, target in zip(src_indices.split(COPIED), dst_indices.split(COPIED), strict=True):
            self._words[target] = self._words[source]


class StateSlots:
    """In place of SGLang's allocator of slots: what it is asked for is counted, and handed out by `StateSide`."""

    def __init__(self, side: StateSide, size: int) -> None:
        self.side = side
        self.size = size

    def available_size(self) -> int:
        return self.size - self.side.states.owned

    schedulable_available_size = available_size

    @property
    def free_slots(self) -> torch.Tensor:
        """For SGLang's message about a leak."""
        placement = self.side.states.placement
        return torch.tensor([slot for slot in range(1, self.size + 1) if placement.is_vacant(slot)])

    def alloc_group_begin(self, num_reqs: int) -> None:
        """A match takes no slot here: a request gets its slots as it begins."""

    def alloc_group_end(self) -> None:
        pass

    def alloc(self, need_size: int) -> NoReturn:
        raise NotImplementedError("slots of states are handed out with a request's pages")

    def free(self, free_index: torch.Tensor) -> NoReturn:
        raise NotImplementedError("slots of states are freed with a request's pages")

    def clear(self) -> None:
        """The memory takes all slots back by itself."""


class Fields:
    """What a request has of states, `req.kv` says. `pool` is SGLang's of requests."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool

    def begin(self, req: Req, own: torch.Tensor, tracks: Sequence[torch.Tensor], source: torch.Tensor | None) -> None:
        kv = req.kv
        kv.mamba_pool_idx, kv.mamba_cow_src_index, kv.mamba_needs_clear = own, source, source is None
        kv.mamba_last_track_seqlen = kv.mamba_prev_track_seqlen = None
        if tracks:
            kv.mamba_ping_pong_track_buffer = torch.stack(list(tracks))
            kv.mamba_ping_pong_empty = [False] * len(tracks)
            kv.mamba_next_track_idx, kv.mamba_last_track_idx = 0, self.pool.get_mamba_ping_pong_other_idx(0)

    def tracked(self, req: Req, most: int, *, over: bool) -> tuple[int, int]:
        kv = req.kv
        track, tokens = kv.mamba_last_track_idx, kv.mamba_last_track_seqlen or 0
        if over and tokens > most and self.pool.mamba_ping_pong_track_buffer_size == 2:
            # The latest one is of a token that is not to come: the answer ended before.
            track, tokens = self.pool.get_mamba_ping_pong_other_idx(track), kv.mamba_prev_track_seqlen or 0
        return (tokens, track) if tokens <= most else (0, 0)

    def replace(self, req: Req, track: int, slot: torch.Tensor) -> None:
        self.pool.set_mamba_ping_pong_slot(req, track, slot[0])

    def nothing_tracked(self, req: Req) -> None:
        req.kv.mamba_last_track_seqlen = req.kv.mamba_prev_track_seqlen = None

    def over(self, req: Req) -> None:
        kv = req.kv
        kv.mamba_pool_idx = kv.mamba_ping_pong_track_buffer = kv.mamba_ping_pong_empty = None
        kv.mamba_next_track_idx = kv.mamba_last_track_idx = kv.mamba_cow_src_index = None
        kv.mamba_needs_clear = False
        self.nothing_tracked(req)


def attach(pool: Any, requests: Any) -> None:
    """Tie SGLang's pool of `requests` to the memory of `pool`, that of tokens."""
    from sglang.srt.runtime_context import mamba_checkpoint_grid

    runtime, grid = pool.runtime, int(mamba_checkpoint_grid(pool.page_size))
    runtime.states = StateSide(runtime, Fields(requests), tracks=slots_a_request() - 1, grid=grid)
    requests.mamba_pool.attach(runtime, pool.state)
    requests.mamba_allocator = StateSlots(runtime.states, requests.mamba_pool.size)
