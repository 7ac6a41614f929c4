"""Files of weights in and out: the host holds one device's shard at a time on the way in, one tensor on the way out.

`files` maps a folder's safetensors, or where it has none the tensors that `pickles` finds in files of torch.save;
`blocks` maps elements of parameters to elements of tensors in the files, and `reading` and `writing` are the two
directions; `sums` are the checksums of what was written.
"""

from rlhf_jax.models.safetensors_io.entry import NUMPY_DTYPES
from rlhf_jax.models.safetensors_io.files import join_names, open_file, open_folder, stored_dtype
from rlhf_jax.models.safetensors_io.reading import different_twin, read_params
from rlhf_jax.models.safetensors_io.sums import check_sums, write_sums
from rlhf_jax.models.safetensors_io.writing import write_params

__all__ = [
    "NUMPY_DTYPES",
    "check_sums",
    "different_twin",
    "join_names",
    "open_file",
    "open_folder",
    "read_params",
    "stored_dtype",
    "write_params",
    "write_sums",
]
