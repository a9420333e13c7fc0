"""RoBERTa: BERT's layers under another name, heads of its own."""

from __future__ import annotations

from peftx.architectures.bert import BLOCKS, DISPATCH, EMBEDDINGS, LAYER
from peftx.kernel.anatomy.table import Table, Tower

TABLE = Table(
    "roberta",
    towers=(
        Tower(
            "encoder",
            layers="roberta.encoder.layer",
            roles=LAYER,
            blocks=BLOCKS,
            dispatch=DISPATCH,
            around={role: f"roberta.{path}" for role, path in EMBEDDINGS.items()}
            | {"pooler": "roberta.pooler.dense?"},
        ),
    ),
    around={
        "head": "lm_head.decoder?",
        "head.dense": "lm_head.dense?",
        "norm.head": "lm_head.layer_norm?",
        "classifier": "classifier.out_proj|classifier|qa_outputs?",
        "classifier.dense": "classifier.dense?",
    },
)
