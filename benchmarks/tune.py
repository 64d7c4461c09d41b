"""`python -m benchmarks.tune prefill|decode|shared-decode`: configurations of our kernels beside each other.

Prints, for each class of shapes, the candidates by their geometric mean against the best of each shape: what
`kernels/configs.py` says is read off here.
"""

from __future__ import annotations

from itertools import product
from statistics import geometric_mean
from typing import Annotated

import torch
import typer

from benchmarks.kernels import DECODE, GEOMETRIES, PREFILL, SHARED, Case, SharedCase, console, graph, ours, times
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
DECODE_CANDIDATES = [
    Config(16, n, warps, stages, tma, occupancy)
    for n, warps, stages, tma, occupancy in product((64, 128), (2, 4), (2, 3, 4), (True, False), (2, 4))
    if (n, stages, occupancy) not in ((128, 4, 2), (128, 4, 4), (128, 3, 4), (128, 3, 2))
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


def shared(geometry: str) -> None:
    """Candidates for shared decode, case by case."""
    for name in SHARED:
        case = SharedCase(name, geometry)
        calls = {repr(config): case.ours(case.decoder(config)) for config in SHARED_CANDIDATES}
        measured = times({config: graph(call, case.rotation) for config, call in calls.items()}, case.rotation)
        console.print(f"{geometry} {name}")
        for config, value in sorted(measured.items(), key=lambda item: item[1]):
            console.print(f"    {value:.1f} us {config}")
        torch.cuda.empty_cache()


def main(
    what: Annotated[str, typer.Argument(help="prefill, decode or shared-decode")],
    geometries: Annotated[str, typer.Option()] = "Llama-3-8B",
) -> None:
    """Measure and print."""
    if what == "shared-decode":
        for geometry in geometries.split(","):
            shared(geometry)
        return
    decode = what == "decode"
    shapes = [[(n - 1, 1) for n in contexts] for contexts in DECODE] if decode else PREFILL
    candidates = DECODE_CANDIDATES if decode else PREFILL_CANDIDATES
    total: dict[Config, list[float]] = {}
    for geometry in geometries.split(","):
        group = GEOMETRIES[geometry][0] // GEOMETRIES[geometry][1]
        for shape in shapes:
            case = Case(geometry, shape)
            graphs = {}
            for config in candidates:
                rows = max(case.new) * group
                small = config.block_m < 64 and rows >= 16 * config.block_m
                if not decode and (small or (config.block_m > 16 and 2 * rows <= config.block_m)):
                    continue
                try:
                    graphs[repr(config)] = graph(ours(case, decode, config=config), case.rotation)
                except Exception as error:  # out of shared memory: no candidate
                    console.print(f"{config}: {error}")
            measured = times(graphs, case.rotation, replays=3)
            best = min(measured.values())
            ranked = sorted(measured.items(), key=lambda item: item[1])
            rate = case.bytes() / best / 1e3 if decode else case.operations() / best / 1e6
            console.print(f"{geometry} {case.label()}: {best:.1f} us, {rate:.0f} {'GB/s' if decode else 'TFLOP/s'}")
            for name, value in ranked[:4]:
                console.print(f"    {best / value:.3f} {name}")
            for config in candidates:
                if repr(config) in measured:
                    total.setdefault(config, []).append(best / measured[repr(config)])
            del graphs, case
            torch.cuda.empty_cache()
    for config, shares in sorted(total.items(), key=lambda item: -geometric_mean(item[1])):
        console.print(f"{geometric_mean(shares):.3f} of the best over {len(shares)} shapes: {config}")


if __name__ == "__main__":
    typer.run(main)
