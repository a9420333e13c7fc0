"""What a run ends in: one table, and what the model writes now."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from peftx.quantities import size
from peftx_cli.render import out, print_json, print_table

if TYPE_CHECKING:
    from peftx.pipeline import Run
    from peftx.run_result import RunResult
    from peftx.toolkits.evaluation import Score
    from peftx.toolkits.evaluation.streams import AccuracyMatrix
    from peftx_spec import DataSpec

SAMPLES = 2
SAMPLE_TOKENS = 48
RESTATED = ("nll", "bits_per_byte")  # the perplexity in other units; --json has them
PROMPT_WORDS = 12  # of a text that has no prompt of its own


def samples(run: Run, result: RunResult) -> list[dict[str, str]]:
    """What the finished stack writes after the first prompts of the held-out data; none where there is no text.

    Returns:
        `prompt` and `text`, and `reference` where the data has one.
    """
    stack = result.stack
    if not stack.model.can_generate() or stack.given_tokenizer is None:
        return []
    rows = _held_out(run.pipeline.data) if result.held_out is None else result.held_out.rows.take(SAMPLES)
    found = []
    for row in rows:
        prompt, reference = _prompt(row)
        if not prompt:
            continue
        text = stack.generate(prompt, max_new_tokens=SAMPLE_TOKENS, do_sample=False)
        found.append({"prompt": prompt, "text": text, "reference": reference})
    return found


def _held_out(data: DataSpec) -> Iterable[Any]:
    from peftx.engines.data import read_dataset
    from peftx.engines.models import asset_path

    source = data.eval or data.train
    if source is None:
        return []
    return read_dataset(
        asset_path(source.path), format=source.format, columns=dict(source.columns) or None, limit=SAMPLES
    )


def _prompt(row: dict[str, Any]) -> tuple[str, str]:
    """Prompt and reference answer of a row of any format."""
    if isinstance(row.get("prompt"), str):
        return str(row["prompt"]), str(row.get("completion", row.get("chosen", "")))
    words = str(row.get("text", "")).split(" ")
    return " ".join(words[:PROMPT_WORDS]), " ".join(words[PROMPT_WORDS : 3 * PROMPT_WORDS])


def report(run: Run, result: RunResult, texts: list[dict[str, str]], *, as_json: bool) -> None:
    """The table and the samples, or all of it as JSON."""
    if as_json:
        print_json(to_dict(run, result, texts))
        return
    print_table(
        " + ".join(result.stack.plugins) + f" on {run.pipeline.model.id}",
        ("", "value", "detail"),
        rows(result),
    )
    for title, matrix in matrices(result).items():
        out("")
        print_table(title, ("after", *matrix.tasks), matrix.rows())
        out(", ".join(f"{name} {value:.3f}" for name, value in matrix.told().items() if value is not None))
    for sample in texts:
        out(f"\nprompt:    {_one_line(sample['prompt'])}")
        out(f"model:     {_one_line(sample['text'])}")
        if sample["reference"]:
            out(f"reference: {_one_line(sample['reference'])}")


def matrices(result: RunResult) -> dict[str, AccuracyMatrix]:
    """Of a stream of tasks, by title; empty where none was gone through."""
    from peftx.toolkits.evaluation.streams import TITLES, AccuracyMatrix

    found = {title: AccuracyMatrix.of(result.stack.history, kind) for kind, title in TITLES.items()}
    return {title: matrix for title, matrix in found.items() if matrix is not None}


def rows(result: RunResult) -> list[tuple[str, str, str]]:
    """Name, value and detail of everything that the run tells."""
    from peftx.toolkits.evaluation.streams import in_brief

    base = result.stack.base_parameters()
    table = [
        (
            "trainable parameters",
            f"{result.trainable:,}",
            f"{100 * result.trainable / max(1, base):.2f} % of {base:,}",
        ),
        ("bytes on disk before", f"{result.bytes_before:,}", size(result.bytes_before)),
    ]
    if result.output is not None:
        table.append(("bytes on disk after", f"{result.bytes_after:,}", _what_was_saved(result)))
    if result.held_out is not None:
        held, of = len(result.held_out.rows), result.held_out.of
        table.append(("eval", f"{held:,} of {of:,} rows held out", f"seed {result.held_out.seed}"))
    for stage, scores in result.scores.items():
        for name in in_brief(scores) if matrices(result) else scores:
            if name not in RESTATED:
                table.append((f"{name}, {stage}", scores[name].number, scores[name].detail))
    for training in result.training:
        detail = f"loss {training.first_loss:.4g} to {training.last_loss:.4g}, {training.seconds:.1f} s"
        table.append(("training steps", f"{training.steps:,}", detail))
    return table


def _what_was_saved(result: RunResult) -> str:
    if result.stack.holds_base:
        smaller = result.bytes_before / result.bytes_after
        return f"{size(result.bytes_after)}, the whole model, {smaller:.1f} times smaller"
    return f"{size(result.bytes_after)}, the plugins alone; the base stays as it is"


def to_dict(run: Run, result: RunResult, texts: list[dict[str, str]]) -> dict[str, Any]:
    """Everything that the table tells, with full precision."""
    return {
        "model": run.pipeline.model.id,
        "plugins": list(result.stack.plugins),
        "output": None if result.output is None else str(result.output),
        "base_parameters": result.stack.base_parameters(),
        "trainable_parameters": result.trainable,
        "bytes_before": result.bytes_before,
        "bytes_after": result.bytes_after,
        "held_out": None
        if result.held_out is None
        else {"rows": len(result.held_out.rows), "of": result.held_out.of, "seed": result.held_out.seed},
        "prepared": [one.model_dump() for one in result.stack.history.preparations],
        "scores": {stage: score_dict(scores) for stage, scores in result.scores.items()},
        "matrices": {title: asdict(matrix) | matrix.told() for title, matrix in matrices(result).items()},
        "training": [
            {"steps": t.steps, "first_loss": t.first_loss, "last_loss": t.last_loss, "seconds": t.seconds}
            for t in result.training
        ],
        "seconds": result.seconds,
        "samples": texts,
    }


def score_dict(scores: dict[str, Score]) -> dict[str, Any]:
    """Scores for JSON, which has no infinity: text in its place."""
    import math

    def plain(number: float | None) -> float | str | None:
        return str(number) if number is not None and math.isinf(number) else number

    return {
        name: {
            "value": plain(score.value),
            "low": plain(score.low),
            "high": plain(score.high),
            "count": score.count,
            "unit": score.unit,
        }
        for name, score in scores.items()
    }


def _one_line(text: str) -> str:
    return " / ".join(line.strip() for line in text.splitlines() if line.strip())
