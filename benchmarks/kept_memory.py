"""To import this sets the process's memory as `rlhf-jax train` sets it, before other imports make threads."""

import os

from rlhf_jax.cli import keep_freed_memory

keep_freed_memory(os.environ)
