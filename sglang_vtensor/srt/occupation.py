"""SGLang's release and resume of memory, by tags: `kv_cache` is ours; `weights` and `cuda_graph` are those of
torch_memory_saver, which `--enable-memory-saver` puts beside us.

    nothing is out --release--> tags are out: nothing runs, and what arrives waits --resume--> nothing is out

SGLang asserts that it can do what it is asked for, and the scheduler dies where it cannot. Here such a call is refused:
it changes nothing, and its caller is told why, by HTTP with status 400, and by the engine with an exception.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

from sglang.srt.constants import (
    GPU_MEMORY_ALL_TYPES,
    GPU_MEMORY_TYPE_KV_CACHE,
    GPU_MEMORY_TYPE_WEIGHTS,
)
from sglang.srt.managers.io_struct import (
    ReleaseMemoryOccupationReqInput,
    ReleaseMemoryOccupationReqOutput,
    ResumeMemoryOccupationReqOutput,
)

from sglang_vtensor.srt.options import Refused

logger = logging.getLogger(__name__)


# In the scheduler.


def release_memory(original: Callable[..., Any], updater: Any, recv_req: Any) -> Any:
    """The memory is free when this is answered. If requests have not ended, it is refused; if they have, and their last
    batch is in flight, the answer comes behind that (`finish_release`)."""
    scheduler = updater.scheduler
    elastic = scheduler.vtensor_elastic
    elastic.refusal = None
    idle = elastic.runtime.sglang.idle(scheduler)
    reason = _unknown(recv_req.tags) or unready(scheduler)
    if reason is None and elastic.release_when_idle is not None:
        reason = "another release waits for the last batch: wait for its answer"
    if reason is not None:
        return _refuse(elastic, "release_memory_occupation", reason, ReleaseMemoryOccupationReqOutput())
    release = functools.partial(_release, original, updater, recv_req)
    if idle:
        return release()
    elastic.release_when_idle = lambda: scheduler.ipc_channels.send_to_tokenizer.send_output(release(), recv_req)
    return None


def unready(scheduler: Any) -> str | None:
    """Why nothing can be released now, whatever the tags."""
    paused, left = scheduler._engine_paused, _unfinished(scheduler)
    if left:
        # Behind a pause in place, SGLang's pause with mode abort waits for ever, and holds off continue_generation.
        first = "call POST /continue_generation, and then " if paused else "call "
        return (
            f"{left} requests have not ended, and memory is released by a server that runs nothing: {first}"
            "POST /pause_generation (mode abort, or retract), or wait for them"
        )
    if paused and not scheduler.vtensor_elastic.runtime.sglang.idle(scheduler):
        return (
            "the engine was paused with a batch in flight, or with requests that wait: call POST /continue_generation, "
            "and POST /pause_generation with mode abort"
        )
    return None


def finish_release(scheduler: Any) -> None:
    """There is no batch to be made. If the last one is done too, what waited for that is done, and answered."""
    elastic = scheduler.vtensor_elastic
    release = elastic.release_when_idle
    if release is not None and elastic.runtime.sglang.idle(scheduler):
        elastic.release_when_idle = elastic.refusal = None  # one that was refused meanwhile has been told so
        release()


def _release(original: Callable[..., Any], updater: Any, recv_req: Any) -> Any:
    # What is out already stays out: torch_memory_saver ends the process that releases it twice.
    recv_req.tags = [tag for tag in recv_req.tags or GPU_MEMORY_ALL_TYPES if tag not in updater.offload_tags]
    if not recv_req.tags:
        return ReleaseMemoryOccupationReqOutput()
    result = original(updater, recv_req)  # flushes the cache, if that is among them
    updater.scheduler.vtensor_elastic.release(_out(updater))
    return result


def resume_memory(original: Callable[..., Any], updater: Any, recv_req: Any) -> Any:
    """The KV cache takes no memory as it is resumed. Weights take theirs at once: with less than that free, this
    is refused, and may be asked for again."""
    elastic, out = updater.scheduler.vtensor_elastic, updater.offload_tags
    elastic.refusal = None
    tags = list(dict.fromkeys(recv_req.tags or sorted(out)))  # SGLang dies of one that is given twice
    reason = _unknown(tags)
    if reason is None and not (tags and out.issuperset(tags)):
        what = f"of {', '.join(tags)}, " if tags else ""
        reason = f"{what}released is {', '.join(sorted(out)) or 'nothing'}: resume what is released"
    if reason is None and GPU_MEMORY_TYPE_WEIGHTS in tags and updater.memory_saver_adapter.enabled:
        reason = _no_room(updater, elastic.runtime)
    if reason is not None:
        return _refuse(elastic, "resume_memory_occupation", reason, ResumeMemoryOccupationReqOutput())
    recv_req.tags = tags
    result = original(updater, recv_req)
    if GPU_MEMORY_TYPE_KV_CACHE in tags and updater.memory_saver_adapter.enabled:
        # torch_memory_saver had SGLang's table of slots too. Padded batches read its first row.
        updater.scheduler.req_to_token_pool.req_to_token.zero_()
    elastic.resume(_out(updater))
    return result


def _out(updater: Any) -> frozenset[str]:
    """The tags whose memory is out: without --enable-memory-saver, SGLang notes the others and frees nothing."""
    freed = GPU_MEMORY_ALL_TYPES if updater.memory_saver_adapter.enabled else [GPU_MEMORY_TYPE_KV_CACHE]
    return frozenset(updater.offload_tags).intersection(freed)


def _unknown(tags: Sequence[str] | None) -> str | None:
    unknown = [tag for tag in tags or () if tag not in GPU_MEMORY_ALL_TYPES]
    if not unknown:
        return None
    return (
        f"tags {', '.join(map(repr, unknown))} are unknown: give of {', '.join(GPU_MEMORY_ALL_TYPES)}, or none for all"
    )


def _unfinished(scheduler: Any) -> int:
    """Requests that have not ended; those that wait in a paused engine stay there."""
    batches = (scheduler.running_batch, scheduler.last_batch)
    reqs = [req for batch in batches if batch is not None for req in batch.reqs]
    if scheduler.chunked_req is not None:
        reqs.append(scheduler.chunked_req)
    if not scheduler._engine_paused:
        reqs += [*scheduler.waiting_queue, *scheduler.grammar_manager.grammar_queue]
    return len({req.rid for req in reqs if not req.finished()})


def _no_room(updater: Any, runtime: Any) -> str | None:
    """Why the weights cannot have their memory back. torch_memory_saver ends a process to which the driver refuses
    that. What its parameters take is the least that the weights need."""
    parameters = updater.tp_worker.model_runner.model.parameters()
    storages = [tensor.untyped_storage() for tensor in parameters]
    needed = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    free = runtime.memory.vmm.memory()[0]
    if runtime.agree(needed <= free):
        return None
    return (
        f"the weights need {needed} bytes, and the device of rank {runtime.sglang.ranks(updater.scheduler)[0]} has "
        f"{free} free: free the device of every rank, and resume again. Until then the server stays released"
    )


def _refuse(elastic: Any, what: str, reason: str, answer: Any) -> Any:
    elastic.refusal = f"{what} is refused: {reason}"
    if not elastic.tells_refusals:  # its caller would take the answer for a yes
        raise RuntimeError(elastic.refusal)
    logger.error(elastic.refusal)
    return answer


# In the process of the HTTP server, or of the engine.


async def tell_refusal(original: Callable[..., Any], manager: Any, obj: Any, request: Any = None) -> None:
    """SGLang's schedulers answer both calls with nothing. Whether one refused, its state says. Raises `Refused`.

    The state is that of the last call, so callers take turns: each would hear of another one's refusal, or of none."""
    async with vars(manager).setdefault("vtensor_occupation", asyncio.Lock()):
        if isinstance(obj, ReleaseMemoryOccupationReqInput):
            # Each data-parallel rank answers for itself. Where one will refuse, the others are not to release.
            ranks = [state["vtensor"] for state in await manager.get_internal_state()]
            for rank in ranks if len(ranks) > 1 else []:
                if rank["unready"]:
                    raise Refused(f"release_memory_occupation is refused: {rank['unready']}")
        await original(manager, obj, request)
        states = await manager.get_internal_state()
    for state in states:
        if state["vtensor"]["refusal"]:
            raise Refused(state["vtensor"]["refusal"])
