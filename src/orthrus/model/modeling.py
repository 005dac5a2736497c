"""The dual-view model: a stock Qwen3 with twin attention projections in every layer.

`forward` is the base's own, untouched: the AR view as any transformers code knows it. The diffusion view, and both
views over this project's cache, go through `attention.run_layers`; the decoding loop calls that, nobody else needs to.
"""

from torch import Tensor, nn
from transformers import Qwen3ForCausalLM

from orthrus.config import OrthrusConfig
from orthrus.model.attention import add_twins, copy_twins


class OrthrusLM(Qwen3ForCausalLM):
    """A Qwen3 causal LM whose layers hold a second, trainable set of attention projections, named `*_diff`."""

    config_class = OrthrusConfig

    def __init__(self, config: OrthrusConfig):
        super().__init__(config)
        for layer in self.model.layers:
            add_twins(layer.self_attn)
        self.post_init()

    def init_view(self) -> None:
        """Start the diffusion view as a copy of the AR projections."""
        for layer in self.model.layers:
            copy_twins(layer.self_attn)

    def view_parameters(self) -> dict[str, nn.Parameter]:
        """The diffusion view's parameters by checkpoint name: all that training changes."""
        return {name: p for name, p in self.named_parameters() if is_view_tensor(name)}

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] to logits [..., V] in the model's own dtype."""
        return self.lm_head(hidden)


def is_view_tensor(name: str) -> bool:
    """Whether a checkpoint name belongs to the diffusion view."""
    return "_diff." in name
