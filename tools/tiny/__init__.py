"""The parts of `tools/pretrain_tiny.py`, which makes the small language model that is bundled with peftx.

What it reads (`texts`, `sources`), its vocabulary (`tokenizer`), the stream of training windows (`sampling`), the model
with its optimizers and checkpoints (`model`), the training and the export (`training`), held-out figures (`measuring`)
and the model card (`card`).
"""
