"""The models of `benchmarks.kinds`: what is sent to them, and which arguments give a server so many bytes for its
cache.

SGLang divides its bytes when it starts. Ours does not: both kinds of memory are of one budget. So equal bytes are
another number of tokens for each:

    gpt-oss       SGLang has memory for 0.8 times as many tokens in layers that see a window (`--swa-full-tokens-ratio`)
    qwen3-next    states are 0.9 bytes for each byte of tokens (`--mamba-full-memory-ratio`), and a request that runs
                  takes 5 of them: so no more run at a time than a fifth of the states, however short they are
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from benchmarks.geometries import GEOMETRIES, Geometry, qwen3_next
from benchmarks.workloads import TOKENS

#: All servers. The parts `admitted` and `served` choose among them.
CONTESTANTS = {
    "sglang": [],
    "sglang-suited": [],
    "unified": ["--enable-unified-memory"],
    "vtensor": ["--kv-backend", "vtensor"],
}
#: On the host SGLang has no memory that is divided while it runs.
HOST_CONTESTANTS = {
    "sglang": ["--attention-backend", "torch_native"],
    "sglang-suited": ["--attention-backend", "torch_native"],
    "vtensor": ["--kv-backend", "vtensor"],
}
#: SGLang's default of --swa-full-tokens-ratio; on the host it has memory for all tokens in all layers.
WINDOW_RATIO, HOST_WINDOW_RATIO = 0.8, 1.0
#: SGLang's default of --mamba-full-memory-ratio.
STATE_RATIO = 0.9
#: Memory for so many times the tokens that a workload holds at once is ample: more would gain nothing.
AMPLE = 1.25


@dataclass(frozen=True)
class Sizes:
    """`admitted`: prompts with how many requests of each, and what each answers. `moved`: KV tokens, the most tokens of
    a batch that computes prompts, the prompts and requests of each load, what each answers, and for how long a load
    goes on. `chat`: tokens that the workload of `served` holds at once. On the host, KV tokens of `admitted` and
    `served`; 0: what the device has room for."""

    admitted: dict[int, int]
    answer: int
    tokens: int
    chunk: int
    loads: tuple[tuple[int, int], ...]
    load_answer: int
    load_seconds: float
    chat: int = TOKENS["chat"]
    admitted_tokens: int = 0
    served_tokens: int = 0


@dataclass(frozen=True)
class Model:
    """Rows call it `name`; keys of summaries begin with `prefixes`: one of `admitted`, and one of `served`. The kind of
    memory beside that of all tokens is `second`. A server that stands alone has the geometry `alone`, and two that
    stand side by side have `pair`. `small` writes the model that runs on the host."""

    name: str
    prefixes: tuple[str, str]
    alone: Geometry
    pair: Geometry
    sizes: Sizes
    host_sizes: Sizes
    small: Callable[[Path], Path]
    second: ClassVar[str]
    #: Servers of SGLang that ours is measured beside, one at a time.
    beside: ClassVar[tuple[str, ...]] = ("sglang",)

    def on_host(self, folder: Path) -> Model:
        """The same with the small model, which is written into the folder."""
        config = json.loads((self.small(folder) / "config.json").read_text())
        geometry = Geometry("", 0, config)
        return replace(self, alone=geometry, pair=geometry, sizes=self.host_sizes)

    def room(self, name: str, geometry: Geometry, nbytes: int) -> list[str]:
        """Arguments that give a contestant so many bytes for its cache."""
        raise NotImplementedError


@dataclass(frozen=True)
class Windowed(Model):
    """Half of its layers see a window. With SGLang these have memory for `ratio` times as many tokens as the others."""

    second: ClassVar[str] = "windows"
    ratio: float = WINDOW_RATIO

    def on_host(self, folder: Path) -> Model:
        host = super().on_host(folder)
        assert isinstance(host, Windowed)
        return replace(host, ratio=HOST_WINDOW_RATIO)

    def room(self, name: str, geometry: Geometry, nbytes: int) -> list[str]:
        tokens = 2 * nbytes / geometry.token_bytes / (2 if name == "vtensor" else 1 + self.ratio)
        return ["--max-total-tokens", str(_whole(tokens))]


@dataclass(frozen=True)
class Linear(Model):
    """Most of its layers have linear attention. SGLang is measured with its own split (`sglang`), and with the one that
    suits the workload of `served` best (`sglang-suited`): ample memory for its tokens, and all the rest for states.
    Each server has one state more than requests get, for padding."""

    second: ClassVar[str] = "states"
    beside: ClassVar[tuple[str, ...]] = ("sglang", "sglang-suited")

    def room(self, name: str, geometry: Geometry, nbytes: int) -> list[str]:
        if name == "vtensor":
            return ["--max-total-tokens", str(_whole((nbytes - geometry.state_bytes) / geometry.token_bytes))]
        states, tokens = self.split(name, geometry, nbytes)
        return ["--max-mamba-cache-size", str(states), "--max-total-tokens", str(tokens)]

    def split(self, name: str, geometry: Geometry, nbytes: int) -> tuple[int, int]:
        """States and tokens of one of SGLang's servers."""
        if name == "sglang-suited":
            for_states = nbytes - int(AMPLE * self.sizes.chat) * geometry.token_bytes
        else:
            for_states = int(nbytes * STATE_RATIO / (1 + STATE_RATIO))
        states = for_states // geometry.state_bytes - 1
        return states, _whole((nbytes - (states + 1) * geometry.state_bytes) / geometry.token_bytes)


def _whole(tokens: float) -> int:
    """In the pages of the host; servers round to their own."""
    return int(tokens) // 16 * 16


def _gemma3(folder: Path) -> Path:
    from tests import windowed_models

    return windowed_models.gemma3(folder, window=41)


def _qwen3_5(folder: Path) -> Path:
    from tests import state_models

    return state_models.qwen3_5(folder)


_GPT_OSS = GEOMETRIES["gpt-oss-20b"]
#: What small models are sent on the host.
_HOST = Sizes(
    {120: 14, 24: 32},
    8,
    512,
    64,
    ((24, 24), (150, 6), (24, 24)),
    8,
    8.0,
    chat=512,
    admitted_tokens=640,
    served_tokens=8192,
)
MODELS: dict[str, Model] = {
    "gpt-oss": Windowed(
        "gpt-oss",
        ("swa", "gptoss"),
        _GPT_OSS,
        _GPT_OSS,
        Sizes(
            {32_768: 130, 2048: 1800, 512: 4500}, 128, 131_072, 4096, ((96, 400), (16_384, 15), (96, 400)), 128, 12.0
        ),
        _HOST,
        _gemma3,
    ),
    # Half of the layers take 75 GiB of a GPU's 140. Two servers of 75 do not fit, so they have a third of the layers.
    # Requests of `admitted` are 1.3 times those that run at once with us: three states of 38 MiB each, and pages of 6
    # MiB of 512 tokens. In `moved` the short requests have most of their memory in states, the long ones in tokens.
    "qwen3-next": Linear(
        "qwen3-next",
        ("linear", "qwen3next"),
        qwen3_next(24),
        qwen3_next(16),
        Sizes({32_768: 140, 2048: 480, 512: 550}, 128, 262_144, 8192, ((96, 100), (16_384, 15), (96, 100)), 128, 12.0),
        replace(_HOST, tokens=2048, loads=((24, 24), (150, 12), (24, 24))),
        _qwen3_5,
    ),
}
