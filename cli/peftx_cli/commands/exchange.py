"""`import` and `export`: adapters and checkpoints of other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftx_cli import options

if TYPE_CHECKING:
    from collections.abc import Callable

    from peftx.stack import Stack

Folder = Annotated[
    str, typer.Argument(metavar="DIR", help="folder with adapter_config.json, as PEFT writes it")
]
Bundle = Annotated[str, typer.Argument(metavar="BUNDLE", help="folder of a bundle")]
Base = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="ID", help="the base, if it is not the one that is named there"),
]
BundleOut = Annotated[Path, typer.Option("--output", "-o", metavar="BUNDLE", help="folder of the bundle")]
Out = Annotated[Path | None, typer.Argument(metavar="OUT", help="folder to write; or -o OUT")]
Place = Annotated[Path | None, typer.Option("--output", "-o", metavar="OUT", help="folder to write")]
Format = Annotated[
    str,
    typer.Option(
        "--format",
        "-f",
        metavar="NAME",
        help="hf: a plain checkpoint; peft: an adapter of HF PEFT; compressed-tensors: quantized layers as they are; "
        "gguf: a file for llama.cpp",
    ),
]
Type = Annotated[
    str | None,
    typer.Option("--type", metavar="NAME", help="of gguf: f16 (if left out), q8_0 or q4_0"),
]
Id = Annotated[str | None, typer.Option("--id", metavar="ID", help="of peft: which of several adapters")]


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command(
        "import",
        epilog=options.examples(
            "import their-adapter -o bundle", "import their-adapter -o bundle --model base"
        ),
    )(import_)
    shown = (
        "export bundle adapter --format peft",
        "export bundle packed --format compressed-tensors",
        "export bundle file --format gguf --type q8_0",
    )
    app.command(epilog=options.examples(*shown))(export)


def import_(
    folder: Folder,
    output: BundleOut,
    model: Base = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Make a bundle of an adapter of HF PEFT: its method, options and numbers are read from the folder."""
    from peftx.composition.adapters import read_adapter
    from peftx.engines.files import folder_bytes, make_place, naming

    with naming(folder):
        read_adapter(folder)  # what is no adapter is refused before torch is imported
    from peftx.interop import import_peft
    from peftx.quantities import size
    from peftx_cli.render import out, print_json

    make_place(output)
    stack = import_peft(folder, model=model, trust_remote_code=trust_remote_code)
    path = stack.save(output)
    count, told = folder_bytes(path), [repr(plugin) for plugin in stack.plugins.values()]
    if as_json:
        print_json(
            {"output": str(path), "bytes": count, "plugins": list(stack.plugins), "model": stack.base_id}
        )
        return
    out(f"{path} ({size(count)}), on {stack.base_id}:")
    for line in told:
        out(f"  {line}")


def export(
    bundle: Bundle,
    place: Out = None,
    output: Place = None,
    format: Format = "hf",
    id: Id = None,
    type: Type = None,
    model: Base = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Write a bundle as other libraries read it.

    hf folds the plugins into the weights (as `peftx merge`), for transformers, vLLM, SGLang and others; peft keeps the
    adapter apart, for HF PEFT, TRL and vLLM's `--lora-modules`; compressed-tensors keeps the integers of quantized
    layers, for transformers, vLLM and SGLang; gguf folds as hf does, into one file for llama.cpp. What a format cannot
    say is refused.
    """
    from peftx_cli.stacks import check_there, open_stack

    check_there(bundle, model=model)
    from transformers.utils import logging

    from peftx.engines.files import folder_bytes, make_place
    from peftx.errors import UsageError
    from peftx.interop import to_compressed_tensors, to_gguf, to_peft
    from peftx.quantities import size
    from peftx_cli.render import out, print_json

    to = place if output is None else output
    if to is None or (place and output):
        what = (
            "no folder to write is named"
            if to is None
            else f"two folders to write are named, {place} and {to}"
        )
        raise UsageError(what, hint=f"peftx export {bundle} OUT --format {format}")
    writers: dict[str, Callable[[Stack], Path]] = {
        "hf": lambda stack: stack.export(to),
        "peft": lambda stack: to_peft(stack, to, id=id),
        "compressed-tensors": lambda stack: to_compressed_tensors(stack, to),
        "gguf": lambda stack: to_gguf(stack, to, type=type or "f16"),
    }
    options.known_format(format, writers)
    if id is not None and format != "peft":
        raise UsageError(
            f"--id names one adapter of several, and {format} holds all of them", hint="leave it out"
        )
    if type is not None and format != "gguf":
        raise UsageError(f"--type is of gguf, and {format} keeps the model's own", hint="leave it out")
    make_place(to)
    logging.disable_progress_bar()
    stack = open_stack(bundle, model=model, device="cpu", trust_remote_code=trust_remote_code)
    stack.model.eval()
    path = writers[format](stack)
    count = folder_bytes(path)
    if as_json:
        print_json({"output": str(path), "format": format, "bytes": count, "plugins": list(stack.plugins)})
    else:
        out(
            f"{path} ({size(count)}): {', '.join(stack.plugins) or 'no plugin'} as {format}, on {stack.base_id}"
        )
