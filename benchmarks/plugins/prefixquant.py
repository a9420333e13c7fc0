"""PrefixQuant on the bundled model, and on a copy with planted outlier tokens; a table to stderr, JSON to stdout.

    python benchmarks/plugins/prefixquant.py --calibration calibration.txt --text held_out.jsonl

For each setting of bits: perplexity in full precision, with the prefix, without it (static scales of its own) and with
dynamic scales (a scale a token, no prefix); the outlier ratio; packed bytes beside the bytes that those weights had.
Then CPU times of the integer kernel over float32: one layer of 1024 x 4096, and the whole model; one thread.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import peftx
from peftx.engines.data import read_dataset
from peftx.engines.models import asset_path
from peftx.kernel.parts import ReplacedPart
from peftx.toolkits.compression import QuantLinear
from peftx.toolkits.evaluation import perplexity
from peftx_prefixquant import PrefixQuant, RotatedLinear

ROOT = Path(__file__).parents[2]
SETTINGS = {"W8A8KV8": (8, 8, 8), "W4A8KV4": (4, 8, 4), "W4A4KV4": (4, 4, 4)}
MODES = ("with_prefix", "without_prefix", "dynamic")


def load(path: Path) -> ModuleType:
    """A file of the repository that is not part of a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model_of(planted: bool) -> Any:
    stack = peftx.Stack("peftx:tiny", [])
    if not planted:
        return stack.model
    tests = load(ROOT / "plugins/compress/prefixquant/tests/test_prefixquant.py")
    tokens = tuple(stack.tokenizer(text, add_special_tokens=False)["input_ids"][-1] for text in (".", "\n"))
    return tests.planted(stack.model, tokens)


def quality(
    name: str, rows: list[Any], calibration: Path, samples: int, rotations: tuple[bool, ...]
) -> list[dict]:
    """Rows of the table for one model."""
    table = []
    tokenizer = peftx.Stack("peftx:tiny", []).tokenizer
    base = perplexity(model_of(name == "planted"), tokenizer, rows)["perplexity"]
    for bits, (weights, activations, kv) in SETTINGS.items():
        for rotate in rotations:
            plugin = PrefixQuant(weight_bits=weights, activation_bits=activations, kv_bits=kv, rotate=rotate)
            stack = peftx.Stack(model_of(name == "planted"), [plugin], tokenizer=tokenizer)
            stack.compress(calibration, samples=samples)
            scores = {
                key: score.value for key, score in stack.evaluate(rows, metrics=["prefixquant"]).items()
            }
            parts = stack.ledger.of("prefixquant", ReplacedPart)
            line: dict[str, Any] = {
                "model": name,
                "bits": bits,
                "rotate": rotate,
                "perplexity_base": base.value,
            }
            line |= {key: round(scores[key], 4) for key in scores if key.startswith("perplexity")}
            line |= {key: round(scores[key], 1) for key in scores if key.startswith("outlier")}
            line["prefix"] = stack.tokenizer.decode(plugin.state["prefix"])
            line["packed_bytes"] = int(scores["packed_bytes"])
            line["float32_bytes"] = sum(
                4 * p.geometry["in_features"] * p.geometry["out_features"] for p in parts
            )
            table.append(line)
            show(line)
    return table


def show(line: dict[str, Any]) -> None:
    shown = " ".join(f"{line['perplexity_' + mode]:>14.2f}" for mode in ("base", *MODES))
    ratios = " ".join(f"{line['outlier_ratio_' + mode]:>7.0f}" for mode in ("with_prefix", "without_prefix"))
    size = f"{line['packed_bytes']:>10,} {line['float32_bytes'] / line['packed_bytes']:>5.2f}x"
    print(
        f"{line['model']:8} {line['bits']} R={int(line['rotate'])} {shown}  {ratios} {size}", file=sys.stderr
    )


def times(rounds: int) -> list[dict[str, Any]]:
    """CPU time of the integer path over float32's."""
    interleaved = load(ROOT / "benchmarks/measure.py").interleaved
    found = []
    torch.manual_seed(0)
    linear = torch.nn.Linear(1024, 4096, bias=False)
    static = {"activation": "static-tensor", "act_bits": 8, "input_scale": 0.03}
    for tokens in (1, 16, 256):
        x = torch.randn(tokens, 1024)
        calls = {
            "float32": linear,
            "W8A8": QuantLinear.from_linear(linear, bits=8, **static),
            "W4A8": QuantLinear.from_linear(linear, bits=4, **static),
            "W8A8 rotated": RotatedLinear.from_linear(linear, bits=8, **static),
        }
        with torch.inference_mode():
            best = interleaved({n: lambda f=f, x=x: f(x) for n, f in calls.items()}, rounds=rounds, inner=3)
        found += [
            {"what": f"layer 1024x4096, {tokens} tokens", "path": n, "ratio": round(t / best["float32"], 3)}
            for n, t in best.items()
        ]
    models: dict[str, Any] = {"float32": model_of(False)}
    tokenizer = peftx.Stack("peftx:tiny", []).tokenizer
    for name, options in {
        "W8A8": {"weight_bits": 8, "kv_bits": 16, "rotate": False},
        "W8A8KV8": {"weight_bits": 8, "kv_bits": 8, "rotate": False},
        "W8A8KV8 rotated": {"weight_bits": 8, "kv_bits": 8},
    }.items():
        stack = peftx.Stack(model_of(False), [PrefixQuant(**options)], tokenizer=tokenizer)
        stack.compress(asset_path("peftx:sample/calibration.txt"), samples=2)
        models[name] = stack.model
    ids = torch.arange(256)[None]
    with torch.inference_mode():
        best = interleaved({n: lambda m=m: m(ids) for n, m in models.items()}, rounds=rounds)
    found += [
        {"what": "peftx:tiny, 256 tokens", "path": n, "ratio": round(t / best["float32"], 3)}
        for n, t in best.items()
    ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--calibration", type=Path, default=asset_path("peftx:sample/calibration.txt"))
    parser.add_argument(
        "--text", type=Path, default=asset_path("peftx:sample/held_out.jsonl"), help="text or rows"
    )
    parser.add_argument("--limit", type=int, default=None, help="rows of the text")
    parser.add_argument("--samples", type=int, default=16, help="calibration sequences of 256 tokens")
    parser.add_argument("--rounds", type=int, default=7, help="of each timing; 0: no timing")
    parser.add_argument("--no-rotation-too", action="store_true", help="each setting also without rotation")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = list(read_dataset(arguments.text, limit=arguments.limit))
    rotations = (True, False) if arguments.no_rotation_too else (True,)
    columns = " ".join(f"{mode:>14}" for mode in ("base", *MODES))
    print(f"{'model':8} {'bits':7} {'':3} {columns}   outlier ratios packed bytes", file=sys.stderr)
    table = [
        line
        for name in ("bundled", "planted")
        for line in quality(name, rows, arguments.calibration, arguments.samples, rotations)
    ]
    timing = times(arguments.rounds) if arguments.rounds else []
    for line in timing:
        print(f"{line['what']:32} {line['path']:16} {line['ratio']:>7.3f} x float32", file=sys.stderr)
    print(json.dumps({"quality": table, "cpu_time_over_float32": timing}, indent=1))


if __name__ == "__main__":
    main()
