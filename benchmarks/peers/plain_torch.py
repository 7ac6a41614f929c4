"""The same work in plain torch, with the models and `generate` of transformers.

    python -m benchmarks.peers.plain_torch ppo_iteration [--size A] [--dtype mixed]

dtype "mixed": weights that train are float32 and computed under autocast, all others bfloat16, among them the copy that
generates. SDPA attention, fused AdamW, logits of the answers only, the whole batch at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch
import transformers
from torch import nn

from benchmarks import ceilings, timing

DTYPES = ("float32", "bfloat16", "mixed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLIP, VALUE_CLIP, KL_COEF, LAM = 0.2, 0.2, 0.1, 0.95


def make_model(sizes: timing.Sizes, dtype: torch.dtype, *, scalar_head: bool = False) -> nn.Module:
    """A random causal model, or its trunk with a scalar head."""
    config = transformers.AutoConfig.for_model(**sizes.hf_config)
    kind = transformers.AutoModel if scalar_head else transformers.AutoModelForCausalLM
    model = kind.from_config(config, attn_implementation="sdpa").to(dtype).eval()  # eval: there is no dropout
    return Scalar(model, sizes.hidden, dtype) if scalar_head else model


class Scalar(nn.Module):
    """A trunk with a scalar head: tokens [B, T] -> [B, T] float32."""

    def __init__(self, trunk: nn.Module, hidden: int, dtype: torch.dtype):
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(hidden, 1, bias=False, dtype=dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(tokens, use_cache=False).last_hidden_state)[..., 0].float()


def token_logprobs(model: nn.Module, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """Log-probabilities of the last `count` tokens, [B, count] float32."""
    logits = model(tokens, use_cache=False, logits_to_keep=count + 1).logits[:, :-1].float()
    return -nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, -count:], reduction="none")


class Training:
    """A model that trains, with its optimizer."""

    def __init__(self, model: nn.Module, dtype: str):
        self.model, self.dtype = model, dtype
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0, fused=True)

    def autocast(self):
        return torch.autocast(DEVICE, torch.bfloat16, enabled=self.dtype == "mixed")

    def update(self, loss_of: Callable[[], torch.Tensor]) -> None:
        """One optimizer step on the loss, with its gradient clipped."""
        with self.autocast():
            loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def wait() -> None:
    """Return once the device has finished; a CPU always has."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def low_dtype(dtype: str) -> torch.dtype:
    """Of weights that do not train."""
    return torch.float32 if dtype == "float32" else torch.bfloat16


def trained_dtype(dtype: str) -> torch.dtype:
    return torch.bfloat16 if dtype == "bfloat16" else torch.float32


def random_prompts(sizes: timing.Sizes) -> torch.Tensor:
    return torch.randint(3, sizes.vocab, (sizes.rows, sizes.prompt))


def sample(sampler: nn.Module, prompts: torch.Tensor, sizes: timing.Sizes) -> torch.Tensor:
    """Prompts with sampled answers of full length, [B, P + N]."""
    # Without an EOS every answer has full length.
    options = dict(max_new_tokens=sizes.answer, do_sample=True, top_k=0, top_p=1.0, temperature=1.0)
    sampler.generation_config = transformers.GenerationConfig(**options, pad_token_id=1, eos_token_id=None)
    with torch.inference_mode():
        tokens = sampler.generate(prompts, attention_mask=torch.ones_like(prompts))
    assert tokens.shape == (sizes.rows, sizes.length), tokens.shape
    return tokens.clone()  # one that the backward pass may keep


class Models:
    """The four models of PPO, and the one that generates."""

    def __init__(self, sizes: timing.Sizes, dtype: str):
        low, trained = low_dtype(dtype), trained_dtype(dtype)
        self.sizes, self.prompts = sizes, random_prompts(sizes)
        self.actor = Training(make_model(sizes, trained), dtype)
        self.critic = Training(make_model(sizes, trained, scalar_head=True), dtype)
        self.reference, self.reward = make_model(sizes, low), make_model(sizes, low, scalar_head=True)
        self.sampler = make_model(sizes, low) if trained != low else self.actor.model

    @torch.inference_mode()
    def publish(self) -> None:
        """Copy the actor into the model that generates, where it is another."""
        if self.sampler is not self.actor.model:
            for copy, own in zip(self.sampler.parameters(), self.actor.model.parameters(), strict=True):
                copy.copy_(own)

    @torch.no_grad()
    def score(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Log-probabilities, values, advantages and returns of the answers, [B, N] float32."""
        count = self.sizes.answer
        with self.actor.autocast():
            old = token_logprobs(self.actor.model, tokens, count)
            values = self.critic.model(tokens)[:, -count - 1 : -1]
        reference, scores = token_logprobs(self.reference, tokens, count), self.reward(tokens)[:, -1]
        rewards = -KL_COEF * (old - reference)
        rewards[:, -1] += scores.clamp(-5, 5)
        advantage, advantages = torch.zeros(len(tokens)), []
        for t in reversed(range(count)):
            later = values[:, t + 1] if t + 1 < count else 0.0
            advantage = rewards[:, t] + later - values[:, t] + LAM * advantage
            advantages.insert(0, advantage)
        advantages = torch.stack(advantages, dim=1)
        whitened = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        return {"old": old, "values": values, "advantages": whitened, "returns": advantages + values}

    def update_actor(self, tokens: torch.Tensor, scored: dict[str, torch.Tensor]) -> None:
        def loss() -> torch.Tensor:
            ratio = (token_logprobs(self.actor.model, tokens, self.sizes.answer) - scored["old"]).exp()
            clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
            return -torch.minimum(ratio * scored["advantages"], clipped * scored["advantages"]).mean()

        self.actor.update(loss)

    def update_critic(self, tokens: torch.Tensor, scored: dict[str, torch.Tensor]) -> None:
        def loss() -> torch.Tensor:
            values, old = self.critic.model(tokens)[:, -self.sizes.answer - 1 : -1], scored["values"]
            clipped = old + (values - old).clamp(-VALUE_CLIP, VALUE_CLIP)
            squares = (values - scored["returns"]).square(), (clipped - scored["returns"]).square()
            return 0.5 * torch.maximum(*squares).mean()

        self.critic.update(loss)


Step = Callable[[timing.Lap], None]


def ppo_iteration(sizes: timing.Sizes, dtype: str) -> Step:
    models = Models(sizes, dtype)

    def step(lap: timing.Lap) -> None:
        models.publish()
        lap("publish")
        tokens = sample(models.sampler, models.prompts, sizes)
        lap("generate")
        scored = models.score(tokens)
        lap("score")
        models.update_actor(tokens, scored)
        lap("actor")
        models.update_critic(tokens, scored)
        lap("critic")

    return step


def generate(sizes: timing.Sizes, dtype: str) -> Step:
    """Sampling alone; "mixed" is "bfloat16"."""
    sampler, prompts = make_model(sizes, low_dtype(dtype)), random_prompts(sizes)

    def step(lap: timing.Lap) -> None:
        sample(sampler, prompts, sizes)
        lap("generate")

    return step


def score(sizes: timing.Sizes, dtype: str) -> Step:
    models = Models(sizes, dtype)
    tokens = torch.randint(3, sizes.vocab, (sizes.rows, sizes.length))

    def step(lap: timing.Lap) -> None:
        models.score(tokens)
        lap("score")

    return step


def train_step(sizes: timing.Sizes, dtype: str) -> Step:
    """A step of supervised fine-tuning, with a loss on every token."""
    training = Training(make_model(sizes, trained_dtype(dtype)), dtype)
    tokens = torch.randint(3, sizes.vocab, (sizes.rows, sizes.length))

    def step(lap: timing.Lap) -> None:
        training.update(lambda: training.model(tokens, labels=tokens, use_cache=False).loss)
        lap("update")

    return step


SUBJECTS = {"ppo_iteration": ppo_iteration, "generate": generate, "score": score, "train_step": train_step}


def main(argv: list[str] | None = None) -> dict:
    parser = timing.make_parser(__doc__, dtypes=DTYPES)
    parser.add_argument("subject", choices=SUBJECTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    torch.set_default_device(DEVICE)
    iterations = timing.measure(SUBJECTS[args.subject](timing.sizes_of(args), args.dtype), args, wait)
    return timing.report(args.subject, "torch", args, iterations, ceilings.by_torch)


if __name__ == "__main__":
    main(sys.argv[1:])
