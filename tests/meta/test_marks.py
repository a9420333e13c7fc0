"""The two marks of a plugin are proved by what the repository holds.

The keywords of a plugin's pyproject.toml say them, and the section "What we measured" of its README begins with a
paragraph for each (`tools/generate.py` puts the words in):

    **Fidelity: equal.** ... the official code (owner/name, commit `1a2b3c4`) ... the largest difference is 3.4e-6 ...
    `test_equals_the_official_layer` ...

    **Evidence: shown.** ... accuracy 0.837 ± 0.023 against 0.790 ± 0.010 ... [results](../../../benchmarks/results/...)

`equal` needs the peer (a repository's commit, a library's version), the largest difference, and a test of the plugin.
`shown` and `not-shown` need two figures, and a results file that has them, or a table of the README where the paragraph
links to none. For `shown` the first figure is the better one, and the spreads, a ± or an interval, stay apart.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest

from peftx.composition.metadata import MARKS, keyword_values

ROOT = Path(__file__).parents[2]
FOLDERS = sorted(path.parent for path in ROOT.glob("plugins/*/*/pyproject.toml"))
LARGEST = Decimal("1e-4")
"""More than this is no rounding of float32, on the tiny models and layers that are compared."""
MEASURES = {"accuracy": 1, "F1": 1, "speed": 1, "loss": -1, "perplexity": -1, "density": -1, "memory": -1}
"""What a figure may be for `shown`: 1 where more is better, -1 where less is."""

NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?"
FIGURE = rf"({NUMBER})(?: ± ({NUMBER})| \(({NUMBER}) to ({NUMBER})\))?"
PAIR = re.compile(rf"([\w-]+) {FIGURE} against {FIGURE}")
PEER = re.compile(r"commit `[0-9a-f]{7,40}`|\b[A-Z]\w*(?: [A-Z]\w*)* \d+\.\d+\.\d+")
RESULTS = re.compile(r"\]\(((?:\.\./)*benchmarks/results/[\w.-]+)\)")


# ------------------------------------------------------------------------------------------------ reading a folder
def problems(folder: Path) -> list[str]:
    """Which marks of a plugin folder are not proved."""
    words = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]["keywords"]
    return unproved(words, (folder / "README.md").read_text("utf-8"), folder)


def unproved(words: list[str], readme: str, folder: Path) -> list[str]:
    section = re.split(r"^## ", readme.partition("\n## What we measured\n")[2], flags=re.MULTILINE)[0]
    paragraphs = [" ".join(text.split()) for text in section.strip().split("\n\n")]
    found = []
    marks = [mark for mark in MARKS if mark != "fidelity" or "paper:none" not in words]  # true to which paper
    for mark, text in zip(marks, [*paragraphs, "", ""], strict=False):
        value = ", ".join(keyword_values(words, mark))
        begin = f"**{mark.capitalize()}: {value}.** "
        if not text.startswith(begin):
            found.append(f"'What we measured' does not begin with {begin!r} in its place, but {text[:40]!r}")
        elif mark == "fidelity":
            found += _fidelity(value, text, folder)
        elif value != "not-measured":
            found += _evidence(value, text, section, folder)
    return found


def _fidelity(value: str, text: str, folder: Path) -> list[str]:
    tests = "\n".join(path.read_text("utf-8") for path in folder.glob("tests/*.py"))
    named = re.findall(r"`(test_\w+)`", text)
    found = [f"fidelity: {name} is no test of the plugin" for name in named if f"\ndef {name}(" not in tests]
    if value != "equal":
        return found
    difference = re.search(rf"the largest difference is ({NUMBER})", text)
    if PEER.search(text) is None:
        found.append("fidelity: no peer is named: a library and its version, or a repository and its commit")
    if difference is None:
        found.append("fidelity: it does not say 'the largest difference is <number>'")
    elif _number(difference[1]) > LARGEST:
        found.append(f"fidelity: a difference of {difference[1]} is more than {LARGEST}")
    if not named:
        found.append("fidelity: no test is named that holds it")
    return found


def _evidence(value: str, text: str, section: str, folder: Path) -> list[str]:
    files = [folder / link for link in RESULTS.findall(text)]
    missing = [f"evidence: {file.name} does not exist" for file in files if not file.is_file()]
    if missing:
        return missing
    tables = "\n".join(line for line in section.splitlines() if line.startswith("|"))
    source = "\n".join(file.read_text("utf-8") for file in files) if files else tables
    pair = PAIR.search(text)
    if pair is None:
        return ["evidence: it does not say '<measure> <figure> against <figure>'"]
    measure, *numbers = pair.groups()
    held = [_number(found) for found in re.findall(NUMBER, source)]
    baseline_of_a_ratio = numbers[4:] == ["1", None, None, None]
    found = [
        f"evidence: {number} is in {', '.join(file.name for file in files) or 'no table of the README'}"
        + (" nowhere" if files else "")
        for number in (numbers[:4] if baseline_of_a_ratio else numbers)
        if number is not None and not any(_rounds(exact, number) for exact in held)
    ]
    if value != "shown":
        return found
    (low, high), (other_low, other_high) = _range(numbers[:4]), _range(numbers[4:])
    if low == high or (other_low == other_high and not baseline_of_a_ratio):
        found.append("evidence: a figure has no spread: '0.837 ± 0.023', or '0.837 (0.810 to 0.860)'")
    if measure not in MEASURES:
        found.append(f"evidence: {measure!r} is none of {', '.join(MEASURES)}")
    elif (low <= other_high) if MEASURES[measure] > 0 else (high >= other_low):
        found.append(f"evidence: {pair[0]!r} is no better beyond the spread")
    return found


def _number(text: str) -> Decimal:
    return Decimal(text.replace(",", ""))


def _rounds(exact: Decimal, text: str) -> bool:
    """Is `text` the exact number, rounded to as many places as it has."""
    number = _number(text)
    places = number.as_tuple().exponent
    assert isinstance(places, int)
    return abs(exact - number) <= Decimal(5).scaleb(places - 1)


def _range(numbers: list[str | None]) -> tuple[Decimal, Decimal]:
    value, spread, low, high = numbers
    assert value is not None
    if low is not None and high is not None:
        return _number(low), _number(high)
    around = _number(spread or "0")
    return _number(value) - around, _number(value) + around


# ------------------------------------------------------------------------------------------------------- the tests
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_mark_is_proved(folder: Path) -> None:
    assert problems(folder) == []


@pytest.mark.parametrize(
    ("mark", "value"), [("fidelity", "equal"), ("evidence", "shown"), ("evidence", "not-shown")]
)
def test_no_mark_can_be_raised_by_its_word(mark: str, value: str) -> None:
    """In every plugin whose mark is lower, in its keywords and its README."""
    values = list(MARKS[mark])
    raised = []
    for folder in FOLDERS:
        words = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]["keywords"]
        readme = (folder / "README.md").read_text("utf-8")
        (old,) = keyword_values(words, mark)
        if values.index(old) <= values.index(value):
            continue
        begin = f"**{mark.capitalize()}: {{}}.**"
        assert begin.format(old) in readme
        raised.append(folder.name)
        words = [*(word for word in words if not word.startswith(mark)), f"{mark}:{value}"]
        assert unproved(words, readme.replace(begin.format(old), begin.format(value)), folder), folder.name
    assert raised


# ------------------------------------------------------------------- the check itself: each defect is seen, and named
README = """# Example

## What we measured

**Fidelity: equal.** Against the official code (someone/example, commit `1a2b3c4`) the largest difference is 3.4e-6, of
a logit; `test_equals_it` holds numbers of it.

**Evidence: shown.** On AG News, three seeds: accuracy 0.837 ± 0.023 against 0.790 ± 0.010 of a head
([results](../benchmarks/results/example.md)).

| method | accuracy | 95 % interval | loss |
| --- | --- | --- | --- |
| this | 0.9 | 0.88 to 0.92 | 1.10 |
| other | 0.8 | 0.77 to 0.83 | 1.30 |

## Cite
"""
EQUAL, SHOWN = ["fidelity:equal", "evidence:shown"], ("0.837 ± 0.023 against 0.790 ± 0.010", "accuracy 0.8")
LINKED = " of a head\n([results](../benchmarks/results/example.md))."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "example.md").write_text("| this | 0.837 ± 0.023 |\n| other | 0.790 ± 0.010 |\n", "utf-8")
    (results / "example.json").write_text('{"this": [0.8365, 0.0231], "other": [0.7904, 0.01]}', "utf-8")
    (tmp_path / "plugin" / "tests").mkdir(parents=True)
    (tmp_path / "plugin" / "tests" / "test_example.py").write_text(
        "\ndef test_equals_it() -> None: ...\n", "utf-8"
    )
    return tmp_path / "plugin"


PROOFS: list[Callable[[str], str]] = [
    lambda text: text,
    lambda text: text.replace("example.md", "example.json"),
    lambda text: text.replace("the official code (someone/example, commit `1a2b3c4`)", "HF PEFT 0.21.2"),
    lambda text: text.replace("3.4e-6", "0"),
    lambda text: text.replace(LINKED, ".").replace(SHOWN[0], "0.9 (0.88 to 0.92) against 0.8 (0.77 to 0.83)"),
    lambda text: text.replace(LINKED, ".").replace(
        f"accuracy {SHOWN[0]}", "speed 1.10 (1.10 to 1.30) against 1"
    ),
]


@pytest.mark.parametrize("change", PROOFS)
def test_a_proof_is_taken(folder: Path, change: Callable[[str], str]) -> None:
    assert unproved(EQUAL, change(README), folder) == []


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("**Fidelity: equal.** ", "", "does not begin with '**Fidelity: equal.** '"),
        ("**Evidence: shown.** ", "", "does not begin with '**Evidence: shown.** '"),
        ("**Fidelity: equal.** ", "**Fidelity: equations.** ", "does not begin"),
        ("(someone/example, commit `1a2b3c4`)", "", "no peer"),
        ("the largest difference is 3.4e-6", "the difference is small", "largest difference"),
        ("3.4e-6", "3.4e-3", "more than"),
        ("; `test_equals_it` holds numbers of it", "", "no test is named"),
        ("`test_equals_it`", "`test_equals`", "test_equals is no test"),
        ("example.md", "other.md", "other.md does not exist"),
        ("0.790 ± 0.010", "0.780 ± 0.010", "0.780 is in example.md nowhere"),
        ("0.837 ± 0.023 against", "0.837 ± 0.003 against", "0.003 is in example.md nowhere"),
        ("against", "and", "<figure> against <figure>"),
        (LINKED, ".", "0.837 is in no table"),
        ("0.837 ± 0.023 against", "0.837 against", "no spread"),
        ("against 0.790 ± 0.010", "against 0.790", "no spread"),
        (
            "accuracy 0.837 ± 0.023 against 0.790 ± 0.010",
            "accuracy 0.790 ± 0.010 against 0.837 ± 0.023",
            "no better",
        ),
        ("accuracy 0.837", "loss 0.837", "no better"),
        ("0.837 ± 0.023 against 0.790 ± 0.010", "0.837 ± 0.037 against 0.790 ± 0.010", "no better"),
        ("accuracy 0.837", "similarity 0.837", "'similarity' is none of accuracy"),
    ],
)
def test_a_mark_without_its_proof_is_named(folder: Path, old: str, new: str, named: str) -> None:
    assert old in README
    assert any(named in line for line in unproved(EQUAL, README.replace(old, new), folder))


def test_what_was_not_shown_needs_figures_and_no_spread(folder: Path) -> None:
    words = ["fidelity:equal", "evidence:not-shown"]
    readme = README.replace("Evidence: shown", "Evidence: not-shown").replace(LINKED, ".")
    assert unproved(words, readme.replace(f"accuracy {SHOWN[0]}", "loss 1.30 against 1.10"), folder) == []
    assert unproved(words, readme.replace(f"accuracy {SHOWN[0]}", "loss 1.30 against 1.20"), folder)
    assert unproved(words, readme.replace(f"accuracy {SHOWN[0]}", "nothing"), folder)


def test_what_was_not_measured_or_compared_needs_no_figure(folder: Path) -> None:
    words = ["fidelity:equations", "evidence:not-measured"]
    readme = "\n## What we measured\n\n**Fidelity: equations.** Yes.\n\n**Evidence: not-measured.** No.\n\n## Cite\n"
    assert unproved(words, readme, folder) == []
    assert unproved(words, readme.replace("Yes", "`test_nothing`"), folder)
