"""DeBERTa-v2 and v3: BERT's layers with attention to relative positions, computed in a way of its own."""

from __future__ import annotations

from peftx.architectures.bert import BLOCKS, DISPATCH, HEADS, LAYER
from peftx.kernel.anatomy.table import Table, Tower

TABLE = Table(
    "deberta-v2",
    towers=(
        Tower(
            "encoder",
            layers="deberta.encoder.layer",
            roles=LAYER
            | {
                "attention.q": "attention.self.query_proj",
                "attention.k": "attention.self.key_proj",
                "attention.v": "attention.self.value_proj",
                "attention.position_q": "attention.self.pos_query_proj?",
                "attention.position_k": "attention.self.pos_key_proj?",
            },
            blocks=BLOCKS,
            dispatch=DISPATCH,
            around={
                "embedding": "deberta.embeddings.word_embeddings",
                "embedding.position": "deberta.embeddings.position_embeddings?",
                "embedding.type": "deberta.embeddings.token_type_embeddings?",
                "embedding.relative": "deberta.encoder.rel_embeddings?",
                "norm.embedding": "deberta.embeddings.LayerNorm",
                "norm.relative": "deberta.encoder.LayerNorm?",
                "projector.in": "deberta.embeddings.embed_proj?",
                "pooler": "pooler.dense?",
            },
        ),
    ),
    around=HEADS
    | {  # with `legacy=False` the masked language model has a head of another shape
        "head.dense": "cls.predictions.transform.dense|lm_predictions.lm_head.dense?",
        "norm.head": "cls.predictions.transform.LayerNorm|lm_predictions.lm_head.LayerNorm?",
    },
)
