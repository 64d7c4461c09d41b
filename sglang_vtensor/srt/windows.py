"""Which layers of a model see a window: from its configuration, before its weights are there, as pages are chosen
then; and held to its layers when these are there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_vtensor.srt.options import Refused

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

#: Architectures with windows that are served. SGLang gives their layers the window of `layer_types`, and K and V of all
#: layers have one shape.
SERVED = ("GptOssForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")
WINDOW, ALL = "sliding_attention", "full_attention"


def windows_of(model: Any) -> list[int | None]:
    """Of each layer, how many tokens before one it sees, as SGLang counts them: without that token itself; None: all.

    `model` is SGLang's `ModelConfig`. Raises `Refused` for windows that are not served.
    """
    config = model.hf_text_config
    name = (model.hf_config.architectures or ["this model"])[0]
    default = "Run this model with --kv-backend default."
    if not (model.is_hybrid_swa or getattr(model, "sliding_window_size", None)):
        return [None] * int(model.num_hidden_layers)
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if name not in SERVED:
        raise Refused(
            f"--kv-backend vtensor does not support {name}: of models whose layers see a window, it serves "
            f"{', '.join(SERVED)}. {default}"
        )
    if not kinds or {*kinds} - {WINDOW, ALL} or ALL not in kinds or (WINDOW in kinds and not (window and window > 1)):
        raise Refused(
            f"--kv-backend vtensor does not support this {name}: its layers are {kinds or 'not named'}, with a window "
            f"of {window} tokens. {ALL} layers, {WINDOW} ones and a window of 2 tokens or more are wanted. {default}"
        )
    return [int(window or 0) - 1 if kind == WINDOW else None for kind in kinds]


def refuse_readers(windows: Sequence[int | None], backends: Sequence[str | None]) -> None:
    """Raise `Refused` for an attention backend that reads whole contexts, and only then masks what a window hides."""
    if any(window is not None for window in windows) and "torch_native" in backends:
        raise Refused(
            "--attention-backend torch_native reads contexts from their start, which is gone behind a window: leave it "
            "out"
        )


def window_of(layer: Any) -> int | None:
    """How many tokens before one a `RadixAttention` sees, that token not counted; None: all."""
    seen: int | None = layer.sliding_window_size
    return None if seen is None or seen < 0 else seen


def hold_to(windows: Sequence[int | None], sides: Sequence[tuple[int, int] | None], model: torch.nn.Module) -> None:
    """Raise `Refused` where a layer of the model that SGLang has built sees another window than its side keeps memory
    for: it would read what is gone; or where it keeps K and V and no side is laid out for that. `sides` are those of
    the layers, `windows` those of the sides."""
    from sglang.srt.layers.radix_attention import RadixAttention

    for layer in model.modules():
        if not isinstance(layer, RadixAttention):
            continue
        seen = window_of(layer)
        side = sides[layer.layer_id]
        if side is None:
            raise Refused(
                f"layer {layer.layer_id} of {type(model).__name__} keeps K and V, and memory was laid out for a state. "
                "Run this model with --kv-backend default."
            )
        kept = windows[side[0]]
        if seen != kept:
            raise Refused(
                f"layer {layer.layer_id} of {type(model).__name__} sees a window of {seen} tokens, and memory was laid "
                f"out for one of {kept} (None: all tokens). Run this model with --kv-backend default."
            )
