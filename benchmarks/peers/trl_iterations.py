"""Iterations of TRL's trainers: PPOTrainer of TRL 1.9.2, and GRPOTrainer of TRL 1.16.

    python -m benchmarks.peers.trl_iterations ppo_iteration [--size A] [--dtype mixed]

An iteration is the time between two calls of what starts it: of PPO the sampling of answers, of GRPO the reward.
dtype "mixed": float32 weights under autocast.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from datasets import Dataset

from benchmarks import ceilings, timing
from benchmarks.peers import words
from benchmarks.peers.plain_torch import DEVICE, DTYPES, trained_dtype, wait

Run = Callable[[timing.Sizes, str, int, str, Callable[[], None]], None]


def shared_arguments(dtype: str, rows: int, folder: str) -> dict[str, Any]:
    """Of both trainers: whole batches, nothing recomputed, nothing saved or reported."""
    plain = dict(
        report_to=[], use_cpu=DEVICE == "cpu", gradient_checkpointing=False, save_strategy="no", disable_tqdm=True
    )
    return plain | dict(output_dir=folder, bf16=dtype == "mixed", per_device_train_batch_size=rows, learning_rate=1e-6)


def run_ppo(sizes: timing.Sizes, dtype: str, iterations: int, folder: str, mark: Callable[[], None]) -> None:
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    def make(kind) -> torch.nn.Module:
        config = transformers.AutoConfig.for_model(**sizes.hf_config, num_labels=1)
        model = kind.from_config(config, attn_implementation="sdpa").to(trained_dtype(dtype))
        model.generation_config = transformers.GenerationConfig(pad_token_id=1)  # without an EOS: full length
        return model

    sample_by_trl = ppo_trainer.batch_generation

    def sample(*given):
        mark()
        tokens, logits = sample_by_trl(*given)
        assert tokens.shape == (sizes.rows, sizes.length), tokens.shape
        return tokens, logits

    ppo_trainer.batch_generation = sample
    causal, scalar = transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification
    prompts = torch.randint(3, sizes.vocab, (sizes.rows, sizes.prompt))
    rows = Dataset.from_list([{"input_ids": row} for row in prompts.tolist()])
    args = PPOConfig(
        **shared_arguments(dtype, sizes.rows, folder),
        total_episodes=sizes.rows * iterations,
        num_mini_batches=1,
        num_ppo_epochs=1,
        response_length=sizes.answer,
        num_sample_generations=0,
        temperature=1.0,
    )
    trainer = PPOTrainer(
        args,
        words.make_tokenizer(sizes.vocab),
        make(causal),
        make(causal),
        make(scalar),
        rows,
        make(scalar),
        data_collator=lambda _: {"input_ids": prompts},
        eval_dataset=rows,
    )
    trainer.train()


def run_grpo(sizes: timing.Sizes, dtype: str, iterations: int, folder: str, mark: Callable[[], None]) -> None:
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions: list[str], completion_ids: list[list[int]], **_) -> list[float]:
        mark()
        assert [len(ids) for ids in completion_ids] == [sizes.answer] * sizes.rows
        return words.share_of_distinct(completions)

    # The trainer reads the reference from where the model is.
    config = transformers.AutoConfig.for_model(**sizes.hf_config)
    transformers.AutoModelForCausalLM.from_config(config).to(trained_dtype(dtype)).save_pretrained(f"{folder}/model")
    model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=trained_dtype(dtype))
    args = GRPOConfig(
        **shared_arguments(dtype, sizes.rows, folder),
        max_steps=iterations,
        num_generations=sizes.samples,
        max_completion_length=sizes.answer,
        generation_kwargs={"min_new_tokens": sizes.answer},
        beta=0.04,
        model_init_kwargs={"dtype": trained_dtype(dtype)},
    )
    rows = Dataset.from_list([{"prompt": prompt} for prompt in words.make_prompts(sizes)])
    tokenizer = words.make_tokenizer(sizes.vocab)
    GRPOTrainer(model, reward, args=args, train_dataset=rows, processing_class=tokenizer).train()


RUNS: dict[str, Run] = {"ppo_iteration": run_ppo, "grpo_iteration": run_grpo}


def main(argv: list[str] | None = None) -> dict:
    parser = timing.make_parser(__doc__, dtypes=DTYPES)
    parser.add_argument("subject", choices=RUNS)
    args = parser.parse_args(argv)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    times: list[float] = []
    count = args.warm_up + args.iterations
    with tempfile.TemporaryDirectory() as folder:

        def mark() -> None:
            wait()
            times.append(time.perf_counter())

        # One more, whose start ends the last that is timed.
        RUNS[args.subject](timing.sizes_of(args), args.dtype, count + 1, folder, mark)
    iterations = timing.between(times)
    assert len(iterations) == count, (len(iterations), count)
    return timing.report(args.subject, "trl", args, iterations, ceilings.by_torch)


if __name__ == "__main__":
    main(sys.argv[1:])
