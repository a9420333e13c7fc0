"""Gemma 4 with images and sound: the text decoder, a vision tower of gated layers, a Conformer for audio. Linear layers
of these two stand inside modules that clip what goes in and comes out."""

from __future__ import annotations

from peftx.architectures.gemma2 import NORMS
from peftx.architectures.gemma3n_text import around
from peftx.architectures.gemma4_text import EXPERTS, ROLES
from peftx.architectures.llama import ATTENTION, BLOCKS, HEADS, MLP, NORMS_QK
from peftx.kernel.anatomy.table import Table, Tower

VISION = {role: f"{path}.linear" for role, path in (ATTENTION | MLP).items()} | NORMS | NORMS_QK
AUDIO = {
    "attention.q": "self_attn.q_proj.linear",
    "attention.k": "self_attn.k_proj.linear",
    "attention.v": "self_attn.v_proj.linear",
    "attention.position_k": "self_attn.relative_k_proj",
    "attention.o": "self_attn.post.linear",
    "mlp.before_up": "feed_forward1.ffw_layer_1.linear",
    "mlp.before_down": "feed_forward1.ffw_layer_2.linear",
    "mlp.after_up": "feed_forward2.ffw_layer_1.linear",
    "mlp.after_down": "feed_forward2.ffw_layer_2.linear",
    "convolution.in": "lconv1d.linear_start.linear",
    "convolution.depthwise": "lconv1d.depthwise_conv1d",
    "convolution.out": "lconv1d.linear_end.linear",
    "norm.attention": "norm_pre_attn",
    "norm.post_attention": "norm_post_attn",
    "norm.mlp_before": "feed_forward1.pre_layer_norm",
    "norm.post_mlp_before": "feed_forward1.post_layer_norm",
    "norm.mlp_after": "feed_forward2.pre_layer_norm",
    "norm.post_mlp_after": "feed_forward2.post_layer_norm",
    "norm.convolution": "lconv1d.pre_layer_norm",
    "norm.depthwise": "lconv1d.conv_norm",
    "norm.layer": "norm_out",
}

TABLE = Table(
    "gemma4",
    towers=(
        Tower(
            "decoder",
            layers="model.language_model.layers",
            roles=ROLES,
            stacked=EXPERTS,
            blocks=BLOCKS,
            around=around("model.language_model"),
            config="text_config",
        ),
        Tower(
            "vision",
            layers="model.vision_tower.encoder.layers",
            roles=VISION,
            blocks=BLOCKS,
            around={"embedding.patch": "model.vision_tower.patch_embedder.input_proj"},
            config="vision_config",
        ),
        Tower(
            "audio",
            layers="model.audio_tower.layers",
            roles=AUDIO,
            around={
                "embedding.patch": "model.audio_tower.subsample_conv_projection.layer0.conv",
                "embedding.patch.second": "model.audio_tower.subsample_conv_projection.layer1.conv",
                "norm.patch": "model.audio_tower.subsample_conv_projection.layer0.norm",
                "norm.patch.second": "model.audio_tower.subsample_conv_projection.layer1.norm",
                "projector.in": "model.audio_tower.subsample_conv_projection.input_proj_linear",
                "projector.out": "model.audio_tower.output_proj",
            },
            config="audio_config",
        ),
    ),
    around=HEADS
    | {
        "projector.vision": "model.embed_vision.embedding_projection",
        "projector.audio": "model.embed_audio.embedding_projection?",
    },
)
