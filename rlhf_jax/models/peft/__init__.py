"""LoRA adapters in PEFT's format, in and out: adapter_config.json and adapter_model.safetensors.

PEFT has an adapter for each module of each layer, with a rank and a scale of its own; ours are stacked over the layers
and share one rank and one scale. A module of theirs may hold several linears of ours (a fused projection), each of
which has its own A here. On both sides the scale times the product of A and B is the same.
"""

from rlhf_jax.models.peft.reading import read_adapter
from rlhf_jax.models.peft.writing import write_adapter

__all__ = ["read_adapter", "write_adapter"]
