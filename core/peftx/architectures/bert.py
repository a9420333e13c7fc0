"""BERT (encoder; post-norm)."""

from __future__ import annotations

from peftx.kernel.anatomy.table import Table, Tower

LAYER = {
    "attention.q": "attention.self.query",
    "attention.k": "attention.self.key",
    "attention.v": "attention.self.value",
    "attention.o": "attention.output.dense",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
    "norm.attention": "attention.output.LayerNorm",
    "norm.mlp": "output.LayerNorm",
}
# What a block adds to the residual comes out of these; the modules around them hold the sum and the norm as well.
BLOCKS = {"attention": "attention.output.dense", "mlp": "output.dense"}
DISPATCH = {"attention": "attention.self"}
EMBEDDINGS = {
    "embedding": "embeddings.word_embeddings",
    "embedding.position": "embeddings.position_embeddings",
    "embedding.type": "embeddings.token_type_embeddings",
    "norm.embedding": "embeddings.LayerNorm",
}
HEADS = {
    "head": "cls.predictions.decoder?",
    "head.dense": "cls.predictions.transform.dense?",
    "norm.head": "cls.predictions.transform.LayerNorm?",
    "classifier": "classifier|qa_outputs?",
}

TABLE = Table(
    "bert",
    towers=(
        Tower(
            "encoder",
            layers="bert.encoder.layer",
            roles=LAYER,
            blocks=BLOCKS,
            dispatch=DISPATCH,
            around={role: f"bert.{path}" for role, path in EMBEDDINGS.items()}
            | {"pooler": "bert.pooler.dense?"},
        ),
    ),
    around=HEADS,
)
