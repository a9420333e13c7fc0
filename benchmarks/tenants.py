"""Fifty fine-tunes of the bundled model in one process, each a `bitdelta` bundle over the one base.

    python benchmarks/tenants.py                 # 50 tenants, a batch of 16 of them
    python benchmarks/tenants.py --tenants 8

No fine-tune is trained: each is the base with a seeded change of a hundredth of its weights' spread, since bytes and
time do not ask what the weights say. Twice: `whole` moves every parameter (only the tenants of the batch are made),
`matrices` leaves the embedding, which is also the head, as the base has it. Tenants come as `peftx serve --adapters`
loads them. Then one row each of 16 tenants is answered in one batch, beside the same 16 as merged models one after
another (each alone, as a server of that model runs it), and beside 16 rows of the base. One thread, CPU time, the least
of interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from measure import interleaved
from torch import nn

import peftx
from peftx import Stack
from peftx.kernel.parts import DeltaPart
from peftx.together import Bases
from peftx.toolkits.serving import Request, Server
from peftx.toolkits.serving.job import Job
from peftx.toolkits.serving.models import Models
from peftx_bitdelta import BitDelta

RESULTS = Path(__file__).parent / "results"
BASE, CHANGE = "peftx:tiny", 0.01
PROMPT = "The river took the bridge and the people of the north wrote a letter"


def make(folder: Path, seed: int, *, whole: bool) -> Path:
    """A bundle of a fine-tune that nobody trained."""
    stack = Stack(BASE)
    draw = torch.Generator().manual_seed(seed)
    embedding = stack.model.get_input_embeddings().weight
    with torch.no_grad():
        for p in stack.model.parameters():
            if whole or p is not embedding:
                p.add_(CHANGE * p.std() * torch.randn(p.shape, generator=draw))
    tuned, bundle = folder / f"tuned-{seed}", folder / f"tenant-{seed}"
    stack.export(tuned)
    tenant = Stack(BASE, [BitDelta(finetuned=str(tuned), steps=1)])
    tenant.compress("peftx:sample/calibration.txt", samples=2, length=64)
    tenant.save(bundle)
    return bundle


def tensor_bytes(models: Iterable[nn.Module]) -> int:
    """Of all parameters and buffers, those that are shared once; without what is laid out for the CPU's products."""
    tensors = (t for model in models for t in (*model.parameters(), *model.buffers()))
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def answer(models: Models, names: list[str], tokens: int) -> None:
    """A row for each name, in the batches that they run in, until all are written."""
    batches: dict[int, tuple[Any, list[Job]]] = {}
    for i, name in enumerate(names):
        engine = models.engine(name)
        request = Request(f"{PROMPT} {i}", max_tokens=tokens, temperature=0)
        job = Job(request, engine.ids_of(request), tokens, model=name)
        batch = engine._worker.batch
        batches.setdefault(id(batch), (batch, []))[1].append(job)
    for batch, jobs in batches.values():
        batch.step(jobs)
        while batch.busy:
            batch.step([])
        for job in jobs:
            job.result(0)


def measured(
    folder: Path, *, whole: bool, tenants: int, batch: int, tokens: int, rounds: int
) -> dict[str, Any]:
    bundles = [make(folder, seed, whole=whole) for seed in range(tenants)]
    bases = Bases()
    base = bases.stack(BASE)
    models = Models([Server(base, name="base")], lambda name, path: Server(bases.stack(path), name=name))
    names, reads, joins = [f"t{i}" for i in range(tenants)], [], []
    alone = tensor_bytes([base.model])
    for name, bundle in zip(names, bundles, strict=True):
        began = time.process_time()
        bases.stack(bundle)
        reads.append(time.process_time() - began)
        began = time.process_time()
        models.load(name, str(bundle))
        joins.append(time.process_time() - began)
    stacks = [models.engine(name).server.stack for name in names]
    ways = {models.engine(name).about()["batching"] for name in names}
    served = tensor_bytes([base.model, *(stack.model for stack in stacks)])
    parts = (t for stack in stacks for part in stack.ledger.all(DeltaPart) for t in part.tensors().values())
    packed = sum(t.nbytes for t in parts)
    found = {
        "batching": sorted(ways),
        "base_bytes": alone,
        "bytes_a_tenant": (served - alone) / tenants,
        "of_it_signs_and_scales": packed / tenants,
        "bundle_bytes_on_disk": sum(f.stat().st_size for f in bundles[0].rglob("*") if f.is_file()),
        "all_over_all_merged": served / (alone * tenants),
        "read_cpu_s": statistics.median(reads),
        "read_and_join_cpu_s": statistics.median(joins),
    }
    merged = []
    for name, bundle in zip(names[:batch], bundles, strict=False):
        stack = peftx.load(bundle)
        stack.merge()
        merged.append(Models([Server(stack, name=name)]))
    plain = Models([Server(bases.stack(BASE), name="plain")])
    calls = {
        "one batch of tenants": partial(answer, models, names[:batch], tokens),
        "merged models, in turn": lambda: [
            answer(own, [name], tokens) for own, name in zip(merged, names, strict=False)
        ],
        "one batch of the base": partial(answer, plain, ["plain"] * batch, tokens),
    }
    seconds = interleaved(calls, rounds=rounds)
    reference = seconds["merged models, in turn"]
    found["cpu_ms_a_token"] = {name: 1e3 * s / (batch * tokens) for name, s in seconds.items()}
    found["over_merged_in_turn"] = {name: s / reference for name, s in seconds.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tenants", type=int, default=50)
    parser.add_argument("--batch", type=int, default=16, help="tenants in one batch")
    parser.add_argument("--tokens", type=int, default=24, help="of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for kind in ("whole", "matrices"):
        given = vars(arguments) | ({"tenants": arguments.batch} if kind == "whole" else {})
        with tempfile.TemporaryDirectory() as folder:
            results[kind] = measured(Path(folder), whole=kind == "whole", **given)
        print(kind, json.dumps(results[kind], indent=1), flush=True)
    text = json.dumps({"settings": vars(arguments), "results": results}, indent=1)
    (RESULTS / "tenants.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
