"""Shared decode: one new token of each request attends to its context, and a run of tokens that several requests share
is read once for all of them.

    sharing = Sharing(slots=1024, requests=256, page_tokens=128)     who shares what (`sglang_vtensor.sharing`)
    decoder = SharedDecoder(max_requests=256, slots=1024, page_tokens=128, max_tokens=8192, ...)
    decoder.update(sharing.tables)                                   when it has changed
    decoder.find_pages(table, slots, contexts)                       once a step
    decoder.plan(slots, contexts)                                    once a step: three small kernels
    decoder(q, k, v, scale=scale)                                    once a layer

A unit is a run of tokens and the requests that read it: a shared run, or what a request has for itself. Its queries,
of all its requests with all their grouped heads, are packed into tiles of BLOCK_M rows, as many whole requests as there
is room for, and each tile goes along all keys of the unit. The work is divided equally among teams of programs (one
program a KV head), so nothing is waited for, however unequal the units are:

    time    | run: tile 0 | run: tile 1 | own 2 |       The tiles of a run go along its keys side by side, at the same
     |      | - - - - - - | - - - - - - | own 3 |       time, so that the keys come from memory once. Everything else
     v      | own 0  own 1| own 1  own 2|       |       is one line, which fills what is left of each team's share.
              team 0        team 1        team 2

Where a tile is cut, each share leaves a partial result with its log-sum-exp. A merge puts together what is on the path
of each request, whose places are found once a step.

A tile costs COST tiles of keys beside its keys: they stand before its keys, and nothing is done there.

Keys are read by pages, which are whole tiles: one load from a page table, and a tile is a rectangle in memory. Nothing
needs to be mapped for this, no request's context to be contiguous. The page table is taken from SGLang's table of slots
before a step: that one may change while the step runs, as requests end whose slots are others' then.

Layers that see a window have a decoder of their own (`for_window`), beside that of the layers which see all tokens. A
unit begins there with the first tile that one of its requests sees; units behind all windows are left out, and nothing
of them is read.

Safe in a CUDA graph: grids and buffers are fixed; who shares what, and all lengths, are read on the device.
"""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
import triton

from sglang_vtensor.kernels import configs
from sglang_vtensor.kernels.compiling import on
from sglang_vtensor.kernels.launch import DIMS, Scales, base_two, check, check_window, narrow, tile_descriptors
from sglang_vtensor.kernels.plan import Config
from sglang_vtensor.kernels.shared_attend import _pieces
from sglang_vtensor.kernels.shared_merge import _together
from sglang_vtensor.kernels.shared_plan import (
    ARRANGED,
    COST,
    FOUND,
    LEVELS,
    LINE_FIELDS,
    LOCATED,
    LOOKED,
    SHORTEST,
    TEAM_FIELDS,
    UNIT_FIELDS,
    _arrange,
    _divide,
    _find_pages,
    _locate,
)
from sglang_vtensor.sharing import DEPTH, Tables


class SharedDecoder:
    """Decode over what requests share, for up to `max_requests` requests of one token each, on static buffers.

    Requests are known by their slots, below `slots`, and have up to `max_tokens` tokens, in pages of `page_tokens`. The
    type of keys and values, `kv_dtype`, chooses the configuration where `config` is not given. One decoder serves all
    layers of a geometry, and of a `window`; two streams must not share one.
    """

    #: The tokens before each that it sees; None: all.
    window: int | None = None

    def __init__(
        self,
        *,
        max_requests: int,
        slots: int,
        page_tokens: int,
        max_tokens: int,
        q_heads: int,
        kv_heads: int,
        head_dim: int,
        device: torch.device | str,
        kv_dtype: torch.dtype = torch.bfloat16,
        config: Config | None = None,
    ) -> None:
        if max_requests < 1 or slots < 1 or q_heads % kv_heads:
            raise ValueError(
                f"{max_requests} requests, {slots} slots, {q_heads} query heads over {kv_heads} KV heads: at least 1, "
                "at least 1, and a multiple, wanted"
            )
        if head_dim not in DIMS:
            raise ValueError(f"head_dim {head_dim}: one of {', '.join(map(str, DIMS))} wanted")
        self.max_requests, self.slots = max_requests, slots
        self.q_heads, self.kv_heads, self.head_dim = q_heads, kv_heads, head_dim
        self.group = q_heads // kv_heads
        self.config = config or configs.shared_decode(head_dim, configs.capability(device), kv_dtype)
        if self.group > self.config.block_m:
            raise ValueError(f"{self.group} query heads a KV head: up to {self.config.block_m} wanted")
        if page_tokens % self.config.block_n:
            raise ValueError(f"pages of {page_tokens} tokens: whole tiles of {self.config.block_n} tokens wanted")
        self.page_tokens, self.max_pages = page_tokens, -(-max_tokens // page_tokens)
        #: Whole requests that a tile of rows takes.
        self.each = self.config.block_m // self.group
        self.teams = max(1, configs.multiprocessors(device) * self.config.occupancy // kv_heads)
        #: Tiles of rows that shared runs may take: twice what all requests fill, and some that are not full.
        self.max_tiles = 2 * -(-max_requests // self.each) + max(16, min(256, max_requests // 4))
        self.rows = triton.next_power_of_2(max_requests)
        self.own = triton.next_power_of_2(self.group)
        self.padded = triton.next_power_of_2(head_dim)

        def buffer(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.tables = Tables(slots, max_requests, buffer(Tables.size(slots, max_requests)))
        # One more than a request can have, which is looked up ahead and not used.
        self.pages = buffer(max_requests, self.max_pages + 1)
        self.members = buffer((DEPTH + 1) * self.rows)
        self.members[DEPTH * self.rows :] = torch.arange(self.rows)
        self.ranks = buffer(DEPTH * self.rows)
        self.starts = buffer(max_requests)
        self.shortest = buffer(max_requests)
        self.units = buffer(2 * self.rows, UNIT_FIELDS.value)
        self.numbers = buffer(2 * self.rows)
        # A request has one partial result of each level and each share that ends within one, or of each team.
        self.most = 2 * self.teams + DEPTH + 1
        self.parts = buffer(self.rows)
        self.places = buffer(self.rows, self.most)
        self.work = buffer(self.teams, TEAM_FIELDS.value)
        self.line = buffer(LINE_FIELDS.value)
        self.own_rows = (self.max_tiles + 2 * self.teams) * kv_heads * self.config.block_m
        parts = self.own_rows + (self.rows + self.teams) * kv_heads * self.own
        self.part_out = buffer(parts * self.padded, dtype=torch.float32)
        self.part_lse = buffer(parts, dtype=torch.float32)
        self.step = (buffer(0), buffer(0))

    def for_window(self, window: int) -> SharedDecoder:
        """A decoder for layers with this window, as SGLang's `sliding_window_size` counts it. It plans for itself, and
        knows the tables and the pages that this one is told of. The two run on one stream."""
        check_window(window)
        other = copy.copy(self)
        other.window = window
        for name in ("units", "numbers", "parts", "places", "work", "line"):
            setattr(other, name, torch.zeros_like(getattr(self, name)))
        return other

    def fits(self, tables: Tables) -> bool:
        """Whether the shared runs take no more tiles of rows than there is room for."""
        return int((-(-tables.counts // self.each)).sum()) <= self.max_tiles

    def update(self, tables: Tables) -> None:
        """From now on, who shares what is as in these tables, on the host. One copy, on the current stream. Raises
        `ValueError` for tables of another size, or with more than `fits`."""
        array = torch.from_numpy(tables.array)
        if array.shape != self.tables.array.shape or not self.fits(tables):
            raise ValueError(
                f"tables of {array.shape[0]} numbers, {tables.counts.tolist()} requests a run: tables for {self.slots} "
                f"slots and {self.max_requests} requests wanted, with up to {self.max_tiles} tiles of {self.each} "
                "requests"
            )
        if self.members.is_cuda:
            array = array.pin_memory()  # the tables may change while the copy is under way
        self.tables.array.copy_(array, non_blocking=True)

    def find_pages(self, table: torch.Tensor, slots: torch.Tensor, contexts: torch.Tensor) -> None:
        """Look up the pages of a step's requests, before the step: in front of the graph that has it, where there is
        one, for the table may change while that runs.

        `table`: `(slots, longest context)` int32, the slot of each token, pages aligned. `slots`, `contexts`: as of
        `plan`.
        """
        requests = self._requests(slots, contexts)
        if table.ndim != 2 or table.shape[0] < self.slots or table.dtype != torch.int32 or table.stride(1) != 1:
            raise ValueError(f"table is {tuple(table.shape)} {table.dtype}: ({self.slots}, tokens) torch.int32 wanted")
        if requests:
            found = min(FOUND, triton.next_power_of_2(self.max_pages))
            on(_find_pages, (requests, triton.cdiv(self.max_pages, found)))(
                slots,
                contexts,
                table,
                self.pages,
                table.stride(0),
                self.pages.stride(0),
                PAGE=self.page_tokens,
                FOUND=found,
                num_warps=4,
            )

    def plan(self, slots: torch.Tensor, contexts: torch.Tensor) -> None:
        """Divide a step's work. In a graph, this belongs to what is captured.

        `slots`, `contexts`: `(requests,)`, int32 or int64 on the device; who the requests are, and their tokens with
        the new one, which is behind all that they share. 0 is no work, and the row of that request is not written. Of
        the requests in the tables none may be missing.
        """
        requests = self._requests(slots, contexts)
        self.step = (slots, contexts)
        if not requests:
            return
        tables = self.tables
        windowed = self.window is not None
        on(_arrange, (DEPTH, triton.cdiv(requests, ARRANGED)))(
            slots,
            contexts,
            tables.chains,
            self.members,
            self.ranks,
            self.starts,
            self.shortest,
            requests,
            ROWS=self.rows,
            DEPTH=DEPTH,
            ARRANGED=ARRANGED,
            LOOKED=min(LOOKED, self.rows),
            WINDOWED=windowed,
            num_warps=4,
        )
        on(_divide, (self.teams,))(
            slots,
            contexts,
            tables.chains,
            tables.lows,
            tables.highs,
            tables.counts,
            self.starts,
            self.shortest,
            self.units,
            self.numbers,
            self.work,
            self.line,
            self.window or 0,
            requests,
            UNITS=self.max_requests,
            ROWS=self.rows,
            DEPTH=DEPTH,
            EACH=self.each,
            BLOCK_N=self.config.block_n,
            TEAMS=self.teams,
            COST=COST,
            SHORTEST=SHORTEST,
            WINDOWED=windowed,
            num_warps=4 if self.rows <= 256 else 8,
        )
        on(_locate, (triton.cdiv(requests, LOCATED),))(
            slots,
            contexts,
            tables.chains,
            self.ranks,
            self.units,
            self.numbers,
            self.work,
            self.line,
            self.parts,
            self.places,
            self.own_rows,
            requests,
            ROWS=self.rows,
            DEPTH=DEPTH,
            LEVELS=LEVELS,
            KV_HEADS=self.kv_heads,
            GROUP=self.group,
            BLOCK_M=self.config.block_m,
            OWN=self.own,
            TEAMS=self.teams,
            COST=COST,
            MOST=self.most,
            LOCATED=LOCATED,
            num_warps=4,
        )

    def rehearse(
        self,
        table: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        q_dtype: torch.dtype,
        kinds: Collection[tuple[float, Scales, torch.Tensor | None]] = ((0.0, None, None),),
    ) -> None:
        """A step of one request without tokens: it needs every kernel, and reads nothing. `kinds` are a soft cap,
        scales and sinks for each kind of layer."""
        slots, contexts = torch.zeros(2, 16, dtype=torch.int64, device=k.device)[:, :1]
        self.find_pages(table, slots, contexts)
        self.plan(slots, contexts)
        q = torch.zeros(1, self.q_heads, self.head_dim, dtype=q_dtype, device=k.device)
        for soft_cap, scales, sinks in kinds:
            self(q, k, v, scale=self.head_dim**-0.5, soft_cap=soft_cap, sinks=sinks, scales=scales)

    def _requests(self, slots: torch.Tensor, contexts: torch.Tensor) -> int:
        """How many a step has. Raises `ValueError` if these do not say who they are."""
        requests = slots.shape[0]
        for name, tensor in (("slots", slots), ("contexts", contexts)):
            if tensor.shape != (requests,) or requests > self.max_requests or tensor.dtype.is_floating_point:
                raise ValueError(
                    f"{name} are {tuple(tensor.shape)} {tensor.dtype}: the same number of integers, up to "
                    f"{self.max_requests}, wanted"
                )
        return requests

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        scale: float,
        out: torch.Tensor | None = None,
        soft_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
        scales: Scales = None,
    ) -> torch.Tensor:
        """Attention of the planned step, `(requests, q_heads, head_dim)` as `q`.

        `k`, `v`: `(slots, kv_heads, head_dim)`, every page that `find_pages` saw readable to its end, but those
        that are behind the window of all who have them. All else, and errors, as of `prefix_prefill`.
        """
        out = torch.empty_like(q) if out is None else out
        slots, contexts = self.step
        check(q, k, v, out, sinks, scales, slots.shape[0])
        if q.shape[1:] != (self.q_heads, self.head_dim) or k.shape[1] != self.kv_heads:
            raise ValueError(
                f"q {tuple(q.shape)} over k {tuple(k.shape)}: {self.q_heads} query heads of {self.head_dim} over "
                f"{self.kv_heads} wanted"
            )
        if not slots.shape[0]:
            return out
        config = self.config
        shape = {
            "KV_HEADS": self.kv_heads,
            "GROUP": self.group,
            "DIM": self.head_dim,
            "DIM_PADDED": self.padded,
            "BLOCK_M": config.block_m,
            "OWN": self.own,
        }
        on(_pieces, (self.teams * self.kv_heads,))(
            q,
            k,
            v,
            *tile_descriptors(k, v, config),
            self.part_out,
            self.part_lse,
            self.pages,
            contexts,
            self.members,
            self.units,
            self.work,
            self.line,
            *(scales or (self.part_lse, self.part_lse)),
            base_two(scale, soft_cap),
            soft_cap,
            self.window or 0,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            self.pages.stride(0),
            self.own_rows,
            BLOCK_N=config.block_n,
            PAGE=self.page_tokens,
            TEAMS=self.teams,
            COST=COST,
            CAP=soft_cap > 0,
            WINDOWED=self.window is not None,
            SCALED=scales is not None,
            NARROW=narrow(k, config),
            TMA=config.tma,
            WIDE=q.device.type == "cpu" and k.dtype is torch.bfloat16,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            maxnreg=config.max_registers,
            **shape,
        )
        on(_together, (slots.shape[0], self.kv_heads))(
            out,
            self.part_out,
            self.part_lse,
            self.part_lse if sinks is None else sinks,
            self.parts,
            self.places,
            out.stride(0),
            out.stride(1),
            self.own_rows,
            MOST=self.most,
            SINKS=sinks is not None,
            num_warps=4,
            **shape,
        )
        return out
