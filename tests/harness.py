"""SGLang's real scheduler, with its model, pool, tree and event loop, in a child process and without sockets.

A `Scheduler` takes a script: which requests arrive, and which are aborted, before which turn of the event loop. Batches
are then the same in every run, so that two servers can be compared token for token. To import SGLang takes 20 s. On the
host, children are forked from a process that has done so, and start in about a second. Beside a GPU nothing can be
forked: there some children import it ahead, and wait to be told what to serve.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import traceback
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests import versions

ON_GPU = os.environ.get("VTENSOR_TEST_GPU") == "1"
if not ON_GPU:
    os.environ["SGLANG_PLATFORM"] = "vtensor_host"
    os.environ["SGLANG_MAMBA_CONV_DTYPE"] = "float32"  # as all else that is compared
os.environ["SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE"] = "1"
os.environ["SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY"] = "1"
os.environ["SGLANG_CHECK_KV_PAGE_INVARIANTS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Importing SGLang beside a GPU initializes CUDA, which survives no fork.
_context = multiprocessing.get_context("spawn" if ON_GPU else "forkserver")
if not ON_GPU:
    # Imports only: a thread or a parallel region in the parent would not survive the fork.
    _context.set_forkserver_preload(["sglang.srt.managers.scheduler", "sglang.srt.models.registry"])


#: Children beside a GPU that wait to be told what to serve, and how many there are to be.
_waiting: deque[tuple[Any, Connection]] = deque()
WAITING = 4 if ON_GPU else 0

#: Seconds after which a child that does not answer hangs: requests that wait for what never comes, for instance. Other
#: tests may have both cores of a slow machine meanwhile.
PATIENCE = 600


@dataclass(frozen=True)
class Request:
    """A prompt of token ids, decoded greedily to exactly `new` tokens."""

    rid: str
    tokens: Sequence[int]
    new: int = 8
    extra_key: str | None = None
    salt: str | None = None
    priority: int | None = None
    #: Whether SGLang is told that it has exactly so many: it admits fewer of them at once then, and retracts none.
    fixed: bool = False
    #: An adapter, by its name.
    lora: str | None = None
    #: The prompt's own log-probabilities are told from this token on.
    logprobs_from: int = -1
    #: At each position, the log-probabilities of so many of the best tokens are told.
    best: int = 2
    #: Its embeddings, `(tokens, hidden)`, in place of the prompt's own.
    embeds: list[list[float]] | None = None


@dataclass(frozen=True)
class Abort:
    rid: str


@dataclass(frozen=True)
class Do:
    """Call `function(scheduler, *args)` in the child, between two turns of its loop."""

    function: Callable[..., None]
    args: tuple[Any, ...] = ()


@dataclass
class Answer:
    """What came of a request. `gaps[i]` is by how much (nats) the best token beat the second at position i, `behind[i]`
    by how much it beat each of the best ones, and `logprobs[i]` its log-probability; `prompt_logprobs` are those of the
    prompt's tokens, if asked for."""

    tokens: list[int]
    cached: int
    retractions: int
    finish: str
    gaps: list[float] = field(default_factory=list)
    behind: list[dict[int, float]] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)


#: What arrives before a turn of the event loop.
Arrivals = Sequence[Request | Abort | Do]


@dataclass(frozen=True)
class Until:
    """These arrive before each turn, until there is a file at `path`."""

    path: Path
    items: Arrivals = ()


#: Before turn i of the event loop, what arrives.
Script = Sequence[Arrivals | Until]


class Scheduler:
    """A scheduler of its own in a child process. Keywords are SGLang's `ServerArgs`. Without `wait` it may not be there
    yet, and what is wrong with them is told by the first call."""

    def __init__(
        self, model: Path, *, environment: dict[str, str] | None = None, wait: bool = True, **server_args: Any
    ) -> None:
        args = {
            "model_path": str(model),
            "skip_tokenizer_init": True,
            "grammar_backend": "none",
            "mem_fraction_static": 0.5,
            "random_seed": 0,
            "max_total_tokens": 8192,
            "max_running_requests": 32,
            "log_level": "warning",
            "sampling_backend": "pytorch",
            **server_args,
        }
        self._process, self._pipe = _with(environment) if environment else _child()
        self._pipe.send(args)
        if wait:
            self.call(_ready)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(scheduler, *args)` in the child, between runs. Raises what it raised."""
        self._ask(function, *args)
        return self._answer(function)

    def _ask(self, function: Callable[..., Any], *args: Any) -> None:
        self._pipe.send((function, args))

    def _answer(self, function: Callable[..., Any]) -> Any:
        if not self._pipe.poll(PATIENCE):
            self._process.kill()
            raise RuntimeError(f"{function.__name__} did not end within {PATIENCE} s")
        try:
            result, error = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(10)  # its pipe is closed before it can be waited for
            raise RuntimeError(f"the scheduler died with exit code {self._process.exitcode}") from None
        if error is not None:
            raise RuntimeError(f"in the scheduler:\n{error}")
        return result

    def run(self, script: Script) -> dict[str, Answer]:
        """Run the event loop until the script is through and the server idle (SGLang checks its pools then)."""
        return self.call(_run, script)

    def generate(self, *requests: Request) -> list[Answer]:
        """All requests at once."""
        answers = self.run([requests])
        return [answers[request.rid] for request in requests]

    def stats(self) -> dict[str, Any]:
        return self.call(_stats)

    def check(self) -> None:
        self.call(_check)

    def flush(self) -> bool:
        return self.call(_flush)

    def close(self) -> None:
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def side_by_side(
    one: Scheduler, other: Scheduler, script: Script, others: Script | None = None
) -> tuple[dict[str, Answer], dict[str, Answer]]:
    """Run a script on two schedulers at once (the second may have one of its own)."""
    one._ask(_run, script)
    other._ask(_run, script if others is None else others)
    try:
        first = one._answer(_run)
    finally:
        second = other._answer(_run)
    return first, second


def nobody_starts() -> None:
    """Wait until the children that import SGLang ahead have done so, where what they take of a GPU would disturb."""
    for _, pipe in _waiting:
        pipe.poll(PATIENCE)


def _child() -> tuple[Any, Connection]:
    """A process that waits to be told what to serve; and others begin to wait."""
    while len(_waiting) <= WAITING:
        _waiting.append(_start({}))
    process, pipe = _waiting.popleft()
    pipe.recv()
    return process, pipe


def _with(environment: dict[str, str]) -> tuple[Any, Connection]:
    """A process of its own, that has `environment` before it imports SGLang: some of it is read only then. (The host's
    fork server has imported SGLang before.)"""
    process, pipe = _start(environment)
    pipe.recv()
    return process, pipe


def _start(environment: dict[str, str]) -> tuple[Any, Connection]:
    ours, theirs = _context.Pipe()
    process = _context.Process(target=_serve, args=(theirs, environment), daemon=True)
    process.start()
    theirs.close()
    return process, ours


# In the child.


def _serve(pipe: Connection, environment: dict[str, str]) -> None:
    faulthandler.enable()  # what a signal ends says where
    os.environ.update(environment)
    if ON_GPU:
        import sglang.srt.managers.scheduler
        import sglang.srt.models.registry  # noqa: F401
    pipe.send("waiting")
    try:
        kwargs = pipe.recv()
    except EOFError:
        os._exit(0)
    scheduler = None
    failure = None
    try:
        scheduler = _build(kwargs)
    except BaseException:  # a refusal may end the process: it is told, not swallowed
        failure = traceback.format_exc()
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            os._exit(0)
        if scheduler is None:
            pipe.send((None, failure))
            continue
        faulthandler.dump_traceback_later(0.8 * PATIENCE)  # what hangs says where, before it is given up
        try:
            pipe.send((function(scheduler, *args), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))
        finally:
            faulthandler.cancel_dump_traceback_later()


def _build(kwargs: dict[str, Any]) -> Any:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    _few_frames()
    scheduler = versions.scheduler(kwargs)
    scheduler.model_config.hf_eos_token_id = set()  # nothing ends an answer but its length
    scheduler.result_queue = deque()  # the event loop makes it; a flush before the first run asks for it
    scheduler.finished_requests = {}
    queue = scheduler._add_request_to_queue

    def remember(req: Any, *args: Any, **more: Any) -> Any:
        scheduler.finished_requests[req.rid] = req
        return queue(req, *args, **more)

    scheduler._add_request_to_queue = remember
    if hasattr(scheduler.token_to_kv_pool_allocator, "runtime"):
        _check_every_batch(scheduler)
    for channel in (scheduler.ipc_channels.send_to_tokenizer, scheduler.ipc_channels.send_to_detokenizer):
        channel.socket = None  # a sender without a socket drops what it is given
    return scheduler


#: The environment of a scheduler in which addresses are always short.
FEW_FRAMES = {"VTENSOR_TEST_FRAMES": "0"}


def _few_frames() -> None:
    """In this process, where the environment says so, there are only so many frames as there must be."""
    from sglang_vtensor import layout

    layout.MOST_FRAMES = int(os.environ.get("VTENSOR_TEST_FRAMES", layout.MOST_FRAMES))


def _check_every_batch(scheduler: Any) -> None:
    """Before each batch, every invariant, and that what it reads is its requests' own.

    On a GPU only what the host knows is checked, as everything else would wait for the device.
    """
    runtime, launch = scheduler.token_to_kv_pool_allocator.runtime, scheduler.run_batch

    def checked(batch: Any, *args: Any, **kwargs: Any) -> Any:
        if batch.forward_mode.is_extend() or batch.forward_mode.is_decode():
            if not ON_GPU:
                scheduler.tree_cache.check_integrity()
            table = None if ON_GPU else scheduler.req_to_token_pool.req_to_token
            slots = [runtime.sglang.slot(req) for req in batch.reqs]
            runtime.check_batch(slots, batch.seq_lens_cpu.tolist(), table)
        return launch(batch, *args, **kwargs)

    scheduler.run_batch = checked


def _ready(scheduler: Any) -> None:
    return None


def _run(scheduler: Any, script: Script) -> dict[str, Answer]:
    turns = _turns(script)
    scheduler.finished_requests.clear()

    def receive(**_: Any) -> list[Any]:
        for turn in turns:
            for item in turn:
                if isinstance(item, Do):
                    item.function(scheduler, *item.args)
            return [_message(scheduler, item) for item in turn if not isinstance(item, Do)]
        if scheduler.is_fully_idle():
            scheduler.gracefully_exit = True
        return []

    scheduler.request_receiver = SimpleNamespace(recv_requests=receive)
    scheduler.gracefully_exit = False
    scheduler.run_event_loop()
    return {rid: _answer(req) for rid, req in scheduler.finished_requests.items()}


def _turns(script: Script) -> Iterator[Arrivals]:
    for turn in script:
        if isinstance(turn, Until):
            while not turn.path.exists():
                yield turn.items
        else:
            yield turn


def _message(scheduler: Any, item: Request | Abort) -> Any:
    from sglang.srt.managers.io_struct import AbortReq

    if isinstance(item, Abort):
        return AbortReq(rid=item.rid)
    message = _tokenized(item)
    if item.lora is not None:
        refs = scheduler.tp_worker.model_runner.lora_manager.lora_refs.values()
        (message.lora_id,) = (ref.lora_id for ref in refs if ref.lora_name == item.lora)
    return message


def _tokenized(request: Request) -> Any:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams

    params = SamplingParams(max_new_tokens=request.new, temperature=0.0, ignore_eos=request.fixed)
    params.normalize(None)
    return TokenizedGenerateReqInput(
        rid=request.rid,
        input_text=None,
        input_ids=array("q", request.tokens),
        input_embeds=request.embeds,
        mm_inputs=None,
        token_type_ids=None,
        sampling_params=params,
        return_logprob=True,
        logprob_start_len=request.logprobs_from,
        top_logprobs_num=request.best,
        token_ids_logprob=None,
        stream=False,
        priority=request.priority,
        **versions.namespace(request.extra_key, request.salt),
    )


def _answer(req: Any) -> Answer:
    best = req.logprob.output_top_logprobs_val or []
    tokens = req.logprob.output_top_logprobs_idx or []
    return Answer(
        tokens=list(req.output_ids),
        cached=req.cached_tokens,
        retractions=req.retraction_count,
        finish=type(req.finished_reason).__name__,
        gaps=[float(values[0] - values[1]) for values in best],
        behind=[
            {int(token): float(values[0] - value) for token, value in zip(some, values, strict=True)}
            for some, values in zip(tokens, best, strict=True)
        ],
        logprobs=[float(values[0]) for values in best],
        prompt_logprobs=[value for value in req.logprob.input_token_logprobs_val or [] if value is not None],
    )


def _stats(scheduler: Any) -> dict[str, Any]:
    return scheduler.token_to_kv_pool_allocator.runtime.stats()


def _check(scheduler: Any) -> None:
    scheduler.tree_cache.check_integrity()


def _flush(scheduler: Any) -> bool:
    return scheduler.flush_cache()
