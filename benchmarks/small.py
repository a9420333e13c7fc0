"""What pruning, masking and sparsifying leave: bytes, memory and time beside dense tuning, plugin by plugin.

    python benchmarks/small.py
    python benchmarks/small.py --only spp,apt --rounds 2

Rows are the plugins of the repository of the families in `FAMILIES`, and those whose one line in the catalogue says
that they prune something or make it sparse; a plugin that claims to work on adapters of others has a LoRA before it.
Dense are full fine-tuning and LoRA. Each row trains for the same few steps on the packaged rows, compresses if it does,
and is saved: of the bundled model, and of a random Llama 512 wide. What wants a mixture of experts (`ON_EXPERTS`) has
rows of its own, of a random Mixtral, where dense is that Mixtral tuned; `--base` runs one of the three anew.

* bytes: the tensor files of the bundle, and what `peftx plan` said of them before.
* memory: of the most demanding step of the run. What the stack holds before it (parameters, buffers, the base's own
  weights where others train in their place), each storage once, and on top the most that torch's CPU allocator had
  given out at once: saved activations, gradients, moments. The process with its libraries is not in it.
* a step: CPU time of the run's steps but the first, over their number, so that phases and choices are in it; all rows
  in turn, the least of the rounds.
* a token: one row behind a prompt, as the bundle runs; and merged, where it folds. The least of interleaved rounds.

One thread. Times and memory are over those of full fine-tuning in the same run.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from measure import prompts_and_tokens
from run import RESULTS, machine
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from peftx import Claim, Registry, Stack
from peftx.engines.bundle import holds_base
from peftx.engines.files import folder_bytes
from peftx.engines.models import load_model
from peftx.errors import PeftxError
from peftx.kernel.parts import BasePart, DeltaPart
from peftx.planning import plan
from peftx_spec.models import Pipeline

FAMILIES = {
    "pruning", "sparse-tuning", "structured-matrices", "moefication", "dynamic-depth", "efficient-training",
}  # fmt: skip
WORDS = re.compile(r"\b(prun|spars)", re.IGNORECASE)
"""In the line of the catalogue."""
DENSE = ("full-finetuning", "lora")
OPTIONS: dict[str, dict[str, Any]] = {
    "adalora": {"every": 2},
    "apt": {"fade": 2},
    "bitfit": {"add": True},
    "cfsp": {"multiple": 16},
    "cofitune": {"rows": 8},
    "ks-lottery": {"alpha": 1.0},
    "layernorm-tuning": {"fraction": 0.5, "fisher_rows": 8},
    "spp": {"sparsity": 0.5},
    "surgical-fim": {"samples": 8},
}
"""Where defaults ask for a longer run, for biases, or for a model that is pruned already."""
ON_ADAPTERS = {"sparselora"}
"""Want a LoRA before them, which none of their claims says: they train nothing themselves."""
TINY, WIDE = BASES = ("peftx:tiny", "a random Llama, 512 wide")
EXPERTS = "a random Mixtral, 256 wide, with 16 experts a layer"
ON_EXPERTS = ("esft",)
"""Want a model with experts."""
ROWS, HELD_OUT, CALIBRATION = (
    f"peftx:sample/{name}" for name in ("train.jsonl", "held_out.jsonl", "calibration.txt")
)
TRAIN = {"steps": 8, "batch_size": 2, "max_length": 160, "learning_rate": 1e-3}
PROMPT, WRITTEN = 32, 8


def chosen() -> list[str]:
    """The plugins of the rule, by family and name, behind the dense ones."""
    entries = [e for e in Registry().entries() if e.family in FAMILIES or WORDS.search(e.summary)]
    named = (e.name for e in sorted(entries, key=lambda e: (e.family, e.name)))
    return [*DENSE, *(name for name in named if name not in ON_EXPERTS)]


def stack_of(name: str) -> list[dict[str, Any]]:
    """The stack of a row, as a spec says it."""
    wants = (
        Registry().load(name).claims & {Claim.WORKS_ON_PREVIOUS, Claim.NEEDS_ADAPTERS} or name in ON_ADAPTERS
    )
    before = [{"use": "lora"}] if wants else []
    return [*before, {"use": name, "with": OPTIONS.get(name, {})}]


def planned(name: str, base: str) -> dict[str, Any]:
    """What `peftx plan` says of it: bytes of the bundle, parameters that train.

    Raises:
        PeftxError: the plan has a conflict.
    """
    sources = Registry().load(name).sources
    spec = {
        "peftx": 1,
        "model": base,
        "data": {"train": ROWS, "calibration": CALIBRATION, "sources": dict.fromkeys(sources, HELD_OUT)},
        "stack": stack_of(name),
        "train": TRAIN,
    }
    found = plan(Pipeline.model_validate(spec))
    if found.conflicts:
        raise PeftxError(found.conflicts[0].reason)
    return {"planned_bytes": found.totals.bundle_bytes, "trained": found.totals.trainable_params}


def built(name: str, base: str) -> Stack:
    registry = Registry()
    members = [(e["use"], registry.load(e["use"])(**e.get("with", {}))) for e in stack_of(name)]
    return Stack(base, members)


def trained(stack: Stack) -> float:
    """CPU seconds of a step, the first one left out."""
    ends: list[float] = []
    sources = {source: HELD_OUT for member in stack.members for source in member.plugin.sources}

    def note(done: int, *_: Any) -> None:
        if len(ends) < done:  # it is told more than once
            ends.append(time.process_time())

    stack.train(ROWS, sources=sources, progress=note, **TRAIN)
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def held(stack: Stack) -> int:
    """Bytes that the stack holds, each storage once."""
    asides = (p for part in stack.ledger.all(BasePart) for p in part.original.values())
    tensors = [*stack.model.parameters(), *stack.model.buffers(), *asides]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that torch's allocator had given out at once during the call, over what was there before."""
    gc.collect()  # what other stacks left is not to be freed meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def saved(stack: Stack, folder: Path) -> dict[str, Any]:
    stack.save(folder)
    tensors = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    return {"bytes": tensors, "folder_bytes": folder_bytes(folder), "whole": holds_base(folder)}


def live(name: str, base: str, found: dict[str, Any], *, profiled: bool) -> Stack:
    """A row from its building to its compression; `found` gets what a step takes, in time or in memory."""
    stack = built(name, base)
    if stack.trainable_parameters():
        if profiled:
            found["memory_bytes"] = held(stack) + peak_bytes(lambda: trained(stack))
        else:
            found.setdefault("step_seconds", []).append(trained(stack))
    if stack.implementers("compress"):
        stack.compress(CALIBRATION, samples=8, length=64, keep=False)
    return stack


def measured(
    base: str, names: list[str], rounds: int, scratch: Path, *, memory: bool
) -> dict[str, dict[str, Any]]:
    """By row: what it takes; or why it cannot be built there.

    Args:
        memory: measure that of a step too, which takes a round of its own.
    """
    results: dict[str, dict[str, Any]] = {}
    stacks: dict[str, Stack] = {}
    for name in names:
        try:
            found = planned(name, base)
            stacks[name] = live(name, base, found, profiled=memory)
            results[name] = found | saved(stacks[name], scratch / name)
        except PeftxError as error:
            results[name] = {"refused": error.message}
        print(name, results[name], flush=True)
    standing = {name: found for name, found in results.items() if "bytes" in found}
    for _ in range(rounds if memory else rounds - 1):
        stacks = {name: live(name, base, found, profiled=False) for name, found in standing.items()}
        print("a round is done", flush=True)
    for stack in stacks.values():
        stack.model.eval().requires_grad_(False)
    told(standing, "token_seconds", stacks, rounds)
    folded = DENSE[:1] + tuple(name for name, stack in stacks.items() if folds(stack))
    for name in folded:
        stacks[name].merge()
    told(
        standing, "merged_token_seconds", {name: stacks[name] for name in folded if name in standing}, rounds
    )
    return results


def stored(base: str, names: list[str], scratch: Path) -> dict[str, dict[str, Any]]:
    """By row: what is planned and stored of it, which no load of the machine changes."""
    return {
        name: planned(name, base) | saved(live(name, base, {}, profiled=False), scratch / name)
        for name in names
    }


def folds(stack: Stack) -> bool:
    """Does all of it fold, and is it not in the weights already."""
    return all(m.claims(Claim.MERGEABLE) for m in stack.members) and bool(stack.ledger.all(DeltaPart))


def told(results: Mapping[str, dict[str, Any]], key: str, stacks: Mapping[str, Stack], rounds: int) -> None:
    """The seconds of a token of each stack, round by round, into its results."""
    models = {name: stack.model for name, stack in stacks.items()}
    found = prompts_and_tokens(models, rounds=4 * rounds, prompt=PROMPT, written=WRITTEN)
    for name, seconds in found.items():
        results[name][key] = seconds["token"]


def random_model(folder: Path, *, experts: int = 0) -> str:
    """A random Llama 512 wide, or Mixtral 256 wide, with the packaged tokenizer; where it lies."""
    torch.manual_seed(0)
    _, tokenizer = load_model("peftx:tiny", meta=True)
    assert tokenizer is not None
    common = {
        "vocab_size": len(tokenizer), "num_attention_heads": 8, "num_key_value_heads": 4,
        "max_position_embeddings": 512, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    if experts:
        sizes = {"hidden_size": 256, "intermediate_size": 172, "num_hidden_layers": 4}
        mixture = MixtralConfig(**common, **sizes, num_local_experts=experts, num_experts_per_tok=2)
        MixtralForCausalLM(mixture).save_pretrained(folder)
    else:
        sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 2}
        LlamaForCausalLM(LlamaConfig(**common, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def over(found: Mapping[str, Any], dense: Mapping[str, Any], key: str) -> str:
    """The least of the rounds, over the dense one's."""
    if key not in found or key not in dense:
        return ""
    return f"{min(found[key]) / min(dense[key]):.2f}"


def spread(results: Mapping[str, Mapping[str, Any]], key: str) -> float:
    """How far the second best round lies above the best, in the median of the rows."""
    ordered = [sorted(found[key]) for found in results.values() if len(found.get(key, ())) > 1]
    ratios = sorted(rounds[1] / rounds[0] - 1 for rounds in ordered)
    return ratios[len(ratios) // 2] if ratios else 0.0


COLUMNS = (
    "", "trains", "bundle, planned", "bundle, on disk", "planned over disk", "memory of a step", "a step", "a token",
    "a token, merged",
)  # fmt: skip


def table(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    dense = results[DENSE[0]]
    for name, found in results.items():
        if "refused" in found:
            continue
        memory = f"{found['memory_bytes'] / dense['memory_bytes']:.2f}" if "memory_bytes" in found else ""
        cells = [
            name + " (whole)" * found["whole"],
            f"{found['trained']:,}", f"{found['planned_bytes']:,}", f"{found['bytes']:,}",
            f"{found['planned_bytes'] / found['bytes']:.2f}", memory, over(found, dense, "step_seconds"),
            over(found, dense, "token_seconds"), over(found, dense, "merged_token_seconds"),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    refused = [f"`{name}`: {found['refused']}" for name, found in results.items() if "refused" in found]
    noise = [f"{spread(results, key):.1%}" for key in ("step_seconds", "token_seconds")]
    told = f"The second best round is above the best by {noise[0]} of a step and {noise[1]} of a token, in the median."
    return [*lines, "", told, *(["Refused: " + "; ".join(refused) + "."] if refused else []), ""]


def page(results: Mapping[str, Mapping[str, Mapping[str, Any]]], rounds: int) -> str:
    about = machine()
    setting = (
        f"{about['processor']}, torch {about['torch']}; one thread, CPU time, least of {rounds} interleaved rounds (of "
        f"a token {4 * rounds}). {TRAIN['steps']} steps of {TRAIN['batch_size']} rows of at most {TRAIN['max_length']} "
        f"tokens. Memory and times are over those of full fine-tuning. Bundles of `(whole)` hold the model, the others "
        f"what comes on top of it."
    )
    lines = ["# Which plugins are small", "", setting, ""]
    for base, found in results.items():
        lines += [f"## {base}", "", *table(found)]
    return "\n".join(lines)


def write(results: Mapping[str, Mapping[str, Mapping[str, Any]]], arguments: argparse.Namespace) -> None:
    found = {"machine": machine(), "train": TRAIN, "options": OPTIONS, "results": results}
    (arguments.output / "small.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = page(results, arguments.rounds)
    (arguments.output / "small.md").write_text(text, encoding="utf-8")
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="rows beside the dense ones, by comma; all if left out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of small.json and small.md")
    parser.add_argument(
        "--bytes", action="store_true", help="of these rows what is stored, and the rest as the file has it"
    )
    parser.add_argument(
        "--base", choices=(*BASES, EXPERTS), help="measure on this alone, and the rest as the file has it"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    wanted = arguments.only.split(",") if arguments.only else [*chosen(), *ON_EXPERTS]
    results: dict[str, dict[str, dict[str, Any]]] = {}
    if arguments.bytes or arguments.base:
        results = json.loads((arguments.output / "small.json").read_text(encoding="utf-8"))["results"]
    with tempfile.TemporaryDirectory() as scratch:
        for title in [arguments.base] if arguments.base else [*BASES, EXPERTS]:
            own = Path(scratch) / title.replace(" ", "-")
            base = title if title == TINY else random_model(own / "base", experts=16 * (title == EXPERTS))
            of_it = [name for name in wanted if name in DENSE or (name in ON_EXPERTS) == (title == EXPERTS)]
            if arguments.bytes:
                for name, found in stored(base, of_it, own).items():
                    results[title][name] |= found
                continue
            names = [*dict.fromkeys((*DENSE, *of_it))]
            results[title] = measured(base, names, arguments.rounds, own, memory=title != WIDE)
            write(results, arguments)
    if arguments.bytes:
        write(results, arguments)


if __name__ == "__main__":
    main()
