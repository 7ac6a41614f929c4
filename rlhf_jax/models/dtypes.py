"""The names of what parameters are kept in, which are there before JAX is imported."""

DTYPES = ("float32", "bfloat16", "float16")  # of files, and of parameters in memory
QUANTISED_KINDS = ("int8", "nf4")  # of the kernels of a model in memory alone, see `models.quantised`
