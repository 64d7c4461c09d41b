"""Pages, segments and the radix tree together, against a model that is plainly right: what a token's KV must be.

The KV of a token depends on its namespace and on all tokens up to it, and on nothing else. So the model of the whole
cache is one function: `content(namespace, tokens[: i + 1])`. Requests write it by slot; whatever the tree then says is
cached, and whatever a segment shows, must read back as exactly that, through splits, duplicates, evictions, retractions
and adopted addresses. And what a batch reads stays where it reads it until that batch is done.
"""

from __future__ import annotations

import random
import zlib
from array import array
from collections import Counter
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import tests.harness  # noqa: F401  (chooses the platform before SGLang is imported)
from sglang_vtensor import patches
from sglang_vtensor.layout import KVLayout
from sglang_vtensor.manager import KVMemory
from sglang_vtensor.segments import Segment
from sglang_vtensor.srt.runtime import Extend, RequestPages, Runtime
from sglang_vtensor.vmm.host import HostVirtualMemory
from tests import versions

ROWS, CONTEXT, CAPACITY_TOKENS = 5, 48, 128
#: Batches that were launched and are not done, at most.
FLYING = 3
POLICIES = ["lru", "lfu", "fifo", "filo", "priority", "slru", *versions.MORE_POLICIES]


#: Reads of all histories, by what was read.
READS: Counter[str] = Counter()


#: What is said: the start of one of these. Some of them begin alike.
SAYINGS = [[0, 1, 2, 3] * 6, [0, 1, 2, 2] * 6, [0, 3] * 12, [2, 1, 1, 3, 0, 0] * 4]
SAID = st.builds(lambda saying, count: SAYINGS[saying][:count], st.integers(0, len(SAYINGS) - 1), st.integers(1, 24))
WHICH = st.integers(0, 11)
#: So many tokens of a prompt are computed at first.
CHUNK = st.sampled_from([1, 3, 8, CONTEXT, CONTEXT])
#: Who may share: an `extra_key`, which an adapter makes, and a `cache_salt`.
NAMESPACES = [(None, None), ("a", None), ("b", None), (None, "a"), ("a", "b")]


def content(namespace: str, tokens) -> int:
    """`namespace` as `Requests.namespace` has it."""
    return zlib.crc32(repr((namespace, tuple(tokens))).encode()) % 1_000_003


def one_of(things: list[Any], which: int) -> Any:
    return things[which % len(things)]


def common(one: list[int], other: list[int]) -> int:
    """How many tokens two texts have in common at their start."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class TreeMachine(RuleBasedStateMachine):
    @initialize(page_tokens=st.sampled_from([1, 4, 8]), policy=st.sampled_from(POLICIES))
    def build(self, page_tokens: int, policy: str) -> None:
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

        layout = KVLayout(1, 8, 64, torch.float32, page_tokens, stride_bytes=4096, granularity=4096)
        self.memory = KVMemory(
            HostVirtualMemory(),
            layout,
            capacity_pages=CAPACITY_TOKENS // page_tokens,
            max_tokens=CONTEXT,
            max_running=ROWS,
            max_parked=3,
            idle_seconds=0.0,
            worker=False,
        )
        self.sglang = patches.load().requests
        self.runtime = Runtime(self.memory, ROWS + 1, self.sglang)
        self.runtime.extend_reads_segments = self.runtime.extend_reads_pages = True
        kvcache = SimpleNamespace(page_size=page_tokens, dtype=torch.float32, device="cpu", runtime=self.runtime)
        allocator = versions.allocator(CAPACITY_TOKENS, kvcache)
        self.rows = ReqToTokenPool(ROWS, CONTEXT, "cpu", False)
        self.tree = versions.prefix_index(
            CacheInitParams(
                disable=False,
                req_to_token_pool=self.rows,
                token_to_kv_pool_allocator=allocator,
                page_size=page_tokens,
                eviction_policy=policy,
            )
        )
        self.tokens_a_page = page_tokens
        self.keys = self.memory.identity_views(0)[0]
        self.by_segment = self.memory.segment_views(0)[0]
        #: Batches in flight: the epoch, the segment that it reads (None: pages), and the pages.
        self.flying: list[tuple[int, Segment | None, list[int]]] = []
        self.requests: list[SimpleNamespace] = []
        self.waiting: list[SimpleNamespace] = []
        self.arrived = 0
        self.spoken: list[list[int]] = [[1, 2, 3]]  # texts that others may begin with

    def cached(self):
        """Every text of which the tree says that it is there, with what follows in unfinished pages; and whose."""
        stack = [(self.tree.root_node, [])]
        while stack:
            node, before = stack.pop()
            text = before + list(node.key.token_ids)
            yield self.sglang.namespace(node.key), text
            for key, tail in node.tails:
                if tail.page is not None and self.tokens_a_page > 1:
                    yield self.sglang.namespace(key), text + list(key.token_ids)
            stack += [(child, text) for child in node.children.values()]

    # What SGLang's scheduler does, in its order.

    def take(self, req: SimpleNamespace, upto: int) -> bool:
        """Pages for `upto` tokens, evicting if need be."""
        record = self.runtime.requests[self.sglang.slot(req)]
        wanted = self.memory.layout.pages_for(upto) - len(record.pages)
        short = wanted - self.memory.available_pages()
        if short > 0:
            self.tree.evict(SimpleNamespace(num_tokens=short * self.tokens_a_page))
        pages = self.memory.allocate(wanted)
        if pages is None:
            return False
        record.pages.extend(pages)
        return True

    def write(self, req: SimpleNamespace, upto: int) -> None:
        """The KV of the tokens up to there, by slot."""
        record = self.runtime.requests[self.sglang.slot(req)]
        tokens = req.origin_input_ids + req.output_ids
        for i in range(req.written, upto):
            slot = record.pages[i // self.tokens_a_page] * self.tokens_a_page + i % self.tokens_a_page
            self.rows.req_to_token[self.sglang.slot(req), i] = slot
            self.keys[slot] = float(content(self.sglang.namespace(req), tokens[: i + 1]))
        req.written = upto

    def grow(self, req: SimpleNamespace, upto: int) -> bool:
        if not self.take(req, upto):
            return False
        self.write(req, upto)
        return True

    def begin(self, req: SimpleNamespace, partial, upto: int) -> bool:
        """The first pages of a request, whose first one begins as another does."""
        record = self.runtime.requests[self.sglang.slot(req)]
        tokens = list(req.origin_input_ids)
        whole = record.protected * self.tokens_a_page
        expected = [
            float(content(self.sglang.namespace(req), tokens[: i + 1])) for i in range(whole, whole + partial.tokens)
        ]
        assert 0 < partial.tokens < self.tokens_a_page
        source = self.keys[partial.page * self.tokens_a_page :][: partial.tokens, 0, 0]
        assert source.tolist() == expected, "a page does not begin as its tokens say"
        if partial.tail is not None:
            page = self.memory.claim(partial.tail)
            if page is None:
                assert not self.memory.available_pages()
                return False
            record.pages.append(page)
        else:
            self.tree.inc_lock_ref(partial.node)
        taken = self.take(req, upto)
        if partial.tail is None:
            self.tree.dec_lock_ref(partial.node)
        if not taken:
            if partial.tail is not None:
                self.memory.unclaim(partial.tail, record.pages.pop())
            return False
        page = record.pages[record.protected]
        if page != partial.page:
            self.memory.copy_tokens(partial.page, page, partial.tokens)
        start = page * self.tokens_a_page
        self.rows.req_to_token[self.sglang.slot(req), whole : whole + partial.tokens] = torch.arange(
            start, start + partial.tokens
        )
        req.written = whole + partial.tokens
        self.write(req, upto)
        return True

    def read(self, req: SimpleNamespace, new: int, *, by_pages: bool) -> None:
        """A batch reads the request's segment, or its pages."""
        slot = self.sglang.slot(req)
        record = self.runtime.requests[slot]
        adopt = self.tree.segment_for(req) if record.segment is None else None
        self.runtime.waits_for = lambda batch, new_pages: 1 << 30 if by_pages else 0
        self.runtime.map_extend([Extend(slot, 0, adopt, new, req.written)], 0)
        assert self.runtime.by_pages == by_pages
        self.runtime.check_batch([slot], [req.written], self.rows.req_to_token, decode=False)
        tokens = req.get_fill_ids()
        if by_pages:
            shown = self.keys[self.rows.req_to_token[slot, : req.written].long(), 0, 0].tolist()
        else:
            shown = self.by_segment[record.segment.index, : req.written, 0, 0].tolist()
        READS["pages" if by_pages else "segments"] += 1
        assert shown == [float(content(self.sglang.namespace(req), tokens[: i + 1])) for i in range(req.written)]
        pages = record.pages[: self.memory.layout.pages_for(req.written)]
        self.flying.append((self.memory.launch(), None if by_pages else record.segment, pages))
        while len(self.flying) > FLYING:
            self.land()

    @rule()
    @precondition(lambda self: self.arrived and self.flying)
    def land(self) -> None:
        """The batch that flies longest is done."""
        epoch, _, _ = self.flying.pop(0)
        self.memory.complete(epoch)

    def what_flies_is_there(self) -> None:
        """Pages may be freed meanwhile, and written to by a later batch; but not unmapped."""
        for _, segment, pages in self.flying:
            assert all(self.memory.pages._mapped[page] for page in pages), "a page of a batch in flight is unmapped"
            if segment is not None:
                assert segment.pages[: len(pages)] == pages, "a segment changed under a batch in flight"

    @rule(
        which=WHICH,
        cut=st.integers(0, CONTEXT),
        more=SAID,
        namespace=st.sampled_from(NAMESPACES[:1] * 6 + NAMESPACES),
        by_pages=st.none() | st.booleans(),
        chunk=CHUNK,
    )
    @precondition(lambda self: len(self.waiting) < 4)
    def arrive(
        self, which: int, cut: int, more: list[int], namespace: tuple, by_pages: bool | None, chunk: int
    ) -> None:
        """A request queues, and begins at once, or waits (None): meanwhile the worker maps what it will share."""
        tokens = (one_of(self.spoken, which)[:cut] + more)[: CONTEXT - 8]
        self.arrived += 1
        req = versions.request(str(self.arrived), array("q", tokens), *namespace)
        self.waiting.append(req)
        self.tree.prepare(self.waiting)
        if by_pages is not None and len(self.requests) < ROWS:
            self.begin_waiting(req, chunk, by_pages=by_pages)

    @rule(which=WHICH)
    @precondition(lambda self: len(self.waiting) > 2)
    def abort_waiting(self, which: int) -> None:
        self.waiting.remove(one_of(self.waiting, which))
        self.tree.prepare(self.waiting)

    @rule(turns=st.sampled_from([1, 2, 4, 48]))
    @precondition(lambda self: self.arrived)
    def housekeep(self, turns: int) -> None:
        for _ in range(turns):
            self.memory.housekeep()

    @rule(which=WHICH, at=WHICH, by_pages=st.booleans(), chunk=CHUNK)
    @precondition(lambda self: len(self.requests) < ROWS and self.shared_and_waiting())
    def lose_a_part(self, which: int, at: int, by_pages: bool, chunk: int) -> None:
        """What a waiting request shares was mapped for it; then somebody reads the start of that, the rest is evicted,
        and the request begins."""
        req, pages = one_of(self.shared_and_waiting(), which)
        self.housekeep(48)
        start, whole = (1 + at % (pages - 1)) * self.tokens_a_page, pages * self.tokens_a_page
        self.look_up(req, start)
        end = self.look_up(req, whole)
        self.look_up(req, start)
        tokens = next((n for n in range(CAPACITY_TOKENS) if end in self.next_to_go(n)), 0)
        if tokens:
            self.evict(tokens)
        self.begin_waiting(req, chunk, by_pages=by_pages)

    def look_up(self, req: SimpleNamespace, tokens: int):
        """The node at which the request's first tokens end: they have nodes of their own from now on."""
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams

        key = self.sglang.key(req, req.origin_input_ids[:tokens])
        return self.tree.match_prefix(MatchPrefixParams(key=key)).last_device_node

    def shared_and_waiting(self) -> list[tuple[SimpleNamespace, int]]:
        """The requests that wait, and would find two whole pages or more; with their number."""
        page = self.tokens_a_page
        keys = [self.sglang.key(req, req.origin_input_ids).page_aligned(page) for req in self.waiting]
        found = [(req, len(self.tree._find(key)[1])) for req, key in zip(self.waiting, keys, strict=True)]
        return [(req, pages) for req, pages in found if pages > 1]

    @rule(which=WHICH, by_pages=st.booleans(), chunk=CHUNK)
    @precondition(lambda self: self.waiting and len(self.requests) < ROWS)
    def start(self, which: int, by_pages: bool, chunk: int) -> None:
        self.begin_waiting(one_of(self.waiting, which), chunk, by_pages=by_pages)

    def begin_waiting(self, req: SimpleNamespace, chunk: int, *, by_pages: bool) -> None:
        """Its first chunk is computed: all of what it says, or so many tokens."""
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams

        self.waiting.remove(req)
        tokens = list(req.origin_input_ids)
        key = self.sglang.key(req, req.origin_input_ids)
        key.limit = len(tokens) - 1
        match = self.tree.match_prefix(MatchPrefixParams(key=key, req=req))
        partial = req.vtensor_partial
        prefix = versions.found(match) - (partial.tokens if partial else 0)
        pages = self.tree.path_pages(match.last_device_node)
        slots = (torch.tensor(pages, dtype=torch.int64)[:, None] * self.tokens_a_page).repeat(1, self.tokens_a_page)
        slots = (slots + torch.arange(self.tokens_a_page)).flatten()
        assert self.keys[slots[:prefix], 0, 0].tolist() == [
            float(content(self.sglang.namespace(req), tokens[: i + 1])) for i in range(prefix)
        ]
        mine = [text for namespace, text in self.cached() if namespace == self.sglang.namespace(req)]
        longest = max((common(tokens[:-1], text) for text in mine), default=0)
        assert prefix + (partial.tokens if partial else 0) == longest, "reuse is exact to the token"
        versions.begin(self.tree, req, self.rows.free_slots.pop(), match, prefix)
        req.written = prefix
        self.rows.req_to_token[self.sglang.slot(req), :prefix] = slots.to(torch.int32)
        assert len(pages) * self.tokens_a_page == prefix
        self.runtime.requests[self.sglang.slot(req)] = RequestPages(pages, len(pages))
        upto = min(len(tokens), longest + chunk)
        begun = self.begin(req, partial, upto) if partial else self.grow(req, upto)
        if not begun:
            self.end(req, insert=False)
            return
        self.read(req, upto - prefix, by_pages=by_pages)
        self.requests.append(req)
        self.spoken = [*self.spoken[-11:], tokens]

    @rule(which=WHICH)
    @precondition(lambda self: self.requests)
    def stash(self, which: int) -> None:
        """The prefill's result is processed: full pages go to the tree, equal ones are swapped."""
        versions.stash(self.tree, one_of(self.requests, which))

    @rule(which=WHICH, more=SAID, by_pages=st.booleans())
    @precondition(lambda self: self.requests)
    def go_on(self, which: int, more: list[int], by_pages: bool) -> None:
        """The next chunk; or, behind the last one, a step of decode, or several."""
        req = one_of(self.requests, which)
        if req.written == len(req.origin_input_ids) + len(req.output_ids):
            req.output_ids.extend(more[: CONTEXT - 1 - req.written])
        new = min(len(more), len(req.origin_input_ids) + len(req.output_ids) - req.written)
        if not new:
            return
        if not self.grow(req, req.written + new):
            self.requests.remove(req)
            self.end(req, insert=False)
            return
        self.read(req, new, by_pages=by_pages)

    @rule(which=WHICH, insert=st.booleans(), owned=st.just(CONTEXT) | st.integers(0, CONTEXT))
    @precondition(lambda self: self.requests)
    def finish(self, which: int, insert: bool, owned: int) -> None:
        """Of what a model thought, for instance, nothing is kept."""
        req = one_of(self.requests, which)
        self.requests.remove(req)
        self.spoken = [*self.spoken[-11:], list(req.get_fill_ids())]
        self.end(req, insert=insert, owned=owned)

    def end(self, req: SimpleNamespace, *, insert: bool, owned: int = CONTEXT) -> None:
        owned = min(owned, req.written)
        self.rows.free_slots.append(versions.end(self.tree, req, insert=insert, owned=owned))

    @rule(tokens=st.integers(1, 16) | st.integers(1, CAPACITY_TOKENS))
    @precondition(lambda self: self.tree.root_node.children)
    def evict(self, tokens: int) -> None:
        doomed = self.next_to_go(tokens)
        before = set(self.tree.nodes())
        self.tree.evict(SimpleNamespace(num_tokens=tokens))
        assert before - set(self.tree.nodes()) == doomed, "not what the policy says"

    @rule(which=WHICH)
    @precondition(lambda self: self.tree.root_node.children)
    def expire(self, which: int) -> None:
        """What nobody has read for so long is given up, whatever the policy; and nobody keeps it."""
        before = one_of(sorted(node.last_access_time for node in self.tree.nodes()), which)
        self.tree.expire(before)
        assert all(leaf.last_access_time >= before for leaf in self.tree.evictable_leaves)
        assert not [node for _, _, node in self.tree._order if node.gone]
        assert {node.id for _, _, node in self.tree._order} == self.tree._queued

    def next_to_go(self, tokens: int) -> set:
        """Leaves in the order of the policy, one after another, until that many tokens are free."""
        rank = self.tree.eviction_strategy.get_priority
        gone: set = set()
        while sum(len(node.key) for node in gone) < tokens:
            leaves = [
                node
                for node in self.tree.nodes()
                if node not in gone and not node.lock_ref and not set(node.children.values()) - gone
            ]
            if not leaves:
                break
            gone.add(min(leaves, key=rank))
        return gone

    @rule()
    @precondition(lambda self: not self.requests and self.arrived % 4 == 3)
    def flush(self) -> None:
        self.tree.reset()
        self.runtime.clear()

    @invariant()
    def everything_agrees(self) -> None:
        if not hasattr(self, "tree"):
            return
        self.tree.check_integrity()
        self.what_flies_is_there()
        live = sum(len(r.pages) - r.protected for r in self.runtime.requests.values()) * self.tokens_a_page
        cached = self.tree.evictable_size() + self.tree.protected_size()
        assert self.memory.available_pages() * self.tokens_a_page + cached + live == CAPACITY_TOKENS
        stack = [(self.tree.root_node, [])]
        while stack:
            node, before = stack.pop()
            tokens = before + list(node.key.token_ids)
            if node is not self.tree.root_node:
                got = self.keys[node.value, 0, 0].tolist()
                whose = self.sglang.namespace(node.key)
                assert got == [float(content(whose, tokens[: i + 1])) for i in range(len(before), len(tokens))]
            stack += [(child, tokens) for child in node.children.values()]

    def teardown(self) -> None:
        if not hasattr(self, "tree"):
            return
        while self.flying:
            self.land()
        self.waiting.clear()
        self.tree.prepare(self.waiting)
        for req in self.requests:
            self.end(req, insert=True)
        self.tree.evict(SimpleNamespace(num_tokens=CAPACITY_TOKENS))
        assert self.memory.pages.owned == 0
        assert self.memory.segments.counts()["parked"] == 0
        self.memory.close()


TreeMachine.TestCase.settings = settings(
    max_examples=300,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)


class TestTree(TreeMachine.TestCase):
    """Histories that hypothesis draws, and shrinks where they fail."""

    def runTest(self) -> None:
        READS.clear()
        super().runTest()
        print(f"reads: {dict(READS)}")
        assert READS["pages"]
        assert READS["segments"]


def busy_history(rng: random.Random) -> None:
    """A long history in which much is shared, evicted and read: every rule is as likely as a server makes it."""
    machine = TreeMachine()
    machine.build(rng.choice([1, 1, 4, 8]), rng.choice(POLICIES))

    def which() -> int:
        return rng.randrange(12)

    def said() -> list[int]:
        return rng.choice(SAYINGS)[: rng.randint(1, 24)]

    def by_pages() -> bool:
        return rng.random() < 0.5

    def chunk() -> int:
        return rng.choice([1, 3, 8, CONTEXT])

    def arrive() -> None:
        begins = rng.choice([None, None, True, False])
        namespace = rng.choice(NAMESPACES[:1] * 6 + NAMESPACES)
        machine.arrive(which(), rng.randint(0, CONTEXT), said(), namespace, begins, chunk())

    steps = {
        arrive: (6, lambda: len(machine.waiting) < 4),
        lambda: machine.start(which(), by_pages(), chunk()): (3, lambda: machine.waiting and room()),
        lambda: machine.lose_a_part(which(), which(), by_pages(), chunk()): (
            3,
            lambda: room() and machine.shared_and_waiting(),
        ),
        lambda: machine.go_on(which(), said(), by_pages()): (9, lambda: machine.requests),
        lambda: machine.stash(which()): (3, lambda: machine.requests),
        lambda: machine.finish(which(), rng.random() < 0.8, rng.choice([CONTEXT, rng.randint(0, CONTEXT)])): (
            3,
            lambda: machine.requests,
        ),
        lambda: machine.housekeep(rng.choice([1, 2, 4, 48])): (4, lambda: True),
        lambda: machine.land(): (4, lambda: machine.flying),
        lambda: machine.evict(rng.randint(1, 24)): (1, lambda: machine.tree.root_node.children),
        lambda: machine.expire(which()): (1, lambda: machine.tree.root_node.children),
    }

    def room() -> bool:
        return len(machine.requests) < ROWS

    for _ in range(60):
        able = [(step, weight) for step, (weight, possible) in steps.items() if possible()]
        rng.choices([step for step, _ in able], [weight for _, weight in able])[0]()
        machine.everything_agrees()
    machine.teardown()


def test_busy_histories():
    READS.clear()
    for seed in range(300):
        try:
            busy_history(random.Random(seed))
        except BaseException:
            print(f"the history of seed {seed} fails")
            raise
    print(f"reads: {dict(READS)}")
    assert READS["pages"] > 1000
    assert READS["segments"] > 1000
