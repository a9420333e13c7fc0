"""Tokens a second and time to the first token, beside `transformers serve --continuous-batching`.

    python benchmarks/serving.py clients         # a random Llama of 44 million numbers
    python benchmarks/serving.py clients --model llama-126m      # or tiny, the bundled model, or a folder
    python benchmarks/serving.py adapters        # 32 rows of 1 to 32 LoRAs in one batch, in this process

Both servers run one after the other on the same saved model, one thread each, and answer the same streamed requests
over HTTP. Tokens are counted by second of the clock and by second of CPU that the server took, which a busy machine
disturbs less.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from peftx.engines.models import ASSETS

RESULTS = Path(__file__).parent / "results"
TOKENS = 48
PROMPTS = [
    "The river took the bridge and",
    "A letter from the city said that",
    "Write down what the people of the north",
    "In the year of the great frost, the",
    "Questions about the sea are",
    "Tell me why the sky",
    "The first of the machines was",
    "Nobody in the village had seen",
]


LAYERS = {"llama": 6, "llama-126m": 19}
"""Of the random models: 44 and 126 million numbers."""


def saved_llama(folder: Path, layers: int = LAYERS["llama"]) -> Path:
    """A random Llama with the bundled tokenizer: 768 wide, 12 heads of which 4 have keys."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from peftx.engines.models import load_model

    _, tokenizer = load_model("peftx:tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=768, intermediate_size=2048, num_hidden_layers=layers,
        num_attention_heads=12, num_key_value_heads=4, max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def cpu_seconds(pid: int) -> float:
    """That a process took, in all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Served:
    """A server in a process of its own."""

    def __init__(self, name: str, command: list[str], port: int, model: str) -> None:
        self.name, self.model, self.url = name, model, f"http://127.0.0.1:{port}"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until = time.monotonic() + 120
        while True:
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            if self.process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"{name} did not start: {' '.join(command)}")
            time.sleep(0.2)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)


async def ask(client: httpx.AsyncClient, served: Served, prompt: str) -> tuple[int, float]:
    """Tokens of an answer, and seconds to the first of them."""
    began, first, count = time.monotonic(), 0.0, 0
    body = {
        "model": served.model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": True,
    }  # fmt: skip
    async with client.stream("POST", f"{served.url}/v1/completions", json=body, timeout=300) as answer:
        if answer.status_code != 200:
            raise SystemExit(f"{served.name}: {(await answer.aread()).decode()}")
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if any(choice.get("text") for choice in event.get("choices", [])) and not first:
                first = time.monotonic() - began
            count = (event.get("usage") or {}).get("completion_tokens") or count
    return count, first


async def measured(served: Served, clients: int) -> dict[str, float]:
    """One round: each client asks once, all at the same time."""
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None)) as client:
        began, cpu = time.monotonic(), cpu_seconds(served.process.pid)
        found = await asyncio.gather(
            *(ask(client, served, PROMPTS[i % len(PROMPTS)] + f" {i}") for i in range(clients))
        )
        seconds, used = time.monotonic() - began, cpu_seconds(served.process.pid) - cpu
    tokens = sum(count for count, _ in found)
    waits = sorted(first for _, first in found)
    return {
        "tokens": tokens,
        "tokens_a_second": tokens / seconds,
        "tokens_a_cpu_second": tokens / max(used, 0.01),
        "first_token_p50": statistics.median(waits),
        "first_token_p95": waits[min(len(waits) - 1, int(0.95 * len(waits)))],
    }


def best(rounds: list[dict[str, float]]) -> dict[str, float]:
    """The round with the most tokens a CPU second."""
    return max(rounds, key=lambda one: one["tokens_a_cpu_second"])


app = typer.Typer()


@app.command()
def adapters(rounds: Annotated[int, typer.Option(help="the least of so many counts")] = 5) -> None:
    """CPU milliseconds a token of a batch of 32 rows, by how many adapters its rows are of."""
    import torch

    from peftx import Stack
    from peftx.copies import sharing
    from peftx.engines.models import load_model
    from peftx.toolkits.serving import Server
    from peftx.toolkits.serving.job import Job, Request
    from peftx.toolkits.serving.models import Models
    from peftx_lora import Lora

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        base, tokenizer = load_model(str(saved_llama(Path(scratch) / "model")))
    base.requires_grad_(False)
    servers = []
    for i in range(32):
        stack = Stack(sharing(base), [Lora(rank=8, targets="all")], tokenizer=tokenizer)
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for p in stack.model.parameters():
                if p.requires_grad:
                    p.add_(0.01 * torch.randn(p.shape, generator=generator))
        servers.append(Server(stack, name=str(i)))
    models = Models(servers)
    rows = models.engine("0")._worker.batch

    def milliseconds(count: int) -> float:
        jobs = []
        for i in range(32):
            name = str(i % count)
            request = Request(PROMPTS[i % len(PROMPTS)] + f" {i}", max_tokens=TOKENS, temperature=0)
            jobs.append(Job(request, models.engine(name).ids_of(request), TOKENS, model=name))
        began = time.process_time()
        rows.step(jobs)
        while rows.busy:
            rows.step([])
        used = time.process_time() - began
        return 1000 * used / sum(job.result(0).completion_tokens for job in jobs)

    counts = (1, 4, 8, 16, 32)
    milliseconds(1)
    found = {count: min(times) for count, times in zip(
        counts, zip(*([milliseconds(count) for count in counts] for _ in range(rounds)), strict=True), strict=True
    )}  # fmt: skip
    results = {str(count): {"ms_a_token": ms, "ratio": ms / found[1]} for count, ms in found.items()}
    print(json.dumps(results, indent=1))
    (RESULTS / "serving_adapters.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


@app.command()
def clients(
    model: Annotated[
        str, typer.Option(help="llama, llama-126m: random; tiny: bundled; or a folder")
    ] = "llama",
    counts: Annotated[
        str, typer.Option("--clients", help="how many ask at once, comma separated")
    ] = "1,8,32",
    rounds: Annotated[int, typer.Option(help="the best of so many counts")] = 3,
    only: Annotated[str, typer.Option(help="one of the two servers")] = "",
) -> None:
    """Measure both servers and write results/serving_MODEL.json."""
    with tempfile.TemporaryDirectory() as scratch:
        if model in LAYERS:
            folder = saved_llama(Path(scratch) / "model", LAYERS[model])
        else:
            folder = ASSETS / "tiny" if model == "tiny" else Path(model)
        ours, theirs = free_port(), free_port()
        commands = {
            "peftx": ([sys.executable, "-m", "peftx_cli", "serve", f"m={folder}", "--port", str(ours)], ours, "m"),
            "transformers": (
                [str(Path(sys.executable).parent / "transformers"), "serve", str(folder), "--continuous-batching",
                 "--device", "cpu", "--port", str(theirs)], theirs, str(folder),
            ),
        }  # fmt: skip
        results: dict[str, Any] = {}
        for name, (command, port, known_as) in commands.items():
            if only and name != only:
                continue
            served = Served(name, command, port, known_as)
            try:
                asyncio.run(measured(served, 2))  # the first one warms up
                for count in map(int, counts.split(",")):
                    found = best([asyncio.run(measured(served, count)) for _ in range(rounds)])
                    results.setdefault(str(count), {})[name] = found
                    print(name, count, {key: round(value, 3) for key, value in found.items()}, flush=True)
            finally:
                served.close()
    if not only:
        RESULTS.mkdir(exist_ok=True)
        place = RESULTS / f"serving_{model if model in LAYERS else folder.name}.json"
        place.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
