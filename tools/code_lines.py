"""Lines of code: of the kernel, and of each plugin without its docstrings, imports and Config.

python tools/code_lines.py             # a table
python tools/code_lines.py --from REF  # beside those of a commit

`tests/meta/test_code_lines.py` holds FIRST to their median, SHORT to their most,
the kernel to KERNEL, and all files but tests to LONGEST.
"""

from __future__ import annotations

import argparse
import ast
import io
import statistics
import subprocess
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
SKIPPED = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}

FIRST = (
    "prefixquant", "aded", "hydragen", "language-ranker", "lora", "p-tuning-v2", "propulsion", "mosaic-it",
    "mezo", "token-trails", "user-profile", "dpo-prefix-sharing", "dynmole", "prompt-tuning",
    "state-offset-tuning", "aligner", "lofit", "ntk-attention", "compacter", "lorma", "qgoft", "ba-lora",
    "hft", "deft", "layernorm-tuning", "sparselora", "ist", "lt-sft", "l-tuning", "sk-tuning", "predgen",
)  # fmt: skip
"""The first 31 plugins, as git added them, which were there before most mechanisms."""
MEDIAN = 100
"""Of FIRST, at most."""
NINE = (
    "router-tuning", "pasta", "hypertuning", "ls-llama", "d2o", "reglu", "sift", "superfiltering", "xprompt",
)  # fmt: skip
SHORT = dict.fromkeys(NINE, 80)
"""The most that each of nine short ones may have."""

KERNEL = 4500
"""Lines of code of all of `core/peftx/kernel`, at most."""
LONGEST = 400
"""Lines of a file of the framework, its tools and benchmarks, at most: a longer one is two things."""


def code_lines(source: str, *, bare: bool = False) -> int:
    """Lines that hold code: no blanks, comments and docstrings; `bare`: no imports and no `...Config` either."""
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            left_out |= set(range(node.lineno, node.end_lineno + 1))  # type: ignore[operator]
        imports = isinstance(node, ast.Import | ast.ImportFrom)
        config = isinstance(node, ast.ClassDef) and node.name.endswith("Config")
        guard = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if bare and (imports or config or guard):
            left_out |= set(range(node.lineno, node.end_lineno + 1))  # type: ignore[operator]
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SKIPPED:
            found |= set(range(token.start[0], token.end[0] + 1))
    return len(found - left_out)


def plugins(ref: str | None) -> dict[str, int]:
    """Name -> code lines, now or at a commit."""
    if ref is None:
        files = {p.parent.parent.name: p.read_text("utf-8") for p in ROOT.glob("plugins/*/*/src/peftx_*.py")}
    else:
        git = ["git", "-C", str(ROOT)]
        names = subprocess.check_output(
            [*git, "ls-tree", "-r", "--name-only", ref, "plugins"], text=True
        ).split()
        files = {
            Path(n).parent.parent.name: subprocess.check_output([*git, "show", f"{ref}:{n}"], text=True)
            for n in names if "/src/peftx_" in n and n.endswith(".py")
        }  # fmt: skip
    return {name: code_lines(text, bare=True) for name, text in sorted(files.items())}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="ref", help="a commit to compare with")
    options = parser.parse_args()
    core = ROOT / "core/peftx"
    for folder in ("kernel", "architectures", "engines", "toolkits", "testing"):
        files = list((core / folder).rglob("*.py"))
        longest = max(files, key=lambda p: p.read_text("utf-8").count("\n"))
        total = sum(code_lines(p.read_text("utf-8")) for p in files)
        lines = longest.read_text("utf-8").count("\n")
        print(
            f"{folder:13} {total:6,} code lines in {len(files)} files (longest: {longest.name}, {lines} lines)"
        )
    now, before = plugins(None), plugins(options.ref) if options.ref else {}
    for name, count in sorted(now.items(), key=lambda item: -item[1]):
        print(f"{name:24} {before.get(name, ''):>5} {count:5}")
    for title, names in (("median", [*now]), (f"median of the first {len(FIRST)}", FIRST)):
        earlier, counts = [before[name] for name in names if name in before], [now[name] for name in names]
        print(f"{title:24} {statistics.median(earlier) if earlier else '':>5} {statistics.median(counts):5}")


if __name__ == "__main__":
    main()
