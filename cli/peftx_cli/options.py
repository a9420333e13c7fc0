"""Arguments that several commands share."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

import typer


def examples(*commands: str) -> str:
    """What the help of a command shows below its options."""
    return "\n\n".join(f"Example: peftx {command}" for command in commands)


def known_device(name: str) -> str:
    """The device's name, if it is one; whether the machine has it is for torch to say.

    Raises:
        PeftxError: no name of a device.
    """
    import re

    from peftx.errors import UsageError
    from peftx_spec.models import DEVICE

    if not re.match(DEVICE, name):
        raise UsageError(
            f"--device {name}: there is no such device", hint="one of auto, cpu, cuda, cuda:0, mps"
        )
    return name


READ = {
    "vllm": ("hf", "peft", "compressed-tensors"), "sglang": ("hf", "peft", "compressed-tensors"),
    "transformers": ("hf", "compressed-tensors"), "trl": ("peft",), "llama.cpp": ("gguf",), "ollama": ("gguf",),
}  # fmt: skip
"""Programs -> formats that they read."""


def known_format(name: str, formats: Collection[str]) -> str:
    """The format's name, if a command writes it.

    Raises:
        PeftxError: it does not; with the formats that the program reads, if it is one's name.
    """
    from peftx.errors import UsageError
    from peftx_spec.errors import nearest

    if name in formats:
        return name
    read = [format for format in READ.get(name.lower(), ()) if format in formats]
    if read:
        raise UsageError(
            f"--format {name}: that is a program, which reads {', '.join(read)}", hint=f"--format {read[0]}"
        )
    raise UsageError(
        f"--format {name}: there is no such format",
        hint=nearest(name, formats) or f"one of {', '.join(formats)}",
    )


def plugin_names(incomplete: str) -> list[str]:
    """For the shell's completion: names of installed plugins."""
    from peftx.composition.registry import Registry

    return [name for name in Registry().names() if name.startswith(incomplete)]


Spec = Annotated[
    str | None, typer.Argument(metavar="[SPEC]", help="spec, a YAML file; or name plugins instead")
]
Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        "-p",
        metavar="NAME",
        help="a plugin; repeat it, in order of effect",
        autocompletion=plugin_names,
    ),
]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="ID", help="base model: peftx:tiny, a folder, or a hub id"),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="as in lora.rank=16, train.steps=50"),
]
Data = Annotated[str | None, typer.Option("--data", metavar="FILE", help="what to train on")]
Eval = Annotated[
    str | None,
    typer.Option("--eval", metavar="FILE", help="held-out data, for the metrics; else a tenth of --data"),
]
Columns = Annotated[
    str | None,
    typer.Option(
        "--columns",
        metavar="OURS=THEIRS,...",
        help="what the files' columns are called, as in prompt=ask,completion=reply",
    ),
]
Split = Annotated[
    float | None,
    typer.Option("--split", metavar="SHARE", help="hold out this share of --data for the metrics"),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        "--adapter", metavar="DIR", help="begin with an adapter of HF PEFT; plugins come on top of it"
    ),
]
InPlace = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        metavar="DIR",
        help="an adapter of HF PEFT, in the place of a bundle; --model is its base",
    ),
]
Calibration = Annotated[
    str | None, typer.Option("--calibration", metavar="FILE", help="text that compression calibrates on")
]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="optimizer steps")]
Metrics = Annotated[
    list[str] | None,
    typer.Option(
        "--metric",
        metavar="NAME",
        help="perplexity, accuracy, exact-match, task-accuracy, lm-eval or a plugin; repeat it; none for none",
    ),
]
Output = Annotated[str | None, typer.Option("--output", "-o", metavar="DIR", help="folder of the bundle")]
Json = Annotated[bool, typer.Option("--json", help="print JSON on stdout, for scripts")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="run Python code that the model brings along")
]
OnRay = Annotated[
    bool, typer.Option("--ray", help="by Ray, on the cluster of RAY_ADDRESS, or one started here")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:0, mps", callback=known_device)]
