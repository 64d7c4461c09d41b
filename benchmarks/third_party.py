"""Other people's benchmarks, by their own command lines, against the servers of the prefix suite.

    python -m benchmarks.third_party --benchmarks gsp --rounds 3 --rows gsp.json
    python -m benchmarks.third_party --benchmarks gsp --devices 0,1,2              a GPU of one host for each server
    python -m benchmarks.third_party --benchmarks mooncake --trace conversation_trace.jsonl --extra \\
        "--num-prompts 300 --mooncake-slowdown-factor 0.25 --goodput ttft:2000 tpot:50"    where a round must be short
    python -m benchmarks.third_party --benchmarks prefix_repetition --compare fa3,fa3-page128,vllm --vllm-boot boot-vllm
    python -m benchmarks.third_party --benchmarks multi_turn --multi-turn multi_turn --vllm-boot boot-vllm
    python -m benchmarks.third_party --quick                the host backend and a small model: does it run?

    gsp                 python -m sglang.bench_serving --dataset-name generated-shared-prefix
    mooncake            python -m sglang.bench_serving --dataset-name mooncake, with the file given by --trace
    agentic             python -m sglang.bench_serving --dataset-name agentic-trace, with the file given by --agentic
    prefix_repetition   vllm bench serve --dataset-name prefix_repetition, where vLLM is installed or has a --vllm-boot
    multi_turn          benchmark_serving_multi_turn.py of vLLM's repository, whose folder --multi-turn names

Sizes are upstream's defaults. What is added is what needs no network (the server's address, a tokenizer that is made
here, a file of the trace), an empty cache at the start of a round, and what makes vLLM's client ask for as many tokens
as it says and no sampling, as SGLang's does by itself. multi_turn has upstream's 24 conversations, whose text is made
of the tokenizer's words, where upstream's example downloads a book. Eight clients have one of them at a time, and all
come to their end: a client of upstream's that has several leaves the last ones unfinished.
`--extra` goes to the end of upstream's command line.

Servers and rounds are as in `benchmarks.prefix`, but servers read and write text, and stream every token unless
`--stream-interval` says otherwise. With 1,024 streams of single tokens the HTTP servers and the client, which are equal
for all contestants, may be busier than the GPU: then ratios are nearer to 1 than those of the engines. A round is a
process of upstream's, with upstream's seed, so all rounds have equal requests; its own account of it is the row. Which
tokens were cached only SGLang's client says, of SGLang's servers.

gsp runs 1,024 requests at once and holds half a million tokens. Several such servers do not fit on one GPU: without
`--devices` each is then started anew for each round. Calls with `--rounds 1 --first N` and `benchmarks.merge --name
third_party` make one result of several short runs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import results, tokenizer
from benchmarks.contestants import GPU, HOST, HOST_TOKENS, VLLM_NAME, Client, Plan, VllmClient, in_vllm
from benchmarks.geometries import LLAMA
from benchmarks.prefix import CONTEXT, Suite, console, devices_of, large_model, room_for, small_model, table
from benchmarks.rounds import Row, summarize, whole
from benchmarks.serving import end_with_servers
from sglang_vtensor.demo import end_with_parent


@dataclass(frozen=True)
class Benchmark:
    """One of other people's: its client (`sglang`, `sglang_chat`, `vllm` or `multi_turn`), its arguments, those of a
    shorter run that warms a server up, and the KV tokens that it comes back to or holds at once."""

    client: str
    arguments: tuple[str, ...]
    warm: tuple[str, ...] = ()
    tokens: int = 0


BENCHMARKS = {
    "gsp": Benchmark("sglang", ("--dataset-name", "generated-shared-prefix"), tokens=64 * 2048 + 64 * 16 * (128 + 256)),
    "mooncake": Benchmark(
        "sglang",
        ("--dataset-name", "mooncake"),
        ("--num-prompts", "64", "--mooncake-slowdown-factor", "0"),
    ),
    "agentic": Benchmark(
        "sglang_chat",
        ("--dataset-name", "agentic-trace"),
        ("--num-prompts", "32", "--agentic-max-turns", "1"),
    ),
    "prefix_repetition": Benchmark(
        "vllm",
        ("--dataset-name", "prefix_repetition", "--ignore-eos", "--temperature", "0"),
        tokens=10 * 256 + 1000 * (256 + 128),
    ),
    "multi_turn": Benchmark(
        "multi_turn",
        ("--input-file", "multi_turn.json", "--num-clients", "8", "--no-early-stop"),
        ("--max-turns", "2"),
        tokens=24 * (500 + 5000 + 9 * (160 + 120)),
    ),
}
#: Of vLLM's repository: the script of `multi_turn`, and what upstream's example generates.
SCRIPT, CONVERSATIONS = "benchmark_serving_multi_turn.py", "generate_multi_turn.json"
#: Words of the text that conversations are made of: each is a token, and no two conversations have the same ones.
TEXT_WORDS = 1 << 17
#: What makes them small.
QUICK = {
    "gsp": "--gsp-num-groups 2 --gsp-prompts-per-group 3 --gsp-system-prompt-len 64 --gsp-question-len 16 "
    "--gsp-output-len 8",
    "mooncake": "--num-prompts 3",
    "agentic": "--sharegpt-output-len 8",
    "prefix_repetition": "--num-prompts 6 --prefix-repetition-num-prefixes 2 --prefix-repetition-prefix-len 64 "
    "--prefix-repetition-suffix-len 16 --prefix-repetition-output-len 8",
    "multi_turn": "--max-turns 4 --limit-min-tokens 8 --limit-max-tokens 8",
}
#: A round that takes longer has hung.
ROUND_SECONDS = 600


def command(benchmark: Benchmark, client: Client, plan: Plan, out: Path) -> list[str]:
    """Upstream's command line against a server: writes what it measured to `out`."""
    vllm = isinstance(client, VllmClient)
    name = VLLM_NAME if vllm else str(plan.model)
    model = ["--model", str(plan.model), "--served-model-name", name, "--tokenizer", str(plan.model)]
    if benchmark.client == "vllm":
        at = ["--backend", "openai", "--base-url", client.url, "--endpoint", "/v1/completions"]
        save = ["--save-result", "--result-dir", str(out.parent), "--result-filename", out.name]
        module = ["vllm.entrypoints.cli.main", "bench", "serve", *at, *model, *benchmark.arguments]
        return in_vllm(plan, ["-m", *module, *save, "--disable-tqdm"])
    if benchmark.client == "multi_turn":
        script, *arguments = benchmark.arguments
        at = ["--url", client.url, "--model", str(plan.model), "--served-model-name", name]
        return in_vllm(plan, [script, *at, *arguments, "--stats-json-output", str(out)])
    speaks = {"sglang": ("sglang", "vllm"), "sglang_chat": ("sglang-oai-chat", "vllm-chat")}[benchmark.client]
    at = ["--backend", speaks[vllm], "--base-url", client.url]
    save = ["--flush-cache", "--output-file", str(out), "--output-details", *([] if vllm else ["--cache-report"])]
    module = ["sglang.bench_serving", *at, *model, *benchmark.arguments]
    return [sys.executable, "-m", *module, *save, "--disable-tqdm"]


def read(text: str) -> dict[str, Any]:
    """A row of what upstream's client wrote, of SGLang's or of vLLM's. Raises `RuntimeError` if a request failed.

    SGLang refuses a stream within an answer of status 200. Its client takes that for an answer with all tokens that it
    asked for; only the time to the first token stays 0."""
    told = json.loads(text)
    errors = [error for error in told.get("errors", []) if error]
    failed = told.get("failed", max(len(errors), told.get("ttfts", []).count(0)))
    if failed or not told["completed"]:
        done = f"upstream's client counts {told['completed']} as done"
        raise RuntimeError(f"{failed} requests failed or got no token, and {done}: {errors[:1]}")
    every = told.get("total_throughput") or told["total_token_throughput"]
    if not (prompt := told["total_input_tokens"]):  # of many turns SGLang's client adds up no prompts
        prompt = sum(told["input_lens"])
        every += prompt / told["duration"]
    row = {
        "seconds": round(told["duration"], 3),
        "requests": told["completed"],
        "requests_per_second": round(told["request_throughput"], 3),
        "tokens_per_second": round(every, 1),
        "output_tokens_per_second": round(told["output_throughput"], 1),
        "prompt_tokens": prompt,
        "output_tokens": told["total_output_tokens"],
        "most_at_once": told["max_concurrent_requests"],
    }
    row |= {
        f"{what}_{at}_ms": round(told[f"{at}_{what}_ms"], 2) for what in ("ttft", "tpot") for at in ("median", "p99")
    }
    if cached := told.get("cache_report"):
        row["cached_share"] = round(cached["total_cached_tokens"] / cached["total_prompt_tokens"], 4)
    # By the names that rows of our own replay have.
    goodput = {"goodput_requests_per_second": "request_goodput", "goodput_share": "slo_attainment"}
    row |= {ours: round(told[theirs], 4) for ours, theirs in goodput.items() if told.get(theirs) is not None}
    return row | {f"{what}_target_ms": target for what, target in (told.get("goodput_slos_ms") or {}).items()}


def read_turns(text: str, said: str) -> dict[str, Any]:
    """The same of the client of `multi_turn`, which writes what came of each request that it has an answer of, and says
    how many conversations came to their end."""
    turns = json.loads(text)
    ended = re.search(r"finished (\d+) out of (\d+) conversations\)", said)
    if not turns or ended is None or ended[1] != ended[2]:
        raise RuntimeError(f"conversations did not come to their end: {ended[0] if ended else said[-1000:]}")
    seconds = (max(t["start_time_ms"] + t["latency_ms"] for t in turns) - min(t["start_time_ms"] for t in turns)) / 1e3
    prompt, new = (sum(turn[f"{what}_num_tokens"] for turn in turns) for what in ("input", "output"))
    row = {
        "seconds": round(seconds, 3),
        "requests": len(turns),
        "requests_per_second": round(len(turns) / seconds, 3),
        "tokens_per_second": round((prompt + new) / seconds, 1),
        "output_tokens_per_second": round(new / seconds, 1),
        "prompt_tokens": prompt,
        "output_tokens": new,
    }
    for what in ("ttft", "tpot"):
        values = sorted(turn[f"{what}_ms"] for turn in turns)
        row[f"{what}_median_ms"] = round(statistics.median(values), 2)
        row[f"{what}_p99_ms"] = round(values[int(0.99 * (len(values) - 1))], 2)
    return row


def write_conversations(upstream: Path, folder: Path) -> None:
    """What `multi_turn` reads, in the folder that it runs in: upstream's example, with a text of ours."""
    example = json.loads((upstream / CONVERSATIONS).read_text())
    (folder / "multi_turn.json").write_text(json.dumps(example | {"text_files": ["multi_turn.txt"]}))
    words = random.Random(0).choices(tokenizer.WORDS, k=TEXT_WORDS)
    (folder / "multi_turn.txt").write_text("".join(f" {word}" for word in words))


class ThirdParty(Suite):
    """Rounds of upstream's clients, in turn."""

    def __init__(
        self, names: list[str], benchmarks: dict[str, Benchmark], plan: Plan, head: Row, file: Path | None
    ) -> None:
        super().__init__(names, {}, plan, head, file)
        self.benchmarks = benchmarks

    def warm_up(self, kind: str, name: str, client: Client) -> None:
        if not self.plan.host:  # where nothing is compiled
            benchmark = self.benchmarks[kind]
            self._upstream(replace(benchmark, arguments=(*benchmark.arguments, *benchmark.warm)), name, client)

    def once(self, kind: str, number: int, name: str, client: Client) -> Row:
        client.flush()
        before = client.stats()
        row = self._upstream(self.benchmarks[kind], name, client)
        row |= client.counted(before, row["seconds"])
        return row | {"upstream": shlex.join(["python", *shown(self.benchmarks[kind])])}

    def _upstream(self, benchmark: Benchmark, name: str, client: Client) -> Row:
        """Upstream's process. It keeps the prompts that it makes below HOME, which is ours: they belong to one
        tokenizer. Raises `RuntimeError` if it ends otherwise than with a result."""
        folder = self.plan.model.parent
        out = folder / "upstream.json"
        out.unlink(missing_ok=True)
        environment = os.environ | {"HOME": str(folder), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            command(benchmark, client, self.plan, out),
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=ROUND_SECONDS,
            check=False,
            preexec_fn=end_with_parent,
        )
        if done.returncode or not out.exists():
            raise RuntimeError(f"{shlex.join(shown(benchmark))} against {name} failed:\n{done.stdout[-4000:]}")
        written = out.read_text()
        return read_turns(written, done.stdout) if benchmark.client == "multi_turn" else read(written)


def shown(benchmark: Benchmark) -> list[str]:
    """What stands in results of upstream's command line: which module, and what is not about where the server is."""
    sglang = ["-m", "sglang.bench_serving"]
    module = {"vllm": ["-m", "vllm.entrypoints.cli.main", "bench", "serve"], "sglang": sglang, "sglang_chat": sglang}
    named = (Path(one).name if os.sep in one else one for one in benchmark.arguments)
    return [*module.get(benchmark.client, []), *named]


def choose(
    kinds: str,
    extra: str,
    *,
    quick: bool,
    vllm: bool,
    trace: Path | None = None,
    agentic: Path | None = None,
    multi_turn: Path | None = None,
) -> dict[str, Benchmark]:
    """The benchmarks of these names (with commas), or those that can run. Raises `typer.BadParameter` for one that is
    unknown, or that cannot run."""
    files, options = {"mooncake": trace, "agentic": agentic}, {"mooncake": "--trace", "agentic": "--agentic"}
    missing = {kind: f"needs {options[kind]} FILE" for kind, file in files.items() if file is None}
    missing |= {} if vllm else {"prefix_repetition": "needs vLLM: --vllm-boot FILE"}
    if multi_turn is None or not (multi_turn / SCRIPT).exists():
        missing["multi_turn"] = f"needs --multi-turn FOLDER: vLLM's benchmarks/multi_turn, with {SCRIPT}"
    chosen = kinds.split(",") if kinds else [kind for kind in BENCHMARKS if kind not in missing]
    for kind in chosen:
        if kind not in BENCHMARKS or kind in missing:
            why = missing.get(kind, f"is unknown: there are {', '.join(BENCHMARKS)}")
            raise typer.BadParameter(f"{kind!r} {why}")
    for kind in missing.keys() - set(chosen):
        console.print(f"without {kind}: it {missing[kind]}")
    made = {}
    for kind in chosen:
        more = [*(QUICK[kind].split() if quick else []), *shlex.split(extra)]
        if (file := files.get(kind)) is not None:
            more = ["--dataset-path", str(file.resolve()), *more]
        script = [str((multi_turn / SCRIPT).resolve())] if kind == "multi_turn" and multi_turn else []
        made[kind] = replace(BENCHMARKS[kind], arguments=(*script, *BENCHMARKS[kind].arguments, *more))
    return made


def main(
    kinds: Annotated[str, typer.Option("--benchmarks", help="With commas; all that can run by default.")] = "",
    compare_with: Annotated[str, typer.Option("--compare", help="Contestants beside ours, with commas.")] = "",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    first: Annotated[int, typer.Option(min=1, help="The number of the first round.")] = 1,
    in_turn: Annotated[bool, typer.Option("--in-turn", help="One server at a time, even where all fit.")] = False,
    devices: Annotated[str, typer.Option(help="With commas, a GPU for each contestant, ours first.")] = "",
    stream_interval: Annotated[
        int, typer.Option(min=1, help="Of all servers, tokens. They ship with 1, with which HTTP may take longest.")
    ] = 1,
    tokens: Annotated[int, typer.Option(help="KV tokens of each server; 0 for what the device has room for.")] = 0,
    trace: Annotated[Path | None, typer.Option(exists=True, help="A Mooncake trace.")] = None,
    agentic: Annotated[Path | None, typer.Option(exists=True, help="A trace of agents, as upstream reads it.")] = None,
    multi_turn: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="The folder benchmarks/multi_turn of vLLM.")
    ] = None,
    extra: Annotated[str, typer.Option(help="Further arguments of upstream's command line.")] = "",
    vllm_boot: Annotated[
        Path | None,
        typer.Option(exists=True, envvar="VTENSOR_VLLM_BOOT", help="A shell file, sourced before vLLM is started."),
    ] = None,
    quick: Annotated[bool, typer.Option(help="A small model on the host backend; nothing is written.")] = False,
    write: Annotated[bool, typer.Option(help="Write the results file.")] = True,
    rows_file: Annotated[Path | None, typer.Option("--rows", help="Write this run's rows, as JSON, here too.")] = None,
) -> None:
    """Measure, print, and merge into third_party.json."""
    end_with_servers()
    names = ["vtensor", *(compare_with.split(",") if compare_with else [] if quick else ["fa3", "fa3-page128"])]
    known = HOST if quick else GPU
    if unknown := set(names) - set(known):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))} unknown: there are {', '.join(known)}")
    vllm = vllm_boot is not None or importlib.util.find_spec("vllm") is not None
    chosen = choose(kinds, extra, quick=quick, vllm=vllm, trace=trace, agentic=agentic, multi_turn=multi_turn)
    if "mooncake" in chosen and "vllm" in names:
        raise typer.BadParameter("sglang.bench_serving replays mooncake's times only against SGLang: leave vllm out")
    on = devices_of(devices, names, alone=in_turn or quick)
    if quick:
        room = tokens or HOST_TOKENS
    else:
        needed = max(benchmark.tokens for benchmark in chosen.values())
        room, in_turn = room_for(1 if on else len(names), tokens, needed, in_turn)
    with tempfile.TemporaryDirectory() as folder:
        model, vocabulary = small_model(Path(folder)) if quick else large_model(Path(folder))
        if not quick:
            tokenizer.write(model, vocabulary, LLAMA.config["bos_token_id"], LLAMA.config["eos_token_id"])
        if multi_turn and "multi_turn" in chosen:
            write_conversations(multi_turn, model.parent)
        streamed: dict[str, Any] = {"text": True, "stream_interval": stream_interval}
        plan = Plan(model, vocabulary, CONTEXT, room, quick, vllm_boot, **streamed, devices=on)
        suite = ThirdParty(names, chosen, plan, results.head(), rows_file)
        (suite.in_turn if in_turn else suite.side_by_side)(list(chosen), range(first, first + rounds))
    console.print(table(suite.rows))
    console.print(summarize(whole(suite.rows)))
    if write and not quick:
        path, dropped = results.add_rounds("third_party", [suite.rows])
        console.print(results.written(path, dropped))


if __name__ == "__main__":
    typer.run(main)
