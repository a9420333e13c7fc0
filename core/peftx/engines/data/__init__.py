"""Local files -> rows -> token ids -> batches.

read_dataset       formats.py        a file becomes a `datasets.Dataset` of rows in one of five formats
with_column, Lazy  mapped.py         rows lie on the disk, and are mapped from there
TrainingData       training_data.py  what the `prepare_data` hook gets and may change
prompt_ids, ...    encoding.py       texts become token ids
encode_pair        pairs.py          so do a prompt and an answer, as texts or as turns
render_messages    messages.py       so do conversations
tokenize_dataset   tokenize.py       rows become `input_ids` and `labels`
tokenize_classes   classes.py        classification rows become texts with the number of their class
tokenize_tags      classes.py        or of the class of each word
ClassTexts         classes.py        the classes of a plugin, and the texts that it names one of
check_differ       contrast.py       rows of preferences whose two answers are one are refused
Place              places.py         where a row stands, for messages: `train.jsonl:12`
Collator           collate.py        examples become padded tensors
"""

from __future__ import annotations

from peftx.engines.data.classes import (
    ClassTexts,
    batches_of,
    check_labels,
    class_ids,
    class_index,
    class_rows,
    tag_rows,
    take_classes,
    tokenize_classes,
    tokenize_tags,
)
from peftx.engines.data.collate import CLASS_INDEX, IGNORE, Collator, pads_right
from peftx.engines.data.contrast import check_differ, check_passages
from peftx.engines.data.diverse import Picks, facility_location
from peftx.engines.data.encoding import (
    Example,
    continuation,
    encoder_ids,
    fill_template,
    following_ids,
    prompt_ids,
    special_frame,
    text_ids,
)
from peftx.engines.data.formats import detect_format, format_of_row, read_dataset
from peftx.engines.data.gate import FORMATS
from peftx.engines.data.mapped import Lazy, with_column
from peftx.engines.data.messages import pair_of, pairs_of, prompt_turns, render_messages, said, turns
from peftx.engines.data.pairs import encode_pair, opening_of
from peftx.engines.data.places import Place, Where, inside
from peftx.engines.data.together import together
from peftx.engines.data.tokenize import dataset_of_examples, tokenize_dataset
from peftx.engines.data.training_data import TrainingData
from peftx_spec.shapes import PROMPT_TURNS

__all__ = [
    "CLASS_INDEX",
    "FORMATS",
    "IGNORE",
    "PROMPT_TURNS",
    "ClassTexts",
    "Collator",
    "Example",
    "Lazy",
    "Picks",
    "Place",
    "TrainingData",
    "Where",
    "batches_of",
    "check_differ",
    "check_labels",
    "check_passages",
    "class_ids",
    "class_index",
    "class_rows",
    "continuation",
    "dataset_of_examples",
    "detect_format",
    "encode_pair",
    "encoder_ids",
    "facility_location",
    "fill_template",
    "following_ids",
    "format_of_row",
    "inside",
    "opening_of",
    "pads_right",
    "pair_of",
    "pairs_of",
    "prompt_ids",
    "prompt_turns",
    "read_dataset",
    "render_messages",
    "said",
    "special_frame",
    "tag_rows",
    "take_classes",
    "text_ids",
    "together",
    "tokenize_classes",
    "tokenize_dataset",
    "tokenize_tags",
    "turns",
    "with_column",
]
