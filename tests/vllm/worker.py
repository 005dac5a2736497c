"""What the tests ask of vLLM's worker process: planted mistakes, and what the model there looks like."""

from typing import Any

from torch import nn

FAULTS = ("write removed", "roll removed", "causal mask", "other mask token", "query bias dropped")


def drafter(runner: Any) -> Any:
    """The draft's side of the runner: a proposer in V1, a speculator in V2."""
    return getattr(runner, "drafter", None) or getattr(runner, "speculator", None)


def draft_of(runner: Any) -> Any:
    """The model that drafts, or None."""
    return getattr(drafter(runner), "model", None)


class Worker:
    """A `worker_extension_cls`: vLLM gives its worker these methods."""

    model_runner: Any
    steps: list[dict[str, Any]]

    def record(self) -> None:
        """Note each step's rows with the drafts that it verifies of them, and the positions of its draft passes."""
        from orthrus.integrations.vllm import draft

        view: Any = draft.View
        self.steps, execute, forward = [], self.model_runner.execute_model, view.forward

        def execute_model(output: Any, *arguments: Any, **options: Any) -> Any:
            drafts = output.scheduled_spec_decode_tokens
            if output.num_scheduled_tokens:
                rows = {name: len(drafts.get(name, ())) for name in output.num_scheduled_tokens}
                self.steps.append({"rows": rows, "drafted": []})
            return execute(output, *arguments, **options)

        def recorded(own: Any, ids: Any, *arguments: Any) -> Any:
            self.steps[-1]["drafted"].append(len(ids))
            return forward(own, ids, *arguments)

        self.model_runner.execute_model, view.forward = execute_model, recorded
        self.mend = lambda: (setattr(view, "forward", forward), delattr(self.model_runner, "execute_model"))

    def recorded(self) -> list[dict[str, Any]]:
        """What was noted; nothing is from here on."""
        self.mend()
        return self.steps

    def plant(self, fault: str | None) -> None:
        """Break the draft in one way, or mend it (None)."""
        from orthrus.integrations.vllm import attention, draft

        assert fault in (None, *FAULTS), fault
        block: Any = attention.BlockAttention
        module: Any = draft
        if not hasattr(block, "sound"):
            block.sound = (block.write, module.roll)
        block.write, module.roll = block.sound
        set_causal(self.model_runner, fault == "causal mask")
        set_query_bias(self.model_runner, fault == "query bias dropped")
        if (own := draft_of(self.model_runner)) is not None:
            drafter(self.model_runner).parallel_drafting_token_id = own.config.mask_token_id - (
                fault == "other mask token"
            )
            own.start_check()
        if fault == "write removed":
            block.write = lambda *_: None
        elif fault == "roll removed":
            module.roll = lambda hidden_SD: hidden_SD

    def findings(self) -> list[str] | None:
        """What the draft's check of itself found since something was planted; None where there was nothing to see."""
        own = draft_of(self.model_runner)
        return own.self_check.findings if own is not None and own.self_check.done else None

    def facts(self) -> dict[str, Any]:
        """Whose modules the draft runs, and how many layers have a cache of their own."""
        target, draft = self.model_runner.get_model(), drafter(self.model_runner).model
        modules = {id(module) for module in target.modules()}
        leaves = [(name, module) for name, module in draft.named_modules() if not list(module.children())]
        own = [name for name, module in leaves if id(module) not in modules]
        layers = self.model_runner.vllm_config.compilation_config.static_forward_context
        return {
            "target": type(target).__name__,
            "draft": type(draft).__name__,
            "own_leaves": sorted({name.rsplit(".", 1)[-1] for name in own}),
            "num_layers": len(layers),
            "num_caches": len({layer.kv_cache.data_ptr() for layer in layers.values()}),
            "runner": type(self.model_runner).__module__,
        }


def set_causal(runner: Any, causal: bool) -> None:
    """Whether the draft pass masks what lies behind a position."""
    if (own := getattr(runner, "drafter", None)) is not None:
        own.dflash_causal = causal
    elif (own := getattr(runner, "speculator", None)) is not None and isinstance(own.model, nn.Module):
        own._group_causal = dict.fromkeys(own._group_causal, causal)


def set_query_bias(runner: Any, dropped: bool) -> None:
    """Whether the view's queries are without their bias."""
    view = getattr(drafter(runner), "model", None)
    for layer in view.model.layers if view is not None else ():
        attention = layer.self_attn
        if (bias := attention.qkv_proj.bias) is not None:
            attention.sound_bias = getattr(attention, "sound_bias", bias.detach().clone())
            bias.data.copy_(attention.sound_bias)
            if dropped:
                bias.data[: attention.q_size] = 0
