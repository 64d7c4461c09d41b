"""A small model of Llama's geometry with random weights, and a tokenizer with a chat template, made in a second.

For machines that have no weights: the real engine runs it, prefix caching behaves as with any model, and what it says
is meaningless. Its words are whole tokens, so that text survives detokenizing and tokenizing again, as the turns of a
chat do. Attention is sharp enough that a wrong K or V changes what comes out.
"""

from __future__ import annotations

import json
import string
from pathlib import Path

import torch
from safetensors.torch import save_file

CORPUS = """
the pages of a conversation are shared by every turn that continues it and a branch shares what came before
memory is mapped when a request needs it and given back when nobody does so an idle server holds very little
you are a helpful assistant that answers every question about virtual memory in a few plain words
what is a page and who owns it when two users ask about the same thing at the same time
please explain how a run holds the pages of one path in order and why a kernel likes that
tell me more about the tree its nodes its leaves and how the oldest of them are evicted first
how long is the context and what happens when it ends in the middle of a page
can you give an example with three short sentences and a number or two in them
one two three four five six seven eight nine ten twelve sixteen sixty hundred thousand
thank you that was clear now say it again for a child and then for an engineer in production
why does the second answer come so much faster than the first one did just before
read write copy map unmap create release reserve free park adopt lease drop trim grow shrink
yes no maybe often never always here there first last next other same new old long short small large
""".strip()

SPECIAL = ["<unk>", "<s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "<s>{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build(
    folder: Path,
    *,
    layers: int = 4,
    hidden: int = 256,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    max_tokens: int = 4096,
    seed: int = 0,
) -> Path:
    """Write config, weights (float32) and tokenizer into `folder`, unless they are there. Returns the folder."""
    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    words, vocab = _write_tokenizer(folder)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": max_tokens,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": SPECIAL.index("<s>"),
        "eos_token_id": SPECIAL.index("<|end|>"),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))

    random = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=random) * (scale / columns**0.5)

    head = matrix(vocab, hidden, 6.0)
    spoken = torch.zeros(vocab, 1)
    spoken[words] = 1.0
    weights = {
        "model.embed_tokens.weight": matrix(vocab, hidden, hidden**0.5),
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": head * spoken,  # other tokens score 0 and are never the best
    }
    for i in range(layers):
        at = f"model.layers.{i}"
        weights |= {
            f"{at}.input_layernorm.weight": torch.ones(hidden),
            f"{at}.post_attention_layernorm.weight": torch.ones(hidden),
            f"{at}.self_attn.q_proj.weight": matrix(heads * head_dim, hidden, 1.5),
            f"{at}.self_attn.k_proj.weight": matrix(kv_heads * head_dim, hidden, 1.5),
            f"{at}.self_attn.v_proj.weight": matrix(kv_heads * head_dim, hidden, 2.0),
            f"{at}.self_attn.o_proj.weight": matrix(hidden, heads * head_dim, 2.0),
            f"{at}.mlp.gate_proj.weight": matrix(2 * hidden, hidden),
            f"{at}.mlp.up_proj.weight": matrix(2 * hidden, hidden),
            f"{at}.mlp.down_proj.weight": matrix(hidden, 2 * hidden),
        }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _write_tokenizer(folder: Path) -> tuple[list[int], int]:
    """Train the tokenizer. Returns the ids of the words that the model may say, and the vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    # Llama's: what decoders.Metaspace does, in steps that llguidance knows.
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    # All that JSON may need, for grammars; the model says none of it unless it is made to.
    alphabet = list(string.ascii_letters + string.digits + string.punctuation)
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    ids = {tokenizer.token_to_id(f"▁{word}") for word in CORPUS.split()}
    return sorted(i for i in ids if i is not None), tokenizer.get_vocab_size()
