"""What the pages of each side would be for models with two kinds of layers, as a table in `docs/sides.md`. Arithmetic,
no measurement.

python -m benchmarks.sides
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.page_sizes import GRANULARITY, TILE_TOKENS

PAGE = Path(__file__).parents[1] / "docs" / "sides.md"
#: Tokens a frame may have, and frames that one page may span.
FRAMES = [TILE_TOKENS << n for n in range(3)]
SPANS = [1 << n for n in range(5)]
#: A page with more padding than this spans more frames instead.
LARGEST_PADDING = 0.1
#: So many tokens before the window a tile of some kernel may begin.
BEFORE_WINDOW = 160


@dataclass(frozen=True)
class Tokens:
    """A side of keys and values, in bfloat16. `window` is in tokens; None: all are read."""

    layers: int
    kv_heads: int
    head_dim: int
    window: int | None = None

    def bytes_a_token(self, tp: int) -> int:
        return self.layers * 2 * max(1, self.kv_heads // tp) * self.head_dim * 2


@dataclass(frozen=True)
class States:
    """A side of recurrent states, one for each request and each kept checkpoint: a float32 matrix of each head, and the
    inputs of a convolution in bfloat16."""

    layers: int
    heads: int
    matrix: int  # elements of a head
    channels: int  # of the convolution
    taps: int

    def bytes_a_state(self, tp: int) -> int:
        return self.layers * (self.heads * self.matrix * 4 + self.channels * (self.taps - 1) * 2) // tp


def delta_net(layers: int, key_heads: int, value_heads: int) -> States:
    """Gated DeltaNet with heads of 128."""
    return States(layers, value_heads, 128 * 128, (2 * key_heads + value_heads) * 128, 4)


#: From each model's config.json; the number of layers of a kind follows from its pattern.
MODELS: dict[str, tuple[Tokens, Tokens | States]] = {
    "gpt-oss-20b": (Tokens(12, 8, 64), Tokens(12, 8, 64, 128)),
    "gpt-oss-120b": (Tokens(18, 8, 64), Tokens(18, 8, 64, 128)),
    "Gemma-3-4B": (Tokens(5, 4, 256), Tokens(29, 4, 256, 1024)),
    "Gemma-3-12B": (Tokens(8, 8, 256), Tokens(40, 8, 256, 1024)),
    "Gemma-3-27B": (Tokens(10, 16, 128), Tokens(52, 16, 128, 1024)),
    "Qwen3-Next-80B-A3B": (Tokens(12, 2, 256), delta_net(36, 16, 32)),
    "Qwen3.5-27B": (Tokens(16, 4, 256), delta_net(48, 16, 48)),
    "Nemotron-H-8B": (Tokens(4, 8, 128), States(24, 128, 64 * 128, 128 * 64 + 2 * 8 * 128, 4)),
}
HEAD = f"""# Sides

Of models with two kinds of layers, gpt-oss, Gemma 3, Qwen3-Next, Qwen3.5 and Nemotron-H are served. This is the
arithmetic that their memory starts from: each kind is a side, whose pages are whole granules of
{GRANULARITY >> 20} MiB. A frame has as
many tokens on each side. Where the bytes of a frame are no whole granules, one page of that side spans several frames
here: as few as leave at most {LARGEST_PADDING:.0%} of padding. The server does not do that yet, and pads such pages.
Of {FRAMES[0]}, {FRAMES[1]} and {FRAMES[2]} tokens a frame, the number with the shortest pages is taken. A state is not
divided: it takes whole granules by itself. KV is bfloat16, states are float32 with bfloat16 convolutions, as SGLang
keeps them; tensor parallelism divides heads, and a rank has at least one KV head.
Made by `python -m benchmarks.sides`.

*held* is what a long request holds on the second side: of a window, whole pages from {BEFORE_WINDOW} tokens before the
window on, as a tile of some kernel may begin there; of a state, one. *as tokens* is that in tokens of the first side.

"""
COLUMNS = (
    "model",
    "TP",
    "tokens a frame",
    "all tokens: bytes a token",
    "frames a page",
    "MiB",
    "padding",
    "the other: bytes a token, or a state",
    "frames a page",
    "MiB",
    "padding",
    "held, MiB",
    "as tokens",
)


@dataclass(frozen=True)
class Pages:
    """Of one side: frames that a page spans, its bytes, and the share that is padding."""

    span: int
    nbytes: int
    padding: float


def pages(frame_bytes: int) -> Pages:
    """The shortest pages with little padding, of a side whose frames have so many bytes."""
    found = []
    for span in SPANS:
        nbytes = -(-span * frame_bytes // GRANULARITY) * GRANULARITY
        found.append(Pages(span, nbytes, 1 - span * frame_bytes / nbytes))
        if found[-1].padding <= LARGEST_PADDING:
            return found[-1]
    return min(found, key=lambda one: one.padding)


def choose(sides: list[Tokens], tp: int) -> tuple[int, list[Pages]]:
    """Tokens a frame, and the pages of each side."""
    choices = [(frame, [pages(frame * side.bytes_a_token(tp)) for side in sides]) for frame in FRAMES]
    return min(choices, key=lambda choice: (max(choice[0] * one.span for one in choice[1]), -choice[0]))


def row(name: str, tp: int) -> str:
    full, other = MODELS[name]
    if isinstance(other, States):
        frame, (first,) = choose([full], tp)
        nbytes = other.bytes_a_state(tp)
        held = -(-nbytes // GRANULARITY) * GRANULARITY
        second = f"{nbytes:,} | - | {held >> 20} | {1 - nbytes / held:.1%}"
    else:
        frame, (first, of_window) = choose([full, other], tp)
        tokens = frame * of_window.span
        assert other.window is not None
        # The window may begin at the end of a page, and its last token at the start of one.
        held = (-(-(other.window + BEFORE_WINDOW - 1) // tokens) + 1) * of_window.nbytes
        second = f"{other.bytes_a_token(tp):,} | {of_window.span} | {of_window.nbytes >> 20} | {of_window.padding:.1%}"
    a_token = full.bytes_a_token(tp)
    return (
        f"| {name} | {tp} | {frame} | {a_token:,} | {first.span} | {first.nbytes >> 20} | {first.padding:.1%} | "
        f"{second} | {held >> 20} | {held // a_token:,} |"
    )


def table() -> str:
    """The whole page."""
    head = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    return HEAD + "\n".join([*head, *(row(name, tp) for name in MODELS for tp in (1, 2, 4, 8))]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(table())
    print(f"written to {PAGE}")
