"""The map of the tree, held to what it says."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = [*(ROOT / "sglang_vtensor/vmm").glob("*.py"), *(ROOT / "kernels").glob("*.py")]
MODULES = (
    "layout",
    "placement",
    "frame_map",
    "history",
    "backing",
    "chores",
    "worker",
    "tails",
    "clock",
    "snapshot",
    "memory",
    "room",
    "sharing",
    "neighbours",
)
CORE += [ROOT / "sglang_vtensor" / f"{name}.py" for name in MODULES]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_does_not_know_sglang(path):
    assert "sglang" not in set(imported(path))


def test_only_the_patches_know_a_version():
    for path in (ROOT / "sglang_vtensor").rglob("*.py"):
        assert not re.search(r"0[._]5[._]\d\d", path.read_text()), path


def test_an_invariant_that_is_named_can_be_looked_up():
    """And its page names checks and tests that there are."""
    page = (ROOT / "docs/invariants.md").read_text()
    known = {int(number) for number in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    assert known == set(range(1, len(known) + 1))
    named = set()
    for folder in ("sglang_vtensor", "kernels", "patches", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            named |= {int(number) for number in re.findall(r"invariant\s+(\d+)", path.read_text())}
    assert named <= known
    for path in re.findall(r"`(tests/[\w/.]+)`", page):
        assert (ROOT / path).exists(), path
    code = "".join(path.read_text() for path in (ROOT / "sglang_vtensor").rglob("*.py"))
    for owner, check in re.findall(r"`(\w+)\.(\w+)`", page):
        assert f"class {owner}" in code, owner
        assert f"def {check}" in code, check


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    out, tree = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("source") / "tree"
    # Of a copy: what is written beside the package says meanwhile which plugins there are, to servers of other tests.
    none = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "results")
    shutil.copytree(ROOT, tree, ignore=none)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_holds_the_package_and_no_other(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"sglang_vtensor", f"{wheel.name.split('-py3')[0]}.dist-info"}
    for module in ("kernels/__init__", "patches/v0_5_17", "patches/v0_5_23/tree", "vmm/cuda", "srt/radix_cache"):
        assert f"sglang_vtensor/{module}.py" in names
    assert "sglang_vtensor/page.html" in names


def test_the_wheel_imports_and_has_its_entry_points(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import sglang_vtensor, sglang_vtensor.kernels, sglang_vtensor.patches\n"
        "from importlib.metadata import distribution\n"
        f"assert sglang_vtensor.__file__.startswith({str(tmp_path)!r}), sglang_vtensor.__file__\n"
        f"d = next(d for d in __import__('importlib.metadata').metadata.distributions(path=[{str(tmp_path)!r}]))\n"
        "print(sorted(e.name for e in d.entry_points))"
    )
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert done.stdout.strip() == "['sglang-vtensor', 'vtensor', 'vtensor_host']", done.stderr


def test_the_pages_say_what_was_measured():
    from benchmarks import report

    marked = set()
    for page in report.PAGES:
        text = page.read_text()
        assert text == report.render(text), f"{page.name}: run python -m benchmarks.report"
        marked |= set(re.findall(r"<!-- (results|short) (\w+) -->", text))
    assert {name for kind, name in marked if kind == "results"} == set(report.TABLES)
    assert {name for kind, name in marked if kind == "short"} == set(report.SHORT)


def test_a_picture_stands_beside_the_numbers_that_it_was_drawn_from():
    """Each is drawn from one results file, so it has one place."""
    pictures = re.findall(r"!\[.*?\]\((plots/.*?)\)", (ROOT / "docs" / "benchmarks.md").read_text())
    assert len(pictures) == len(set(pictures)), pictures


def test_no_number_of_a_benchmark_is_written_by_hand():
    """Every table of rates stands between marks."""
    from benchmarks import report

    for page in report.PAGES:
        rest = re.sub(r"<!-- (results|short) (\w+) -->.*?<!-- end -->", "", page.read_text(), flags=re.DOTALL)
        assert not re.search(r"^\|.*(tokens/s|TFLOP|\bms\b)", rest, re.MULTILINE), page


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_is_there(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", text):
        assert (page.parent / target).exists(), target
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#([^)\s]+)\)", text):
        other = page.parent / target if target else page
        headings = re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, anchor


def test_the_page_size_table_is_what_the_layout_chooses():
    from benchmarks import page_sizes, sides

    for page in (page_sizes, sides):
        assert page.PAGE.read_text() == page.table()


def test_pre_commit_runs_the_linters_of_make_lint():
    (recipe,) = re.findall(r"^lint: .*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    hooks = re.findall(r"entry: \.venv/bin/(.*)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert hooks == re.findall(r"\t\$\(BIN\)/(.*)", recipe)


def test_a_version_without_a_lock_gets_one():
    """docs/upgrading.md begins with it. Nothing is run."""
    done = subprocess.run(["make", "-n", "SGLANG=9.9.9", "lock"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "-o requirements-9.9.9.lock" in done.stdout
