"""Weights of the Hugging Face hub, `hf_hub:OWNER/NAME[@REVISION]`, through its cache.

Only safetensors are fetched and read, and `config.json`: a pickle is not even looked at. What is in
the cache is found without a network, too. Needs huggingface_hub, imported where the first such
address is named; it reads the variables HF_HOME, HF_HUB_OFFLINE and HF_TOKEN.
"""

import re
from pathlib import Path
from typing import Any

from stvit_jax.checkpoints import files, safetensors_files
from stvit_jax.errors import UserError, listing, one_line

_SCHEME = "hf_hub:"
_WEIGHTS = "model.safetensors"
_NAME = r"[A-Za-z0-9](?:[\w.-]*\w)?"
_SECONDS = 10  # that a hub has for its first answer


def is_address(text: str) -> bool:
    """Whether a text names weights on a hub."""
    return text.startswith(_SCHEME)


def fetched(address: str) -> Path:
    """The folder in the cache that holds the weights, and `config.json` where there is one.

    Args:
      address: `hf_hub:OWNER/NAME[@REVISION]`, a branch, tag or commit; `main` where it names none.

    Raises:
      UserError: malformed; nothing of that name, there or in the cache; or no safetensors.
    """
    found = re.fullmatch(rf"{_SCHEME}({_NAME}/{_NAME})(?:@([\w./-]+))?", address, re.ASCII)
    if not found:
        raise UserError(f"{one_line(address)} is no address of a hub: write hf_hub:OWNER/NAME")
    repository, revision = found.groups()
    file = _fetch(address, repository, _WEIGHTS, revision, optional=True)
    if file is None:
        index = _WEIGHTS + safetensors_files.INDEX
        file = _fetch(address, repository, index, revision, optional=True)
    if file is None:
        raise UserError(f"{address} has no {_WEIGHTS}, and nothing else is read from a hub")
    commit, held = file.parent.name, [file]  # one commit, whatever happens there meanwhile
    if file.name != _WEIGHTS:
        shards = safetensors_files.read_shards(file)
        if others := [shard for shard in shards if files.suffix(Path(shard)) != ".safetensors"]:
            raise UserError(f"{address} has shards that are no safetensors: {listing(others, 3)}")
        held = [_fetch(address, repository, shard, commit) for shard in shards]
    for shard in held:
        if files.beginning(shard)[8:9] != b"{":
            raise UserError(f"{shard} is no safetensors file, and nothing else is read from a hub")
    _fetch(address, repository, "config.json", commit, optional=True)
    return file.parent


def _fetch(
    address: str, repository: str, file: str, revision: str | None, optional: bool = False
) -> Any:
    """The path of a file in the cache; None where it is `optional` and the hub has none."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise UserError(f"{address} needs: pip install huggingface_hub") from error
    try:
        return Path(
            huggingface_hub.hf_hub_download(
                repository, file, revision=revision, etag_timeout=_SECONDS
            )
        )
    except errors.LocalEntryNotFoundError as error:
        if optional and _is_held(huggingface_hub, repository, revision):
            return None
        raise UserError(
            f"{address}: the hub cannot be reached, and the cache in "
            f"{huggingface_hub.constants.HF_HUB_CACHE} holds no {file} of it"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{address}: there is no revision {revision}") from error
    except errors.GatedRepoError as error:
        raise UserError(f"{address} is gated: ask for access there, and set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{address}: there is none, or it is private: set HF_TOKEN") from error
    except errors.EntryNotFoundError as error:
        if optional:
            return None
        raise UserError(f"{address} has no {file}") from error
    except Exception as error:  # of the network and the disk, whatever the library makes of them
        raise UserError(f"{address} cannot be fetched: {one_line(error)}") from error


def _is_held(library: Any, repository: str, revision: str | None) -> bool:
    """Whether the cache has weights of this revision."""
    names = (_WEIGHTS, _WEIGHTS + safetensors_files.INDEX)
    found = (library.try_to_load_from_cache(repository, n, revision=revision) for n in names)
    return any(isinstance(path, str) for path in found)
