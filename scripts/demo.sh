#!/usr/bin/env bash
# Trains a small assistant from scratch: makes .venv, installs the package, runs SFT, reward model and PPO on built-in
# data, and shows what PPO changed. About ten minutes on two free CPU cores; a second run continues where the first
# stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

install -e '.[serve]'  # with what the README's next commands need
.venv/bin/rlhf-jax train configs/demo.toml
.venv/bin/rlhf-jax evaluate configs/demo.toml

cat <<'END'

Results are in runs/demo:
  runs/demo/config.toml             the configuration that ran
  runs/demo/*/metrics.jsonl         the numbers of every step, and in runs/demo/tensorboard
  runs/demo/ppo/rollouts/           every answer that PPO sampled, with its score
  runs/demo/{sft,reward,ppo}/export the models, as Hugging Face folders
Talk to the result (it was taught single questions like those above: /clear between them):
  .venv/bin/rlhf-jax chat runs/demo/ppo/export
END
