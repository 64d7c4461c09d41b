"""Models that keep states of linear attention or of Mamba, as whole servers on a GPU."""

from __future__ import annotations

import pytest

from benchmarks.logprobs import ask, spoken
from benchmarks.serving import server
from sglang_vtensor.server_client import server_stats
from tests import state_models
from tests.e2e.compare import Prompts, mean_difference

pytest.importorskip("sgl_kernel.flash_attn")

#: FlashInfer's kernels for linear attention take heads of 128 only.
DIMS = {"qwen3_5": {"dims": (128, 128)}, "qwen3_next": {"dims": (128, 128)}, "nemotron_h": {}}
COMMON = ["--load-format", "auto", "--mem-fraction-static", "0.2", "--chunked-prefill-size", "2048"]


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("name", DIMS)
def test_log_probabilities_are_as_near_as_sglangs_own(tmp_path, name, graphs):
    """Answers behind states that were kept: how far their log-probabilities are from SGLang's own of the same text,
    computed at once. In bfloat16 SGLang's own answers are not these either, so they are the measure. Graphs are padded
    for three requests, and for five."""
    model = getattr(state_models, name)(tmp_path / name, dtype="bfloat16", **DIMS[name])
    common = [*COMMON, *([] if graphs else ["--disable-cuda-graph"])]
    prompt = Prompts(71)
    stem = prompt(1100)
    prompts, new = [stem + prompt(count) for count in (20, 600, 900, 1100, 1300)], 60
    with (
        server("fa3", model, tmp_path / "fa3.log", arguments=["--attention-backend", "fa3", *common]) as (theirs, _),
        server("vtensor", model, tmp_path / "ours.log", arguments=["--kv-backend", "vtensor", *common]) as (url, _),
    ):
        for turn in (1, 2):
            said = {who: ask(who, prompts, new, at_once=len(prompts)) for who in (theirs, url)}
            texts = {who: spoken(prompts, answers) for who, answers in said.items()}
            asked = {who: ask(theirs, texts[who], 1, at_once=len(prompts), told_from=0) for who in texts}
            told = {who: [one[-new:] for one in answers] for who, answers in asked.items()}
            own = mean_difference(said[theirs], told[theirs])
            assert mean_difference(said[url], told[url]) < 1.5 * own, turn
            prompts = [text + prompt(40) for text in texts[theirs]][: 5 - 2 * turn]  # three go on: graphs are padded
        (stats,) = server_stats(url)
    assert stats["prefix_tokens_served"] >= 3 * 1024, "the second turn went on behind the states of the first"
    assert stats["states_owned"] > 0
