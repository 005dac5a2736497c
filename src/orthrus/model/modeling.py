"""The dual-view model: a stock decoder with twin attention projections in every layer, under the stock LM head.

`forward` is the base's own, untouched: the AR view as any transformers code knows it. The diffusion view, and both
views over this project's cache, go through `attention.run_layers`; the decoding loop calls that, nobody else needs to.
"""

from torch import Tensor, nn
from transformers import PreTrainedConfig, Qwen3ForCausalLM

from orthrus.config import OrthrusConfig
from orthrus.model.attention import add_twins, copy_twins
from orthrus.model.bases import family_of


class OrthrusLM(Qwen3ForCausalLM):
    """A causal LM whose layers hold a second, trainable set of attention projections, named `*_diff`.

    The decoder is the base family's own class. What stands over it (LM head, loss, tying) is Qwen3's for all of them:
    transformers writes the same code for each family, and a class for each would be copies of this one.
    """

    config_class = OrthrusConfig

    def __init__(self, config: PreTrainedConfig):
        super(Qwen3ForCausalLM, self).__init__(config)  # not Qwen3's own, which would build a Qwen3 decoder
        self.model = family_of(config).decoder(config)
        self.vocab_size: int = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Before there are twins, as the stock class does it: a seed gives the base the weights it has always given.
        self.post_init()
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
