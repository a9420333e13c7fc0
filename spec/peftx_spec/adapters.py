"""`use: peft`: which plugins an adapter of HF PEFT is, in the place of its entry."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

from peftx_spec.catalogue import Catalogue
from peftx_spec.errors import PeftxError
from peftx_spec.overrides import Overridden
from peftx_spec.resolve import absolute
from peftx_spec.translate import Finding

PEFT = "peft"


def with_adapters(
    overridden: Overridden, catalogue: Catalogue, folder: FilePath | None
) -> tuple[Overridden, list[Finding]]:
    """The data with each `use: peft` read; what of the base an adapter trained as well comes at the stack's end."""
    stack = overridden.data.get("stack")
    if not isinstance(stack, list) or not any(_is_peft(entry) for entry in stack):
        return overridden, []
    found: list[Any] = []
    further: list[dict[str, Any]] = []
    findings: list[Finding] = []
    for index, entry in enumerate(stack):
        if not _is_peft(entry):
            found.append(entry)
            continue
        path = entry.get("path") if isinstance(entry, dict) else None
        if not isinstance(path, str):
            findings.append(
                Finding(
                    ("stack", index),
                    "'use: peft' does not say where the adapter is",
                    expected="path: a folder",
                )
            )
            continue
        try:
            first, *others = catalogue.adapter(absolute(path, folder or FilePath.cwd()))
        except PeftxError as error:
            findings.append(
                Finding(("stack", index, "path"), error.message, suggestion=error.hint or "", code=error.code)
            )
            continue
        id = entry.get("id", first["use"])
        given = entry.get("with") if isinstance(entry.get("with"), dict) else {}
        found.append({**entry, "use": first["use"], "id": id, "with": {**first["with"], **given}})
        further += [
            {**other, "id": f"{id}-{other['use']}-{number}", "path": path}
            for number, other in enumerate(others, start=1)
        ]
    return replace(overridden, data={**overridden.data, "stack": [*found, *further]}), findings


def _is_peft(entry: object) -> bool:
    return entry == PEFT or (isinstance(entry, dict) and entry.get("use") == PEFT)
