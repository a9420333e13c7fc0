"""SignRound against Auto-Round, its official code, on the same layers, inputs and steps; JSON to stdout.

    pip install auto-round==0.16.1 && python benchmarks/plugins/signround.py > benchmarks/results/signround.json

Three layers of the bundled model's first block, and what enters them of 8 sequences of 128 tokens of the sample's
calibration text; groups of 128, all sequences in each step, so that nothing is drawn. `official` and `ours`: the
squared error of the output over that of rounding to the nearest. `differ`: share of the weights that are not the same;
`largest`: by how much, over the largest scale of a group. Seconds are CPU time of one thread.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from importlib.metadata import version

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftx import Stack
from peftx.engines.data import text_ids
from peftx.engines.models import asset_path
from peftx_signround import Rounding, SignRound

LAYERS = ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")
TEXTS, LENGTH, GROUP = 8, 128, 128


def official(W: Tensor, x: Tensor, y: Tensor, bits: int, steps: int) -> Tensor:
    """Its layer and its optimizer, in the order of its `SignRoundQuantizer.quantize_block`: W^ [out, in]."""
    from auto_round.algorithms.quantization.sign_round.sign_sgd import SignSGD
    from auto_round.wrapper import WrapperLinear

    layer = nn.Linear(W.shape[1], W.shape[0], bias=False)
    layer.weight.data = W.clone()
    settings = {"bits": bits, "group_size": GROUP, "sym": False, "data_type": "int", "act_bits": 16}
    for name, value in (settings | {"scale_dtype": torch.float32}).items():
        setattr(layer, name, value)
    wrapped = WrapperLinear(layer, enable_torch_compile=False, iters=steps)
    optimizer = SignSGD(wrapped.params.values(), lr=1 / steps)
    rates = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps)
    lowest, best = torch.inf, {}
    for _ in range(steps):
        loss = F.mse_loss(wrapped(x), y)
        if float(loss) < lowest:
            lowest, best = float(loss), {name: p.detach().clone() for name, p in wrapped.params.items()}
        (loss * 1000).backward()
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
    with torch.no_grad():
        found: Tensor = wrapped._qdq_weight(best["value"], best["min_scale"], best["max_scale"])[0]
    return found.detach()


@torch.no_grad()
def ours(W: Tensor, x: Tensor, y: Tensor, bits: int, steps: int) -> tuple[Tensor, float]:
    """W^ [out, in], and the largest scale of a group."""
    rounding = Rounding(W, bits, GROUP)

    def loss(some: Iterable[int]) -> Tensor:
        return torch.stack([F.mse_loss(x[i] @ rounding().T, y[i]) for i in some]).mean()

    SignRound(bits=bits, group_size=GROUP, steps=steps, batch_size=TEXTS).train([rounding], loss, TEXTS)
    return rounding(), float(rounding.codes()[1].max())


@torch.no_grad()
def inputs() -> dict[str, tuple[Tensor, Tensor]]:
    """Of each layer: W [out, in], and what enters it [TEXTS, LENGTH, in]."""
    stack, caught = Stack("peftx:tiny"), {}
    text = asset_path("peftx:sample/calibration.txt").read_text("utf-8")
    ids = torch.tensor(text_ids(stack.tokenizer, text)[: TEXTS * LENGTH]).view(TEXTS, LENGTH)
    block = stack.model.get_submodule("model.layers.0")
    for name in LAYERS:
        layer = block.get_submodule(name)
        layer.register_forward_pre_hook(
            lambda layer, given, name=name: caught.update({name: (layer.weight.detach(), given[0])})
        )
    stack.model(ids)
    return caught


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for name, (W, x) in inputs().items():
        y = x @ W.T
        for bits in (4, 3, 2):
            nearest = float(F.mse_loss(x @ Rounding(W, bits, GROUP)().detach().T, y))
            for steps in (20, 200):
                begin = time.process_time()
                theirs = official(W, x, y, bits, steps)
                middle = time.process_time()
                own, scale = ours(W, x, y, bits, steps)
                end = time.process_time()
                apart = (theirs - own).abs() / scale
                left = [float(F.mse_loss(x @ found.T, y)) / nearest for found in (theirs, own)]
                rows.append(
                    {
                        "layer": name, "bits": bits, "steps": steps, "official": round(left[0], 4),
                        "ours": round(left[1], 4), "differ": round(float((apart > 1e-5).double().mean()), 5),
                        "largest": round(float(apart.max()), 7), "official_s": round(middle - begin, 2),
                        "ours_s": round(end - middle, 2),
                    }
                )  # fmt: skip
    print(
        json.dumps({"auto-round": version("auto-round"), "torch": torch.__version__, "rows": rows}, indent=1)
    )


if __name__ == "__main__":
    main()
