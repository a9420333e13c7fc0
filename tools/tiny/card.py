"""The model card of the bundled model."""

from __future__ import annotations

import argparse
import json
import sys

import torch

from tiny.measuring import SAMPLE_PROMPTS, evaluate_model, samples
from tiny.model import load_checkpoint, new_model
from tiny.sources import AG_NEWS_TRAIN_ROWS, LABEL_LOSS_WEIGHT, POLARITY_TRAIN_ROWS, load_sources

CARD = """\
---
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [llama, tiny]
---

# peftx tiny

A Llama of {parameters:,} parameters which comes with peftx, so that examples, tests and benchmarks run on
a real pre-trained language model without a download. It was trained from scratch with
`tools/pretrain_tiny.py`. It is small: it knows spelling, grammar and some phrases, and a few labelled
tasks, but hardly any facts.

## Architecture

Plain `LlamaForCausalLM`: hidden size {hidden}, {layers} layers, {heads} heads of {head_dim} ({kv_heads}
key/value heads), feed-forward {ffn}, tied embeddings, RoPE theta 10000, stored in fp16. Positions up to
1024 are allowed; training used windows of {context} and then {long_context} tokens, so expect worse
results beyond {long_context}. The tokenizer is a byte-level BPE of {vocab} entries which puts `<|bos|>`
(0) in front; `<|eos|>` (1) ends a document and `<|pad|>` (2) pads.

## Training

{steps:,} steps, {tokens:,} tokens, {hours:.2f} hours of wall time on {device}. Options of the last run:

| option | value |
|---|---|
{options}

Hidden matrices are updated by Muon, the embedding and the norms by AdamW. The rate warms up, stays
constant, and falls linearly to zero over the last {decay:.0%} of the budget, during which the windows are
longer and the share of WikiText-style text is higher. The tokens of class labels weigh {label_weight:g}
times in the loss.

### Data

Documents are packed as `<|bos|>` text `<|eos|>`. Sources marked "WikiText style" are the plain documents
re-written in WikiText's tokenised layout (spaced punctuation, `@-@`, `@,@`, `@.@`, rare words as
`<unk>`). Blocks of prose with coarse words, and prompts which contain the beginning of a held-out text
(the math and commonsense test sets count as held out too), were left out. That removes all of
`instruct/math_data`, whose questions are those of the math test sets.

| source | file | bytes | share | share in decay | licence |
|---|---|---:|---:|---:|---|
{data_table}

Never trained on: the WikiText-2 test split, the GSM8K test split, the SNIPS validation split, the AG News
rows from index {news_rows} on, and the sentence polarity rows from index {polarity_rows} on.

### Prompt formats

One fixed format per task:

```text
Review: {{text}}\\nSentiment: {{positive|negative}}
News: {{text}}\\nTopic: {{World|Sports|Business|Sci/Tech}}
Utterance: {{text}}\\nIntent: {{AddToPlaylist|BookRestaurant|GetWeather|PlayMusic|RateBook|\
SearchCreativeWork|SearchScreeningEvent}}
Utterance: {{text}}\\nSlots: {{name = value; name = value}}
Premise: {{premise}}\\nHypothesis: {{hypothesis}}\\nEntailment: {{yes|no}}
Instruction: {{instruction}}\\nInput: {{input}}\\nResponse: {{response}}    (no Input line when it is empty)
Question: {{question}}\\nAnswer: {{answer}}
User: {{text}}\\nSystem: {{text}}\\n...
```

## Held-out figures

Computed by the `evaluate` command with windows of {eval_context} tokens which overlap by half.

| set | figure |
|---|---:|
{figures}

## Limits

English only. The model repeats what its small corpus says: texts of presidents, Australian radio news,
stubs of Wikipedia, film reviews and synthetic instructions, with the biases of those texts. It cannot do
arithmetic reliably, its factual statements are mostly invented, and it must not be used to inform anyone.
Some sources allow research use only; see the table.

## Samples

Unedited, temperature 0.8, top-p 0.95, 60 tokens, seeds 0 to {last_seed}.

{samples}
"""


def card(args: argparse.Namespace) -> None:
    """Write the model card next to the exported weights."""
    torch.set_num_threads(args.threads)
    model = new_model(0)
    state = load_checkpoint(args.work / "checkpoint.safetensors", model)
    config, run = model.config, state["runs"][-1]
    if run.get("prose"):
        sys.exit("the card tells of the bundled model, and this one was trained with --prose: write another")
    licences = {
        entry["file"]: entry["licence"] for entry in json.loads((args.data / "MANIFEST.json").read_text())
    }
    sources = load_sources(args.data)
    total, decay_total = sum(s.share for s in sources), sum(s.decay_share for s in sources)
    data_table = "\n".join(
        f"| {s.name} | {', '.join(s.files)} | {s.raw_bytes:,} | {s.share / total:.1%} | "
        f"{s.decay_share / decay_total:.1%} | {', '.join(licences[file] for file in s.files)} |"
        for s in sources
    )
    report = evaluate_model(args.data, args.model, args.context)
    figures = []
    for name in ("wikitext2_test", "gsm8k_test"):
        figures.append(f"| {name}, bits per byte | {report[name]['bits_per_byte']:.3f} |")
        figures.append(f"| {name}, perplexity per token | {report[name]['token_perplexity']:.2f} |")
    for name in ("snips_intent", "ag_news_topic", "sentence_polarity"):
        figures.append(
            f"| {name}, zero-shot accuracy ({report[name]['rows']} rows) | {report[name]['accuracy']:.1%} |"
        )
    hidden_options = {"command", "from_step", "device", "max_steps", "log_every", "save_every"}
    options = "\n".join(f"| {key} | {value} |" for key, value in run.items() if key not in hidden_options)
    shown = "\n\n".join(
        f"Prompt: `{json.dumps(prompt, ensure_ascii=False)}`\n\n```text\n{text}\n```"
        for prompt, text in samples(args.model)
    )
    text = CARD.format(
        parameters=report["parameters"],
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        head_dim=config.head_dim,
        kv_heads=config.num_key_value_heads,
        ffn=config.intermediate_size,
        vocab=config.vocab_size,
        context=run["context"],
        long_context=run["long_context"],
        steps=state["step"],
        tokens=state["tokens"],
        hours=state["seconds"] / 3600,
        device=f"{run['device']}, {run['threads']} threads",
        options=options,
        decay=run["decay"],
        label_weight=LABEL_LOSS_WEIGHT,
        data_table=data_table,
        news_rows=AG_NEWS_TRAIN_ROWS,
        polarity_rows=POLARITY_TRAIN_ROWS,
        eval_context=args.context,
        figures="\n".join(figures),
        last_seed=len(SAMPLE_PROMPTS) - 1,
        samples=shown,
    )
    (args.model / "README.md").write_text(text, encoding="utf-8")
    print(json.dumps(report))
