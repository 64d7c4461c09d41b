"""`python -m benchmarks.tune prefill|shared-decode|shared-decode-fp8`: configurations of our kernels beside each other.

Prints, for each class of shapes, the candidates by their geometric mean against the best of each shape: what
`kernels/configs.py` says is read off here.
"""

from __future__ import annotations

from statistics import geometric_mean
from typing import Annotated

import torch
import typer

from benchmarks.kernels import (
    GEOMETRIES,
    PREFILL,
    SHARED,
    Case,
    PlainCase,
    SharedCase,
    console,
    fa3,
    graph,
    ours,
    times,
)
from sglang_vtensor.kernels.launch import FP8
from sglang_vtensor.kernels.plan import Config

PREFILL_CANDIDATES = [
    Config(m, n, warps, stages, tma, occupancy)
    for m, n, warps, stages, tma, occupancy in [
        (16, 64, 4, 3, True, 2),
        (16, 128, 4, 3, True, 1),
        (32, 64, 4, 3, True, 2),
        (64, 64, 4, 3, True, 2),
        (64, 128, 4, 2, True, 1),
        (64, 128, 4, 3, True, 1),
        (128, 64, 4, 3, True, 1),
        (128, 64, 8, 3, True, 1),
        (128, 128, 8, 3, True, 1),
    ]
] + [
    Config(64, 64, 4, 3, True, 2, hopper=True),
    Config(128, 128, 4, 2, True, 1, hopper=True),
    Config(128, 64, 4, 4, True, 1, hopper=True),
]
SHARED_CANDIDATES = [
    Config(m, n, warps, stages, True, occupancy)
    for m, n, warps, stages, occupancy in [
        (64, 64, 4, 3, 2),
        (128, 64, 8, 3, 1),
        (128, 64, 8, 5, 1),
        (128, 128, 8, 3, 1),
    ]
]
FP8_CANDIDATES = [
    Config(m, n, warps, stages, True, occupancy, narrow=narrow)
    for m, n, warps, stages, occupancy in [
        (64, 64, 4, 3, 2),
        (64, 128, 4, 3, 2),
        (64, 128, 4, 2, 2),
        (128, 128, 8, 3, 1),
        (16, 128, 4, 4, 2),
    ]
    for narrow in (False, True)
]


def shared(geometry: str, candidates: list[Config], dtype: torch.dtype) -> None:
    """Candidates for shared decode, case by case."""
    for name in [*SHARED, "nothing shared"]:
        case = PlainCase([8192] * 64, geometry, dtype) if name not in SHARED else SharedCase(name, geometry, dtype)
        calls = {repr(config): case.ours(case.decoder(config)) for config in candidates}
        calls["fa3, pages of 128"] = fa3(case, 128)
        measured = times({config: graph(call, case.rotation) for config, call in calls.items()}, case.rotation)
        console.print(f"{geometry} {name}")
        for config, value in sorted(measured.items(), key=lambda item: item[1]):
            console.print(f"    {value:.1f} us {config}")
        torch.cuda.empty_cache()


def main(
    what: Annotated[str, typer.Argument(help="prefill, shared-decode or shared-decode-fp8")],
    geometries: Annotated[str, typer.Option()] = "Llama-3-8B",
) -> None:
    """Measure and print."""
    if what.startswith("shared-decode"):
        fp8 = what.endswith("fp8")
        for geometry in geometries.split(";"):
            shared(geometry, *((FP8_CANDIDATES, FP8[0]) if fp8 else (SHARED_CANDIDATES, torch.bfloat16)))
        return
    total: dict[Config, list[float]] = {}
    for geometry in geometries.split(","):
        group = GEOMETRIES[geometry][0] // GEOMETRIES[geometry][1]
        for shape in PREFILL:
            case = Case(geometry, shape)
            graphs = {}
            for config in PREFILL_CANDIDATES:
                rows = max(case.new) * group
                small = config.block_m < 64 and rows >= 16 * config.block_m
                if small or (config.block_m > 16 and 2 * rows <= config.block_m):
                    continue
                try:
                    graphs[repr(config)] = graph(ours(case, config=config), case.rotation)
                except Exception as error:  # out of shared memory: no candidate
                    console.print(f"{config}: {error}")
            measured = times(graphs, case.rotation, replays=3)
            best = min(measured.values())
            ranked = sorted(measured.items(), key=lambda item: item[1])
            rate = case.operations() / best / 1e6
            console.print(f"{geometry} {case.label()}: {best:.1f} us, {rate:.0f} TFLOP/s")
            for name, value in ranked[:4]:
                console.print(f"    {best / value:.3f} {name}")
            for config in PREFILL_CANDIDATES:
                if repr(config) in measured:
                    total.setdefault(config, []).append(best / measured[repr(config)])
            del graphs, case
            torch.cuda.empty_cache()
    for config, shares in sorted(total.items(), key=lambda item: -geometric_mean(item[1])):
        console.print(f"{geometric_mean(shares):.3f} of the best over {len(shares)} shapes: {config}")


if __name__ == "__main__":
    typer.run(main)
