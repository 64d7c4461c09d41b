"""Kernels are compiled by threads before they are launched: each once, and again if it failed. And what is compiled as
a server starts is all that it launches later."""

from __future__ import annotations

import logging
import random
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from sglang_vtensor.kernels import compiling, configs
from sglang_vtensor.kernels.compiling import Compiling, launches, on
from sglang_vtensor.kernels.prefix_prefill import plan_prefill, prefill_calls, prefix_prefill
from sglang_vtensor.kernels.shared_decode import SharedDecoder

PAGE, HEADS, KV_HEADS, DIM, MOST = 128, 32, 8, 128, 8192
PATIENCE = 30


class Kernel:
    """As Triton's: `kernel[grid]` launches, `warmup` compiles. It compiles when `go` is set, and fails so often."""

    def __init__(self, name, failures=0):
        self.__name__, self.failures = name, failures
        self.compiled, self.launched = [], []
        self.go = threading.Event()
        self.go.set()

    def __getitem__(self, grid):
        return lambda *args, **options: self.launched.append((grid, args, options))

    def warmup(self, *args, grid, **options):
        assert self.go.wait(PATIENCE)
        self.compiled.append((grid, args, options))
        if len(self.compiled) <= self.failures:
            raise RuntimeError("no room for a file")


def noted(kernel, *sizes):
    return launches([lambda: [on(kernel, (1,))(torch.zeros(1), SIZE=size) for size in sizes]])


def test_a_call_launches_and_is_only_noted_within():
    kernel = Kernel("one")
    on(kernel, (3, 4))(5, SIZE=6)
    assert kernel.launched == [((3, 4), (5,), {"SIZE": 6})]
    (launch,) = launches([lambda: on(kernel, (3, 4))(5, SIZE=6)])
    assert len(kernel.launched) == 1
    assert not kernel.compiled
    launch.compile()
    assert kernel.compiled == kernel.launched
    with pytest.raises(ZeroDivisionError):
        launches([lambda: 1 / 0])
    on(kernel, (1,))()
    assert len(kernel.launched) == 2, "after an error, launches are made again"


def test_others_are_ready_while_one_is_slow():
    slow, quick = Kernel("slow"), Kernel("quick")
    slow.go.clear()
    compiling = Compiling("test", {"a": noted(slow, 1), "b": noted(quick, 1, 2)}, device="cpu")
    wait_for(lambda: compiling.ready("b") or compiling.left == 1)
    assert not compiling.ready("a")
    assert compiling.left >= 1
    slow.go.set()
    compiling.wait()
    assert compiling.ready("a")
    assert compiling.ready("b")
    assert not compiling.ready("c"), "nobody asked for it"
    assert compiling.left == 0


def test_a_kernel_that_two_keys_need_is_compiled_once():
    kernel = Kernel("one")
    compiling = Compiling("test", {"a": noted(kernel, 1), "b": noted(kernel, 1, 2)}, device="cpu")
    compiling.wait()
    assert sorted(options["SIZE"] for _, _, options in kernel.compiled) == [1, 2]


def test_a_kernel_that_fails_once_is_compiled_again(caplog):
    kernel = Kernel("one", failures=1)
    compiling = Compiling("test", {"a": noted(kernel, 1)}, device="cpu")
    compiling.wait()
    assert compiling.ready("a")
    assert len(kernel.compiled) == 2
    assert "one is compiled again, as it failed: no room for a file" in caplog.text


def test_a_kernel_that_fails_twice_is_never_ready_and_others_are(caplog):
    caplog.set_level(logging.INFO, Compiling.__module__)
    bad, good = Kernel("bad", failures=9), Kernel("good")
    compiling = Compiling("test", {"a": noted(bad, 1), "b": noted(good, 1)}, device="cpu")
    with pytest.raises(RuntimeError, match="no room for a file"):
        compiling.wait()
    wait_for(lambda: compiling.ready("b"))
    assert not compiling.ready("a")
    assert (compiling.left, compiling.failed) == (0, 1), "nobody waits for it any more"
    assert len(bad.compiled) == 2
    assert "bad failed twice, and is not used: no room for a file" in caplog.text
    assert "all kernels are compiled" not in caplog.text


def test_the_log_says_when_all_is_done(caplog):
    caplog.set_level(logging.INFO, compiling.__name__)
    Compiling("test", {"a": noted(Kernel("one"), 1)}, device="cpu").wait()
    wait_for(lambda: "test: all kernels are compiled, after" in caplog.text)


def wait_for(condition):
    for _ in range(100 * PATIENCE):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError(f"not within {PATIENCE} s")


# Triton's own bookkeeping of what is compiled, without its compiler: as on a GPU of that capability.


@pytest.fixture(params=[80, 90])
def compiled(request, monkeypatch):
    """The names of the kernels that Triton compiled, in order."""
    capability, device = request.param, 1000 + request.param
    target = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: device,
        get_current_stream=lambda _: 0,
    )
    monkeypatch.setattr(driver, "_active", target)
    monkeypatch.setattr(configs, "capability", lambda _: capability)
    monkeypatch.setattr(configs, "multiprocessors", lambda _: 132)
    names: list[str] = []
    kernels: set[JITFunction] = set()

    def compile_nothing(kernel, key, *_):
        names.append(kernel.__name__)
        kernels.add(kernel)
        done = SimpleNamespace(
            launch_metadata=lambda *_: None, run=lambda *_: None, function=None, packed_metadata=None
        )
        kernel.device_caches[device][0][key] = done
        return done

    monkeypatch.setattr(JITFunction, "_do_compile", compile_nothing)
    yield names
    for kernel in kernels:
        kernel.device_caches.pop(device)


@pytest.fixture(params=["bfloat16", "float8_e4m3fn"])
def layers(request):
    """Keys and values of each of two layers, in one pool."""
    pool = torch.zeros(16 * PAGE, 2, 2, KV_HEADS, DIM, dtype=getattr(torch, request.param))
    return [(pool[:, layer, 0], pool[:, layer, 1]) for layer in range(2)]


def test_prefill_compiles_nothing_while_serving(compiled, layers):
    shapes = {"q_heads": HEADS, "page_tokens": PAGE}
    calls = prefill_calls(*layers[0], q_dtype=torch.bfloat16, max_tokens=MOST, **shapes)
    for some in calls.values():
        for launch in launches(some):
            launch.compile()
    assert compiled
    at_start, rng = len(compiled), random.Random(0)
    for requests in (1, 2, 3, 16, 33):
        for _ in range(8):
            new = [rng.choice((1, 2, 17, 100, 1000)) for _ in range(requests)]
            contexts = [n + rng.choice((0, 1, 500, MOST - 1000)) for n in new]
            runs = [[(0, context // PAGE * PAGE), (0, context % PAGE)] for context in contexts]
            runs = [[run for run in some if run[1]] for some in runs]
            plan = plan_prefill(
                new, runs, kv_heads=KV_HEADS, head_dim=DIM, device="cpu", kv_dtype=layers[0][0].dtype, **shapes
            )
            assert plan.config in calls
            # A row more than it has: as a captured batch is padded.
            q = torch.zeros(plan.rows + 1, HEADS, DIM, dtype=torch.bfloat16)[: plan.rows]
            for k, v in layers:
                prefix_prefill(q, k, v, plan, scale=1.0)
    assert compiled[at_start:] == []


def test_shared_decode_compiles_nothing_while_serving(compiled, layers):
    decoder = SharedDecoder(
        max_requests=256,
        slots=257,
        page_tokens=PAGE,
        max_tokens=MOST,
        q_heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=DIM,
        device="cpu",
        kv_dtype=layers[0][0].dtype,
    )
    table = torch.zeros(257, MOST + 4, dtype=torch.int32)
    for launch in launches([lambda: decoder.rehearse(table, *layers[0], q_dtype=torch.bfloat16)]):
        launch.compile()
    assert len(compiled) == 6
    at_start = len(compiled)
    for requests in (1, 2, 3, 8, 16, 100, 256):
        slots, contexts = torch.zeros(2, 512, dtype=torch.int64)[:, :requests]
        decoder.find_pages(table, slots, contexts)
        decoder.plan(slots, contexts)
        for k, v in layers:
            decoder(torch.zeros(requests, HEADS, DIM, dtype=torch.bfloat16), k, v, scale=1.0)
    assert compiled[at_start:] == []


# Triton's compiler, without a GPU: the interpreter, which the other tests of kernels run in, takes what it refuses.


@pytest.mark.parametrize(("capability", "kv_dtype"), [(80, "bfloat16"), (90, "bfloat16"), (90, "float8_e4m3fn")])
def test_the_compiler_takes_every_kernel(monkeypatch, capability, kv_dtype):
    pool = torch.zeros(16 * PAGE, 2, KV_HEADS, DIM, dtype=getattr(torch, kv_dtype))
    k, v = pool.unbind(1)
    target = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: 2000 + capability,
        get_current_stream=lambda _: 0,
    )
    monkeypatch.setattr(driver, "_active", target)
    monkeypatch.setattr(configs, "capability", lambda _: capability)
    monkeypatch.setattr(configs, "multiprocessors", lambda _: 132)
    shapes = {"q_heads": HEADS, "page_tokens": PAGE}
    plain, all_there_is = (0.0, None, None), (30.0, None, torch.zeros(HEADS, dtype=torch.bfloat16))
    noted = []
    for window, kind in ((None, plain), (1023, all_there_is)):
        calls = prefill_calls(k, v, q_dtype=torch.bfloat16, max_tokens=MOST, window=window, kinds=[kind], **shapes)
        noted += [launch for some in calls.values() for launch in launches(some)]
    decoder = SharedDecoder(
        max_requests=2048,
        slots=2049,
        max_tokens=MOST,
        kv_heads=KV_HEADS,
        head_dim=DIM,
        device="cpu",
        kv_dtype=k.dtype,
        **shapes,
    )
    table = torch.zeros(2049, MOST + 4, dtype=torch.int32)
    for decode, kind in ((decoder, plain), (decoder.for_window(1023), all_there_is)):
        ask = partial(decode.rehearse, table, k, v, q_dtype=torch.bfloat16, kinds=[kind])
        noted += launches([ask])
    for launch in {launch.key: launch for launch in noted}.values():
        assert launch.compile().asm["ptx"], launch.name
        launch.kernel.device_caches.pop(2000 + capability, None)
