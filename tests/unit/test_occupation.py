"""What the process that hands answers out makes of a refusal in a scheduler."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from types import SimpleNamespace

import pytest
from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput

from sglang_vtensor import patches
from sglang_vtensor.patches import common
from sglang_vtensor.srt import http
from sglang_vtensor.srt.occupation import tell_refusal
from sglang_vtensor.srt.options import Options, Refused


class Manager:
    """SGLang's tokenizer manager, with the refusals of each data-parallel rank."""

    def __init__(self, *refusals):
        self.refusals, self.asked = refusals, []

    async def get_internal_state(self):
        return [{"vtensor": {"refusal": refusal}} for refusal in self.refusals]


async def original(manager, obj, request):
    manager.asked.append((obj, request))


def test_a_refusal_of_any_rank_is_raised():
    manager = Manager(None, "resume_memory_occupation is refused: why")
    with pytest.raises(Refused, match=r"^resume_memory_occupation is refused: why$"):
        asyncio.run(tell_refusal(original, manager, "asked", None))
    assert manager.asked == [("asked", None)]


def test_without_a_refusal_the_answer_is_sglangs():
    manager = Manager(None, None)
    assert asyncio.run(tell_refusal(original, manager, "asked")) is None
    assert manager.asked == [("asked", None)]


@pytest.mark.parametrize(("ranks", "asked"), [((None, "2 requests have not ended"), 0), ((None, None), 1), (("1",), 1)])
def test_no_rank_releases_where_another_one_has_requests(ranks, asked):
    """Of a single rank, its own answer is enough."""

    class Ranks(Manager):
        async def get_internal_state(self):
            return [{"vtensor": {"refusal": None, "unready": why}} for why in ranks]

    manager, released = Ranks(), ReleaseMemoryOccupationReqInput()
    refused = pytest.raises(Refused, match=r"^release_memory_occupation is refused: 2 requests have not ended$")
    with contextlib.nullcontext() if asked else refused:
        asyncio.run(tell_refusal(original, manager, released))
    assert manager.asked == [(released, None)] * asked


class Scheduler(Manager):
    """As the last call left it, which takes a while, and so does asking for its state."""

    async def get_internal_state(self):
        await asyncio.sleep(0.001)
        return await super().get_internal_state()


async def answered(manager, obj, request):
    await asyncio.sleep(0.001)
    manager.refusals = [obj]


def test_callers_at_once_are_each_told_of_their_own_call():
    async def together(calls):
        manager = Scheduler()
        asked = [tell_refusal(answered, manager, refusal) for refusal in calls]
        return await asyncio.gather(*asked, return_exceptions=True)

    calls = [None, "one", None, "two", "three", None]
    told = asyncio.run(together(calls))
    assert [result and str(result) for result in told] == calls
    assert all(result is None or isinstance(result, Refused) for result in told)


@pytest.mark.parametrize(
    ("backend", "loaded", "hooked"), [("vtensor", True, 3), ("vtensor", False, 0), ("default", True, 0)]
)
def test_only_a_server_of_ours_asks(monkeypatch, backend, loaded, hooked):
    """A process without SGLang's tokenizer manager, as a scheduler's is, does not import it for this."""
    seams = []
    monkeypatch.setattr(common, "hook", seams.extend)
    monkeypatch.setattr(common.HookRegistry, "apply_hooks", lambda: None)
    modules = {name: module for name, module in sys.modules.items() if "http_server" not in name}
    modules.pop("sglang.srt.managers.tokenizer_manager", None)
    if loaded:
        modules["sglang.srt.managers.tokenizer_manager"] = SimpleNamespace()
    monkeypatch.setattr(sys, "modules", modules)
    args = SimpleNamespace()
    Options(kv_backend=backend).attach(args)
    patches.load().serve(None, args)
    wanted = ["get_internal_state", "release_memory_occupation", "resume_memory_occupation"]
    assert [seam.target.split(".")[-1] for seam in seams] == wanted[:hooked]


@pytest.mark.parametrize(
    ("key", "admin", "keyed"), [(None, None, False), ("user", None, True), (None, "admin", True), ("u", "a", True)]
)
def test_the_routes_know_whether_the_server_wants_a_key(monkeypatch, key, admin, keyed):
    said, patch = [], patches.load()
    monkeypatch.setattr(http, "add_routes", lambda app, state, *, keyed: said.append(keyed))
    monkeypatch.setattr(common, "hook", lambda seams: None)
    monkeypatch.setattr(common.HookRegistry, "apply_hooks", lambda: None)
    monkeypatch.setattr(sys, "modules", sys.modules | {"sglang.srt.entrypoints.http_server": SimpleNamespace(app=None)})
    settings = SimpleNamespace(tokenizer_worker_num=1, api_key=key, admin_api_key=admin)
    monkeypatch.setattr(patch, "settings", lambda _: settings)
    monkeypatch.setattr(patch, "serves_page", False)
    args = SimpleNamespace()
    Options(kv_backend="vtensor").attach(args)
    patch.serve(None, args)
    assert said == [keyed]
