"""lm-eval on a stack: the library's tasks, prompts and metrics, over the stack's own likelihoods and decode hooks.

This file imports lm_eval, which the extra `peftx[eval]` brings.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from jinja2.sandbox import SandboxedEnvironment
from lm_eval import utils
from lm_eval.api import task as task_module
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import METRIC_REGISTRY, get_metric
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from torch import Tensor

from peftx.engines.data import encoder_ids, prompt_ids, text_ids
from peftx.engines.data.files import read_records
from peftx.engines.tasks import TaskFile, find_tasks, splits
from peftx.errors import DataError, PeftxError, nearest
from peftx.kernel.modes import evaluating
from peftx.toolkits.decoding.generation import decode
from peftx.toolkits.decoding.text import request_of_ids
from peftx.toolkits.evaluation.likelihood import (
    Progress,
    Request,
    context_window,
    decoder_start,
    opening_ids,
    read_requests,
    refuse_masked,
)
from peftx.toolkits.evaluation.scores import Score, bootstrap_ratio, wilson_interval

if TYPE_CHECKING:
    from peftx.kernel.stack import Stack

BATCH = 8
NEW_TOKENS = 256
"""Tokens that a task's answer may have where it does not say."""
FEWSHOT_SEED = 1234  # the library's own, so that both show the same examples


class StackLM(TemplateLM):  # type: ignore[misc]  # Any here
    """A stack as lm-eval asks models: with masks, so that padding reaches no plugin, and through `decode` hooks.

    Args:
        max_length: tokens that are read at once; the model's window when None.
    """

    def __init__(
        self, stack: Stack, *, max_length: int | None = None, progress: Progress | None = None
    ) -> None:
        super().__init__()
        refuse_masked(stack.model)
        self.stack, self.tokenizer, self.progress = stack, stack.tokenizer, progress
        self.size = context_window(stack.model, self.tokenizer) if max_length is None else max_length
        self.backend = "seq2seq" if stack.model.config.is_encoder_decoder else "causal"
        self.failure: BaseException | None = None
        """What a model or a plugin raised; all else that fails is a task's."""

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        return opening_ids(self.tokenizer)[-1]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is False:
            return text_ids(self.tokenizer, string)
        if self.backend == "causal":
            return prompt_ids(self.tokenizer, string)
        return encoder_ids(self.tokenizer, string, max_length=self.size)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """(log p(continuation | context), is it what greedy decoding would write) of each (texts, ids, ids)."""
        with self._asked():
            wanted = [self._request(context, target) for _, context, target in requests]
            return read_requests(
                self.stack.model, wanted, _likelihood, batch_size=BATCH, progress=self.progress
            )

    def _request(self, context: list[int], target: list[int]) -> Request:
        if not 0 < len(target) <= self.size:
            raise DataError(f"an answer has {len(target)} tokens; between 1 and {self.size} fit")
        if self.backend == "seq2seq":
            inputs = [decoder_start(self.stack.model), *target[:-1]]
            return Request(inputs=inputs, first=0, targets=[target], encoder=context)
        inputs = (context + target)[-self.size - 1 : -1]
        return Request(inputs=inputs, first=len(inputs) - len(target), targets=[target])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, in windows without overlap."""
        sums = []
        for (text,) in (request.args for request in requests):
            windows = utils.get_rolling_token_windows(
                text_ids(self.tokenizer, text), self.prefix_token_id, self.size, 1
            )
            pieces = [(None, *utils.make_disjoint_window(window)) for window in windows]
            sums.append(math.fsum(log for log, _ in self._loglikelihood_tokens(pieces)))
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, through the stack's `decode` hooks; greedy where the task does not say otherwise."""
        answers = []
        with self._asked():
            for done, (context, asked) in enumerate((request.args for request in requests), start=1):
                answers.append(self._answer(context, dict(asked)))
                if self.progress is not None:
                    self.progress(done, len(requests))
        return answers

    def _answer(self, context: str, options: dict[str, Any]) -> str:
        until = options.pop("until", None) or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        new = int(options.pop("max_gen_toks", NEW_TOKENS))
        if new >= self.size:
            raise DataError(f"an answer may have {new} tokens, and {self.size} fit with its prompt")
        if not options.setdefault("do_sample", False):
            options.pop("temperature", None)
        ids = self.tok_encode(context)
        if self.backend == "causal":
            ids = ids[max(0, len(ids) - (self.size - new)) :]
        more = {"stop_strings": stops} if stops else {}
        request = request_of_ids(self.stack, [ids], new, FEWSHOT_SEED, options | more)
        found = decode(self.stack, request)
        start = 0 if self.backend == "seq2seq" else request.input_ids.shape[1]
        text: str = self.tokenizer.decode(found[0, start:], skip_special_tokens=True)
        return min((text.split(stop, 1)[0] for stop in stops), key=len, default=text)

    @contextmanager
    def _asked(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.failure = error
            raise


def _likelihood(logits: Tensor, request: Request) -> tuple[float, bool]:
    """logits: [T, V]"""
    (target,) = request.targets
    used = logits[request.first : request.first + len(target)].float().log_softmax(-1)
    ids = torch.tensor(target, device=used.device)
    return float(used.gather(1, ids[:, None]).double().sum()), bool((used.argmax(-1) == ids).all())


def run_tasks(
    stack: Stack,
    names: Sequence[str],
    *,
    include: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    max_length: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Score]:
    """Run tasks of lm-eval on a stack, and return what their metrics say.

    Args:
        names: tasks. include: folder of one's own. num_fewshot: examples before each question; the task's own number
            unless given. limit: questions of each task, from the start.

    Returns:
        `metric/task` -> Score. The interval is Wilson's where every question counts 0 or 1, a bootstrap over the
        questions where the metric is their mean, and None otherwise.

    Raises:
        DataError: no such task, or one that cannot be read. UnsupportedError: a masked language model.
    """
    found = find_tasks(names, include)
    if not found:
        raise DataError("lm-eval: no task is named", hint="tasks: [peftx-opposites]")
    model = StackLM(stack, max_length=max_length, progress=progress)
    with _guarded(), evaluating(stack.model):
        try:
            loaded = _loaded(found, num_fewshot)
            told = evaluate(model, loaded, limit=limit, bootstrap_iters=0, log_samples=True)
        except PeftxError:
            raise
        except Exception as error:  # templates, data sets and metrics raise what they like
            if error is model.failure:
                raise
            said = " ".join(str(error).split())[:300]
            raise DataError(
                f"lm-eval: {', '.join(names)} cannot be run: {type(error).__name__}: {said}",
                hint="; ".join(f"the rows of '{t.name}' come from the Hub" for t in found if not splits(t))
                or None,
            ) from error
    return {score.name: score for score in _scores(told)}


def _loaded(found: Sequence[TaskFile], num_fewshot: int | None) -> Any:
    """The library's tasks, of files that run nothing but what is installed."""
    folders = sorted({str(task.file.parent) for task in found if task.config is None})
    manager = TaskManager(include_path=folders, include_defaults=False)
    loaded = manager.load([task.name if task.config is None else _config(task) for task in found])
    for task in loaded["tasks"].values():
        if num_fewshot is not None:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


def _config(task: TaskFile) -> dict[str, Any]:
    """A task as the library takes it, its rows read by us: seen from its file, and left in no cache."""
    assert task.config is not None
    files = splits(task)
    if not files:
        return task.config
    rows = {
        split: Dataset.from_list([dict(record.value) for path in paths for record in read_records(path)])  # type: ignore[call-overload]
        for split, paths in files.items()
    }
    rest = {key: value for key, value in task.config.items() if not key.startswith("dataset_")}
    return {**rest, "custom_dataset": lambda **_: rows}


def _scores(told: Mapping[str, Any]) -> Iterator[Score]:
    for task, values in told["results"].items():
        samples = told["samples"].get(task, [])
        for key, value in values.items():
            metric, comma, filter = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            each = [sample[metric] for sample in samples if sample["filter"] == filter and metric in sample]
            ends = _interval(float(value), each)
            low, high = ends if ends is not None else (None, None)
            name = f"{metric}/{task}" + ("" if filter == "none" else f",{filter}")
            yield Score(name=name, value=float(value), low=low, high=high, count=len(each) or None)


def _interval(value: float, each: Sequence[Any]) -> tuple[float, float] | None:
    """95 %; None where the metric is no mean over the questions."""
    if not each or not all(isinstance(one, int | float) for one in each):
        return None
    numbers = [float(one) for one in each]
    if not math.isclose(math.fsum(numbers) / len(numbers), value, rel_tol=1e-6, abs_tol=1e-9):
        return None
    if set(numbers) <= {0.0, 1.0}:
        low, high = wilson_interval(int(sum(numbers)), len(numbers))
        return min(low, value), max(high, value)
    return bootstrap_ratio(numbers, [1.0] * len(numbers))


def _metric(name: str, hf_evaluate_metric: bool = False) -> Any:
    """Raises DataError for a metric that the library would fetch from the Hub, as code."""
    if hf_evaluate_metric or name not in METRIC_REGISTRY:
        raise DataError(
            f"lm-eval has no metric '{name}', and would run one of the Hub",
            hint=nearest(name, METRIC_REGISTRY) or None,
        )
    return get_metric(name)


@contextmanager
def _guarded() -> Iterator[None]:
    """Inside, templates reach no Python, metrics are the library's own, and its bars and warnings do not stand between
    our lines."""
    plain, logger = utils.env, logging.getLogger("lm_eval")
    sandbox = SandboxedEnvironment(
        loader=plain.loader, undefined=plain.undefined, keep_trailing_newline=plain.keep_trailing_newline
    )
    sandbox.filters.update(plain.filters)
    level = logger.level
    changed = ((utils, "env", sandbox), (task_module, "get_metric", _metric), (task_module, "tqdm", _no_bar))
    before = [(module, name, getattr(module, name)) for module, name, _ in changed]
    try:
        logger.setLevel(logging.ERROR)
        for module, name, value in changed:
            setattr(module, name, value)
        yield
    finally:
        logger.setLevel(level)
        for module, name, value in before:
            setattr(module, name, value)


def _no_bar(items: Iterable[Any], **_: Any) -> Iterable[Any]:
    return items
