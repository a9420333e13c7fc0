"""`doctor`, `check` and `matrix`: is the installation whole, does a plugin keep its promises, which go together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftx_cli import options

if TYPE_CHECKING:
    from peftx.testing.kit import CheckResult

PACKAGES = (
    "peftx", "torch", "transformers", "accelerate", "datasets", "safetensors", "pydantic", "pluggy", "typer", "fastapi"
)  # fmt: skip
Name = Annotated[str, typer.Argument(metavar="NAME", help="name of a plugin")]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", "-m", metavar="NAME", help="tiny architecture to check on; repeat it"),
]

Only = Annotated[
    list[str] | None, typer.Option("--only", metavar="CHECK", help="a check to run; repeat it; else all")
]
Names = Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="plugins; all if left out")]
Jobs = Annotated[int, typer.Option("--jobs", "-j", min=0, help="processes; 0: one a core")]
Page = Annotated[
    str | None, typer.Option("--output", "-o", metavar="FILE", help="an HTML page; the JSON goes beside it")
]
Threes = Annotated[
    int,
    typer.Option("--threes", min=0, metavar="N", help="N further stacks, around threes that none has shown"),
]
Seed = Annotated[int, typer.Option("--seed", help="which stacks there are")]
Fresh = Annotated[bool, typer.Option("--fresh", help="try everything, whatever former runs showed")]

Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="a line a check")]
Option = Annotated[
    list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="an option of the plugin")
]


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command(epilog=options.examples("doctor", "doctor --json"))(doctor)
    app.command(
        epilog=options.examples("check lora --model llama", "check my-method --only merge --verbose")
    )(check)
    app.command(
        epilog=options.examples(
            "matrix lora mezo prefixquant --output matrix.html", "matrix --threes 200 --seed 1"
        )
    )(matrix)


def doctor(as_json: options.Json = False) -> None:
    """Import every plugin and look at the machine: versions, threads, kernels. Exits with 1 if something is broken."""
    from peftx.composition.registry import Registry
    from peftx_cli.render import print_json

    registry = Registry()
    facts: dict[str, Any] = {
        "versions": _versions(),
        "machine": _machine(),
        "kernels": _kernels(),
        "model": _model(),
    }
    plugins, notes = _plugins(registry)
    facts["plugins"] = plugins
    broken = [p for p in plugins if p["status"] in ("broken", "clash")]
    healthy = not broken and facts["model"]["ok"]
    if as_json:
        print_json(facts | {"healthy": healthy, "notes": notes})
    else:
        _show(facts, notes, healthy=healthy)
    if not healthy:
        raise typer.Exit(1)


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version
    from platform import python_version

    import peftx

    found = {"python": python_version(), "peftx": peftx.__version__}
    for name in PACKAGES[1:]:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _machine() -> dict[str, Any]:
    from platform import platform

    import torch

    from peftx.engines.machine import cores

    return {
        "platform": platform(),
        "cpus": cores(),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _kernels() -> dict[str, bool]:
    """Which fast integer kernels run here, found out by running them; without them weights are dequantized first."""
    import torch

    from peftx.toolkits.compression.kernels import int4_matmul, int4_pack, int8_matmul

    def int8() -> bool:
        x = torch.randint(-128, 128, (32, 64), dtype=torch.int8)
        w = torch.randint(-128, 128, (16, 64), dtype=torch.int8)
        return torch.equal(int8_matmul(x, w), x.int() @ w.int().t())

    def int4() -> bool:
        q = torch.randint(-8, 8, (32, 64), dtype=torch.int8)
        packed, scales = int4_pack(q, torch.ones(32, 2), None, group_size=32)
        x = torch.ones(1, 64, dtype=torch.bfloat16)
        return torch.allclose(int4_matmul(x, packed, scales).float(), x.float() @ q.float().t(), atol=2.0)

    found = {}
    for name, kernel in (("int8 matmul", int8), ("int4 matmul", int4)):
        try:
            found[name] = kernel()
        except (RuntimeError, AttributeError, NotImplementedError):  # this torch or this processor has none
            found[name] = False
    return found


def _model() -> dict[str, Any]:
    """Whether the bundled model is there and loads."""
    from peftx.engines.checkpoints import TINY
    from peftx.engines.models import load_model
    from peftx.errors import PeftxError

    try:
        model, tokenizer = load_model(TINY)
    except PeftxError as error:
        return {"id": TINY, "ok": False, "reason": str(error)}
    count = sum(p.numel() for p in model.parameters())
    return {
        "id": TINY,
        "ok": tokenizer is not None,
        "reason": "" if tokenizer else "no tokenizer",
        "parameters": count,
    }


def _plugins(registry: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """Every plugin after an attempt to import it, and what else there is to say."""
    from peftx.errors import RegistryError
    from peftx.kernel.plugin import hooks_of
    from peftx_cli.health import Verdicts, listed

    found: list[dict[str, Any]] = []
    broken = {}
    notes = []
    for one in listed(registry):
        line = {"name": one.name, "status": one.status, "reason": one.reason, "hint": ""}
        found.append(line)
        if one.status == "clash":
            line["hint"] = f"pip uninstall {registry.clashes()[one.name][-1]}"
        if one.entry is None:
            continue
        try:
            plugin = registry.load(one.name)
        except RegistryError as error:
            line |= {"status": "broken", "reason": error.message, "hint": error.hint or ""}
            broken[one.name] = (one.entry, error.message)
            continue
        line |= {"status": "ok", "reason": ""}
        if hooks_of(plugin) != set(one.entry.hooks):
            notes.append(
                f"{one.name}: its metadata names other hooks than its code: {', '.join(sorted(hooks_of(plugin)))}"
            )
    try:
        Verdicts.write(broken)
    except OSError as error:
        notes.append(f"what is broken could not be noted for peftx list: {error}")
    return found, notes


def _show(facts: dict[str, Any], notes: list[str], *, healthy: bool) -> None:
    from peftx_cli.render import out

    out("versions  " + "  ".join(f"{name} {version}" for name, version in facts["versions"].items()))
    machine = facts["machine"]
    out(
        f"machine   {machine['platform']}, {machine['cpus']} CPUs ({machine['cpu']}), "
        f"torch threads {machine['threads']}"
    )
    out(f"          accelerators: {', '.join(machine['accelerators']) or 'none'}")
    out(
        "kernels   "
        + ", ".join(f"{name}: {'yes' if there else 'no'}" for name, there in facts["kernels"].items())
    )
    model = facts["model"]
    out(
        f"model     {model['id']}: "
        + (f"{model['parameters']:,} parameters" if model["ok"] else model["reason"])
    )
    plugins = facts["plugins"]
    out(f"plugins   {sum(p['status'] == 'ok' for p in plugins)} of {len(plugins)} work")
    for line in plugins:
        if line["status"] != "ok":
            out(f"  {line['status']}: {line['name']}: {line['reason']}")
            if line["hint"]:
                out(f"    hint: {line['hint']}")
    for note in notes:
        out(f"  note: {note}")
    out("all is well" if healthy else "something is broken")


def check(
    name: Name,
    model: Models = None,
    only: Only = None,
    option: Option = None,
    verbose: Verbose = False,
    as_json: options.Json = False,
) -> None:
    """Run the conformance kit on a plugin: what its hooks and claims promise, on tiny random models.

    Shows which checks fail, and why. Exits with 1 when one does.
    """
    import time
    from dataclasses import asdict

    from peftx.composition.registry import Registry
    from peftx.testing.kit import run_checks
    from peftx_cli.failures import ours_alone
    from peftx_cli.progress import reporter
    from peftx_cli.render import print_json

    plugin = Registry().load(name)
    chosen = {**plugin.example, **_options(option or [])}
    plugin(**chosen)  # a wrong option is the user's mistake, not the plugin's
    began = time.perf_counter()
    with reporter() as told, ours_alone():
        told.stage("check", [name])
        results = run_checks(
            name,
            models=model or None,
            only=only or None,
            options=chosen,
            progress=lambda done, total, last: told.progress(done, total, {"after": last.id}),
        )
    if as_json:
        print_json([asdict(result) for result in results])
    else:
        _show_results(name, results, time.perf_counter() - began, every=verbose)
    if any(result.outcome in BAD for result in results):
        raise typer.Exit(1)


BAD = ("failed", "not-run")
ALIKE = 3
"""Checks that are named of those that fail with the same words."""


def _show_results(name: str, results: list[CheckResult], seconds: float, *, every: bool) -> None:
    """What does not hold, with its cause, and a line on all. `every`: the others too."""
    from textwrap import indent

    from peftx_cli.render import out, print_table

    failed = [result for result in results if result.outcome in BAD]
    if every:
        rows = [
            (result.arch or "-", result.name, result.outcome, f"{result.seconds:.2f}", result.message)
            for result in results
        ]
        print_table(name, ("model", "check", "outcome", "seconds", ""), rows)
    alike: dict[str, list[CheckResult]] = {}  # a plugin that cannot be built fails every check in one way
    for result in () if every else failed:
        alike.setdefault(result.message, []).append(result)
    for message, those in alike.items():
        for result in those[:ALIKE]:
            out(f"{result.id}  {result.outcome}  {result.seconds:.2f} s")
        more = f"and {len(those) - ALIKE} more, all with this:\n" if len(those) > ALIKE else ""
        out(f"{more}{indent(message, '  ')}\n")
    exempt = sum(result.outcome == "expected" for result in results)
    said = f", {exempt} of them by failing, as the plugin's 'exempt' says" if exempt else ""
    out(f"{len(results) - len(failed)} of {len(results)} checks hold{said}; {seconds:.1f} s")


def matrix(
    names: Names = None,
    output: Page = None,
    jobs: Jobs = 0,
    threes: Threes = 0,
    seed: Seed = 0,
    fresh: Fresh = False,
    as_json: options.Json = False,
) -> None:
    """Try every ordered pair of plugins on a tiny model: built, trained, saved, reloaded and run, or refused.

    Pairs are tried in stacks of up to twelve. What a stack showed is kept in the cache folder until the core or one of
    its plugins changes, so that a second run tries what is new. Exits with 1 when a pair fails.
    """
    from pathlib import Path

    from peftx.engines.files import make_place, write_text
    from peftx.engines.machine import cores
    from peftx.errors import FileError, UsageError
    from peftx.testing.matrix import run_matrix
    from peftx.testing.matrix_page import page, to_json
    from peftx_cli.health import cache_file
    from peftx_cli.progress import reporter
    from peftx_cli.render import out, out_json

    if output is not None and Path(output).suffix != ".html":
        raise UsageError(f"--output {output}: the page is an .html file", hint="--output matrix.html")
    if output is not None and not Path(output).absolute().parent.is_dir():
        raise FileError(
            f"--output {output}: there is no folder {Path(output).parent}",
            hint="make it, or name another file",
        )
    if output is not None:
        make_place(Path(output))
    with reporter() as told:
        told.stage("matrix", [])
        found = run_matrix(
            names or (),
            jobs=jobs or cores(),
            kept=None if fresh else cache_file("matrix.jsonl"),
            seed=seed,
            threes=threes,
            progress=lambda done, total, _: told.progress(done, total, {}),
        )
    failed = [cell for cell in found.cells if cell.outcome == "failed"]
    if output is not None:
        write_text(Path(output), page(found))
        write_text(Path(output).with_suffix(".json"), to_json(found) + "\n")
    if as_json:
        out_json(to_json(found))
    else:
        _show_matrix(found, whole=len(found.plugins) <= 12)
        if output is not None:
            out(f"{output} and {Path(output).with_suffix('.json')}")
    if failed or found.failing:
        raise typer.Exit(1)


def _show_matrix(found: Any, *, whole: bool) -> None:
    """Counts; every pair that does not work where there are few plugins, else the failures."""
    from peftx_cli.render import out, print_table

    rows = [
        (cell.first, cell.second, cell.outcome, cell.reason, ", ".join(cell.order))
        for cell in found.cells
        if cell.outcome == "failed" or (whole and cell.outcome != "works")
    ]
    if rows:
        print_table("pairs", ("first", "second", "", "reason", "order that works"), rows)
    for title, refused in (("fail", False), ("are refused when they are built,", True)):
        groups = [(", ".join(g.fault), g.reason) for g in found.together if g.refused is refused]
        if groups:
            print_table(f"stacks that {title} though every two of them work", ("stack", "reason"), groups)
    words = ("works", "refused", "other-model", "failed")
    counts = ", ".join(f"{found.count(word)} {word}" for word in words)
    out(f"{len(found.cells)} pairs: {counts}; {found.stacks} stacks were tried")
    shown, of = found.threes
    if of:
        out(f"{shown:,} of {of:,} ordered threes stood in one of them ({shown / of:.1%})")


def _options(texts: list[str]) -> dict[str, Any]:
    """`rank=4` as an option of the plugin, read like a value of a spec."""
    from peftx.errors import UsageError
    from peftx_spec.loader import parse_value
    from peftx_spec.overrides import VALUES
    from peftx_spec.scalars import ScalarError

    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {text}: an option is 'name=value'", hint="peftx check lora --set rank=4")
        try:
            found[key] = parse_value(value)
        except ScalarError as error:
            raise UsageError(f"--set {text}: {error}", hint=VALUES) from error
    return found
