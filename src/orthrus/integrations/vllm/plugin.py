"""The entry point that vLLM calls in each of its processes, possibly more than once."""

from orthrus.integrations.vllm.versions import check_version

TARGETS = ("OrthrusLM", "OrthrusForCausalLM")
"""Architectures that config.json of a checkpoint names."""
VIEWS = (*TARGETS, "OrthrusView")
"""Architectures that config.json of what is drafted with names: a whole checkpoint, or a view file."""


def register() -> None:
    """Tell vLLM the architectures of this project. Classes are named, not imported: vLLM does that when it needs them.

    vLLM puts "DFlash" before the architecture of a checkpoint that it is to draft with.
    """
    import vllm
    from vllm import ModelRegistry

    check_version(vllm.__version__)
    for name in TARGETS:
        ModelRegistry.register_model(name, "orthrus.integrations.vllm.target:OrthrusTarget")
    for name in VIEWS:
        ModelRegistry.register_model(f"DFlash{name}", "orthrus.integrations.vllm.draft:OrthrusDraft")
