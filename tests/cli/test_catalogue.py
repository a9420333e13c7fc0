"""`list`, `info`, `doctor`, `check`, `new`."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tomllib
from collections.abc import Callable
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, create_model

from peftx import Plugin, PluginConfig
from peftx_cli.commands.catalogue import option_rows

HOOKS = ("prepare_data", "inject", "train_step", "compress", "decode", "serve", "evaluate")


def named(lines: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(line for line in lines if line["name"] == name)


def test_list_tells_what_the_metadata_says(
    installed: Any, ok_json: Callable[..., Any], ok: Callable[..., str]
) -> None:
    installed.scaffold("fake-gain", "inject")
    line = named(ok_json("list", "--json"), "fake-gain")
    assert line["status"] == "ok"
    assert (line["hooks"], line["family"]) == (["inject"], "fake")
    assert (line["fidelity"], line["evidence"]) == ("equations", "not-measured")
    assert line["url"] == "https://arxiv.org/abs/2101.00001"
    (short,) = (text for text in ok("list").splitlines() if text.startswith("fake-gain "))
    assert short.split(None, 1)[1] == line["summary"]
    assert "arXiv:2101.00001" in ok("list", "--long")


def test_a_list_has_a_line_a_plugin_as_wide_as_the_terminal(
    installed: Any, ok: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for hook in HOOKS:
        installed.scaffold(f"fake-{hook.replace('_', '-')}-of-a-long-name", hook)
    for width in (80, 100):
        monkeypatch.setenv("COLUMNS", str(width))
        *lines, last = ok("list").splitlines()
        names = [line["name"] for line in json.loads(ok("list", "--json"))]
        assert [line.split()[0] for line in lines] == names
        assert width - 12 < max(map(len, lines)) <= width
        assert last == f"{len(names)} plugins; --long shows marks, hooks, family and paper"


@pytest.mark.parametrize(
    ("kind", "limits", "text"),
    [
        (float | None, {"gt": 0, "allow_inf_nan": False}, "number, > 0"),
        (int | str, {}, "integer or text"),
        (dict[str, Annotated[int, Field(gt=0)]], {}, "mapping"),
        (Literal["sum", "mean"], {}, "sum, mean"),
        (list[int], {"min_length": 1, "max_length": 3}, "list, length >= 1, length <= 3"),
        (float, {"ge": 0, "lt": 1}, "number, >= 0, < 1"),
    ],
)
def test_what_an_option_takes_in_words(kind: Any, limits: dict[str, Any], text: str) -> None:
    class One(Plugin):
        Config = create_model(
            "OneConfig", __base__=PluginConfig, size=(kind, Field(description="", **limits))
        )

    (row,) = option_rows(One)
    assert row["type"] == text


def test_list_shows_the_marks_as_the_metadata_has_them(
    installed: Any, ok_json: Callable[..., Any], ok: Callable[..., str]
) -> None:
    """None, known ones, and words that are no marks; `peftx check` says what is wrong with the last."""
    installed.publish("fake-silent", "")
    installed.publish("fake-proved", "", keywords=["inject", "fidelity:equal", "evidence:shown"])
    installed.publish("fake-proud", "", keywords=["inject", "evidence:gold", "fidelity:exact"])
    lines = ok_json("list", "--json")
    marks = {name: (named(lines, name)["fidelity"], named(lines, name)["evidence"]) for name in
             ("fake-silent", "fake-proved", "fake-proud")}  # fmt: skip
    assert marks == {
        "fake-silent": ("", ""), "fake-proved": ("equal", "shown"), "fake-proud": ("exact", "gold")
    }  # fmt: skip
    table = {
        line.split()[0]: line.split()
        for line in ok("list", "--long").splitlines()
        if line.startswith("fake-")
    }
    assert table["fake-silent"][1] == "inject"
    assert table["fake-proved"][1:4] == ["equal", "shown", "inject"]
    assert table["fake-proud"][1:4] == ["exact", "gold", "inject"]


def test_list_filters(installed: Any, ok_json: Callable[..., Any], refused: Callable[..., str]) -> None:
    installed.scaffold("fake-gain", "inject")
    installed.scaffold("fake-words", "evaluate")
    names = {line["name"] for line in ok_json("list", "--hook", "evaluate", "--json")}
    assert "fake-words" in names
    assert "fake-gain" not in names
    assert {line["name"] for line in ok_json("list", "--family", "fake", "--json")} == {
        "fake-gain",
        "fake-words",
    }
    assert "did you mean 'inject'?" in refused("list", "--hook", "injct")
    assert "did you mean 'fake'?" in refused("list", "--family", "fale")


def test_list_filters_by_marks(
    installed: Any, ok_json: Callable[..., Any], ok: Callable[..., str], refused: Callable[..., str]
) -> None:
    for name, fidelity, evidence in (
        ("fake-one", "equal", "not-shown"),
        ("fake-two", "equal", "shown"),
        ("fake-three", "equations", "shown"),
    ):
        words = ["inject", "family:fake", f"fidelity:{fidelity}", f"evidence:{evidence}"]
        installed.publish(name, "", keywords=words)

    def fakes(*words: str) -> set[str]:
        return {
            line["name"] for line in ok_json("list", *words, "--json") if line["name"].startswith("fake-")
        }

    assert fakes("--fidelity", "equal") == {"fake-one", "fake-two"}
    assert fakes("--evidence", "shown") == {"fake-two", "fake-three"}
    assert fakes("--fidelity", "equal", "--evidence", "shown") == {"fake-two"}
    assert ok("list", "--fidelity", "reconstruction", "--family", "fake") == "no plugin fits\n"
    assert "there is no mark of fidelity 'gold'" in refused("list", "--fidelity", "gold")
    assert "did you mean 'not-shown'" in refused("list", "--evidence", "notshown")


def test_the_help_names_every_mark(ok: Callable[..., str]) -> None:
    from peftx.composition.metadata import MARKS

    help = " ".join(ok("list", "--help").replace("│", " ").split())
    for mark, values in MARKS.items():
        *others, last = values
        assert f"--{mark}" in help
        assert f"only {', '.join(others)} or {last}" in help


def test_a_plugin_that_does_not_import_is_listed_as_broken(
    installed: Any, ok_json: Callable[..., Any], run: Callable[..., Any], ok: Callable[..., str]
) -> None:
    module = installed.publish("fake-torn", "raise RuntimeError('the moon is wrong')\n")
    result = run("doctor")
    assert result.exit_code == 1
    assert "broken: fake-torn" in result.stdout
    assert "the moon is wrong" in result.stdout
    line = named(ok_json("list", "--json"), "fake-torn")
    assert line["status"] == "broken"
    assert "RuntimeError: the moon is wrong" in line["reason"]
    shown = next(text for text in ok("list", "--long").splitlines() if text.startswith("fake-torn "))
    assert f"broken: {line['reason']}" in shown
    (installed.site / f"{module}.py").write_text(
        "from peftx import Plugin, hookimpl\n\n\nclass Fake(Plugin):\n    @hookimpl\n    def inject(self, model): ...\n"
    )
    assert named(ok_json("list", "--json"), "fake-torn")["status"] == "ok", "the note is of an older file"


SOUND = '''from __future__ import annotations
import os, json as text
from peftx import Plugin, hookimpl
try:
    import a_module_that_may_be_nowhere
except ImportError:
    a_module_that_may_be_nowhere = None
if os.name == "none":
    import a_module_of_another_system
class Fake(Plugin):
    """
import in_a_docstring
from prose import nothing
    """
    @hookimpl
    def inject(self, model):
        import a_module_for_later
'''
TORN = {
    "does not compile": (SOUND + "def broken(:\n", "SyntaxError: invalid syntax"),
    "no place for a return": (SOUND + "return\n", "SyntaxError: 'return' outside function"),
    "not installed": (SOUND + "from a_module.that_is import nowhere\n", "No module named 'a_module'"),
    "one of two": (SOUND + "import sys, nowhere_at_all.inner as x\n", "No module named 'nowhere_at_all'"),
}


@pytest.mark.parametrize("kind", TORN)
def test_what_the_source_shows_is_told_without_an_import(
    installed: Any,
    ok_json: Callable[..., Any],
    ok: Callable[..., str],
    refused: Callable[..., str],
    kind: str,
) -> None:
    (source, cause), line = TORN[kind], SOUND.count("\n") + 1
    file = installed.site / f"{installed.publish('fake-torn', source)}.py"
    listed = named(ok_json("list", "--json"), "fake-torn")
    assert (listed["status"], listed["reason"].split(": ", 1)[0]) == ("broken", f"{file}:{line}")
    assert cause in listed["reason"]
    *lines, above, last = ok("list").splitlines()
    assert any(text.startswith("fake-torn  ") and " broken: " in text for text in lines)
    assert above == f"broken: fake-torn: {listed['reason']}", "whole, in a terminal of 80 columns too"
    assert ", 1 of them unusable" in last
    (installed.work / "spec.yaml").write_text("peftx: 1\nmodel: peftx:tiny\nstack: [fake-torn]\n", "utf-8")
    for words in (["validate", "spec.yaml"], ["info", "fake-torn"]):
        told = " ".join(refused(*words).split())
        assert (
            f"plugin 'fake-torn' (peftx-fake-torn, {file.stem}:Fake) does not import: {file}:{line}: " in told
        )
        assert cause in told
        assert "PEFTX_DISABLE_PLUGINS=fake-torn" in told
    assert file.stem not in sys.modules
    file.write_text(SOUND, "utf-8")
    assert named(ok_json("list", "--json"), "fake-torn")["status"] == "ok", "the note is of an older file"
    assert "1 problem" not in ok("validate", "spec.yaml")


@pytest.mark.parametrize("where", ["__init__.py", "inner/__init__.py", "inner/method.py"])
def test_a_fault_on_the_way_to_a_module_in_a_package(
    installed: Any, ok_json: Callable[..., Any], refused: Callable[..., str], where: str
) -> None:
    module = installed.publish("fake-torn", "", module="{}.inner.method")
    package = installed.site / module
    (package / "inner").mkdir(parents=True)
    for name in ("__init__.py", "inner/__init__.py"):
        (package / name).write_text("", "utf-8")
    (package / "inner/method.py").write_text(SOUND, "utf-8")
    assert named(ok_json("list", "--json"), "fake-torn")["status"] == "ok"
    (package / where).write_text("import a_module_that_is_nowhere\n", "utf-8")
    assert (
        f"{package / where}:1: ModuleNotFoundError" in named(ok_json("list", "--json"), "fake-torn")["reason"]
    )
    assert f"{package / where}:1: ModuleNotFoundError" in refused("info", "fake-torn")


def test_a_module_that_changes_where_imports_look_is_not_judged(
    installed: Any, ok: Callable[..., str]
) -> None:
    (installed.work / "beside").mkdir()
    (installed.work / "beside" / "peftx_test_beside.py").write_text("", "utf-8")
    source = f"import sys\nsys.path.append({str(installed.work / 'beside')!r})\nimport peftx_test_beside\n"
    installed.publish("fake-own", source + SOUND.partition("\n")[2])
    assert "broken" not in ok("list")
    assert "inject" in ok("info", "fake-own")


def test_a_note_that_cannot_be_kept_or_is_damaged_changes_nothing(
    installed: Any, ok_json: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed.publish("fake-torn", "def broken(:\n")
    ok_json("list", "--json")
    note = installed.site.parent / "cache" / "sources.json"
    assert "fake_torn" in note.read_text("utf-8")
    note.write_text("[", "utf-8")
    assert named(ok_json("list", "--json"), "fake-torn")["status"] == "broken"
    for place in ("", str(note)):  # none, and a file where the folder should be
        monkeypatch.setenv("PEFTX_CACHE", place)
        assert named(ok_json("list", "--json"), "fake-torn")["status"] == "broken"


def test_a_source_is_compiled_once(
    installed: Any, ok: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftx.composition import importable

    installed.publish("fake-gain", SOUND)
    ok("list")
    monkeypatch.setattr(importable, "glance", lambda file: pytest.fail(f"{file} was looked at again"))
    ok("list")


def test_a_module_that_a_finder_knows_is_there(
    installed: Any, ok_json: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of an editable install that puts no folder on the path."""
    module = installed.publish("fake-gain", SOUND)
    file = (installed.site / f"{module}.py").rename(installed.work / "elsewhere.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "meta_path", [*sys.meta_path, finder := SimpleNamespace()])
        finder.find_spec = lambda name, *_: spec_from_file_location(name, file) if name == module else None
        assert named(ok_json("list", "--json"), "fake-gain")["status"] == "ok"
    assert named(ok_json("list", "--json"), "fake-gain")["status"] == "broken"


def test_what_is_missing_shows_without_an_import(installed: Any, ok_json: Callable[..., Any]) -> None:
    module = installed.publish("fake-gone", "")
    (installed.site / f"{module}.py").unlink()
    installed.publish(
        "fake-poor", "", requires=["a-package-that-is-nowhere>=1", "also-nowhere; extra == 'x'"]
    )
    lines = ok_json("list", "--json")
    assert f"its module {module} is not there" in named(lines, "fake-gone")["reason"]
    assert named(lines, "fake-poor")["reason"] == "needs a-package-that-is-nowhere, which is not installed"


PAIR = '''{doc}from __future__ import annotations
from peftx import Plugin, hookimpl
class Base(Plugin):
    @hookimpl
    def inject(self, model): ...
class First(Base):
    """The first: adds something.

    Of arXiv:2101.00001.
    """
    @hookimpl(wrapper=True)
    def train_step(self, step):
        return (yield)
    def serve(self, server): ...  # no hook: it is not marked
class Second(Plugin):
    """The second: writes something."""
    @hookimpl
    def decode(self, request): ...
'''
DOC = '"""The {}: in a module of its own (arXiv:2101.0000{})."""\n'


def test_plugins_of_one_distribution_have_titles_hooks_and_papers_of_their_own(
    installed: Any, ok_json: Callable[..., Any], ok: Callable[..., str], run: Callable[..., Any]
) -> None:
    made = PAIR.format(doc=DOC.format("third", 3)) + "made = Second\n"
    installed.publish_several(
        "peftx-fake-pair",
        {
            "fake-first": "peftx_fake_pair:First",
            "fake-second": "peftx_fake_pair:Second",
            "fake-third": "peftx_fake_made:Second",
            "fake-made": "peftx_fake_made:made",
        },
        {"peftx_fake_pair": PAIR.format(doc=""), "peftx_fake_made": made},
        keywords=["inject", "family:fake", "evidence:shown", "fidelity:equal", "fidelity:equations"],
    )
    expected = {
        "fake-first": ("The first: adds something", ["inject", "train_step"], "arXiv:2101.00001"),
        "fake-second": ("The second: writes something", ["decode"], ""),
        "fake-third": (
            "The second: writes something",
            ["decode"],
            "",
        ),  # its module's docstring is of two plugins
        "fake-made": (
            "A fake of several",
            ["inject"],
            "",
        ),  # what the source does not show is the distribution's
    }
    lines = ok_json("list", "--json")
    for name, (title, hooks, paper) in expected.items():
        line = named(lines, name)
        assert (line["summary"], line["hooks"], line["paper"]) == (title, hooks, paper)
        assert (line["family"], line["evidence"], line["fidelity"]) == ("fake", "shown", ""), (
            "two are none of it"
        )
        assert f"{name} 0.1.0: {title}" in ok("info", name, "--metadata")
    for name in ("fake-first", "fake-second"):
        about = ok_json("info", name, "--json")
        assert (about["summary"], about["hooks"]) == expected[name][:2], "list says what the class has"
    decoders = {one["name"] for one in ok_json("list", "--hook", "decode", "--json")}
    assert decoders & set(expected) == {"fake-second", "fake-third"}
    assert "fake-first: its metadata names other hooks" not in run("doctor").stdout


def test_the_docstring_of_a_module_is_the_title_of_its_one_plugin(
    installed: Any, ok_json: Callable[..., Any]
) -> None:
    installed.publish_several(
        "peftx-fake-pair",
        {"fake-one": "peftx_fake_one:Second", "fake-two": "peftx_fake_two:Second"},
        {
            "peftx_fake_one": PAIR.format(doc=DOC.format("one", 1)),
            "peftx_fake_two": PAIR.format(doc=DOC.format("two", 2)),
        },
        keywords=["decode", "arXiv:2101.00001", "arXiv:2101.00002"],
    )
    lines = ok_json("list", "--json")
    for number, name in enumerate(("one", "two"), 1):
        line = named(lines, f"fake-{name}")
        assert line["summary"] == f"The {name}: in a module of its own (arXiv:2101.0000{number})"
        assert line["paper"] == f"arXiv:2101.0000{number}"


def test_of_a_distribution_of_one_plugin_the_metadata_is_shown(
    installed: Any, ok_json: Callable[..., Any]
) -> None:
    source = DOC.format("other", 9) + "class Fake: ...\n"
    installed.publish("fake-lone", source, keywords=["serve"])
    line = named(ok_json("list", "--json"), "fake-lone")
    assert (line["summary"], line["hooks"], line["paper"]) == ("A fake fake-lone", ["serve"], "")


def test_a_name_claimed_twice_and_a_disabled_one(
    installed: Any, ok_json: Callable[..., Any], run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed.publish("fake-twin", "")
    installed.publish("fake-twin", "", distribution="fake-other")
    installed.publish("fake-rest", "")
    monkeypatch.setenv("PEFTX_DISABLE_PLUGINS", "fake-rest")
    lines = ok_json("list", "--json")
    twin = named(lines, "fake-twin")
    assert twin["status"] == "clash"
    assert "peftx-fake-twin" in twin["reason"]
    assert "fake-other" in twin["reason"]
    assert named(lines, "fake-rest")["status"] == "disabled"
    result = run("doctor")
    assert result.exit_code == 1
    assert "clash: fake-twin" in result.stdout


def test_doctor_is_content_with_a_whole_installation(
    installed: Any, ok_json: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib.metadata import entry_points

    others = {
        point.name for point in entry_points(group="peftx.plugins")
    }  # only ours are this test's business
    installed.scaffold("fake-gain", "inject")
    monkeypatch.setenv("PEFTX_DISABLE_PLUGINS", ",".join(others))
    facts = ok_json("doctor", "--json")
    assert facts["healthy"]
    assert facts["notes"] == []
    assert facts["model"]["ok"]
    assert facts["model"]["parameters"] > 1_000_000
    assert facts["versions"]["torch"]
    assert facts["machine"]["threads"] >= 1
    assert set(facts["kernels"]) == {"int8 matmul", "int4 matmul"}


def test_doctor_notes_metadata_that_names_other_hooks(installed: Any, run: Callable[..., Any]) -> None:
    source = "from peftx import Plugin, hookimpl\n\n\nclass Fake(Plugin):\n"
    source += "    @hookimpl\n    def decode(self, request): ...\n"
    installed.publish("fake-liar", source, keywords=["inject"])
    assert "fake-liar: its metadata names other hooks than its code: decode" in run("doctor").stdout


def test_info(
    installed: Any, ok_json: Callable[..., Any], ok: Callable[..., str], refused: Callable[..., str]
) -> None:
    installed.scaffold("fake-gain", "inject")
    installed.scaffold("fake-bits", "compress")
    about = ok_json("info", "fake-gain", "--json")
    assert about["claims"] == ["identity-at-start", "mergeable"]
    power = next(option for option in about["options"] if option["option"] == "power")
    assert power == {
        "option": "power", "type": "integer, >= 1", "default": "1", "meaning": "p, the exponent of the gains"
    }  # fmt: skip
    assert ok_json("info", "fake-bits", "--json")["conflicts"][0] == "one in a stack: quantizes"
    text = ok("info", "fake-gain")
    assert "integer, >= 1" in text
    assert "https://arxiv.org/abs/2101.00001" in text
    assert "  fidelity equations: written from the paper's equations" in text
    assert "  evidence not-measured: not measured on real data" in text
    assert (about["fidelity"], about["evidence"]) == ("equations", "not-measured")
    assert ok("info", "fake-gain", "--readme").lstrip().startswith("# fake-gain")
    assert "did you mean 'fake-gain'" in refused("info", "fake-gian")


def test_info_of_what_does_not_import(
    installed: Any, refused: Callable[..., str], ok: Callable[..., str]
) -> None:
    installed.publish("fake-torn", "import a_module_that_is_nowhere\n")
    assert "No module named 'a_module_that_is_nowhere'" in refused("info", "fake-torn")
    assert "A fake fake-torn" in ok("info", "fake-torn", "--metadata")


# ------------------------------------------------------------------------------------------------------------- check
def test_check(
    installed: Any, ok_json: Callable[..., Any], run: Callable[..., Any], refused: Callable[..., str]
) -> None:
    installed.scaffold("fake-gain", "inject")
    results = ok_json("check", "fake-gain", "--model", "llama", "--only", "identity_at_start", "--json")
    assert [result["outcome"] for result in results] == ["passed"]
    assert "power" in refused(
        "check", "fake-gain", "--set", "power=0", "--only", "config_round_trip", "-m", "llama"
    )
    assert "did you mean 'llama'" in refused("check", "fake-gain", "--model", "lama")
    assert "did you mean 'identity_at_start'" in refused(
        "check", "fake-gain", "-m", "llama", "--only", "identity_at_strat"
    )


def weaken(installed: Any, name: str, exempt: str = "") -> None:
    """A new plugin whose gains do not begin at 1."""
    installed.scaffold(name, "inject")
    file = installed.site / f"peftx_{name.replace('-', '_')}.py"
    text = file.read_text().replace("torch.ones(*batch", "2 * torch.ones(*batch")
    file.write_text(text.replace("    config: ", f"    exempt = {exempt}\n    config: ") if exempt else text)


TWO = ("-m", "llama", "--only", "identity_at_start", "--only", "config_is_frozen")


def test_check_fails_a_plugin_that_breaks_its_word(installed: Any, run: Callable[..., Any]) -> None:
    weaken(installed, "fake-word")
    for words in ((), ("--quiet",)):
        result = run(*words, "check", "fake-word", *TWO)
        assert result.exit_code == 1
        first, cause, *_, last = result.stdout.splitlines()
        assert re.fullmatch(r"llama-identity_at_start  failed  \d+\.\d\d s", first)
        assert re.match(r"  .*largest difference", cause)
        assert re.fullmatch(r"1 of 2 checks hold; \d+\.\d s", last)
        assert "config_is_frozen" not in result.stdout, "what holds is no news"
    result = run("check", "fake-word", "--verbose", *TWO)
    assert result.exit_code == 1
    assert re.search(r"^llama +identity_at_start +failed", result.stdout, re.MULTILINE)
    assert re.search(r"^- +config_is_frozen +passed", result.stdout, re.MULTILINE)


def test_what_fails_alike_is_told_once(installed: Any, run: Callable[..., Any]) -> None:
    installed.scaffold("fake-crash", "inject")
    file = installed.site / "peftx_fake_crash.py"
    file.write_text(
        file.read_text().replace("        for site in model", "        1 / 0\n        for site in model")
    )
    result = run("check", "fake-crash", "-m", "llama")
    assert result.exit_code == 1
    named = re.findall(r"^\S+  (?:failed|not-run)  ", result.stdout, re.MULTILINE)
    more = [int(n) for n in re.findall(r"^and (\d+) more, all with this:$", result.stdout, re.MULTILINE)]
    held, of = map(int, re.search(r"^(\d+) of (\d+) checks hold", result.stdout, re.MULTILINE).groups())  # type: ignore[union-attr]
    assert more
    assert len(named) + sum(more) == of - held
    assert result.stdout.count("ZeroDivisionError") < 4


def test_check_says_what_holds_by_failing(installed: Any, ok: Callable[..., str]) -> None:
    weaken(installed, "fake-frank", exempt='{"identity_at_start": "the gains begin at 2"}')
    assert re.fullmatch(
        r"2 of 2 checks hold, 1 of them by failing, as the plugin's 'exempt' says; \d+\.\d s\n",
        ok("check", "fake-frank", *TWO),
    )


LOUD = """import warnings
from transformers.utils import logging
def say():
    warnings.warn("a library has an opinion", stacklevel=1)
    logging.get_logger("transformers.some").warning("a library has another one")
    for _ in logging.tqdm(range(1), desc="a library counts"): ...
"""


def test_other_libraries_do_not_drown_a_check(installed: Any, spawn: Callable[..., Any]) -> None:
    installed.scaffold("fake-gain", "inject")
    (installed.site / "loud_library.py").write_text(LOUD, "utf-8")
    file = installed.site / "peftx_fake_gain.py"
    text = file.read_text().replace("import torch\n", "import loud_library\nimport torch\n")
    text = text.replace("        for site in model", "        loud_library.say()\n        for site in model")
    file.write_text(text)
    for words, more in (((), ()), (("--quiet",), ()), ((), ("--verbose",))):
        done = spawn(*words, "check", "fake-gain", *more, *TWO)
        assert done.returncode == 0
        assert re.search(r"^2 of 2 checks hold; \d+\.\d s\n\Z", done.stdout, re.MULTILINE)
        assert "a library" not in done.stderr


# --------------------------------------------------------------------------------------------------------------- new
def meta(name: str) -> ModuleType:
    """A test that every plugin folder of this repository must pass."""
    file = Path(__file__).parents[1] / "meta" / f"test_{name}.py"
    spec = importlib.util.spec_from_file_location(f"peftx_test_{name}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("paper", ["--arxiv=2106.09685", ""], ids=["paper", "none"])
def test_a_new_folder_is_complete(installed: Any, ok: Callable[..., str], hook: str, paper: str) -> None:
    out = ok(
        "new",
        "two-words",
        "--hook",
        hook,
        *([paper] if paper else []),
        "--title",
        "Two words: as small as it gets",
    )
    folder = installed.work / "plugins" / hook / "two-words"
    assert str(Path("plugins") / hook / "two-words" / "README.md") in out
    assert meta("structure").problems(folder) == []
    assert meta("marks").problems(folder) == []
    for file in folder.rglob("*.py"):
        compile(file.read_text("utf-8"), str(file), "exec")
    text = (folder / "README.md").read_text("utf-8")
    assert "$" not in text, "a placeholder is left"
    assert ("2106.09685" in text) == bool(paper)
    words = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]["keywords"]
    assert ("Fidelity" in text, "fidelity:equations" in words) == (bool(paper), bool(paper)), (
        "true to which paper"
    )


@pytest.mark.parametrize("hook", HOOKS)
def test_a_new_plugin_keeps_its_promises(installed: Any, hook: str) -> None:
    """The conformance kit, on one model, without the checks that start a process or need a source tree."""
    from peftx.testing.kit import plan_checks

    installed.scaffold(f"fake-{hook.replace('_', '-')}", hook)
    planned = plan_checks(f"fake-{hook.replace('_', '-')}", models=["llama"])
    slow = ("fresh", "imports_quickly", "package_is_whole", "reload", "resume")
    ran = [
        item for item in planned if item.arch in ("", "llama") and not any(word in item.id for word in slow)
    ]
    assert len(ran) >= 6
    assert "readme_has_the_options" in {item.check.name for item in ran}
    for item in ran:
        item.run()


def test_the_bad_option_of_a_new_plugin_is_refused(installed: Any) -> None:
    from peftx.composition.registry import Registry
    from peftx.errors import PeftxError
    from peftx_cli.scaffold import OPTIONS

    for hook in HOOKS:
        name = f"fake-{hook.replace('_', '-')}"
        installed.scaffold(name, hook)
        option, bad, good = OPTIONS[hook]
        plugin = Registry().load(name)
        with pytest.raises(PeftxError, match=option):
            plugin(**{option: float(bad)})
        assert plugin(**{option: float(good)})


@pytest.mark.parametrize(
    ("words", "named_"),
    [
        (["Two_Words"], "try 'two-words'"),
        (["two--words"], "lower-case words joined by hyphens"),
        (["spec"], "cannot be a plugin's name"),
        (["2bits"], "cannot be a plugin's name"),
        (["two-words", "--hook", "injekt"], "did you mean 'inject'?"),
        (["two-words", "--arxiv", "21.06"], "no arXiv id"),
        (["two-words", "--title", "short"], "10 to 90"),
        (["two-words", "--title", "It ends in a full stop."], "full stop"),
        (["two-words", "--title", 'It has "quotation" marks'], "quotation marks"),
        (["two-words", "--family", "Low Rank"], "no family"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_new_refuses(refused: Callable[..., str], words: list[str], named_: str) -> None:
    assert named_ in refused("new", *words)


def test_new_leaves_an_existing_folder_alone(
    installed: Any, ok: Callable[..., str], refused: Callable[..., str]
) -> None:
    ok("new", "two-words")
    assert "exists already" in refused("new", "two-words")
