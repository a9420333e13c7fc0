"""Parts of other files of the repository, which a test holds true there."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def section(file: str, heading: str) -> str:
    """What stands below a heading of the second degree."""
    found = re.search(rf"^## {re.escape(heading)}\n\n(.*?)(?=^## |\Z)", _text(file), re.MULTILINE | re.DOTALL)
    if found is None:
        raise LookupError(f"{file} has no '## {heading}'")
    return found[1].rstrip()


def first(kind: str, text: str) -> str:
    """The first fenced block of a language, without what its fence says to the tests."""
    found = re.search(rf"^```{kind}[^\n]*\n(.*?^```)$", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise LookupError(f"no block of {kind}")
    return f"```{kind}\n{found[1]}"


def _text(file: str) -> str:
    return (ROOT / file).read_text("utf-8")


def demo() -> str:
    """The README's one command, with its output."""
    return first("console", _text("README.md"))


def setup() -> str:
    """Its commands that make peftx ready."""
    return first("bash", _text("README.md"))


def said() -> str:
    """What the base answers to the first sample of that run, and what the model does that came out of it."""
    prompt, model, reference = re.findall(
        r"^(?:prompt|model|reference): +(.*)", _text("benchmarks/results/demo.txt"), re.MULTILINE
    )[:3]
    base = " / ".join(_text("benchmarks/results/demo-base.txt").split("\n")).strip(" /")
    rows = {
        "prompt": prompt,
        "the base": base,
        "with LoRA, in 4 bits": model,
        "the row's own answer": reference,
    }
    return "\n".join(["| | |", "| --- | --- |", *(f"| {who} | {text} |" for who, text in rows.items())])


def method(plugin: str, *names: str) -> str:
    """Functions and methods of a plugin's file as they stand there, `LoraDelta.fold` by its dotted name."""
    (file,) = ROOT.glob(f"plugins/*/{plugin}/src/*.py")
    source = file.read_text("utf-8")
    parts = []
    for name in names:
        node: ast.AST = ast.parse(source)
        for part in name.split("."):
            inner = [
                n for n in ast.walk(node) if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == part
            ]
            if not inner:
                raise LookupError(f"{file.name} has no '{name}'")
            node = inner[0]
        parts.append(textwrap.dedent(ast.get_source_segment(source, node, padded=True) or ""))
    return "\n".join(["```python", "\n\n".join(parts), "```"])


METHODS = {
    "lora": ("LoraDelta.forward", "LoraDelta.fold"),
    "prompt-tuning": ("SoftPrompt", "PromptTuning.inject"),
    "mezo": ("projected_gradient", "perturb"),
    "prefixquant": ("PrefixQuant.compress",),
}
"""What the page on good plugins reads line by line."""


def beside() -> str:
    """Its table of measured figures."""
    (table,) = re.findall(r"(?:^\|.*\n)+", section("README.md", "Beside other libraries"), re.MULTILINE)
    return table.replace("](benchmarks/", "](../../benchmarks/").rstrip()


def versions() -> str:
    return section("CHANGELOG.md", "Versions and deprecation").replace("](docs/", "](")


def citation() -> str:
    return first("bibtex", section("README.md", "Cite"))
