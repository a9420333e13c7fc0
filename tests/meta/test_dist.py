"""What `make dist` builds: all of it, whole, and it works where there is no source tree."""

from __future__ import annotations

import email
import json
import shutil
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from typing import Any

import generate
import pytest
from dist import stage_plugin

from peftx import __version__

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs/examples/peftx-lora-xs"
FOLDERS = {path.parent.name: path.parent for path in ROOT.glob("plugins/*/*/pyproject.toml")}
INFO = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}


def wheel(dist: Path, name: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(dist / f"{name.replace('-', '_')}-{__version__}-py3-none-any.whl")


def files(archive: zipfile.ZipFile) -> tuple[set[str], set[str]]:
    """Names of a wheel's files: its code, and what lies in `.dist-info`."""
    names = {name for name in archive.namelist() if not name.endswith("/")}
    info = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    return names - info, {name.partition("/")[2] for name in info}


def metadata(archive: zipfile.ZipFile) -> Message:
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_string(archive.read(name).decode())


def in_tree(*folders: str) -> set[str]:
    """Files of import packages, as a wheel names them."""
    return {
        path.relative_to(ROOT / folder).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


# ---------------------------------------------------------------------------------------------------- what is in them
def test_the_framework_holds_its_packages_and_nothing_else(dist: Path) -> None:
    archive = wheel(dist, "peftx")
    code, info = files(archive)
    assert code == in_tree("core", "spec", "cli")
    assert code >= {"peftx/py.typed", "peftx_spec/py.typed", "peftx_cli/py.typed"}
    assert code >= {"peftx/assets/tiny/model.safetensors", "peftx/assets/sample/train.jsonl"}
    assert info == INFO
    assert metadata(archive).get_all("Project-URL")
    assert metadata(archive)["Version"] == __version__


@pytest.mark.parametrize("hook", sorted({folder.parent.name for folder in FOLDERS.values()}))
def test_a_plugin_holds_its_module_and_nothing_else(dist: Path, hook: str) -> None:
    for slug, folder in FOLDERS.items():
        if folder.parent.name == hook:
            archive = wheel(dist, f"peftx-{slug}")
            code, info = files(archive)
            assert code == in_tree(f"plugins/{hook}/{slug}/src"), slug
            assert info == INFO, slug
            about = metadata(archive)
            assert (about["Version"], about["License-Expression"]) == (__version__, "Apache-2.0"), slug
            assert f"Source, https://github.com/peftx/peftx/tree/main/plugins/{hook}/{slug}" in about.get_all(
                "Project-URL"
            )
            assert about.get_payload().startswith("# "), f"{slug}: the README is not its description"


def test_the_licence_is_the_repository_s(dist: Path) -> None:
    text = (ROOT / "LICENSE").read_bytes()
    wheels, sdists = sorted(dist.glob("*.whl")), sorted(dist.glob("*.tar.gz"))
    assert len(wheels) == len(sdists)
    for path in wheels:
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE"))
            assert archive.read(name) == text, path.name
    for path in sdists:
        with tarfile.open(path) as archive:
            found = archive.extractfile(f"{path.name.removesuffix('.tar.gz')}/LICENSE")
            assert found is not None
            assert found.read() == text, path.name


@pytest.mark.parametrize(
    ("name", "backend"), [("peftx", "hatchling.build"), ("peftx-lora", "flit_core.buildapi")]
)
def test_an_sdist_builds_the_same_wheel(
    dist: Path, tmp_path: Path, build: Callable[[Path, str, Path], Path], name: str, backend: str
) -> None:
    folder = f"{name.replace('-', '_')}-{__version__}"
    with tarfile.open(dist / f"{folder}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    build(tmp_path / folder, backend, tmp_path / "again")
    one, other = wheel(dist, name), wheel(tmp_path / "again", name)
    assert {n: one.read(n) for n in one.namelist()} == {n: other.read(n) for n in other.namelist()}


def test_bundles_require_what_their_names_say(dist: Path) -> None:
    families: dict[str, set[str]] = {}
    for slug, folder in FOLDERS.items():
        project = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]
        for word in project["keywords"]:
            if word.startswith("family:"):
                families.setdefault(word.removeprefix("family:"), set()).add(f"peftx-{slug}~={__version__}")
    wanted = {f"peftx-all-{family}": members for family, members in families.items() if len(members) >= 3}
    wanted["peftx-all"] = {f"peftx-{slug}~={__version__}" for slug in FOLDERS}
    built = {path.name.split("-")[0].replace("_", "-") for path in dist.glob("*.whl")}
    assert built == {"peftx", *wanted, *(f"peftx-{slug}" for slug in FOLDERS)}
    for name, members in wanted.items():
        code, info = files(wheel(dist, name))
        assert code == set()
        assert info == INFO - {"entry_points.txt"}
        assert set(metadata(wheel(dist, name)).get_all("Requires-Dist")) == members, name


# ---------------------------------------------------------------------------------------------------------- one version
@pytest.mark.parametrize(
    ("version", "asked"), [("0.2.7", ">=0.2,<0.3"), ("0.10.0", ">=0.10,<0.11"), ("2.3.1", ">=2.3,<3")]
)
def test_one_version_is_written_everywhere(version: str, asked: str) -> None:
    """That what is committed has the version of today is seen by tests/meta/test_derived.py."""
    texts = generate.versioned(version)
    assert set(texts) == {
        ROOT / "CITATION.cff",
        ROOT / "cli/peftx_cli/templates/pyproject.toml.tmpl",
        *(folder / "pyproject.toml" for folder in FOLDERS.values()),
    }
    for folder in FOLDERS.values():
        project = tomllib.loads(texts[folder / "pyproject.toml"])["project"]
        assert project["version"] == version
        assert project["dependencies"][0] == f"peftx{asked}"
    assert f"\nversion: {version}\n" in texts[ROOT / "CITATION.cff"]
    template = texts[ROOT / "cli/peftx_cli/templates/pyproject.toml.tmpl"]
    assert f'["peftx{asked}"]' in template
    assert '\nversion = "0.1.0"\n' in template


def test_a_plugin_of_another_version_is_not_built(tmp_path: Path) -> None:
    folder = FOLDERS["lora"]
    with pytest.raises(
        SystemExit, match=r"plugins/inject/lora/pyproject.toml: version 0.1.0, and .* says 0.3.0"
    ):
        stage_plugin(folder, {"version": "0.1.0"}, "0.3.0", tmp_path / "staged")


# -------------------------------------------------------------------------------------------- where no source tree is
WHERE = """
import sys
from importlib.metadata import distributions
import peftx, peftx_cli, peftx_spec
print(*sys.path, *(m.__file__ for m in (peftx, peftx_cli, peftx_spec)), sep="\\n")
print(*sorted(d.name for d in distributions() if d.name.startswith("peftx")))
"""
RELOAD = """
import peftx, torch
stack = peftx.load("out")
ids = torch.arange(3, 19)[None]
whole = stack.model(input_ids=ids).logits
assert torch.equal(whole, peftx.load("out").model(input_ids=ids).logits)
assert not torch.equal(whole, peftx.Stack("peftx:tiny", []).model(input_ids=ids).logits)
"""
STACK = """
peftx: 1
model: peftx:tiny
data: {{train: peftx:sample/train.jsonl, eval: rows.jsonl}}
stack: {stack}
train: {{steps: 2, batch_size: 2, learning_rate: 5e-2}}
evaluate: [perplexity]
output: out
"""


def prove(bare: Any, tree: set[str], stack: str) -> None:
    """The installed distributions are these, none of a source tree; a stack of them is applied, and reloads."""
    *places, found = bare.run(WHERE).splitlines()
    assert set(found.split()) == tree
    assert not any(Path(place).is_relative_to(ROOT) for place in places if place)
    assert all(Path(place).is_relative_to(bare.python.parents[1]) for place in places[-3:])
    listed = {line["name"]: line["status"] for line in json.loads(bare.peftx("list", "--json"))}
    assert listed == {name.removeprefix("peftx-"): "ok" for name in tree - {"peftx"}}

    rows = (ROOT / "core/peftx/assets/sample/held_out.jsonl").read_text("utf-8").splitlines()[:2]
    (bare.work / "rows.jsonl").write_text("\n".join(rows), "utf-8")
    (bare.work / "stack.yaml").write_text(STACK.format(stack=stack), "utf-8")
    applied = json.loads(bare.peftx("apply", "stack.yaml", "--json"))
    measured = list(applied["scores"].values())[-1]
    again = json.loads(bare.peftx("evaluate", "out", "--data", "rows.jsonl", "--json"))
    assert again["perplexity"] == measured["perplexity"]  # in another process, to the bit
    bare.run(RELOAD)


@pytest.mark.slow
def test_it_works_from_wheels_alone(dist: Path, bare: Any) -> None:
    """About 25 s of CPU: four processes load torch and transformers."""
    bare.install("peftx-mosaic-it", "peftx-lora", "peftx-deft", index=dist)
    prove(bare, {"peftx", "peftx-mosaic-it", "peftx-lora", "peftx-deft"}, "[mosaic-it, lora, deft]")


@pytest.mark.slow
def test_a_stranger_s_plugin_works_beside_it(
    dist: Path, bare: Any, build: Callable[[Path, str, Path], Path]
) -> None:
    """docs/examples/peftx-lora-xs, of which nothing in the repository knows; about 40 s of CPU."""
    bare.install("peftx", build(EXAMPLE, "flit_core.buildapi", bare.work), index=dist)
    prove(bare, {"peftx", "peftx-lora-xs"}, "[{use: lora-xs, with: {rank: 4, init_std: 0.01}}]")
    checked = json.loads(bare.peftx("check", "lora-xs", "--model", "llama", "--json"))
    assert len([result for result in checked if result["outcome"] == "passed"]) > 20
    assert {result["outcome"] for result in checked} <= {"passed", "skipped"}
    shutil.copytree(EXAMPLE / "tests", bare.work / "tests")
    tested = bare.shell("python -m pytest -q -p no:cacheprovider -k 'not conformance' tests")
    assert tested.returncode == 0, tested.stdout
    assert "4 passed" in tested.stdout


def test_the_options_in_its_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    from peftx.composition.options import options_table

    monkeypatch.syspath_prepend(str(EXAMPLE / "src"))
    from peftx_lora_xs import LoraXs

    assert options_table(LoraXs.Config) in (EXAMPLE / "README.md").read_text("utf-8")
