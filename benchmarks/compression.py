"""What the plugins that compress make of one model: bytes on disk, perplexity, time.

    python benchmarks/compression.py --text wikitext2_test.txt.gz --train wikitext2_valid.txt.gz

First the bundled model is fine-tuned as a whole for a few steps on `--train`; that is the model which is packed, and
of which `bitdelta` and `delta-come` pack the difference from the bundled one. Each plugin has its own defaults but for
what a row says, and calibrates on the same sequences of `--train`; perplexity is of the first `--bytes` of `--text`.
Bits of a weight are those of the bundle's tensors that stand for the matrices of the blocks, over the weights that
these had; a difference's bits come on top of a base that others share.

Times are CPU time of one thread, the least of interleaved rounds, over float32's: a prompt of 64 tokens, and a token of
one row behind it; of the same model, and of a random one of two blocks that are 1024 wide, which the plugins pack with
as little search as they can, since time does not ask for it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from bases import Source, seen
from compare import RESULTS
from measure import prompts_and_tokens
from run import machine
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from peftx import Plugin, Stack
from peftx.engines.models import load_model
from peftx.toolkits.evaluation import perplexity
from peftx_alphatuning import AlphaTuning
from peftx_bitdelta import BitDelta
from peftx_bitmod import BitMoD
from peftx_cfsp import CFSP
from peftx_delta_come import DeltaCome
from peftx_full_finetuning import FullFinetuning
from peftx_nf4 import NF4Storage
from peftx_prefixquant import PrefixQuant
from peftx_signround import SignRound

BASE, PROMPT, WRITTEN = "peftx:tiny", 64, 8
TEXTS = {"training": Source("text/wikitext2_valid.txt.gz"), "test": Source("text/wikitext2_test.txt.gz")}
Make = Callable[[str], Plugin]
"""The folder of the fine-tuned model -> a plugin."""


def methods(*, search: bool) -> dict[str, Make]:
    """By what a row says.

    Args:
        search: look for good values, not only for values.
    """
    steps, rounds = (20, 15) if search else (1, 0)
    return {
        "nf4": lambda tuned: NF4Storage(),
        "signround, 4 bits": lambda tuned: SignRound(steps=steps, batch_size=4),
        "signround, 3 bits": lambda tuned: SignRound(bits=3, steps=steps, batch_size=4),
        "bitmod, 4 bits": lambda tuned: BitMoD(),
        "bitmod, 3 bits": lambda tuned: BitMoD(bits=3),
        "alphatuning, 3 codes": lambda tuned: AlphaTuning(rounds=rounds),
        "alphatuning, 4 codes": lambda tuned: AlphaTuning(bits=4, rounds=rounds),
        "prefixquant, W4A16": lambda tuned: PrefixQuant(activation_bits=16, kv_bits=16),
        "prefixquant, W4A8KV4": lambda tuned: PrefixQuant(),
        "prefixquant, W8A8KV8": lambda tuned: PrefixQuant(weight_bits=8, kv_bits=8),
        "cfsp, a fifth of the channels": lambda tuned: CFSP(multiple=16),
        "bitdelta": lambda tuned: BitDelta(finetuned=tuned, steps=steps),
        "delta-come": lambda tuned: DeltaCome(finetuned=tuned),
    }


DIFFERENCES = {"bitdelta", "delta-come"}


def text_of(path: Path, size: int | None = None) -> str:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        return file.read(size).decode("utf-8", errors="ignore")


def pieces(text: str, size: int = 600) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


def matrices(model: PreTrainedModel) -> int:
    """Weights of the matrices of the blocks."""
    return sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)


def on_disk(stack: Stack, folder: Path) -> tuple[int, int]:
    """Bytes of a bundle's tensors: of what stands for the matrices of the blocks, and of all."""
    stack.save(folder)
    sizes = {}
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            sizes |= {f"{file}:{name}": tensors.get_tensor(name).nbytes for name in tensors.keys()}  # noqa: SIM118
    rest = ("embed_tokens.weight", "lm_head.weight", "norm.weight")
    packed = {
        n: size for n, size in sizes.items() if not n.removesuffix(".to").removesuffix(".at").endswith(rest)
    }
    return sum(packed.values()), sum(sizes.values())


def times(dense: PreTrainedModel, packed: Mapping[str, Stack], rounds: int) -> dict[str, dict[str, float]]:
    """Over those of the dense model in float32."""
    half = type(dense)(dense.config).to(torch.bfloat16).eval()
    half.load_state_dict(dense.state_dict())
    models = {"float32": dense, "bfloat16": half} | {
        name: stack.model.eval() for name, stack in packed.items()
    }
    each_round = prompts_and_tokens(models, rounds=rounds, prompt=PROMPT, written=WRITTEN)
    found = {name: {what: min(seconds) for what, seconds in of.items()} for name, of in each_round.items()}
    return {
        name: {what: seconds / found["float32"][what] for what, seconds in each.items()}
        | {"ms": 1e3 * each["token"]}
        for name, each in found.items()
    }


def wide_model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=1024, intermediate_size=2816, num_hidden_layers=2, num_attention_heads=16,
        num_key_value_heads=8, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def changed(model: PreTrainedModel, folder: Path) -> None:
    """Save a fine-tune of a random model."""
    found = type(model)(model.config)
    found.load_state_dict(model.state_dict())
    with torch.no_grad():
        for p in found.parameters():
            p.add_(0.002 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    found.save_pretrained(folder)


def run(arguments: argparse.Namespace, scratch: Path) -> dict[str, dict[str, Any]]:
    learned, tuned = text_of(arguments.train), str(scratch / "tuned")
    first = Stack(BASE, [FullFinetuning()])
    rows = [{"text": piece} for piece in pieces(learned)]
    first.train(rows, steps=arguments.steps, batch_size=8, learning_rate=1e-4, max_length=128)
    first.export(tuned)
    held_out = pieces(text_of(arguments.text, arguments.bytes), 2000)
    calibration = pieces(learned[-80_000:])
    dense, tokenizer = load_model(tuned)
    count, whole = matrices(dense), sum(p.nbytes for p in dense.parameters())

    def scored(model: PreTrainedModel) -> float:
        return perplexity(model, tokenizer, held_out, max_length=256)["perplexity"].value

    half = load_model(tuned, dtype="bfloat16")[0]
    results: dict[str, dict[str, Any]] = {
        "float32": {"bits": 32.0, "file_bytes": whole, "perplexity": scored(dense)},
        "bfloat16": {"bits": 16.0, "file_bytes": whole // 2, "perplexity": scored(half)},
        "the model before": {"perplexity": scored(load_model(BASE)[0])},
    }
    stacks: dict[str, Stack] = {}
    for name, make in methods(search=True).items():
        began = time.process_time()
        stack = Stack(BASE if name in DIFFERENCES else tuned, [make(tuned)])
        stack.compress(calibration, samples=32, length=128)
        used = time.process_time() - began
        bytes_of, total = on_disk(stack, scratch / f"bundle-{len(stacks)}")
        results[name] = {
            "bits": 8 * bytes_of / count, "file_bytes": total, "perplexity": scored(stack.model), "pack_s": used,
        }  # fmt: skip
        print(name, results[name], flush=True)
        stacks[name] = stack
    for name, found in times(dense, stacks, arguments.rounds).items():
        results[name]["tiny"] = found
    wide, stacks = wide_model(), {}
    changed(wide, scratch / "wide")
    for name, make in methods(search=False).items():
        model = type(wide)(wide.config).eval()
        model.load_state_dict(wide.state_dict())
        stacks[name] = Stack(model, [make(str(scratch / "wide"))], tokenizer=tokenizer)
        stacks[name].compress(calibration, samples=2, length=64, keep=False)
        print("wide:", name, flush=True)
    for name, found in times(wide, stacks, arguments.rounds).items():
        results[name]["wide"] = found
    return results


def page(results: Mapping[str, Mapping[str, Any]], arguments: argparse.Namespace) -> str:
    about = machine()
    columns = [
        "", "bits of a weight", "bundle, bytes", "perplexity", "seconds to pack", "token", "prompt", "token, wide",
        "prompt, wide",
    ]  # fmt: skip
    setting = (
        f"{about['processor']}, torch {about['torch']}; one thread, CPU time, least of {arguments.rounds} interleaved "
        f"rounds. The bundled model after {arguments.steps} steps on the valid split of WikiText-2; perplexity on the "
        f"first {arguments.bytes:,} bytes of its test split, windows of 256 tokens. One seed, no "
        "intervals. Times are over float32's: of a token of one row behind a prompt of "
        f"{PROMPT} tokens, and of that prompt; `wide` is a random model of two blocks, 1024 wide. "
        + seen("peftx:tiny", **TEXTS)
    )
    note = (
        "A difference comes on top of its base, which many of them share; its bundle has embedding and norms too. The "
        "model before is the bundled one: what is lost of a difference moves a score towards that one's, better or "
        "worse."
    )
    lines = [
        "# Compression plugins on one table",
        "",
        setting,
        "",
        f"| {' | '.join(columns)} |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in results.items():
        cells = [
            name + (" (a difference)" if name in DIFFERENCES else ""),
            f"{found['bits']:.2f}" if "bits" in found else "",
            f"{found['file_bytes']:,}" if "file_bytes" in found else "",
            f"{found['perplexity']:.2f}",
            f"{found['pack_s']:.1f}" if "pack_s" in found else "",
            *(
                f"{found[m][w]:.2f}" if m in found else ""
                for m in ("tiny", "wide")
                for w in ("token", "prompt")
            ),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        note,
        "",
        "![Perplexity against bits of a weight](compression.png)",
        "",
    ]
    return "\n".join(lines)


def plot(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Perplexity against bits; a line along what nothing else beats in both."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import ScalarFormatter

    colors = pyplot.get_cmap("tab20")
    figure, axes = pyplot.subplots(figsize=(8, 4.6), layout="constrained")
    points = [
        (found["bits"], found["perplexity"], name) for name, found in results.items() if "bits" in found
    ]
    for index, (bits, score, name) in enumerate(points):
        marker = "s" if name in DIFFERENCES else "o"
        axes.plot(bits, score, marker=marker, linestyle="", color=colors(index), label=name)
    front: list[tuple[float, float]] = []
    for bits, score, name in sorted(points):
        if name not in DIFFERENCES and (not front or score < front[-1][1]):
            front.append((bits, score))
    axes.plot(*zip(*front, strict=True), color="0.7", linewidth=0.8, zorder=0)
    bits_of = "bits of a weight on disk (squares: of a difference)"
    axes.set(xscale="log", xticks=[1, 2, 4, 8, 16, 32], xlabel=bits_of, ylabel="perplexity")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="held out; .gz or plain")
    parser.add_argument("--train", type=Path, required=True, help="to fine-tune and calibrate on")
    parser.add_argument("--bytes", type=int, default=16_000, help="of the held-out text")
    parser.add_argument("--steps", type=int, default=40, help="of fine-tuning")
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        results = run(arguments, Path(scratch))
    settings = {"bytes": arguments.bytes, "steps": arguments.steps, "rounds": arguments.rounds}
    found = {"machine": machine(), "settings": settings, "results": results}
    (RESULTS / "compression.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "compression.md").write_text(page(results, arguments), encoding="utf-8")
    plot(results, RESULTS / "compression.png")
    print(page(results, arguments))


if __name__ == "__main__":
    main()
