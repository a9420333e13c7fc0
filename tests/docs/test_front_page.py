"""What the README says of a run and of other libraries was measured; its three ways to say one run are one."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from peftx import Stack
from peftx_cli.main import app
from peftx_cli.summary import SAMPLE_TOKENS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text("utf-8")
COMMAND = "peftx apply --plugin lora --plugin nf4"
NUMBER = re.compile(r"\d[\d,]*\.?\d*")


def block(language: str, containing: str) -> str:
    bodies = re.findall(rf"^```{language}[^\n]*\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    (found,) = [body for body in bodies if containing in body]
    return found


def results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def test_the_output_is_that_of_the_committed_run() -> None:
    first, *shown = block("console", COMMAND).splitlines()
    assert first == f"$ {COMMAND}"
    assert shown == (RESULTS / "demo.txt").read_text("utf-8").splitlines()[: len(shown)]
    assert "training steps" in shown[-1], "the whole table"


def test_figures_beside_other_libraries() -> None:
    peers, serving = results("peers")["results"], results("serving_llama")
    step, decode = peers["train step"]["ms"], peers["decode, batch 1"]["ms_per_token"]
    kept = peers["saved for backward with dropout"]["megabytes"]
    assert rows() == {
        "inject LoRA into 56 layers": figures(peers["inject 56 linears"]["ms"], ("peftx", "peft"), 1),
        "load a saved adapter": figures(peers["load a bundle"]["ms"], ("peftx", "peft"), 1),
        "a training step": figures(step, ("peftx", "peft"), 0),
        "memory of a step with dropout, for the backward pass": figures(
            kept, ("peftx dropout 0.1", "peft dropout 0.1"), 1
        ),
        "decode a token with an adapter on": figures(decode, ("peftx", "peft", "base"), 1),
        "a soft prompt and a LoRA, trained together and saved": [],
        "serve one request of a small Llama, by the clock": a_second(serving["1"], "tokens_a_second"),
        "serve 32 requests at once, by the clock": a_second(serving["32"], "tokens_a_second"),
        "the same, for each second of CPU": a_second(serving["32"], "tokens_a_cpu_second"),
    }
    ways = {name: len(found["saved"]) for name, found in results("prompt_with_lora").items()}
    assert ways == {name: 2 if name.startswith("peftx") else 1 for name in ways}


def test_what_the_server_does_on_other_models_is_measured() -> None:
    """The sentence below the table."""
    told = " ".join(README.split())
    for name in ("serving_tiny", "serving_llama-126m"):
        ours, theirs = (
            f"{results(name)['32'][who]['tokens_a_second']:.0f}" for who in ("peftx", "transformers")
        )
        assert re.search(rf"\b{ours}(?: tokens/s)? against {theirs}\b[^.]*results/{name}\.json\)", told), name


def rows() -> dict[str, list[str]]:
    table = README[README.index("## Beside other libraries") :].split("\n\n")[2]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {what: NUMBER.findall(f"{ours} {theirs}") for what, ours, theirs, _ in cells}


def figures(found: dict[str, float], names: tuple[str, ...], digits: int) -> list[str]:
    return [f"{found[name]:.{digits}f}" for name in names]


def a_second(found: dict[str, dict[str, float]], of: str) -> list[str]:
    return [f"{found[name][of]:.1f}" for name in ("peftx", "transformers")]


def test_the_readme_cites_what_the_citation_file_says() -> None:
    file = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    cited = dict(re.findall(r"^  (\w+) += \{+(.*?)\}+,?$", block("bibtex", "@software{peftx"), re.MULTILINE))
    assert cited == {
        "title": file["title"],
        "author": " and ".join(author["name"] for author in file["authors"]),
        "version": str(file["version"]),
        "year": str(file["date-released"].year),
    }


@pytest.mark.slow
def test_the_base_says_what_the_front_page_shows() -> None:
    prompt = re.findall(r"^prompt: +(.*)", (RESULTS / "demo.txt").read_text("utf-8"), re.MULTILINE)[0]
    written = Stack("peftx:tiny", []).generate(prompt, max_new_tokens=SAMPLE_TOKENS, do_sample=False)
    assert written.strip() == (RESULTS / "demo-base.txt").read_text("utf-8").strip()
    assert f"both stop after {SAMPLE_TOKENS} tokens" in (ROOT / "docs/index.md").read_text("utf-8")


def test_most_plugins_show_no_effect_as_the_readme_says() -> None:
    words = [
        tomllib.loads(file.read_text("utf-8"))["project"]["keywords"]
        for file in ROOT.glob("plugins/*/*/pyproject.toml")
    ]
    assert sum("evidence:shown" in keywords for keywords in words) < len(words) / 2


def test_how_many_architectures_have_a_table() -> None:
    from peftx.kernel.anatomy.table import tables

    assert f"\n{len(tables())} architectures have a table of their parts" in README
    assert f"\n[{len(tables())} architectures](" in (ROOT / "docs/how-to/model.md").read_text("utf-8")


def test_how_large_the_bundled_model_is() -> None:
    (line,) = re.findall(
        r"^trainable parameters.* of ([\d,]+)$", (RESULTS / "demo.txt").read_text("utf-8"), re.MULTILINE
    )
    millions = int(line.replace(",", "")) / 1e6
    assert f"(`peftx:tiny`, {millions:.1f} million parameters)" in README
    board = (ROOT / "docs/choose/leaderboards.md").read_text("utf-8")
    assert f"The base is small ({millions:.1f} million numbers)" in board


def test_command_yaml_and_python_are_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tensors, byte for byte, and the same perplexity; shortened alike."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("peftx_cli.summary.SAMPLE_TOKENS", 4)
    Path("stack.yaml").write_text(block("yaml", "use: nf4"), "utf-8")
    short = ["--set", "train.steps=2", "--set", "train.batch_size=2", "--set", "evaluate.perplexity.limit=2"]
    for words, output in ((COMMAND.split()[1:], "line"), (["apply", "stack.yaml"], "file")):
        done = CliRunner().invoke(app, [*words, *short, "--output", output])
        assert done.exit_code == 0, done.output
    code = block("python", "from peftx_nf4")
    for long, shorter in (
        ("steps=60", "steps=2, batch_size=2"),
        ('held_out.jsonl")', 'held_out.jsonl", limit=2)'),
    ):
        assert code.count(long) == 1
        code = code.replace(long, shorter)
    exec(compile(code, "README.md", "exec", dont_inherit=True), {})
    tensors = {
        name: {file.name: file.read_bytes() for file in Path(name).glob("*.safetensors")}
        for name in ("line", "file", "out")
    }
    assert set(tensors["line"]) >= {"base.safetensors", "nf4.safetensors"}
    assert tensors["line"] == tensors["file"] == tensors["out"]
    scores = [
        json.loads(Path(name, "manifest.json").read_text("utf-8"))["scores"]
        for name in ("line", "file", "out")
    ]
    assert len({str(found["perplexity"]) for found in scores}) == 1


@pytest.mark.slow
def test_the_run_gives_what_the_readme_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 2 %, as sums differ between machines; but for the seconds."""
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, COMMAND.split()[1:])
    assert done.exit_code == 0, done.output
    shown = block("console", COMMAND).splitlines()[1:]
    for line, expected in zip(done.stdout.splitlines(), shown, strict=False):
        if expected.startswith("training steps"):
            line, expected = line.rpartition(", ")[0], expected.rpartition(", ")[0]
        assert NUMBER.sub("#", " ".join(line.split())) == NUMBER.sub("#", " ".join(expected.split()))
        wanted = [float(text.replace(",", "")) for text in NUMBER.findall(expected)]
        assert [float(text.replace(",", "")) for text in NUMBER.findall(line)] == pytest.approx(
            wanted, rel=0.02
        )
