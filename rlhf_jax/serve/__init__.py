"""An HTTP server for trained models, with OpenAI's endpoints.

limits, errors, fields   what clients may ask, and what they get if they ask for something else
metrics                  counters
worker                   one thread per policy, which drives `answering`
models                   the models by name
replies                  the JSON of answers
votes                    what the web page collects
app                      the routes
run                      start and stop
"""

from rlhf_jax.serve.limits import Limits
from rlhf_jax.serve.run import serve

__all__ = ["Limits", "serve"]
