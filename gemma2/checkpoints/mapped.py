"""Weights that stay in their file: tensors over its mapped pages, which the system reads when they are used."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma2.checkpoints.dtypes import dtype_name
from gemma2.checkpoints.folder import FileWeights
from gemma2.checkpoints.safetensors_file import SafetensorsFile
from gemma2.checkpoints.weights import Weights
from gemma2.errors import BadModelFile
from gemma2.tied import HEAD

INSTEAD = "leave mapped out (--mapped)"


def check_mappable(device: torch.device, device_map: object) -> None:
    """Raises ValueError where weights are to go somewhere else than into the memory of the processor."""
    if device_map is not None:
        raise ValueError(f"mapped weights stay in their file, and device_map says where to copy them: {INSTEAD}")
    if device.type != "cpu":
        raise ValueError(
            f'mapped weights stay in the memory of the processor: give device="cpu" (--device cpu) instead of '
            f"{device}, or {INSTEAD}"
        )


def map_weights(weights: Weights, form: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], str]:
    """The tensors of safetensors files as views of the files, by name, and a note that says what was done.

    Nothing is read. A tensor of another dtype than `dtype` is left out, and so is one whose values do not begin at a
    multiple of their size in the file: `build` copies those. The pages are private: a change of a weight in place is
    made in a copy of its page, and the file stays as it is. While a model is mapped its files must stay as they are;
    where one becomes shorter, the system ends the process when it uses a page that is gone (SIGBUS). Windows does not
    let a file be replaced or deleted while it is mapped.

    Args:
        form: `Checkpoint.form` of the weights.
    Raises:
        BadModelFile: the format cannot be mapped, or a file has become shorter since its header was read.
        MemoryError: the system refuses to map a file, as under a limit of the address space.
        ValueError: the weights are stored in another dtype than the model runs in.
    """
    if not isinstance(weights, FileWeights) or form != "safetensors":
        raise BadModelFile(
            f"{weights.where}: mapped weights need safetensors files, which hold them as they are used, and this is "
            f"{form}: {INSTEAD}, or convert it to safetensors (gemma2 convert FILE FOLDER)"
        )
    stored = {stored for _, stored in weights.tensors.values()}
    if dtype not in stored:
        held = ", ".join(sorted(map(dtype_name, stored)))
        raise ValueError(
            f"{weights.where}: mapped weights stay as they are stored, in {held}, and cannot run in "
            f"{dtype_name(dtype)}: {INSTEAD}"
        )
    views: dict[str, Tensor] = {}
    wanted = [name for name in weights.tensors if name != HEAD]  # which is read once, to be compared
    for name in wanted:
        file, there = weights.source(name)
        if weights.tensors[name][1] == dtype and isinstance(file, SafetensorsFile):
            view = file.view(there)
            if view is not None:
                views[name] = view
    rest = len(wanted) - len(views)
    copied = f"; {rest} were copied and checked, for their dtype or their place in the file" if rest else ""
    return views, (
        f"{weights.where}: {len(views)} tensors are mapped: their values are not checked for NaN and infinity before "
        f"they are used, and the file must not change meanwhile{copied}"
    )
