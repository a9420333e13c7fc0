"""The mistakes of `tools/mutants.py`: a module's source with one small mistake in it, in every way that there is."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

SWAPPED_OPERATORS: dict[type[ast.AST], tuple[str, str]] = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"), ast.Pow: ("**", "*"),
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
}  # fmt: skip
DROPPED_CALLS = {
    "dropout", "softmax", "log_softmax", "sigmoid", "logsigmoid", "tanh", "relu", "norm", "normalize", "layer_norm",
    "rms_norm", "clamp", "clamp_", "clip", "abs", "square",
}  # fmt: skip
"""Called as a function or as a method; the first argument, or what has the method, stays."""
DROPPED_METHODS = {"detach", "float", "clone"}
SIMPLE = (ast.Name, ast.Attribute, ast.Call, ast.Subscript, ast.Constant)
"""What needs no parentheses wherever it stands."""


@dataclass(frozen=True)
class Mutant:
    """A source with one mistake in it; `old` and `new` are the line where it is."""

    kind: str
    line: int
    old: str
    new: str
    source: str


def mutants(source: str) -> list[Mutant]:
    """Every mutant of a module, in the order of its lines."""
    finder = Finder(source)
    finder.visit(ast.parse(source))
    return sorted(finder.found.values(), key=lambda mutant: mutant.line)


class Finder(ast.NodeVisitor):
    """Collects the mutants of a module, by source: of two mistakes that make the same text one counts."""

    def __init__(self, source: str) -> None:
        self.text = source.encode()  # columns of `ast` count bytes
        self.starts = [0]
        for line in self.text.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.found: dict[str, Mutant] = {}
        self.in_config = False
        self.imported: set[str] = set()

    def span(self, node: Any) -> tuple[int, int]:
        return (
            self.starts[node.lineno - 1] + node.col_offset,
            self.starts[node.end_lineno - 1] + node.end_col_offset,
        )

    def segment(self, node: ast.AST) -> str:
        """A node's text, in parentheses where it may need them."""
        start, end = self.span(node)
        text = self.text[start:end].decode()
        return text if isinstance(node, SIMPLE) else f"({text})"

    def put(self, kind: str, start: int, end: int, text: str) -> None:
        new = self.text[:start] + text.encode() + self.text[end:]
        line = self.text.count(b"\n", 0, start)
        old_line, new_line = (part.splitlines()[line].decode().strip() for part in (self.text, new))
        source = new.decode()
        self.found.setdefault(source, Mutant(kind, line + 1, old_line, new_line, source))

    def replace(self, kind: str, node: ast.AST, text: str) -> None:
        self.put(kind, *self.span(node), text)

    def swap(self, kind: str, left: ast.AST, operator: ast.AST, right: ast.AST) -> None:
        """The operator alone, which stands between two nodes."""
        if type(operator) in SWAPPED_OPERATORS:
            old, new = SWAPPED_OPERATORS[type(operator)]
            gap = self.span(left)[1], self.span(right)[0]
            at = self.text.index(old.encode(), *gap)
            self.put(kind, at, at + len(old), new)

    # -- what is left alone ------------------------------------------------------------------------------------------
    def visit_Raise(self, node: ast.Raise) -> None: ...

    def visit_Assert(self, node: ast.Assert) -> None: ...

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None: ...

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> None:
        self.imported |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}

    visit_ImportFrom = visit_Import

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer, self.in_config = self.in_config, False  # a validator is code
        for part in (*node.args.defaults, *filter(None, node.args.kw_defaults), *node.body):
            self.visit(part)
        self.in_config = outer

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer, self.in_config = self.in_config, node.name.endswith("Config")
        for part in node.body:
            self.visit(part)
        self.in_config = outer

    def visit_Assign(self, node: ast.Assign) -> None:
        if not any(isinstance(target, ast.Name) and target.id == "example" for target in node.targets):
            self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg != "strict":  # of `zip`, for readers
            self.visit(node.value)

    # -- expressions -------------------------------------------------------------------------------------------------
    def visit_Constant(self, node: ast.Constant) -> None:
        self.constant(node, node.value)

    def constant(self, node: ast.AST, value: object) -> None:
        kind = "config" if self.in_config else "constant"
        if isinstance(value, bool):
            self.replace(kind, node, str(not value))
        elif isinstance(value, int | float):
            self.replace(kind, node, repr(value + 1))

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        inner = node.operand
        if isinstance(node.op, ast.USub) and isinstance(inner, ast.Constant):
            self.constant(node, -inner.value)  # type: ignore[operator]
            return
        if isinstance(node.op, ast.Not):
            self.replace("condition", node, self.segment(inner))
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        self.swap("arithmetic", node.left, node.op, node.right)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        terms = [node.left, *node.comparators]
        for left, operator, right in zip(terms, node.ops, terms[1:], strict=False):
            self.swap("comparison", left, operator, right)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        function, first = node.func, node.args[0] if node.args else None
        name = getattr(function, "attr", None) or getattr(function, "id", "")
        if isinstance(function, ast.Attribute):
            of = ast.unparse(function.value)
            method = of != "self" and of.partition(".")[0] not in self.imported
            kept = function.value if method else first
            dropped = name in DROPPED_CALLS or (method and name in DROPPED_METHODS)
        else:
            kept, dropped = first, name in DROPPED_CALLS
        if dropped and kept is not None:
            self.replace("call", node, self.segment(kept))
        self.generic_visit(node)

    # -- conditions and statements -------------------------------------------------------------------------------------
    def negate(self, test: ast.expr) -> None:
        if not (isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)):  # which is dropped elsewhere
            start, end = self.span(test)
            self.put("condition", start, end, f"(not ({self.text[start:end].decode()}))")

    def visit_If(self, node: ast.If | ast.IfExp) -> None:
        if ast.unparse(node.test) != "TYPE_CHECKING":
            self.negate(node.test)
            self.generic_visit(node)

    visit_IfExp = visit_If

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self.negate(test)
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call) and not ast.unparse(node).startswith("super()."):
            self.replace("statement", node, "pass")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.replace("statement", node, "pass")
        self.swap("arithmetic", node.target, node.op, node.value)
        self.generic_visit(node)
