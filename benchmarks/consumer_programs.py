"""What each consumer of benchmarks/consumers.py does with a folder, run by the Python of its own environment.

python benchmarks/consumer_programs.py CONSUMER CASES.json OUT.jsonl
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path

Answers = list[list[int]]
Pairs = list[tuple[str, str]]
TOLERANCE = 1e-3  # of scores


def transformers_answers(folder: str, prompts: Answers, new: int) -> Answers:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    ids = torch.tensor(prompts)
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return written[:, ids.shape[1] :].tolist()


def transformers_scores(folder: str, pairs: Pairs) -> list[float]:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    batch = tokenizer(*map(list, zip(*pairs, strict=True)), padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0].tolist()


def mlx_answers(folder: str, prompts: Answers, new: int) -> Answers:
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    mx.set_default_device(mx.cpu)
    model, _ = load(folder)
    return [[int(token) for token, _ in generate_step(mx.array(ids), model, max_tokens=new)] for ids in prompts]


def ctranslate2_answers(folder: str, prompts: Answers, new: int) -> Answers:
    import ctranslate2
    from transformers import AutoTokenizer

    converted = Path(folder).with_name("ctranslate2")
    ctranslate2.converters.TransformersConverter(folder).convert(str(converted), force=True)
    tokenizer, generator = AutoTokenizer.from_pretrained(folder), ctranslate2.Generator(str(converted))
    tokens = [tokenizer.convert_ids_to_tokens(ids) for ids in prompts]
    found = generator.generate_batch(tokens, max_length=new, sampling_topk=1, include_prompt_in_result=False)
    return [each.sequences_ids[0] for each in found]


def sentence_transformers_scores(folder: str, pairs: Pairs) -> list[float]:
    import torch
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(folder, device="cpu", activation_fn=torch.nn.Identity())
    return [float(score) for score in model.predict([tuple(pair) for pair in pairs])]


ANSWERS: dict[str, Callable[[str, Answers, int], Answers]] = {
    "transformers5": transformers_answers,
    "transformers4": transformers_answers,
    "mlx": mlx_answers,
    "ctranslate2": ctranslate2_answers,
}
SCORES: dict[str, Callable[[str, Pairs], list[float]]] = {
    "transformers5": transformers_scores,
    "transformers4": transformers_scores,
    "sentence_transformers": sentence_transformers_scores,
}
PACKAGES = {
    "transformers5": "transformers",
    "transformers4": "transformers",
    "mlx": "mlx-lm",
    "ctranslate2": "ctranslate2",
    "sentence_transformers": "sentence-transformers",
}


def outcome(consumer: str, case: dict) -> str:
    """ "right", "other answers: ...", or "refused: ..." with the reason; "-" for what the consumer has no use for."""
    programs = SCORES if "scores" in case else ANSWERS
    if consumer not in programs:
        return "-"
    try:
        if "scores" in case:
            found = programs[consumer](case["folder"], case["pairs"])
            error = max(abs(one - other) for one, other in zip(found, case["scores"], strict=True))
            return "right" if error <= TOLERANCE else f"wrong: scores differ by {error:.2g}"
        answers = programs[consumer](case["folder"], case["prompts"], len(case["answers"][0]))
        same = sum(one == other for one, other in zip(answers, case["answers"], strict=True))
        return "right" if same == len(answers) else f"wrong: {same} of {len(answers)} answers"
    except Exception as error:  # whatever a consumer raises is its answer
        lines = str(error).strip().splitlines() or [""]
        return f"refused: {type(error).__name__}: {lines[0][:160]}"


def main(consumer: str, cases: str, out: str) -> None:
    package = PACKAGES[consumer]
    with open(out, "w", encoding="utf-8") as file:
        lines = [{"versions": f"{package} {importlib.metadata.version(package)}"}]
        for line in lines:
            print(json.dumps(line), file=file, flush=True)
        for case in json.loads(Path(cases).read_text()):
            print(json.dumps({"model": case["model"], "outcome": outcome(consumer, case)}), file=file, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
