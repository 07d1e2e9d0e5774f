"""What a checkpoint says of its use: how to sample, what ends an answer, and its chat template."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..runtime.errors import InputError
from ..runtime.manifest import CHAT_TEMPLATE, MAX_TEMPLATE_BYTES
from ..runtime.sampling_options import Sampling
from .config import has_file, read_json_object

GENERATION = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"


def read_generation(folder: Path) -> tuple[dict[str, Any], Sampling]:
    """generation_config.json, {} where there is none, and the sampling that it asks for."""
    path = folder / GENERATION
    generation = read_json_object(path) if has_file(path) else {}
    return generation, read_sampling(generation, str(path))


def read_sampling(generation: Mapping[str, Any], where: str) -> Sampling:
    """How tokens are drawn unless a caller says otherwise, out of the fields of
    generation_config.json. Raises CheckpointError that names the field."""
    names = [field.name for field in fields(Sampling)]
    given = {name: generation[name] for name in names if generation.get(name) is not None}
    is_drawn = generation.get("do_sample")
    if not isinstance(is_drawn, bool | None):
        raise CheckpointError(
            f"{where}: do_sample: expected true or false, found {is_drawn!r:.200}"
        )
    if is_drawn is False:
        given["temperature"] = 0.0
    try:
        return Sampling(**given)
    except InputError as error:
        raise CheckpointError(f"{where}: {error}; correct it, or leave the field out") from None


def read_eos(generation: Mapping[str, Any], vocab_size: int, where: str) -> tuple[int, ...]:
    """The ids that end a text, out of the fields of generation_config.json: one, several, or none.
    Raises CheckpointError for what is no id."""
    found = generation.get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    for id in ids:
        if type(id) is not int or not 0 <= id < vocab_size:
            raise CheckpointError(
                f"{where}: eos_token_id: expected token ids from 0 to {vocab_size - 1}, found "
                f"{id!r:.200}; correct it, or leave the field out"
            )
    return tuple(ids)


def read_chat_template(folder: Path) -> str | None:
    """The text of chat_template.jinja, or else of the field in tokenizer_config.json, of which the
    one named `default` counts where there are several."""
    path = folder / CHAT_TEMPLATE
    if has_file(path):
        try:
            with path.open("rb") as file:
                content = file.read(MAX_TEMPLATE_BYTES + 1)
            _check_size(len(content), str(path))
            return content.decode()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path}: not UTF-8 ({error}); download the file again") from None
    path = folder / TOKENIZER_CONFIG
    found = read_json_object(path).get("chat_template") if has_file(path) else None
    if isinstance(found, list):
        named = [t for t in found if isinstance(t, dict) and t.get("name") == "default"]
        found = named[0].get("template") if named else None
    return None if found is None else check_chat_template(found, f"{path}: chat_template")


def check_chat_template(text: object, where: str) -> str:
    """The text, if it can be one. Whether it can be rendered is told when it is used."""
    if not isinstance(text, str):
        raise CheckpointError(f"{where}: expected a text, found {type(text).__name__}")
    try:
        _check_size(len(text.encode()), where)
    except UnicodeEncodeError:
        raise CheckpointError(f"{where}: expected valid Unicode, found half a pair") from None
    return text


def _check_size(num_bytes: int, where: str) -> None:
    if num_bytes > MAX_TEMPLATE_BYTES:
        raise CheckpointError(
            f"{where}: expected a chat template of at most {MAX_TEMPLATE_BYTES} bytes, found more; "
            "remove it to compile without one"
        )
