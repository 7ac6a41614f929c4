"""Losses and gradients of the PPOTrainer of TRL 1.9.2, which later versions do not have, for the parity test.

    python -m benchmarks.peers.trl_ppo

Makes a virtual environment in runs/peers, runs the trainer's own `train` for one step on the models and answers of
`ppo_case.py`, and writes benchmarks/results/trl_ppo.json: what was logged, and what the optimizer was given.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import environments, ppo_case
from benchmarks.provenance import record

FOLDER = environments.FOLDER / "trl-1.9.2"
LOGGED = {"policy_loss": "loss/policy_avg", "value_loss": "loss/value_avg"}
LOGGED |= {"policy_clipped": "policy/clipfrac_avg", "value_clipped": "val/clipfrac_avg"}


def main() -> None:
    out = FOLDER / "found.json"
    environments.run_module(FOLDER.name, "benchmarks.peers.trl_ppo", str(out))
    record("trl_ppo", {"packages": environments.PACKAGES[FOLDER.name], "cases": json.loads(out.read_text())})


def encode(values: Any) -> str:
    """An array as base64 of its float32 values, lowest byte first."""
    return base64.b64encode(np.asarray(values, "<f4").tobytes()).decode()


def train_once(settings: ppo_case.Settings) -> dict[str, Any]:
    """One step of TRL's trainer on these answers, with its weights left as they are.

    What was sampled is given by replacing two functions of its module: `batch_generation`, whose logits are the
    policy's with noise, and `get_reward`, whose values of the value model have noise. Everything after is TRL's.
    """
    import torch
    import transformers
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    assert ppo_trainer.__name__ == PPOTrainer.__module__
    prompts, answers = torch.tensor(ppo_case.prompts()), torch.tensor(ppo_case.answers(settings))
    four = {name: ppo_case.torch_model(name) for name in ppo_case.MODELS}
    found: dict[str, Any] = {"old_logprobs": [], "old_values": []}
    score_by_trl = ppo_trainer.get_reward

    def sample(policy, queries, *_):
        assert torch.equal(queries, prompts)
        both = torch.cat([queries, answers], dim=1)
        logits = ppo_trainer.forward(policy, both, ppo_case.PAD).logits[:, ppo_case.PROMPT - 1 : -1]
        logits = logits / settings.temperature + torch.tensor(ppo_case.noise(*logits.shape))
        logprobs = torch.log_softmax(logits, dim=-1).gather(2, answers[..., None])[..., 0]
        found["old_logprobs"] = encode(logprobs)
        return both, logits

    def get_reward(model, tokens, *rest):
        values, *others = score_by_trl(model, tokens, *rest)
        if model is four["value"]:
            values = values + torch.tensor(ppo_case.noise(*values.shape))
            found["old_values"] = encode(values[:, ppo_case.PROMPT - 1 : -1, 0])
        return values, *others

    class Recorder(torch.optim.SGD):
        def step(self, closure=None):
            found["gradients"] = {
                name: {key: encode(each.grad) for key, each in four[name].named_parameters()}
                for name in ("policy", "value")
            }

    ppo_trainer.batch_generation, ppo_trainer.get_reward = sample, get_reward
    words = {f"<{number}>": number for number in range(ppo_case.VOCAB)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<2>")), pad_token="<0>", eos_token="<1>"
    )
    sizes = dict(per_device_train_batch_size=ppo_case.ROWS, total_episodes=ppo_case.ROWS, num_mini_batches=1)
    sizes |= dict(
        num_ppo_epochs=1, response_length=ppo_case.ANSWER, num_sample_generations=0, stop_token_id=ppo_case.EOS
    )
    plain = dict(report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no")
    args = PPOConfig(
        output_dir=str(FOLDER / "out"),
        gamma=settings.gamma,
        lam=settings.lam,
        kl_coef=settings.kl_coef,
        kl_estimator=settings.estimator,
        cliprange=settings.clip,
        cliprange_value=settings.value_clip,
        vf_coef=1.0,
        missing_eos_penalty=settings.missing_eos_penalty,
        temperature=settings.temperature,
        **sizes,
        **plain,
    )
    optimizer = Recorder([each for name in ("policy", "value") for each in four[name].parameters()], lr=0.0)
    trainer = PPOTrainer(
        args,
        tokenizer,
        four["policy"],
        four["reference"],
        four["reward"],
        Dataset.from_list([{"input_ids": [2]}] * ppo_case.ROWS),
        four["value"],
        data_collator=lambda rows: {"input_ids": prompts},
        eval_dataset=Dataset.from_list([{"input_ids": [2]}] * ppo_case.ROWS),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
    )
    trainer.train()
    ppo_trainer.get_reward = score_by_trl
    logged = trainer.state.log_history[-1]
    return found | {name: logged[key] for name, key in LOGGED.items()}


def run_inside(out: str) -> None:
    """The program of the virtual environment."""
    import trl

    assert trl.__version__ == "1.9.2", trl.__version__
    Path(out).write_text(json.dumps({name: train_once(each) for name, each in ppo_case.CASES.items()}))


if __name__ == "__main__":
    main() if len(sys.argv) == 1 else run_inside(sys.argv[1])
