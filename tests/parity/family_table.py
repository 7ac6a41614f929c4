"""`python tests/parity/family_table.py` prints the README's table of families: a row for each that the tests cover."""

import variants_gpt
import variants_llama

from rlhf_jax.models.families import FAMILIES

MODELS = {
    "opt": "OPT, all sizes",
    "gpt2": "GPT-2",
    "gpt_neo": "GPT-Neo",
    "gptj": "GPT-J",
    "gpt_neox": "GPT-NeoX, Pythia",
    "codegen": "CodeGen",
    "bloom": "BLOOM, BLOOMZ",
    "falcon": "Falcon (7B, 40B, RW)",
    "phi": "Phi-1, 1.5, 2",
    "llama": "LLaMA 1, 2, 3",
    "mistral": "Mistral 7B",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "phi3": "Phi-3",
    "olmo2": "OLMo 2",
    "stablelm": "StableLM",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 (text)",
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3, mixture of experts",
}
# What test_family_parity.py does with every variant of every family.
COLUMNS = ("train", "generate", "LoRA", "export")


def table() -> str:
    """Markdown.

    Raises:
        AssertionError: a family has no variant among the tests, or no name here.
    """
    tested = {settings["model_type"] for settings in (variants_gpt.VARIANTS | variants_llama.VARIANTS).values()}
    assert FAMILIES.keys() == tested == MODELS.keys(), (FAMILIES.keys() ^ tested, FAMILIES.keys() ^ MODELS.keys())
    head = ["models", "`model_type`", *COLUMNS, "reward model, exported as"]
    lines = [head, ["---"] * len(head)]
    for name in MODELS:
        scalar = FAMILIES[name].scalar
        lines.append([MODELS[name], f"`{name}`", *["✓"] * len(COLUMNS), f"`{scalar}`" if scalar else "own folder"])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    print(table())
