"""What peftx writes can be copied to any system: no name of a file is one that Windows refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import peftx
from peftx.comparing.table import slugs_of
from peftx.engines.bundle.manifest import BASE, member_file
from peftx.testing import tiny
from peftx.toolkits.evaluation import Evaluation
from peftx_cli.scaffold import write
from peftx_lora import Lora
from peftx_nf4 import NF4Storage
from peftx_prompt_tuning import PromptTuning
from peftx_spec.portable import portable

DEVICES = ("con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10)))
NAMES = st.one_of(
    st.text(max_size=300),
    st.sampled_from(DEVICES),
    st.builds(
        "{}{}{}".format, st.sampled_from(DEVICES), st.sampled_from(["", ".", " ", ".v2", " .x"]), st.text()
    ),
)
IDS = st.one_of(
    st.from_regex("[a-z0-9][a-z0-9-]{0,200}", fullmatch=True), st.sampled_from([*DEVICES, "base"])
)


def refused(name: str) -> str:
    """Why Windows does not take a name, in Microsoft's words; empty where it does."""
    stem = name.split(".")[0].rstrip(" ").lower()
    if not name or re.search(r'[<>:"/\\|?*\x00-\x1f]', name):
        return "a reserved character"
    if name[-1] in ". ":
        return "ends in a dot or a space"
    if stem in DEVICES or stem in ("conin$", "conout$"):
        return "the name of a device"
    return "too long" if len(name.encode()) > 200 else ""


@settings(max_examples=300, deadline=None)
@given(name=NAMES)
@example(name="a: b / c?")
@example(name="..")
@example(name="CON.json")
@example(name="\ud800")
def test_a_portable_name_is_one(name: str) -> None:
    found = portable(name)
    assert not refused(found)
    assert not refused(f"{found}.yaml")
    assert portable(found) == found


@settings(max_examples=200, deadline=None)
@given(name=st.from_regex("[A-Za-z0-9_][A-Za-z0-9_=+ -]{0,60}[A-Za-z0-9]", fullmatch=True))
def test_a_name_that_is_one_stays(name: str) -> None:
    assert (portable(name) == name) == (not refused(name))


@settings(max_examples=200, deadline=None)
@given(ids=st.sets(IDS, max_size=8))
def test_the_files_of_a_bundle(ids: set[str]) -> None:
    """Each id of a stack has its own, and none is that of the base."""
    files = [member_file(id) for id in sorted(ids)]
    assert not [why for file in files if (why := refused(file))]
    assert len({BASE, *(file.lower() for file in files)}) == len(ids) + 1


@settings(max_examples=200, deadline=None)
@given(names=st.lists(NAMES, max_size=8, unique=True))
def test_the_files_of_a_comparison(names: list[str]) -> None:
    files = [f"{slug}.yaml" for slug in slugs_of(names).values()]
    assert not [why for file in files if (why := refused(file))]
    assert len({file.lower() for file in files}) == len(names)


def test_a_stack_may_call_its_plugins_what_it_likes(tmp_path: Path) -> None:
    """`base` had the file of the base, which took its place, and the bundle could not be loaded."""
    stack = peftx.Stack(
        tiny("llama"), [("base", PromptTuning(length=3)), ("con", Lora(rank=2)), NF4Storage()]
    )
    stack.compress()
    stack.save(tmp_path / "out")
    written = [file.relative_to(tmp_path).as_posix() for file in (tmp_path / "out").rglob("*")]
    assert not [name for name in written for part in name.split("/") if refused(part)]
    again, ids = peftx.load(tmp_path / "out"), torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, stack.model(ids).logits)


def test_a_figure(tmp_path: Path) -> None:
    evaluation = Evaluation(stack=peftx.Stack(tiny("llama"), []), output_dir=tmp_path)
    evaluation.figure("rank/de: x?", {"a": [(0, 0), (1, 1)]}, x="x", y="y")
    assert [file.name for file in tmp_path.iterdir()] == ["rank-de- x-.html"]


@pytest.mark.parametrize("name", ["con", "nul", "com1"])
def test_a_scaffold(name: str, tmp_path: Path) -> None:
    with pytest.raises(peftx.PeftxError, match="cannot be a plugin's name"):
        write(tmp_path / name, slug=name, hook="inject", arxiv=None, title=None, family=None)
