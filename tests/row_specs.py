"""The row specifications of the three stages of a recipe, and `data.split` as a recipe passes it on."""

from rlhf_jax.data.records import RowSpec
from rlhf_jax.data.splits import named_shares

SPECS = {"sft": RowSpec("demonstration", "sft"), "reward": RowSpec("pair", "reward"), "ppo": RowSpec("prompt", "ppo")}
STAGES = tuple(SPECS)


def split_of(text: str) -> dict[str, float]:
    return named_shares(text, STAGES, {})
