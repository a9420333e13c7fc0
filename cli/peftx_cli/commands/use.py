"""`evaluate`, `generate` and `serve`: what one does with a bundle or a model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from peftx_cli import failures, options

Target = Annotated[
    str | None,
    typer.Argument(metavar="BUNDLE|MODEL", help="folder of a bundle, peftx:tiny, or another model"),
]
Base = Annotated[
    str | None,
    typer.Option("--model", "--base", "-m", metavar="ID", help="the bundle's base, if it lies elsewhere"),
]
DataFile = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="FILE", help="what to measure on; else what the bundle was measured on, or a sample"
    ),
]
Metrics = Annotated[
    list[str] | None,
    typer.Option("--metric", metavar="NAME", help="perplexity, accuracy, exact-match, lm-eval, or a plugin"),
]
Tasks = Annotated[
    list[str] | None, typer.Option("--task", metavar="NAME", help="a task of lm-eval; repeat it")
]
Include = Annotated[
    str | None, typer.Option("--include", metavar="DIR", help="folder of lm-eval's tasks of your own")
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="examples to use, from the start")]
Prompt = Annotated[str | None, typer.Argument(help="text to continue; - reads it from stdin")]
Tokens = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="tokens to write at most")]
Temperature = Annotated[
    float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token each time")
]
TopP = Annotated[
    float, typer.Option("--top-p", min=0.0, max=1.0, help="sample from so much of the probability")
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="the same text again")]
Stream = Annotated[bool, typer.Option("--stream", help="print tokens as they come")]
Host = Annotated[str, typer.Option(help="address to listen on; any but loopback is open to the network")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="port; 0 takes a free one")]
MaxBatch = Annotated[int, typer.Option("--max-batch", min=1, help="requests that run together at most")]
MaxWait = Annotated[
    float,
    typer.Option(
        "--max-wait-ms", min=0.0, help="how long a request waits for company where batches run whole"
    ),
]
MaxQueue = Annotated[
    int, typer.Option("--max-queue", min=1, help="requests to a model that wait at most; more get status 429")
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens", min=1, help="tokens that an answer may have; who asks for more gets 400"
    ),
]
MaxSeconds = Annotated[
    float | None,
    typer.Option("--max-seconds", min=0.001, help="time that a request may take, its wait too; then 408"),
]
PackWeights = Annotated[
    bool, typer.Option(help="lay float32 weights out for a CPU's products; takes their memory once more")
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key", envvar="PEFTX_API_KEY", help="clients must send it as their key; none if left out"
    ),
]
Targets = Annotated[
    list[str] | None,
    typer.Argument(metavar="[NAME=]BUNDLE|MODEL...", help="folders of bundles, peftx:tiny, or other models"),
]
Adapters = Annotated[
    Path | None,
    typer.Option(
        "--adapters", metavar="FOLDER", help="clients may load the bundles in it, while others are served"
    ),
]
PrefixCache = Annotated[bool, typer.Option("--prefix-cache", help="keep keys and values of served prompts")]

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command(
        epilog=options.examples(
            "evaluate peftx-out --data held_out.jsonl --metric perplexity",
            "evaluate --adapter their-adapter --task peftx-opposites",
        )
    )(evaluate)
    app.command(
        epilog=options.examples(
            'generate peftx-out "Once upon a time" --max-new-tokens 40',
            'generate "Once upon a time" --adapter their-adapter --stream',
        )
    )(generate)
    app.command(
        epilog=options.examples(
            "serve peftx-out --port 8000", "serve german=out/de legal=out/law --adapters out"
        )
    )(serve)


def evaluate(
    target: Target = None,
    adapter: options.InPlace = None,
    data: DataFile = None,
    columns: options.Columns = None,
    metric: Metrics = None,
    task: Tasks = None,
    include: Include = None,
    limit: Limit = None,
    model: Base = None,
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Measure a bundle or a model on a data file, or by tasks of lm-eval."""
    from peftx_cli.measured import Measured
    from peftx_cli.stacks import check_there, chosen, open_stack

    target = chosen(target, adapter)
    check_there(target, model=model)
    of_tasks = set(metric or ["lm-eval"]) == {"lm-eval"} and bool(task)
    measured = (
        Measured(None, "its tasks", None, ("lm-eval",)) if of_tasks else Measured.of(target, data, columns)
    )
    names = metric or list(measured.metrics)
    tasks = _tasks(names, task or [], include)
    _check_metrics(names, measured.format)
    from peftx.quantities import between, plain
    from peftx_cli.progress import reporter
    from peftx_cli.render import print_json, print_table
    from peftx_cli.summary import score_dict

    stack = open_stack(target, model=model, device=device, trust_remote_code=trust_remote_code)
    with reporter() as told:
        told.stage("evaluate", names)
        scores = stack.evaluate(
            measured.rows, metrics=names, limit=limit, max_length=measured.max_length,
            columns=measured.columns,
            progress=lambda done, total: told.progress(done, total, {}), **tasks,
        )  # fmt: skip
    if as_json:
        print_json(score_dict(scores))
        return
    rows = [
        (
            score.name,
            plain(score.value, 6),
            between(score.low, score.high, 5),
            "" if score.count is None else f"{score.count:,}",
            score.unit,
        )
        for score in scores.values()
    ]
    print_table(f"{target} on {measured.named}", ("measure", "value", "95 % interval", "count", "unit"), rows)


def _tasks(names: Sequence[str], tasks: Sequence[str], include: str | None) -> dict[str, Any]:
    """What lm-eval is told; found before a model is loaded.

    Raises:
        PeftxError: tasks without lm-eval, lm-eval without tasks, or a task that is not there.
    """
    import os

    from peftx.engines.tasks import find_tasks
    from peftx.errors import UsageError

    if ("lm-eval" in names) != bool(tasks):
        raise UsageError(
            "lm-eval runs tasks, and --task names them", hint="peftx evaluate BUNDLE --task peftx-opposites"
        )
    if include is not None and not tasks:
        raise UsageError("--include is a folder of tasks, and --task names none of them", hint="--task NAME")
    folder = None if include is None else Path(os.path.expanduser(include))
    if tasks:
        find_tasks(tasks, folder)
    return {"tasks": tasks, "include": folder}


def _check_metrics(names: Sequence[str], format: str | None) -> None:
    """Raises PeftxError for a metric that cannot read rows of this format, before a model is loaded."""
    from peftx.errors import OptionError
    from peftx_spec.checks import metric_for
    from peftx_spec.models import METRIC_FORMATS

    for name in names:
        fitting = METRIC_FORMATS.get(name)
        if format is not None and fitting and format not in fitting:
            raise OptionError(
                f"{name} reads rows of {' or '.join(fitting)}, and these are {format}",
                hint=metric_for(format),
            )


def generate(
    target: Target = None,
    prompt: Prompt = None,
    adapter: options.InPlace = None,
    max_new_tokens: Tokens = 64,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    stream: Stream = False,
    model: Base = None,
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Continue a prompt, through the decode hooks of the bundle's plugins."""
    from peftx.errors import GenerationError, UsageError
    from peftx_cli.stacks import chosen, open_stack

    if stream and as_json:
        raise UsageError("--stream and --json exclude each other", hint="peftx serve streams JSON")
    if adapter is not None and prompt is None:  # in the target's place
        target, prompt = None, target
    if prompt is None:
        raise UsageError("there is no prompt", hint='peftx generate peftx:tiny "Once upon a time"')
    target = chosen(target, adapter)
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise GenerationError("the prompt is empty", hint='peftx generate peftx:tiny "Once upon a time"')
    from peftx_cli.render import out_exactly, print_json

    stack = open_stack(target, model=model, device=device, trust_remote_code=trust_remote_code)
    from peftx.toolkits.decoding.text import request_for

    choice: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        choice = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    request = request_for(stack, [text], max_new_tokens, seed, choice)
    if stream:
        request.streamer = _streamer(stack.tokenizer)
    ids = stack.decode(request)
    start = 0 if stack.model.config.is_encoder_decoder else request.input_ids.shape[1]
    written = stack.tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    if as_json:
        print_json(
            {"prompt": text, "text": written, "new_tokens": int(ids.shape[1] - start), "stats": request.stats}
        )
    elif not stream:
        out_exactly(written)


def _streamer(tokenizer: Any) -> Any:
    """Prints a text as it comes."""
    from transformers import TextStreamer

    from peftx_cli.render import out_exactly

    class Streamer(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            out_exactly(text, end="\n" if stream_end else "")

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def serve(
    targets: Targets = None,
    adapter: options.InPlace = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    max_batch: MaxBatch = 32,
    max_wait_ms: MaxWait = 5.0,
    max_queue: MaxQueue = 256,
    max_new_tokens: MaxNewTokens = None,
    max_seconds: MaxSeconds = None,
    prefix_cache: PrefixCache = False,
    pack_weights: PackWeights = True,
    adapters: Adapters = None,
    api_key: ApiKey = None,
    model: Base = None,
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Serve bundles or models as OpenAI's API does: chats, completions, embeddings; and a page to chat at /.

    Bundles of one base share its weights. Clients name the one that they ask; the first answers where they name none.
    """
    from peftx.errors import MissingExtraError

    try:
        import fastapi  # noqa: F401  what an installation without the extra lacks
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"serving needs {error.name}, which is not installed", hint="pip install 'peftx[serve]'"
        ) from error
    from peftx_cli.stacks import Opener, check_there, chosen

    if adapter is not None or not targets:
        targets = [*(targets or ()), chosen(None, adapter)]
    named = _named(targets)
    _check_port(host, port)
    for target in named.values():
        check_there(target, model=model)
    from peftx.toolkits.serving import Scheduler, Server
    from peftx.toolkits.serving.folder import AdapterFolder
    from peftx.toolkits.serving.http import run_http

    if host not in LOOPBACK and api_key is None:
        failures.warn(f"{host} is open to the network, and this server asks for no key")
    opener = Opener(model=model, device=device, trust_remote_code=trust_remote_code)

    def server(name: str, target: str) -> Server:
        scheduler = Scheduler(
            max_batch=max_batch, max_wait_ms=max_wait_ms, max_queue=max_queue,
            prefix_cache=prefix_cache, pack_weights=pack_weights,
        )  # fmt: skip
        return Server(
            opener.stack(target), name=name, scheduler=scheduler, api_key=api_key,
            max_tokens=max_new_tokens, max_seconds=max_seconds,
        )  # fmt: skip

    hosts = LOOPBACK if host in LOOPBACK else None
    servers = [server(name, target) for name, target in named.items()]
    opener.bases.settle()
    run_http(
        *servers,
        host=host, port=port, allowed_hosts=hosts, loader=None if adapters is None else AdapterFolder(adapters, server),
    )  # fmt: skip


def _check_port(host: str, port: int) -> None:
    """Raises ServerError where nothing can listen; before any model is loaded."""
    import socket

    from peftx.errors import ServerError

    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            return
    except OSError as error:
        raise ServerError(
            f"nothing can listen at {host}:{port}: {error.strerror or error}",
            hint="another --port, or --port 0 for a free one",
        ) from error


def _named(targets: Sequence[str]) -> dict[str, str]:
    """Name -> bundle or model; the folder's name where none is given.

    Raises:
        PeftxError: two of one name.
    """
    from peftx.errors import UsageError

    found: dict[str, str] = {}
    for text in targets:
        name, named, target = text.partition("=")
        if not named or Path(text).expanduser().exists():  # a folder may have = in its name
            name, target = Path(text).name, text
        if name in found:
            raise UsageError(
                f"two models are named '{name}': {found[name]} and {target}",
                hint=f"give one another name: other={target}",
            )
        found[name] = target
    return found
