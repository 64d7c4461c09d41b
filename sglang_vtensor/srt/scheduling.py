"""SGLang's scheduler with this KV memory: what it does before, around and behind its own steps.

The device may give less than the pool's size promised: admission goes down, batches wait, requests are retracted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import orjson
from sglang.srt.managers.utils import is_health_check_generate_req

from sglang_vtensor.srt.allocation import PutOff
from sglang_vtensor.srt.demand import Demand
from sglang_vtensor.srt.elastic import LOOK_EVERY_SECONDS, MAP, Elastic
from sglang_vtensor.srt.memory_map import memory_map
from sglang_vtensor.srt.metrics import Metrics
from sglang_vtensor.srt.occupation import finish_release, unready
from sglang_vtensor.srt.options import Options

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_vtensor.srt.runtime import Runtime

#: How many shared prefixes `sglang-vtensor top` is told of.
_SHOWN_PREFIXES = 5


def runtime_of(scheduler: Any) -> Runtime:
    runtime: Runtime = scheduler.token_to_kv_pool_allocator.runtime
    return runtime


def equip(scheduler: Any, options: Options, metrics_of: str | None, *, tells_refusals: bool) -> None:
    """A scheduler was made. `metrics_of` is the model's name, where the server is asked for metrics;
    `tells_refusals`: whether our code is in the process that hands answers out."""
    runtime = runtime_of(scheduler)
    scheduler.vtensor_elastic = Elastic(
        runtime,
        scheduler.tree_cache,
        cache_idle_seconds=options.vtensor_cache_idle_seconds,
        minimum_bytes=options.minimum_bytes(runtime.memory.budget.nbytes),
    )
    scheduler.vtensor_elastic.tells_refusals = tells_refusals
    if metrics_of is not None:
        tp_rank, dp_rank = runtime.sglang.ranks(scheduler)
        labels = {"model_name": metrics_of, "tp_rank": str(tp_rank), "dp_rank": str(dp_rank)}
        runtime.metrics = Metrics(labels, runtime.stats)


# Admission.


def passes_over(adder: Any, req: Req) -> bool:
    """Whether a request is passed over: its prefix is being computed for another one, and the next batch finds it in
    the tree; or requests are tried one at a time, and another one is."""
    from sglang.srt.managers.schedule_policy import AddReqResult

    fewest = adder.tree_cache.fewest_tries
    if fewest is not None and (adder.can_run_list or _tries(req) > fewest):
        return True
    # If others were preempted for it, it is to run now.
    may_wait = not adder.preempt_list and adder.budget_state() is AddReqResult.CONTINUE
    return may_wait and bool(adder.tree_cache.awaits(req, adder.can_run_list))


def _tries(req: Any) -> int:
    """How often a request was tried alone, and found no memory, since others were."""
    return int(getattr(req, "vtensor_tries", 0))


def get_new_batch_prefill(original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """An extend batch for which there is no memory waits, and the running batch decodes meanwhile."""
    running_batch, elastic = kwargs["running_batch"], scheduler.vtensor_elastic
    chunked, last = scheduler.chunked_req, scheduler.last_batch
    ratio = scheduler.new_token_ratio_tracker.current
    elastic.tick(Demand(scheduler.waiting_queue, running_batch.reqs, ratio, chunked))
    send = scheduler.ipc_channels.send_to_tokenizer.send_output
    elastic.refuse_too_long(scheduler.waiting_queue, send)
    if elastic.holding:
        # Not by a token, as an idle server that is awake answers them, but as a busy one does.
        scheduler.return_health_check_ipcs.extend(elastic.take_health_checks(scheduler.waiting_queue))
        # Grammars are compiled meanwhile: SGLang takes those that are done, or failed, as it makes an extend batch.
        if scheduler.grammar_manager.has_waiting_grammars():
            for req in scheduler.grammar_manager.get_ready_grammar_requests():
                scheduler._add_request_to_queue(req)
        elastic.answer_failed(scheduler.waiting_queue, send)
    busy = chunked is not None or not running_batch.is_empty()
    offered, beyond = elastic.offers(scheduler.waiting_queue, busy=busy)
    if elastic.holding and not offered and chunked is None:
        return None, running_batch
    if elastic.has_more_room() or running_batch.is_empty():
        running_batch.batch_is_full = False  # no request may end that would set it back
    # For `awaits`. The last batch is in flight, unless its results are in the tree already: then none awaits them.
    tree = scheduler.tree_cache
    tree.computing = list(last.reqs) if last is not None and last.forward_mode.is_extend() else []
    if chunked is not None:
        tree.computing.append(chunked)
    # Alike on every rank, whichever it is whose driver refuses. Of who was tried least the first is tried next.
    one_at_a_time = elastic.one_at_a_time and not busy
    tree.fewest_tries = min(map(_tries, offered), default=0) if one_at_a_time else None

    def admit(offered: list[Any], beyond: bool) -> Any:
        waiting, scheduler.waiting_queue = scheduler.waiting_queue, offered
        grammars = scheduler.grammar_manager.grammar_queue
        if offered is not waiting:
            scheduler.grammar_manager.grammar_queue = []  # none is ready yet: it would begin with what is offered
        try:
            with elastic.beyond_the_limit(beyond):
                made = original(scheduler, *args, **kwargs)
            if made[0] is not None:
                elastic.patience.begins()
            if one_at_a_time:  # one of them found memory, or is not to begin now for another reason
                elastic.one_at_a_time = made[0] is None
                for req in offered:
                    req.vtensor_tries = 0
            return made
        except PutOff as put_off:
            _put_off(scheduler, put_off.reqs, chunked, alone=running_batch.is_empty())
            return None
        finally:
            if offered is not waiting:
                scheduler.grammar_manager.grammar_queue = grammars
                others = set(offered)
                scheduler.waiting_queue = scheduler.waiting_queue + [req for req in waiting if req not in others]

    result = admit(offered, beyond)
    if result is not None and result[0] is None and elastic.bars(scheduler.waiting_queue, busy=busy):
        running_batch.batch_is_full = False
        result = admit(scheduler.waiting_queue[:1], True)
    return result or (None, running_batch)


def _put_off(scheduler: Any, reqs: list[Any], chunked: Any, alone: bool) -> None:
    """Undo the admission of `reqs`; `chunked` is the one among them that has its first chunks already, if any.

    That one keeps its pages, unless it is `alone`, with nothing running whose end would make room: then it gives them
    up and queues again, for what others can use and the tree keeps of it.
    """
    sglang = runtime_of(scheduler).sglang
    scheduler.vtensor_elastic.one_at_a_time = alone
    if alone and len(reqs) == 1:
        reqs[0].vtensor_tries = _tries(reqs[0]) + 1
    if scheduler.chunked_req is not None:
        scheduler.chunked_req.inflight_middle_chunks -= 1
    scheduler.chunked_req = chunked
    waiting = [req for req in reqs if req is not chunked]
    for req in waiting:
        sglang.release_match(scheduler.tree_cache, req)
        req.vtensor_anew = alone  # of a model with states: it then begins without one, which may be evicted for it
    scheduler.waiting_queue = waiting + scheduler.waiting_queue
    if chunked is None:
        return
    sglang.nothing_new(chunked)
    if alone and not chunked.inflight_middle_chunks:
        scheduler.chunked_req = None
        sglang.retract(scheduler, [chunked])
        scheduler._add_request_to_queue(chunked, is_retracted=True)


def spare(runtime: Runtime, retracted: list[Any], aborted: list[Any], may_wait: Callable[[Any], bool]) -> None:
    """SGLang aborts the last request of a decode batch when that finds no memory. Here the request is retracted
    instead, and waits. It stays aborted only if the whole pool is too small for it, or if it cannot wait
    (`may_wait`)."""
    budget = runtime.memory.budget.nbytes
    for req in list(aborted):
        if may_wait(req) and runtime.bytes_for(len(req.origin_input_ids) + len(req.output_ids)) <= budget:
            req.to_finish = None
            aborted.remove(req)
            retracted.append(req)


# Batches.


def run_batch(original: Callable[..., Any], scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    runtime = runtime_of(scheduler)
    host = scheduler.device == "cpu"
    _copy(runtime, scheduler)
    with runtime.memory.clock:
        runtime.batch = runtime.decode.slots(batch.reqs)
        if runtime.sharing is not None and batch.forward_mode.is_decode():
            contexts = batch.seq_lens_cpu
            runtime.sharing.begin(runtime.batch, int(contexts.sum()), int(contexts.max()))
    try:
        result = original(scheduler, batch, *args, **kwargs)
    finally:
        runtime.batch = []
    idle = all(map(is_health_check_generate_req, batch.reqs))
    if host:
        runtime.memory.complete(runtime.memory.launch(idle=idle))  # the host computes in this very call: it is done
    else:
        runtime.launched(_forward_stream(scheduler), idle=idle)
    _count_tokens(runtime, scheduler, batch)
    _tell(runtime)
    return result


def _copy(runtime: Runtime, scheduler: Any) -> bool:
    """Make the copies that are to come before the next batch. Whether there were any."""
    if not runtime.copies:
        return False
    if scheduler.device == "cpu":
        runtime.copy_partials()
    else:
        with scheduler.device_module.stream(_forward_stream(scheduler)):
            runtime.copy_partials()
    return True


def _forward_stream(scheduler: Any) -> Any:
    """The stream that batches run on, one after another."""
    return scheduler.forward_stream if scheduler.enable_overlap else scheduler.device_module.current_stream()


def on_idle(original: Callable[..., None], scheduler: Any) -> None:
    runtime = runtime_of(scheduler)
    # Before what they read is given back, as no batch may come. Nothing else waits for the device here.
    if _copy(runtime, scheduler) and scheduler.device != "cpu":
        _forward_stream(scheduler).synchronize()
    finish_release(scheduler)
    scheduler.vtensor_elastic.tick(Demand(scheduler.waiting_queue))
    runtime.idle()
    _tell(runtime)
    original(scheduler)
    if scheduler.waiting_queue and scheduler.vtensor_elastic.asleep(scheduler.waiting_queue):
        scheduler.maybe_sleep_on_idle()  # SGLang takes a server for busy while requests wait


def while_paused(_: None, scheduler: Any) -> None:
    """A paused engine begins nothing, and so wants nothing of its neighbours; what it has cached it gives them."""
    runtime = runtime_of(scheduler)
    scheduler.vtensor_elastic.tick(Demand((), paused=True))
    if not runtime.copies:  # else the next batch begins with them, and reads what was given up before it
        runtime.idle()


def sleep_on_idle(original: Callable[..., None], scheduler: Any) -> None:
    """With --sleep-on-idle the event loop sleeps until a message comes, a second at most; beside neighbours it looks
    for what they want as often as without."""
    from sglang.srt.managers.scheduler_components.idle_sleeper import IdleSleeper

    if isinstance(scheduler.idle_sleeper, IdleSleeper) and scheduler.vtensor_elastic.beside_others:
        scheduler.idle_sleeper.poller.poll(1000 * LOOK_EVERY_SECONDS)
    else:
        original(scheduler)


def _count_tokens(runtime: Runtime, scheduler: Any, batch: Any) -> None:
    """Each request of a batch gets one token, but for a prompt that has more chunks to come."""
    mode = batch.forward_mode
    if mode.is_decode() or mode.is_extend():
        runtime.generated_tokens += len(batch.reqs) - (mode.is_extend() and scheduler.chunked_req is not None)


def _tell(runtime: Runtime) -> None:
    runtime.history.sample()
    if runtime.metrics is not None:
        runtime.metrics.update()


# What it is asked.


def add_internal_state(result: Any, scheduler: Any, *_: Any, **__: Any) -> Any:
    start = time.thread_time()
    runtime, tree = runtime_of(scheduler), scheduler.tree_cache
    wanted, runtime.map_wanted, drawn = runtime.map_wanted, False, None
    free, total = runtime.memory.vmm.memory()
    with runtime.memory.held_still():
        stats = runtime.stats()
        if wanted:
            drawn = memory_map(runtime, tree, _running(scheduler), _SHOWN_PREFIXES)
    result.internal_state["vtensor"] = stats | {
        "dp_rank": runtime.sglang.ranks(scheduler)[1],
        "released": sorted(scheduler.vtensor_elastic.released),
        "refusal": scheduler.vtensor_elastic.refusal,
        "unready": unready(scheduler),
        "device_bytes": total,
        "device_free_bytes": free,
        "weights_bytes": int(scheduler.tp_worker.model_runner.weight_load_mem_usage * (1 << 30)),
        "shared_prefixes": tree.shared_prefixes(_SHOWN_PREFIXES),
        "live_tokens": live_tokens(scheduler),
        "reserve_bytes": runtime.memory.reserve_now * runtime.memory.page_bytes,
        "token_bytes": runtime.memory.layout.stride_bytes,
    }
    if wanted:  # as text, so that encoding it is timed here too, and is nothing to do again behind
        why = None if drawn else "There are too many pages to draw a map of them."
        page = orjson.dumps({"map": drawn, "history": runtime.history.columns(), "why": why}).decode()
        result.internal_state["vtensor"] |= {"page": page, "page_seconds": time.thread_time() - start}
    return result


def live_tokens(scheduler: Any) -> int:
    """Tokens that requests hold and no node does."""
    sglang = runtime_of(scheduler).sglang
    return sum(sglang.own(req) for req in _running(scheduler).values())


def _running(scheduler: Any) -> dict[int, Req]:
    """The requests that have begun, by slot."""
    sglang, reqs = runtime_of(scheduler).sglang, {}
    for batch in (scheduler.running_batch, scheduler.last_batch):
        reqs.update({req.rid: req for req in _requests(batch)})
    if scheduler.chunked_req is not None:
        reqs[scheduler.chunked_req.rid] = scheduler.chunked_req
    return {sglang.slot(req): req for req in reqs.values() if sglang.begun(req)}


def _requests(batch: Any) -> Sequence[Req]:
    return batch.reqs if batch is not None else ()


def set_internal_state(original: Callable[..., Any], scheduler: Any, recv_req: Any) -> Any:
    from sglang.srt.managers.io_struct import SetInternalStateReqOutput

    asked = recv_req.server_args
    ours = {key: value for key, value in asked.items() if key.startswith("vtensor_")}
    if not ours:
        return original(scheduler, recv_req)
    if ours.keys() == asked.keys() == {MAP}:
        runtime_of(scheduler).map_wanted = True
        return SetInternalStateReqOutput(updated=True)
    return SetInternalStateReqOutput(updated=len(ours) == len(asked) and scheduler.vtensor_elastic.control(ours))
