"""The entry point that vLLM calls in each of its processes, possibly more than once."""

from typing import Any

from orthrus.integrations.vllm.versions import check_version

ARCHITECTURES = ("OrthrusLM", "OrthrusForCausalLM")
"""Architectures that config.json of a checkpoint names."""
VIEWS = (*ARCHITECTURES, "OrthrusView")
"""Architectures that config.json of what is drafted with names: a whole checkpoint, or a view file."""

TARGET = "orthrus.integrations.vllm.target:OrthrusOfAnyFamily"


def register() -> None:
    """Tell vLLM the architectures of this project. Classes are named, not imported: vLLM does that when it needs them.

    vLLM puts "DFlash" before the architecture of a checkpoint that it is to draft with.
    """
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from orthrus.integrations.vllm.view_config import ViewConfig

    AutoConfig.register(ViewConfig.model_type, ViewConfig, exist_ok=True)
    for name in ARCHITECTURES:
        ModelRegistry.register_model(name, TARGET)
        settle_before_start(name)
    settle_before_start("OrthrusView")  # which is no target, and says so
    ModelRegistry.register_model("OrthrusView", TARGET)
    for name in VIEWS:
        ModelRegistry.register_model(f"DFlash{name}", "orthrus.integrations.vllm.draft:OrthrusDraft")


def settle_before_start(architecture: str) -> None:
    """Have vLLM ask `settle` while it still makes an engine's configuration, before it starts processes.

    Versions that do not ask are refused what does not work when the models are built, with more words around it.
    """
    try:
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
    except ImportError:
        return

    class EngineConfig(VerifyAndUpdateConfig):
        """vLLM's way to ask about the configuration of an architecture."""

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            import vllm

            from orthrus.integrations.vllm.refusals import settle

            check_version(vllm.__version__)
            try:
                settle(vllm_config)
            except ValueError as error:
                # pydantic, which calls this, wraps a ValueError in lines of its own; this way the sentence comes last.
                raise RuntimeError(str(error)) from None

    MODELS_CONFIG_MAP[architecture] = EngineConfig
