"""Each head's share of the attention output, which the forward pass itself never forms."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gemma2.config import Gemma2Config
from gemma2.model import Tap
from gemma2.twins import Make


class OutputByHead(nn.Module):
    """A twin of `o_proj` that forms every head's contribution before summing them: TransformerLens's `hook_result`.

    The weight keeps its name. It costs h times the output's memory, and the sum over heads is taken in another order
    than in one product, so results differ by rounding.

        with replaced(gemma.model, by_head(gemma.config)) as model:
            o_proj = model.model.layers[3].self_attn.o_proj
            o_proj.hook_result.register_forward_hook(...)    # [b t h d]
    """

    def __init__(self, o_proj: nn.Linear, heads: int) -> None:
        super().__init__()
        self.heads, self.weight = heads, o_proj.weight  # [d h*c]
        self.hook_result = Tap()  # [b t h d]

    def forward(self, z: Tensor) -> Tensor:
        """z [b t h*c] -> [b t d]."""
        z, weight = z.unflatten(-1, (self.heads, -1)), self.weight.unflatten(-1, (self.heads, -1))
        return self.hook_result(torch.einsum("bthc,dhc->bthd", z, weight)).sum(dim=2)


def by_head(config: Gemma2Config) -> Make:
    """`OutputByHead` in every layer, for `gemma2.twins.replaced`."""

    def make(path: str, module: nn.Module) -> nn.Module | None:
        if path.endswith(".o_proj") and isinstance(module, nn.Linear):
            return OutputByHead(module, config.num_attention_heads)
        return None

    return make
