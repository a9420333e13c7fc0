"""The training, which may be stopped at any time and continues from its checkpoint, and the export."""

from __future__ import annotations

import argparse
import json
import signal
import time
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, GenerationConfig

from tiny.model import load_checkpoint, lr_scale, new_model, optimizers, save_checkpoint
from tiny.sampling import Sampler
from tiny.sources import load_sources
from tiny.tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE


def train(args: argparse.Namespace) -> None:
    """Train until the token budget is spent or a signal asks to stop."""
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    tokenizer = AutoTokenizer.from_pretrained(args.work / "tokenizer")
    sources = load_sources(args.data, args.prose)
    sampler = Sampler(sources, tokenizer, args.seed)
    for source, encoded in zip(sources, sampler.sources, strict=True):
        print(
            f"{source.name:32s} {len(source.documents):6d} documents {source.raw_bytes:9d} bytes "
            f"{len(encoded.tokens):8d} tokens, share {source.share:.3f} -> {source.decay_share:.3f}, "
            f"{source.dropped} dropped",
            flush=True,
        )

    model = new_model(args.seed).to(device)
    model.config.use_cache = False
    optims = optimizers(model, args)
    checkpoint = args.work / "checkpoint.safetensors"
    state: dict[str, Any] = {"step": 0, "tokens": 0, "seconds": 0.0, "runs": []}
    if checkpoint.exists():
        state = load_checkpoint(checkpoint, model, optims)
        sampler.restore(state.pop("sampler"))
        print(f"resumed at step {state['step']}, {state['tokens']} tokens", flush=True)
    options = {key: value for key, value in vars(args).items() if isinstance(value, int | float | str | bool)}
    state["runs"].append({"from_step": state["step"], **options})

    def loss_of(ids: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            logits = model(input_ids=ids).logits
        losses = F.cross_entropy(logits.float().view(-1, VOCAB_SIZE), targets.view(-1), reduction="none")
        return (losses * weights.view(-1)).sum() / weights.sum()

    step_loss = torch.compile(loss_of) if args.compile else loss_of
    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: stop.append(received))

    def checkpoint_now() -> None:
        state["seconds"] = earlier + time.monotonic() - started
        save_checkpoint(checkpoint, model, optims, {**state, "sampler": sampler.state()})

    earlier, started = state["seconds"], time.monotonic()
    tick, tick_tokens, recent = started, state["tokens"], []
    while state["tokens"] < args.tokens and not stop and state["step"] != args.max_steps:
        progress = state["tokens"] / args.tokens
        decaying = progress >= 1 - args.decay
        context = args.long_context if decaying else args.context
        batch = sampler.batch(args.batch_tokens // context, context, decaying)
        scale = lr_scale(state["step"], progress, args.warmup, args.decay)
        loss = step_loss(*(tensor.to(device) for tensor in batch))
        loss.backward()
        for optimizer in optims:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * scale
            optimizer.step()
            optimizer.zero_grad()
        recent.append(loss.item())
        state["step"] += 1
        state["tokens"] += batch[0].numel()
        if state["step"] % args.log_every == 0:
            now = time.monotonic()
            speed = (state["tokens"] - tick_tokens) / (now - tick)
            left = (args.tokens - state["tokens"]) / speed / 60
            print(
                f"step {state['step']:6d} | {state['tokens'] / 1e6:7.2f}M tokens | context {context} | "
                f"loss {sum(recent) / len(recent):.4f} | lr x{scale:.3f} | {speed:6.0f} tok/s | "
                f"ETA {left:5.1f} min",
                flush=True,
            )
            tick, tick_tokens, recent = now, state["tokens"], []
        if state["step"] % args.save_every == 0:
            checkpoint_now()
    checkpoint_now()
    print(
        f"{'stopped' if stop else 'finished'} at step {state['step']}, {state['tokens']} tokens", flush=True
    )


def export(args: argparse.Namespace) -> None:
    """Write the checkpoint's model as a folder which ``from_pretrained`` reads, weights in fp16."""
    model = new_model(0)
    state = load_checkpoint(args.work / "checkpoint.safetensors", model)
    model.generation_config = GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    model.half().save_pretrained(args.out)
    (args.out / "model.safetensors").chmod(0o644)
    AutoTokenizer.from_pretrained(args.work / "tokenizer").save_pretrained(args.out)
    tokenizer_config = args.out / "tokenizer_config.json"
    options = json.loads(tokenizer_config.read_text(encoding="utf-8"))
    options = {key: value for key, value in options.items() if "local" not in key and key != "backend"}
    options["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name which every transformers release knows
    tokenizer_config.write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")
    readme = args.out / "README.md"
    if not readme.exists():
        readme.write_text(
            "# peftx tiny\n\nRun the `card` command of the pre-training script.\n", encoding="utf-8"
        )
    size = sum(path.stat().st_size for path in args.out.iterdir())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        json.dumps(
            {"step": state["step"], "tokens": state["tokens"], "parameters": parameters, "bytes": size}
        )
    )
