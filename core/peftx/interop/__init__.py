"""To and from other libraries' files: HF PEFT's adapters, and checkpoints for engines.

stack = import_peft("adapter", model="base")     # any method that a plugin knows: a stack of its own
to_peft(stack, "adapter")                        # and back
from_peft(stack, "adapter")                      # LoRA's A and B into a stack that has their places
to_compressed_tensors(stack, "packed")           # quantized layers as they are: transformers, vLLM, SGLang
to_gguf(stack, "file", type="q8_0")              # the merged model in one file: llama.cpp
"""

from __future__ import annotations

from peftx.interop.compressed_tensors import to_compressed_tensors
from peftx.interop.gguf_file import to_gguf
from peftx.interop.importing import import_peft
from peftx.interop.low_rank import from_peft
from peftx.interop.writing import to_peft

__all__ = ["from_peft", "import_peft", "to_compressed_tensors", "to_gguf", "to_peft"]
