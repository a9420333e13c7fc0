"""Which plugins a run of the tests has where there are more than it takes."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import draw_plugins  # noqa: E402

NAMES = [f"plugins/inject/p{i}" for i in range(300)]


def test_a_draw_has_what_changed_and_is_another_for_the_next_commit() -> None:
    changed = {"plugins/inject/p7", "plugins/inject/p200", "plugins/inject/gone"}
    draws = [draw_plugins.drawn(NAMES, 100, changed=changed, seed=f"commit {i}") for i in range(40)]
    assert all(len(draw) == 100 and {"plugins/inject/p7", "plugins/inject/p200"} <= draw for draw in draws)
    assert draws[0] != draws[1]
    assert draws[0] == draw_plugins.drawn(reversed(NAMES), 100, changed=changed, seed="commit 0")
    assert set.union(*draws) == set(NAMES), "every plugin's turn comes"
    assert draw_plugins.drawn(NAMES, 300) == draw_plugins.drawn(NAMES, 1000) == set(NAMES)


def test_what_changed_is_read_from_git(tmp_path: Path) -> None:
    """Of the last commits, and what is not committed; without git nothing, and no error."""

    def git(*words: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)

    def write(name: str, text: str) -> None:
        file = tmp_path / "plugins" / "inject" / name / "pyproject.toml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    assert draw_plugins.changed(tmp_path) == set()
    assert draw_plugins.seed(tmp_path) == ""
    git("init")
    for name in ("old", "recent", "open", "new"):
        if name != "new":
            write(name, "1")
    git("add", "-A")
    git("commit", "-m", "begin")
    for i in range(draw_plugins.RECENT):
        write("recent", f"{i}")
        git("commit", "-am", f"{i}")
    assert len(draw_plugins.seed(tmp_path)) == 40
    write("open", "2")
    write("new", "1")
    assert draw_plugins.changed(tmp_path) == {f"plugins/inject/{name}" for name in ("recent", "open", "new")}
    assert len(draw_plugins.folders(tmp_path)) == 4
    assert draw_plugins.touched(tmp_path, "plugins/inject/new") == {"plugins/inject/new/pyproject.toml"}
    assert draw_plugins.touched(tmp_path.parent) == set()


def collected(most: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *words],
        cwd=ROOT, env=os.environ | {draw_plugins.VARIABLE: most}, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_a_run_collects_those_that_are_drawn_and_what_it_names() -> None:
    folder = "plugins/prepare_data"
    draw = draw_plugins.drawn(
        draw_plugins.folders(), 60, changed=draw_plugins.changed(), seed=draw_plugins.seed()
    )
    found = {"/".join(line.split("/")[:3]) for line in collected("60", folder).splitlines() if "::" in line}
    assert found == {name for name in draw if name.startswith(folder)}
    readmes = collected("60", "tests/docs/test_plugin_readmes.py").split("test_what_a_readme_shows_works[")[
        1:
    ]
    assert {line.partition("]")[0] for line in readmes} == {Path(name).name for name in draw}
    left_out = next(name for name in draw_plugins.folders() if name not in draw)
    assert f"{left_out}/tests" in collected("60", left_out)


def test_a_dear_test_runs_where_what_it_is_about_changed() -> None:
    about = ("core/peftx/engines/training/", "Makefile")
    assert draw_plugins.concerns(about, {"README.md", "core/peftx/engines/training/run.py"})
    assert draw_plugins.concerns(about, {"Makefile"})
    assert not draw_plugins.concerns(about, {"README.md", "core/peftx/engines/data/rows.py"})


def test_a_run_has_the_dear_tests_of_what_changed() -> None:
    file, name = "tests/core/test_on_ray.py", "::test_a_process_dies"
    source = (ROOT / file).read_text(encoding="utf-8")
    about = re.search(r"mark\.dear\((.*?)\)", source, re.DOTALL)
    assert about is not None
    changed = draw_plugins.concerns(ast.literal_eval(f"({about[1]},)"), draw_plugins.touched())
    assert (name in collected("100", file)) == changed


@pytest.mark.parametrize(
    ("about", "said"), [(("core/gone.py", "Makefile"), "core/gone.py, which is not there"), ((), "nothing")]
)
def test_a_dear_test_of_what_is_not_there_is_told(
    about: tuple[str, ...], said: str, pytestconfig: pytest.Config
) -> None:
    """Else it would never run again when a file is moved."""
    item = Mock(nodeid="a test")
    item.get_closest_marker.return_value = pytest.mark.dear(*about).mark
    hook = pytestconfig.pluginmanager.get_plugin(str(ROOT / "conftest.py")).pytest_collection_modifyitems
    with pytest.raises(pytest.UsageError, match=f"a test: dear, and about {said}; name the files"):
        hook(pytestconfig, [item])


def test_a_number_that_is_none_is_told() -> None:
    assert "PEFTX_PLUGINS is 'many'" in collected("many", "plugins/search")
