"""To import this sets the process's memory and XLA as `rlhf-jax train` sets them, before other imports make threads."""

import os

from rlhf_jax.cli import keep_freed_memory, set_xla_flags

keep_freed_memory(os.environ)
set_xla_flags(os.environ)
