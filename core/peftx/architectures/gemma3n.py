"""Gemma 3n with images and sound: the text decoder, and a Conformer for audio. The images' tower is a convolutional
network of timm, no run of equal layers, and has no roles."""

from __future__ import annotations

from peftx.architectures.gemma3n_text import APART, READ, ROLES, around, streams
from peftx.architectures.llama import BLOCKS, HEADS
from peftx.kernel.anatomy.table import Table, Tower

FEED_FORWARD = {
    "mlp.before_up": "ffw_layer_start.ffw_layer_1",
    "mlp.before_down": "ffw_layer_start.ffw_layer_2",
    "mlp.after_up": "ffw_layer_end.ffw_layer_1",
    "mlp.after_down": "ffw_layer_end.ffw_layer_2",
    "norm.mlp_before": "ffw_layer_start.pre_layer_norm",
    "norm.post_mlp_before": "ffw_layer_start.post_layer_norm",
    "norm.mlp_after": "ffw_layer_end.pre_layer_norm",
    "norm.post_mlp_after": "ffw_layer_end.post_layer_norm",
}
CONVOLUTION = {
    "convolution.in": "lconv1d.linear_start",
    "convolution.depthwise": "lconv1d.depthwise_conv1d",
    "convolution.out": "lconv1d.linear_end",
    "norm.convolution": "lconv1d.pre_layer_norm",
    "norm.depthwise": "lconv1d.conv_norm",
}
AUDIO_ATTENTION = {
    "attention.q": "attention.attn.q_proj",
    "attention.k": "attention.attn.k_proj",
    "attention.v": "attention.attn.v_proj",
    "attention.position_k": "attention.attn.relative_position_embedding.pos_proj",
    "attention.o": "attention.post",
    "norm.attention": "attention.pre_attn_norm",
    "norm.post_attention": "attention.post_norm",
    "norm.layer": "norm",
}

TABLE = Table(
    "gemma3n",
    towers=(
        Tower(
            "decoder",
            layers="model.language_model.layers",
            roles=ROLES,
            blocks=BLOCKS,
            read=READ,
            called=READ,
            apart=APART,
            around=around("model.language_model") | streams("model.language_model"),
            config="text_config",
        ),
        Tower(
            "audio",
            layers="model.audio_tower.conformer",
            roles=AUDIO_ATTENTION | FEED_FORWARD | CONVOLUTION,
            around={
                "embedding.patch": "model.audio_tower.subsample_conv_projection.conv_0.conv",
                "embedding.patch.second": "model.audio_tower.subsample_conv_projection.conv_1.conv",
                "norm.patch": "model.audio_tower.subsample_conv_projection.conv_0.norm",
                "norm.patch.second": "model.audio_tower.subsample_conv_projection.conv_1.norm",
                "projector.in": "model.audio_tower.subsample_conv_projection.input_proj_linear",
            },
            config="audio_config",
        ),
    ),
    around=HEADS
    | {
        f"{role}.{sense}": f"model.embed_{sense}.{path}"
        for sense in ("vision", "audio")
        for role, path in (
            ("embedding", "embedding"),
            ("projector", "embedding_projection"),
            ("norm.hard", "hard_embedding_norm"),
            ("norm.soft", "soft_embedding_norm"),
        )
    },
)
