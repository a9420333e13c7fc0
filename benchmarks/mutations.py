"""Is any damage to a file read in silence? Bundles, checkpoints and adapters, each damaged in one place, many times.

python benchmarks/mutations.py 600 --seed 0

Exit code 1 if reading one ends in anything but a `PeftxError` that names the file, or what the undamaged one gives.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

import peftx
from peftx import Registry, Stack
from peftx.interop import from_peft, to_peft
from peftx.testing import tiny, tiny_tokenizer
from peftx.testing.attempt import Outcome, Reading, attempt, digest_of
from peftx.testing.mutations import KINDS, mutate, sign

ROWS = [{"prompt": f"Say {n}.", "completion": f"It is {n}."} for n in range(8)]
TEXTS = ["The quick brown fox jumps over the lazy dog. " * 40] * 2
RUN = {"batch_size": 2, "checkpoint_every": 1, "max_length": 48, "learning_rate": 1e-2}
SECONDS = 20.0
LAWFUL = {
    "flip bytes", "insert bytes", "delete bytes", "truncate", "empty", "delete", "rename", "encoding", "lines",
    "symlink to another", "json value", "json drop", "json type", "tensor value", "tensor swap", "tensor nan",
    "tensor dtype", "auto map", "redirect",
}  # fmt: skip
"""Changes after which a folder without checksums may be another whole one: then its own numbers are right too."""
SIGNED = LAWFUL - {"json drop", "json type"}
"""The same of a bundle whose checksums were made anew."""


@dataclass(frozen=True)
class Case:
    """A kind of folder. `build` makes a whole one, `read` reads it. `checked`: has checksums; `signed`: they are made
    anew after the damage. `closed`: nothing outside of the folder may be opened."""

    name: str
    build: Callable[[Path, Path], None]
    read: Callable[[Path], Reading]
    checked: bool = True
    signed: bool = False
    closed: bool = True

    def lawful(self, kind: str, what: str) -> bool:
        """May a folder changed so give numbers of its own?"""
        if self.signed:
            return kind in SIGNED or (kind in LAWFUL and not what.startswith("manifest.json"))
        return not self.checked and kind in LAWFUL


# ------------------------------------------------------------------------------------------------ what the folders are
def _plugin(name: str, **options: object) -> peftx.Plugin:
    return Registry().load(name)(**options)


def _filled(stack: Stack) -> Stack:
    """With values that are not where they started."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for id in stack.plugins:
            for tensor in stack.ledger.parameters(id):
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.05)
    return stack


def _base(folder: Path, shard: str = "1GB") -> Path:
    tiny("llama").save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _lora_bundle(folder: Path, beside: Path) -> None:
    _filled(Stack("peftx:tiny", [_plugin("lora", rank=2, targets="attention.q,v")])).save(folder)


def _compressed_bundle(folder: Path, beside: Path) -> None:
    stack = Stack(tiny("llama"), [_plugin("prefixquant", weight_bits=4)], tokenizer=tiny_tokenizer())
    stack.compress(TEXTS)
    stack.save(folder)


def _folded_bundle(folder: Path, beside: Path) -> None:
    base = _base(beside / "base")
    plugins = [_plugin("lora", rank=2), _plugin("propulsion")]
    stack = _filled(Stack(str(base), plugins))
    stack.merge("lora", keep=False)
    stack.freeze("propulsion")
    stack.save(folder)


def _spec(folder: Path, beside: Path) -> None:
    _lora_bundle(beside / "bundle", beside)
    folder.mkdir()
    shutil.move(beside / "bundle" / "pipeline.yaml", folder)


def _checkpoint(folder: Path, beside: Path) -> None:
    stack = Stack(str(_base(beside / "base")), [_plugin("lora", rank=2)])
    stack.train(ROWS, steps=2, output=folder, **RUN)
    shutil.rmtree(folder / "checkpoint-1")


def _adapter(folder: Path, beside: Path) -> None:
    to_peft(_filled(Stack(str(_base(beside / "base")), [_plugin("lora", rank=2)])), folder)


def _exported(folder: Path, beside: Path) -> None:
    base = _base(beside / "base")
    _filled(Stack(str(base), [_plugin("lora", rank=2)])).export(folder)


# ----------------------------------------------------------------------------------------------------------- reading
def _numbers(stack: Stack) -> str:
    """Of the logits of one text, as the stack's own tokenizer reads it."""
    tokenizer = stack.given_tokenizer
    ids = torch.arange(3, 40)[None]
    if tokenizer is not None:
        ids = torch.tensor([tokenizer("Once upon a time, 1+1 was 2.")["input_ids"]])
    with torch.no_grad():
        return digest_of(ids, stack.model(ids).logits)


def _all_in(held: dict[str, Tensor], files: list[Path]) -> bool:
    """Are these tensors those of the files: none missing, none too many, every value the same."""
    saved = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return saved.keys() == held.keys() and all(
        torch.equal(saved[name].to(held[name].dtype).nan_to_num(), held[name].nan_to_num()) for name in saved
    )


def _read_bundle(folder: Path) -> Reading:
    stack = peftx.load(folder)
    files = {id: folder / f"{id}.safetensors" for id in stack.plugins}
    faithful = all(_all_in(stack.ledger.tensors(id), [file]) for id, file in files.items() if file.exists())
    if (folder / "base.safetensors").exists():
        names = load_file(folder / "base.safetensors").keys()
        state = stack.model.state_dict()
        faithful &= _all_in({name: state[name] for name in names}, [folder / "base.safetensors"])
    numbers = _numbers(stack)
    stack.save(folder.parent / "again")  # what was taken without a look shows when it is used
    return Reading(numbers, faithful)


def _read_base(folder: Path) -> Reading:
    stack = Stack(str(folder), [])
    return Reading(
        _numbers(stack), _all_in(stack.model.state_dict(), sorted(folder.glob("model*.safetensors")))
    )


def _read_checkpoint(steps: int) -> Callable[[Path], Reading]:
    def read(folder: Path) -> Reading:
        stack = Stack(str(folder.parent / "base"), [_plugin("lora", rank=2)])
        stack.train(ROWS, steps=steps, output=folder, resume=True, **RUN)
        return Reading(_numbers(stack))

    return read


def _read_adapter(folder: Path) -> Reading:
    stack = Stack(str(folder.parent / "base"), [_plugin("lora", rank=2)])
    from_peft(stack, folder)
    held = {f"base_model.model.{name}": t for name, t in _peft_names(stack).items()}
    return Reading(_numbers(stack), _all_in(held, [folder / "adapter_model.safetensors"]))


def _peft_names(stack: Stack) -> dict[str, Tensor]:
    return {
        f"{part.path}.lora_{name}.weight": getattr(part.module, name)
        for part in stack.ledger.of("lora")
        for name in "AB"
    }


def _read_spec(folder: Path) -> Reading:
    from peftx_spec import load_spec

    pipeline = load_spec(folder / "pipeline.yaml", catalogue=Registry()).pipeline
    return Reading(pipeline.model_dump_json())


def _export_again(folder: Path) -> Reading:
    Stack(str(folder.parent / "base"), [_plugin("lora", rank=2)]).export(folder)
    return Reading("")


CASES = [
    Case("lora bundle", _lora_bundle, _read_bundle),
    Case("lora bundle, signed", _lora_bundle, _read_bundle, signed=True),
    Case("prefixquant bundle", _compressed_bundle, _read_bundle),
    Case("prefixquant bundle, signed", _compressed_bundle, _read_bundle, signed=True),
    Case("folded bundle, signed", _folded_bundle, _read_bundle, signed=True),
    Case("checkpoint", _checkpoint, _read_checkpoint(3), closed=False),
    Case("finished checkpoint", _checkpoint, _read_checkpoint(2), closed=False),
    Case("base", lambda folder, _: _base(folder), _read_base, checked=False, closed=False),
    Case("base in shards", lambda folder, _: _base(folder, "50KB"), _read_base, checked=False, closed=False),
    Case("export", _exported, _read_base, checked=False, closed=False),
    Case("export over another", _exported, _export_again, checked=False, closed=False),
    Case("peft adapter", _adapter, _read_adapter, checked=False, closed=False),
    Case("spec", _spec, _read_spec, checked=False, closed=False),
]  # fmt: skip


# ------------------------------------------------------------------------------------------------- one after another
@dataclass(frozen=True)
class Result:
    """One mutation and how it ended; `finding` is empty where all is well."""

    case: str
    kind: str
    what: str
    number: str
    outcome: Outcome
    finding: str

    def __str__(self) -> str:
        """One line; what it prints is what the damaged file says, so nothing of it may move the cursor."""
        said = self.outcome.detail.replace("\n", " ")[:300]
        line = f"{self.finding:12} {self.case} / {self.kind} / {self.what} [{self.number}]: {said}"
        line += f" ({self.outcome.where})" if self.outcome.where else ""
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


class Bench:
    """The undamaged folders, built when they are first asked for, and what they give."""

    def __init__(self, folder: Path, *, seconds: float = SECONDS) -> None:
        self.folder = folder
        self.seconds = seconds
        self._whole: dict[str, Reading] = {}

    def whole(self, case: Case) -> Reading:
        """Raises RuntimeError if even the undamaged folder is not read."""
        if case.name not in self._whole:
            place = self._place(case, "whole")
            case.build(place / "it", place)
            case.read(self._copy(case))  # here too, so that what is imported late is there for every child
            copy = self._copy(case)
            outcome = attempt(case.read, copy, copy.parent / "outside", seconds=60)
            if outcome.reading is None or not outcome.reading.faithful:
                raise RuntimeError(f"{case.name}: the undamaged folder is not read: {outcome}")
            self._whole[case.name] = outcome.reading
        return self._whole[case.name]

    def _place(self, case: Case, what: str) -> Path:
        place = self.folder / case.name.replace(" ", "-").replace(",", "") / what
        place.mkdir(parents=True)
        return place

    def _copy(self, case: Case) -> Path:
        """A fresh copy, with what lies beside it."""
        whole = self.folder / case.name.replace(" ", "-").replace(",", "") / "whole"
        scratch = whole.with_name("scratch")
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(whole, scratch)
        (scratch / "outside").mkdir()
        return scratch / "it"

    def one(
        self, case: Case, kind: str, number: str, *, change: Callable[[Path, Path], str] | None = None
    ) -> Result | None:
        """One mutation, made again from its number; None if the kind has no place in this folder.

        Args:
            change: instead of the kind's own; gets the folder and the one outside.
        """
        reference = self.whole(case)
        folder = self._copy(case)
        outside = folder.parent / "outside"
        names = frozenset(p.name for p in folder.rglob("*"))
        manifest = folder / "manifest.json"
        before = manifest.read_bytes() if manifest.exists() else b""
        rng = random.Random(f"{case.name} {kind} {number}")
        what = change(folder, outside) if change is not None else mutate(folder, outside, kind, rng)
        if what is None:
            return None
        if case.signed:
            sign(folder, before)
        linked = kind.startswith("symlink") or what.endswith(("symlink", "'link'"))
        closed = case.closed or not linked  # the cache of a hub is made of links
        outcome = attempt(case.read, folder, outside, seconds=self.seconds, names=names, closed=closed)
        return Result(
            case.name, kind, what, number, outcome, self._finding(case, kind, what, outcome, reference)
        )

    def _finding(self, case: Case, kind: str, what: str, outcome: Outcome, reference: Reading) -> str:
        if outcome.word != "read" or outcome.reading is None:
            return "" if outcome.word == "refused" else outcome.word
        if outcome.reading.digest == reference.digest:
            return ""
        if case.lawful(kind, what):
            return "" if outcome.reading.faithful else "unfaithful"
        return "different"


def results(bench: Bench, count: int, seed: int, cases: list[Case], kinds: list[str]) -> Iterator[Result]:
    """`count` mutations, each kind on each case in turn."""
    done = 0
    for round_ in range(count):
        pairs = [(case, kind) for kind in kinds for case in cases]
        random.Random(f"{seed} {round_}").shuffle(pairs)
        for case, kind in pairs:
            if done == count:
                return
            result = bench.one(case, kind, f"{seed}.{round_}")
            if result is not None:
                done += 1
                yield result


def table(found: list[Result]) -> str:
    """By kind: how many were refused, read the same, read as another whole folder, and findings."""
    lines = [f"{'kind':20} {'tried':>6} {'refused':>8} {'read':>6} {'findings':>9}"]
    for kind in KINDS:
        own = [r for r in found if r.kind == kind]
        refused = sum(not r.finding and r.outcome.word == "refused" for r in own)
        findings = sum(bool(r.finding) for r in own)
        lines.append(f"{kind:20} {len(own):6} {refused:8} {len(own) - refused - findings:6} {findings:9}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("count", type=int, nargs="?", default=600, help="mutations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--case", action="append", choices=[case.name for case in CASES], help="only this one"
    )
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="only this one")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="a reading that takes longer hangs")
    parser.add_argument("--json", type=Path, help="all results into this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    cases = [case for case in CASES if options.case is None or case.name in options.case]
    kinds = [kind for kind in KINDS if options.kind is None or kind in options.kind]
    found: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="peftx-mutations-") as folder:
        bench = Bench(Path(folder), seconds=options.seconds)
        for result in results(bench, options.count, options.seed, cases, kinds):
            found.append(result)
            if result.finding:
                print(result, flush=True)
    print(table(found))
    words = Counter(result.finding for result in found if result.finding)
    print(f"{len(found)} mutations, {sum(words.values())} findings", dict(words) or "")
    if options.json is not None:
        options.json.write_text(json.dumps([vars(r) | {"outcome": str(r.outcome)} for r in found], indent=1))
    return 1 if words else 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
