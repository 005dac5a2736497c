"""The configuration of a view file, whose config.json says of its shape only which base it belongs to."""

from typing import Any

from transformers import PreTrainedConfig

from orthrus.model.bases import check_base
from orthrus.model.checkpoint import VIEW_MODEL_TYPE, WRITER_FIELDS
from orthrus.model.hub import find_folder
from orthrus.model.tensors import read_json

OWN_FIELDS = ("block_size", "mask_token_id", "base_id", "base_revision", "base_fingerprint", "architectures")


class ViewConfig(PreTrainedConfig):
    """The base's fields under those of the view: vLLM wants to know the shape of what it drafts with.

    Of no family's class, since a field that is absent from a base's config.json means what its own family says.
    """

    model_type = VIEW_MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """From a view file's config.json; `ValueError` where its base cannot be found or carry a view."""
        view = str(options.get("name_or_path", ""))
        if not isinstance(base := config_dict.get("base_id"), str):
            raise ValueError(f"config.json of the view {view} does not name its base (base_id)")
        fields = whole_fields(read_base_fields(base, config_dict.get("base_revision"), view), where=base)
        own = {name: config_dict[name] for name in OWN_FIELDS if name in config_dict}
        return super().from_dict(fields | own, **options)


def whole_fields(base_fields: dict[str, Any], *, where: str) -> dict[str, Any]:
    """The fields of a base's config.json with what its family makes of those that are absent."""
    config = check_base(base_fields, where=where).config.from_dict(base_fields)
    return {name: value for name, value in config.to_dict().items() if name not in WRITER_FIELDS}


def read_base_fields(base: str, revision: str | None, view: str) -> dict[str, Any]:
    """config.json of a view's base: a Hub id, or a folder, which "./" and "../" look for from the view's own."""
    source = f"{view}/{base}" if base.startswith(("./", "../")) else base
    try:
        return read_json(find_folder(source, weights=False, revision=revision) / "config.json")
    except ValueError as error:
        raise ValueError(
            f"the base of the view {view} cannot be read ({error}): make one checkpoint of both with "
            f"`orthrus export {view} OUT --base BASE`"
        ) from error
