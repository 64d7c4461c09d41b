"""The tables of seams: SGLang has each target, and calls what we put there as we take it.

SGLang's registry only logs a target that is gone, and a body of another signature fails when it is called first.
"""

from __future__ import annotations

import ast
import inspect
import pkgutil
from pathlib import Path

import pytest
from sglang.srt.plugins.hook_registry import HookType

from sglang_vtensor import patches

PATCHES = Path(patches.__file__).parent


def seams():
    patch = patches.load()
    return [
        *patch.everywhere(),
        *patch.in_schedulers(),
        *patch.in_servers(),
        *patch.for_shared_decode(),
        *patch.on_the_host(),
    ]


def original(target):
    """What SGLang has there, also where a test before this one had it hooked."""
    owner, name = target.rsplit(".", 1)
    found = inspect.getattr_static(pkgutil.resolve_name(owner), name)
    return inspect.unwrap(found.__func__ if isinstance(found, classmethod | staticmethod) else found)


def calls(function):
    """Arguments that the function takes: all by position, and all by name that have one; with its options and without.
    As pairs of positional and named ones."""
    parameters = list(inspect.signature(function).parameters.values())
    plain = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    for taken in (plain, [p for p in plain if p.default is p.empty]):
        by_name = [p.name for p in taken if p.kind is p.KEYWORD_ONLY]
        positional = [p.name for p in taken if p.kind is not p.KEYWORD_ONLY]
        yield positional, by_name
        # SGLang calls methods on an object: `self` is positional.
        yield positional[:1], positional[1:] + by_name


@pytest.mark.parametrize("seam", seams(), ids=lambda seam: seam.target.removeprefix("sglang.srt."))
def test_each_body_takes_what_its_target_takes(seam):
    before = {HookType.AROUND: ["original"], HookType.AFTER: ["result"]}.get(seam.kind, [])
    for positional, named in calls(original(seam.target)):
        inspect.signature(seam.body).bind(*before, *positional, **dict.fromkeys(named))


def classes():
    """Ours, which stand where SGLang has its own."""
    from sglang_vtensor.srt.attention_cuda import FlashAttention3, TritonPrefill
    from sglang_vtensor.srt.attention_host import HostAttentionBackend
    from sglang_vtensor.srt.kv_pool import VTensorKVPool
    from sglang_vtensor.srt.platform import HostPlatform
    from sglang_vtensor.srt.shared_decode import SharedDecodeBackend

    patch = patches.load()
    ours = [patch.tree_class(), patch.allocator_class(), VTensorKVPool, HostPlatform]
    ours += [FlashAttention3, TritonPrefill, HostAttentionBackend, SharedDecodeBackend]
    return ours + [seam.body(None) for seam in seams() if seam.target.endswith("get_prefill_adder_class")]


@pytest.mark.parametrize("ours", classes(), ids=lambda ours: ours.__name__)
def test_each_method_takes_what_sglangs_method_takes(ours):
    """A method of ours that has the name of one of SGLang's is called as that, also where we meant something else."""
    mine = [owner for owner in ours.__mro__ if owner.__module__.startswith("sglang_vtensor")]
    theirs = [owner for owner in ours.__mro__ if owner.__module__.startswith("sglang.")]
    taken = 0
    for name in {name for owner in mine for name in vars(owner)} - {"__init__"}:
        owner = next((owner for owner in theirs if name in vars(owner)), None)
        if owner is None or not inspect.isfunction(vars(owner)[name]):
            continue
        method = inspect.getattr_static(ours, name)
        if isinstance(method, property):
            continue
        taken += 1
        for positional, named in calls(vars(owner)[name]):
            inspect.signature(method).bind(*positional, **dict.fromkeys(named))
    assert taken, "nothing of SGLang's is in it"


def test_each_target_has_one_body():
    targets = [seam.target for seam in seams()]
    assert len(targets) == len(set(targets))


@pytest.mark.parametrize("file", sorted(PATCHES.rglob("*.py")), ids=lambda file: str(file.relative_to(PATCHES)))
def test_a_module_for_a_version_knows_what_that_has(file):
    """It asks no object whether it has a name, and guards no import: what is not there is to fail, and to be seen."""
    for node in ast.walk(ast.parse(file.read_text())):
        where = f"{file.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "hasattr", where
            assert node.func.id != "getattr" or len(node.args) == 2, where
        if isinstance(node, ast.ExceptHandler):
            caught = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)} if node.type else {"all"}
            assert not caught & {"all", "ImportError", "ModuleNotFoundError", "AttributeError", "Exception"}, where
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Attribute) and file != PATCHES / "__init__.py":
            names = [alias.name for alias in node.names] if not isinstance(node, ast.Attribute) else [node.attr]
            assert not {"__version__", "version"} & set(names), f"{where}: one module, one version"
