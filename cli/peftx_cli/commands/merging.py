"""`merge`: a bundle into the base's weights, or several adapters into one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftx_cli import options

if TYPE_CHECKING:
    from peftx.merging import Merged
    from peftx_cli.progress import ClosingReporter

Folders = Annotated[
    list[str],
    typer.Argument(
        metavar="BUNDLE OUT|ADAPTER...",
        help="a bundle and a folder to write; with --method the adapters, and -o",
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        "--method", metavar="NAME", help="linear, task-arithmetic, cat, svd, ties, dare or dare-ties"
    ),
]
Weights = Annotated[
    str | None, typer.Option("--weights", "-w", metavar="W,W,...", help="one for each adapter; else all 1")
]
Rank = Annotated[
    int | None, typer.Option("--rank", "-r", metavar="N", help="rank of the result, where it is cut to one")
]
Density = Annotated[
    float | None,
    typer.Option(
        "--density", metavar="SHARE", help="entries that stay: 0.2 of ties, 0.1 of dare if left out"
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="of what dare drops; 0 if left out")]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        "-f",
        metavar="NAME",
        help="bundle (if left out); peft: an adapter of HF PEFT; hf: a plain checkpoint in the base's dtype",
    ),
]
Out = Annotated[Path | None, typer.Option("--output", "-o", metavar="OUT", help="folder to write")]
Base = Annotated[
    str | None, typer.Option("--model", "-m", metavar="ID", help="the base, if it lies elsewhere")
]

FORMATS = ("bundle", "peft", "hf")
PATIENCE = 2.0
"""Seconds after which a bar appears."""


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    several = "merge german legal --method ties --weights 1,0.5 --rank 16 -o both"
    app.command(epilog=options.examples("merge peftx-out merged-model", several))(merge)


def merge(
    folders: Folders,
    adapter: options.InPlace = None,
    method: Method = None,
    weights: Weights = None,
    rank: Rank = None,
    density: Density = None,
    seed: Seed = None,
    format: Format = None,
    output: Out = None,
    model: Base = None,
    device: options.Device = "cpu",
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Fold a bundle's plugins into the weights and write a plain checkpoint, for vLLM, lm-eval and from_pretrained; or,
    with --method, combine several adapters of one base.

    Refused where that would not be exact: a quantized base, or a plugin that does not fold.
    """
    from transformers.utils import logging

    from peftx.errors import UsageError
    from peftx_cli.stacks import chosen

    logging.disable_progress_bar()  # a library's own bar would stand between our lines
    if method is None:
        given = {
            "--weights": weights, "--rank": rank, "--density": density, "--seed": seed, "--format": format,
        }  # fmt: skip
        folders = folders if output is None else [*folders, str(output)]
        bundle, place = _pair(folders, adapter, [name for name, value in given.items() if value is not None])
        _fold(chosen(bundle, adapter), place, model, device, trust_remote_code, as_json)
        return
    if adapter is not None:
        raise UsageError(
            "--adapter is one that is folded, and --method combines several", hint="name them as arguments"
        )
    format = options.known_format(format or FORMATS[0], FORMATS)
    _combine(
        folders, method, _numbers(weights), rank, density, seed, format, _placed(output), model, device,
        trust_remote_code, as_json,
    )  # fmt: skip


def _pair(folders: Sequence[str], adapter: str | None, given: Sequence[str]) -> tuple[str | None, Path]:
    """What is folded (None: the adapter), and the folder to write; PeftxError where it is not clear what goes where."""
    from peftx.errors import UsageError

    if given:
        raise UsageError(
            f"{given[0]} goes with --method, which says how adapters are combined", hint="--method linear"
        )
    *first, place = folders
    if len(first) > 1 or not (first or adapter):
        raise UsageError(
            f"one bundle is folded into one folder, and {len(folders)} are named",
            hint="peftx merge BUNDLE OUT; several adapters into one: peftx merge A B --method linear -o OUT",
        )
    return (first[0] if first else None), Path(place)


def _fold(bundle: str, output: Path, model: str | None, device: str, trust: bool, as_json: bool) -> None:
    from peftx.engines.files import folder_bytes, make_place
    from peftx.quantities import size
    from peftx_cli.render import out, print_json
    from peftx_cli.stacks import open_stack

    make_place(output)
    stack = open_stack(bundle, model=model, device=device, trust_remote_code=trust)
    path = stack.export(output)
    count = folder_bytes(path)
    if as_json:
        print_json({"output": str(path), "bytes": count, "plugins": list(stack.plugins)})
    else:
        out(f"{path} ({size(count)}): {', '.join(stack.plugins) or 'no plugin'} folded into {stack.base_id}")


def _numbers(text: str | None) -> list[float] | None:
    from peftx.errors import UsageError

    try:
        return None if text is None else [float(word) for word in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--weights {text}: these are no numbers", hint="--weights 0.7,0.3") from error


def _placed(output: Path | None) -> Path:
    from peftx.errors import UsageError

    if output is None:
        raise UsageError(
            "it is not said where the result goes", hint="-o OUT; all folders before it are adapters"
        )
    return output


def _combine(
    adapters: Sequence[str],
    method: str,
    weights: Sequence[float] | None,
    rank: int | None,
    density: float | None,
    seed: int | None,
    format: str,
    output: Path,
    model: str | None,
    device: str,
    trust: bool,
    as_json: bool,
) -> None:
    from peftx_cli.stacks import check_bundle

    for folder in adapters:
        if not Path(folder).is_dir():  # an adapter of HF PEFT is one, too
            check_bundle(folder)
    from peftx.engines.files import folder_bytes, make_place
    from peftx.interop import to_peft
    from peftx.merging import merge_adapters
    from peftx.quantities import size
    from peftx_cli.progress import reporter
    from peftx_cli.render import out, print_json, print_table

    make_place(output)
    with reporter() as told:
        merged = merge_adapters(
            adapters, method=method, weights=weights, rank=rank, density=density, seed=seed,
            into="weights" if format == "hf" else "lora", model=model, device=device, trust_remote_code=trust,
            progress=_patient(told, adapters),
        )  # fmt: skip
        writers = {
            "bundle": merged.stack.save,
            "hf": merged.stack.export,
            "peft": lambda p: to_peft(merged.stack, p),
        }
        path = writers[format](output)
    count = folder_bytes(path)
    if as_json:
        places = [
            {"place": p.name, "role": p.role, "rank": p.rank, "norm": p.norm, "kept": p.kept}
            for p in merged.places
        ]
        print_json(
            {"output": str(path), "format": format, "bytes": count, "method": method, "model": merged.base,
             "norm_kept": merged.kept, "places": places}
        )  # fmt: skip
        return
    print_table(
        f"{' + '.join(adapters)} by {method}", ("role", "places", "rank", "norm", "kept"), _rows(merged)
    )
    out(
        f"{path} ({size(count)}): {format} on {merged.base}; {_share(merged.kept)} of the difference's Frobenius norm "
        "is kept"
    )


def _patient(told: ClosingReporter, ids: Sequence[str]) -> Callable[[int, int], None]:
    """Tells of the progress once it takes long."""
    from time import monotonic

    began, shown = monotonic(), False

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if not shown and monotonic() - began > PATIENCE:
            told.stage("merge", ids)
            shown = True
        if shown:
            told.progress(done, total, {})

    return progress


def _rows(merged: Merged) -> list[tuple[str, ...]]:
    """A row a role."""
    from math import fsum

    from peftx.merging import share_kept

    rows: list[tuple[str, ...]] = []
    for role in dict.fromkeys(place.role for place in merged.places):
        own = [place for place in merged.places if place.role == role]
        ranks = sorted({place.rank for place in own if place.rank is not None})
        shown = f"{ranks[0]} to {ranks[-1]}" if ranks[1:] else "".join(map(str, ranks))
        norm = fsum(place.norm**2 for place in own) ** 0.5
        rows.append((role, str(len(own)), shown or "full", f"{norm:.4g}", _share(share_kept(own))))
    return rows


def _share(share: float) -> str:
    """Rounded down, so that only all of it, to float32's rounding, is 100 %."""
    return f"{int(round(share, 6) * 1e4) / 100:g} %"
