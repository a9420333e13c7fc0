"""What the site is made of: links that lead somewhere, parts that are made from the code, and no other host."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pages import MADE, NOTE, UnknownPart, filled, gallery, made, spec, streams, together
from pages.links import dead, links_of
from pages.shown import as_in_site, from_elsewhere, shown, without_reasons

import peftx
from peftx import Claim, Registry

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *shown(".md")]


def read(page: Path) -> str:
    return filled(page.read_text("utf-8"), page.name)


def test_no_link_of_the_documents_is_dead() -> None:
    assert not dead(PAGES, ROOT, read)
    assert sum(len(links_of(page)) for page in PAGES) > 500


def test_links_of_what_is_made_are_looked_at(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("# Page\n", "utf-8")
    (found,) = dead([tmp_path / "page.md"], tmp_path, lambda page: "# Page\n\n[x](no.md)\n")
    assert found == "page.md, in what is made: the link 'no.md' leads nowhere: there is no no.md"


def test_brackets_that_read_as_a_link_are_told(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(
        "# Page\n\n`[a] [b]`, and [B - B0, B0] [A; A - A0].\n\n    [a][b]\n", "utf-8"
    )
    (found,) = dead([tmp_path / "page.md"], tmp_path)
    assert found.startswith("page.md:3: '[...] [A; A - A0]' reads as a link to 'A; A - A0', which is nowhere")


@pytest.mark.parametrize(
    ("link", "why"),
    [
        (
            "[x](nowhere.md)",
            "docs/page.md:3: the link 'nowhere.md' leads nowhere: there is no docs/nowhere.md",
        ),
        (
            "[x](other.md#nothing)",
            "docs/page.md:3: the link 'other.md#nothing' leads nowhere: docs/other.md has no heading",
        ),
        ("[x](#nothing)", "docs/page.md:3: the link '#nothing' leads nowhere"),
        ("![x](no.png)", "docs/page.md:3: the link 'no.png' leads nowhere"),
        ("[`x`](../../out.md)", "docs/page.md:3: the link '../../out.md' leads nowhere"),
        (
            "[x](https://github.com/peftx/peftx/blob/main/NO.md)",
            "docs/page.md:3: the link 'https://github.com/peftx",
        ),
    ],
)
def test_a_dead_link_is_named_by_file_and_line(link: str, why: str, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "other.md").write_text("# Other\n\n## A `heading(of, code)`\n", "utf-8")
    (docs / "page.md").write_text(
        f"# Page\n\n{link}\n[a](other.md#a-headingof-code) [b](#page) `[c](d.md)`\n", "utf-8"
    )
    (found,) = dead([docs / "page.md"], tmp_path)
    assert found.startswith(why)


def test_a_link_in_a_fence_is_none(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("````text\n```\n[a](nowhere.md)\n```\n````\n", "utf-8")
    assert links_of(page) == []


@pytest.mark.parametrize("name", sorted(MADE))
def test_every_part_is_made_and_stands_in_a_page(name: str) -> None:
    assert made(name).strip()
    assert any(f"<!-- made: {name} -->" in page.read_text("utf-8") for page in PAGES)


def test_an_unknown_part_is_named_by_file_and_line() -> None:
    with pytest.raises(UnknownPart, match=r"^docs/page\.md:3: nothing makes 'nothing'; there are: "):
        filled("# Page\n\n<!-- made: nothing -->\n", "docs/page.md")


@pytest.mark.parametrize(
    "page", [p for p in shown(".md") if p.parent.name == "results"], ids=lambda p: p.stem
)
def test_a_page_of_results_has_a_title_and_no_file_in_it(page: Path) -> None:
    text = page.read_text("utf-8")
    title = text.splitlines()[0].removeprefix("# ")
    assert title[0].isupper()
    assert title.lower() != page.stem.lower()
    assert "```json" not in text, "figures stand in the file beside it"


def test_the_spec_page_has_every_key_and_a_heading_for_each_link() -> None:
    text = (ROOT / "docs/reference/spec.md").read_text("utf-8")
    for name, model in spec.SECTIONS.items():
        fields = {field.alias or key for key, field in model.model_fields.items()}
        assert set(re.findall(r"^\| `([\w-]+)` ", made(f"spec-{name}"), re.MULTILINE)) == fields
        assert f"<!-- made: spec-{name} -->" in text


def test_the_gallery_has_every_plugin() -> None:
    names = {each.name for each in gallery.listed()}
    assert names >= set(Registry(disabled=()).names())
    assert "lora-xs" in names, "the example of a distribution of its own"


def test_the_gallery_says_which_rows_and_whether_it_folds() -> None:
    known = {each.name: each for each in gallery.listed()}
    assert known["lora"].mergeable == "yes"
    assert known["prompt-tuning"].mergeable == "no"
    assert known["lora"].formats == ("any",)
    assert "preference" in known["dpo-prefix-sharing"].formats


def test_every_goal_has_plugins_and_every_plugin_a_goal() -> None:
    *rows, rest = made("goals").splitlines()[2:]
    assert all("](" in row for row in rows)
    assert rest.count("](") < len(gallery.listed()) / 6
    assert all(f"[{each.name}](" in made("goals") for each in gallery.listed())


def test_a_plugin_from_elsewhere_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs" / "listed").mkdir(parents=True)
    (tmp_path / "docs/listed/far.toml").write_text(
        '[project]\nname = "far"\ndescription = "Far: from elsewhere"\n'
        'keywords = ["decode", "family:decoding", "arXiv:2501.00001"]\n'
        '[project.urls]\nSource = "https://example.org/far"\n'
        '[project.entry-points."peftx.plugins"]\nfar = "far:Far"\n',
        "utf-8",
    )
    monkeypatch.setattr(gallery, "ROOT", tmp_path)
    gallery.listed.cache_clear()
    try:
        row = gallery.table().splitlines()[-1]
    finally:
        gallery.listed.cache_clear()
    assert row == (
        "| [far](https://example.org/far) | Far: from elsewhere | decode | decoding |  |  |  |  |  "
        "| [2501.00001](https://arxiv.org/abs/2501.00001) |"
    )


def test_two_plugins_of_one_package_are_two_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed, each says its own; of the others is known what the package says."""
    (tmp_path / "docs" / "listed").mkdir(parents=True)
    (tmp_path / "docs/listed/far.toml").write_text(
        '[project]\nname = "far"\ndescription = "Far: several"\nkeywords = ["decode", "arXiv:2501.00001"]\n'
        '[project.urls]\nSource = "https://example.org/far"\n'
        '[project.entry-points."peftx.plugins"]\nlora = "far:Lora"\nfar = "far:Far"\n',
        "utf-8",
    )
    monkeypatch.setattr(gallery, "ROOT", tmp_path)
    gallery.listed.cache_clear()
    try:
        far, lora = gallery.listed()
    finally:
        gallery.listed.cache_clear()
    known = gallery.REGISTRY.describe("lora")
    assert (far.what, far.hooks, far.paper) == ("Far: several", ("decode",), "arXiv:2501.00001")
    assert (lora.what, lora.hooks, lora.paper) == (known.summary, known.hooks, known.paper)


def test_what_goes_together_is_that_of_the_matrix() -> None:
    found = together.outcomes("lora")
    assert len(found) == len(together.matrix()["plugins"]) - 1
    rows = {line.split("|")[1].strip(): line for line in together.table().splitlines()[2:]}
    numbers = [
        int(number)
        for number in re.findall(r"\| (\d+) ", rows["[lora](../../plugins/inject/lora/README.md)"])
    ]
    assert sum(numbers) == len(found)
    assert "not after a plugin that claims quantizes" in together.goes_with("lora", "../../../")


def test_every_claim_has_its_meaning() -> None:
    assert set(re.findall(r'id="([\w-]+)"', made("claims"))) == set(Claim)


def test_the_python_page_has_all_that_peftx_gives() -> None:
    text = (ROOT / "docs/reference/python.md").read_text("utf-8")
    missing = [
        name for name in peftx.__all__ if not re.search(rf"\b{name}\b", text) and name != "__version__"
    ]
    assert not missing


@pytest.mark.parametrize(
    ("html", "asked"),
    [
        ('<script src="https://cdn.example.org/x.js"></script>', ["https://cdn.example.org/x.js"]),
        ('<link rel="stylesheet" href="//fonts.example.org/x.css">', ["//fonts.example.org/x.css"]),
        ('<img alt="a" src="https://example.org/x.png">', ["https://example.org/x.png"]),
        ('<link rel="canonical" href="https://example.org/"><a href="https://example.org/">x</a>', []),
        ('<script src="../assets/x.js"></script>', []),
    ],
)
def test_what_a_page_asks_of_other_hosts_is_seen(html: str, asked: list[str]) -> None:
    assert from_elsewhere(html) == asked


def test_our_scripts_ask_nobody() -> None:
    for script in (ROOT / "docs/assets").glob("*.js"):
        assert not re.search(r"https?://|fetch\(|XMLHttpRequest|import\(", script.read_text("utf-8")), (
            script.name
        )


def test_links_as_they_are_in_the_site() -> None:
    inside = as_in_site(
        "[a](../../plugins/x/README.md) [b](../other.md)", "choose/gallery.md", is_shown=False
    )
    assert inside == "[a](../plugins/x/README.md) [b](../other.md)"
    assert as_in_site("[a](docs/data.md)", "CONTRIBUTING.md", is_shown=True) == "[a](data.md)"


def test_whoever_reads_the_file_is_told_where_its_tables_are() -> None:
    pages = [*(ROOT / "docs" / "reference").glob("*.md"), *(ROOT / "docs" / "choose").glob("*.md")]
    made = [page for page in pages if re.search("^(<!-- made|:::)", page.read_text("utf-8"), re.MULTILINE)]
    assert len(made) > 7
    for page in made:
        assert page.read_text("utf-8").count(NOTE) == 1, page
        assert NOTE not in read(page)


def test_the_site_shows_a_block_that_does_not_run_as_any_other() -> None:
    text = '```yaml norun="the base is of the Hub"\na: 1\n```\n'
    assert without_reasons(text) == "```yaml\na: 1\n```\n"
    for page in shown(".md"):
        assert not re.search("^```.* norun=", without_reasons(page.read_text("utf-8")), re.MULTILINE), page


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    """Where MkDocs is installed: `make docs` does that."""
    pytest.importorskip("mkdocstrings")
    words = (
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path / "site"),
    )
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("index.html"))
    assert len(pages) > 150
    for page in pages:
        assert not from_elsewhere(page.read_text("utf-8")), page


def stream() -> dict[str, Any]:
    """Numbers of a run, as `benchmarks/continual.py` leaves them."""
    rest = {"forgetting": [0.1, 0.01], "forward transfer": None}
    names = ("joint LoRA, head", "LoRA, head", "lae", "scl-mgsm", "LoRA, likelihood", "q-tuning, likelihood")
    return {
        "settings": {"tasks": ["a", "b"], "classes": [["x", "y"], ["z", "w"]], "steps": 3, "batch_size": 2,
                     "rates": [0.1, 0.2], "chosen_after": 1},
        "base": "The base, such a one, was not pre-trained on the rows.",
        "results": [
            {"method": name, "told": "no", "joint": i == 0, "rate": 0.2, "seeds": [{"trained": 1234}],
             "summary": {"unknown": {"average": [i / 10, 0.02], **rest}, "known": {"average": [i / 5, 0.5], **rest}}}
            for i, name in enumerate(names)
        ],
    }  # fmt: skip


def test_what_a_stream_gave_stands_in_the_readme_of_its_plugins_and_on_the_site(tmp_path: Path) -> None:
    """Once it was measured: before there is neither a link nor a number."""
    readme = "text\n\n<!-- stream -->\nold\n<!-- /stream -->\n\n## Departures"
    assert streams.told("lae", readme, tmp_path) == readme
    assert "no figures" in streams.table(tmp_path)
    (tmp_path / "continual.json").write_text(json.dumps(stream()), "utf-8")
    assert streams.told("lora", readme, tmp_path) == readme
    told = streams.told("lae", readme, tmp_path)
    assert streams.told("lae", told, tmp_path) == told
    assert "old" not in told
    assert told.endswith("\n<!-- /stream -->\n\n## Departures")
    assert (
        "lae 0.200 ± 0.020 right at the end, 0.100 ± 0.010 forgotten; joint LoRA, head 0.000 ± 0.020" in told
    )
    assert "(../../../benchmarks/results/continual.md)" in told
    assert "such a one" in told
    assert "q-tuning, likelihood 1.000 ± 0.500 right at the end" in streams.told("q-tuning", readme, tmp_path)


def test_every_plugin_of_the_stream_has_a_place_for_it() -> None:
    for name in streams.BESIDE:
        (page,) = ROOT.glob(f"plugins/*/{name}/README.md")
        assert streams.PLACE.search(
            page.read_text("utf-8").partition("## What we measured")[2].partition("\n## ")[0]
        )
