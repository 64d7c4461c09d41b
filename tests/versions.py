"""What tests ask of SGLang that its versions say differently: each here in the words of the installed one."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

from sglang_vtensor import patches

#: The installed version's name in this module.
HERE = patches.module_name(patches.version("sglang"))
#: Eviction policies that the other version has not, or not in a tree like ours.
MORE_POLICIES = ["mru"] if HERE == "v0_5_17" else []
#: A KV cache with scales beside tokens, by the name that it has here.
FP4 = "fp4_e2m1" if HERE == "v0_5_17" else "nvfp4"
#: Tiny models (`tests.windowed_models`) that SGLang serves on the host and we do too.
WINDOWED = [] if HERE == "v0_5_17" else ["gemma3"]
#: The same with linear attention or Mamba (`tests.state_models`).
WITH_STATES = [] if HERE == "v0_5_17" else ["qwen3_5", "nemotron_h"]
#: Options that only this version has, and that we refuse.
REFUSED_OPTIONS = [] if HERE == "v0_5_17" else ["--radix-eviction-policy tlru", "--enable-nvidia-megakernel"]

#: Page sizes that SGLang's own KV cache has on a GPU only.
REFUSED_PAGES = [16] if HERE == "v0_5_17" else []
#: Whether weights from tensors are taken between `begin_weight_update` and `end_weight_update` only.
WEIGHT_SESSIONS = HERE != "v0_5_17"


def scheduler(kwargs: dict[str, Any]) -> Any:
    """SGLang's scheduler in this process, as its own process would build it; `kwargs` are arguments of a server."""
    from sglang.srt.managers.scheduler import Scheduler, configure_scheduler_process
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import PortArgs

    args = patches.load().make(**kwargs)
    if HERE == "v0_5_17":
        args.check_server_args()
        configure_scheduler_process(args, 0, 0, 0, 0, 0, 0, None)
        publish(args, role="scheduler")
        return Scheduler(args, PortArgs.init_new(args), 0, 0, 0, 0, 0, 0, None)

    from sglang.srt.runtime_context import SpawnRanks

    args.resolve_once()
    args.check_server_args()
    publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0))
    configure_scheduler_process(args, 0)
    return Scheduler(args, PortArgs.init_new(args))


def computed(req: Any) -> int:
    """How many tokens a request has computed behind the chunk at hand."""
    end: int = req.extend_range.end if HERE == "v0_5_17" else req.extend_end
    return end


def settle(args: Any) -> None:
    """What a server does with its arguments before it starts anything."""
    if HERE != "v0_5_17":
        args.resolve_once()


def namespace(extra_key: str | None, salt: str | None) -> dict[str, str | None]:
    """The arguments of a tokenized request that say who may share its KV."""
    if HERE == "v0_5_17":  # a salt is part of the key there: see entrypoints/openai/serving_base.py
        return {"extra_key": (salt or "") + (extra_key or "") or None}
    return {"extra_key": extra_key, "cache_salt": salt}


def prefix_index(params: Any) -> Any:
    """Our tree."""
    return patches.load().tree_class()(params)


def allocator(size: int, pool: Any) -> Any:
    return patches.load().allocator_class()(size, pool)


# A request without a server, through its life: what the scheduler does to it, in its order.


def request(rid: str, tokens: array[int], extra_key: str | None, salt: str | None) -> SimpleNamespace:
    """`written` of its tokens are computed."""
    if HERE == "v0_5_17":
        kv: Any = None
    else:
        from sglang.srt.managers.schedule_batch import ReqKvInfo

        kv = ReqKvInfo()
    req = SimpleNamespace(
        rid=rid, origin_input_ids=tokens, output_ids=array("q"), priority=0, written=0, kv=kv, lock=None
    )
    vars(req).update(namespace(extra_key, salt))
    req.get_fill_ids = lambda: (req.origin_input_ids + req.output_ids)[: req.written]
    req.finished = lambda: False
    req.owned_kv_len = lambda: req.written
    return req


def found(match: Any) -> int:
    """How many tokens a match found."""
    return len(match.device_indices) if HERE == "v0_5_17" else match.device_prefix_len


def begin(tree: Any, req: SimpleNamespace, row: int, match: Any, whole: int) -> None:
    """It locks what it matched, of which `whole` tokens are the tree's, and gets a row."""
    req.last_node = match.last_device_node
    if HERE == "v0_5_17":
        req.req_pool_idx, req.cache_protected_len = row, whole
        tree.inc_lock_ref(req.last_node)
    else:
        req.kv.req_pool_idx, req.kv.cache_protected_len = row, whole
        req.lock = tree.lock(req.last_node)


def stash(tree: Any, req: SimpleNamespace) -> None:
    """What it computed so far goes to the tree, and it goes on."""
    if HERE == "v0_5_17":
        tree.cache_unfinished_req(req)
    else:
        req.full_untruncated_fill_ids = req.origin_input_ids + req.output_ids
        tree.checkpoint(req, up_to=req.written)


def end(tree: Any, req: SimpleNamespace, *, insert: bool, owned: int) -> int:
    """It is over, or given up; of its tokens `owned` are worth keeping. Returns its row, which is free now."""
    if HERE == "v0_5_17":
        req.kv = SimpleNamespace(kv_allocated_len=req.written)
        tree.cache_finished_req(req, is_insert=insert, kv_len_to_handle=owned)
        return req.req_pool_idx
    req.kv.kv_allocated_len = req.kv.kv_committed_len = req.written
    req.finished, req.owned_kv_len = lambda: True, lambda: owned
    if insert:
        req.full_untruncated_fill_ids = req.origin_input_ids + req.output_ids
        tree.checkpoint(req, up_to=owned)
    tree.free_kv_row(req.kv, [(req.kv.cache_protected_len, owned)])
    tree.unlock(req.lock)
    tree.on_release(req, checkpointed=insert)
    return req.kv.req_pool_idx


# Graphs.


def captured(runner: Any, labels: Sequence[str | None], capture: Callable[[int], None]) -> dict[Any, tuple]:
    """SGLang's capture of all sizes of a graph runner, each under several LoRA labels. By the key of each graph: its
    size, its label, and whether it is one of shared decode (None where the runner has nothing of ours)."""
    from sglang_vtensor.patches.common import shared_decode

    backend, keys = shared_decode(runner), {}

    def note(key: Any, size: int, label: str | None) -> None:
        capture(size)
        assert key() not in keys
        keys[key()] = (size, label, None if backend is None else backend.shared)

    if HERE == "v0_5_17":
        from sglang_vtensor.patches import v0_5_17 as module

        def stream(self: Any, stream_idx: int | None) -> None:
            for size in self.capture_bs:
                for label in labels:
                    key = partial(module._label_graph_key, lambda *key: key[1:], self, size, None, label)
                    note(key, size, label)

        module._capture_both(stream, runner, None)
        return keys

    from sglang_vtensor.patches.v0_5_23 import graphs

    runner.attention_graph_variants = None
    graphs.have_variants(runner)
    variants = runner.attention_graph_variants

    def shape(_: Any, size: int, forward: Any, stream_idx: int | None, label: str | None, variant: str | None) -> None:
        note(lambda: (size, label, variant), size, label)

    for size in runner.capture_bs:
        for label in labels:
            for variant in (None,) if variants is None else variants.capture_labels:
                graphs.capture_one_shape(shape, runner, size, None, None, label, variant)
    return keys
