"""Backbones from and to the Hugging Face Hub, through huggingface_hub; safetensors only, so nothing is unpickled."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mixmask.engine.backbones import is_backbone_file
from mixmask.engine.errors import CheckpointError, RunFailure, UserError
from mixmask.engine.wording import printable

FILES = ("backbone.safetensors", "model.safetensors")  # ours first, then what timm and transformers write


def hub_file(name: str, download: bool = True) -> Path:
    """The safetensors file of a model on the Hub, from huggingface_hub's cache if it is there.

    Args:
        name: ``OWNER/NAME``, with ``@REVISION`` for a branch, a tag or a commit.
        download: Whether it may be downloaded.

    Raises:
        UserError: If the name is malformed, there is no such model or no safetensors file in it.
        RunFailure: If the Hub cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub import errors

    repository, _, revision = name.partition("@")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", repository) is None:
        raise UserError(
            f"hf:{name}: OWNER/NAME or OWNER/NAME@REVISION was expected, for example hf:timm/resnet50.a1_in1k"
        )
    for file in FILES:
        try:
            return Path(
                huggingface_hub.hf_hub_download(
                    repository, file, revision=revision or None, local_files_only=not download
                )
            )
        except errors.LocalEntryNotFoundError as error:
            if not download:
                continue
            raise RunFailure(f"hf:{name}: the Hub cannot be reached ({_first_line(error)})") from None
        except errors.EntryNotFoundError:
            continue
        except errors.GatedRepoError:
            raise UserError(
                f"hf:{name}: this model is gated: accept its terms on its page, then `hf auth login`"
            ) from None
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
            what = "revision" if isinstance(error, errors.RevisionNotFoundError) else "model"
            raise UserError(f"hf:{name}: no such {what} on the Hub, or it is private (`hf auth login`)") from None
        except Exception as error:
            if not _of_network(error):
                raise
            raise RunFailure(f"hf:{name}: {_first_line(error)}") from None
    if not download:
        raise UserError(f"hf:{name}: not downloaded yet, and a dry run downloads nothing")
    raise CheckpointError(f"hf:{name}: holds neither {' nor '.join(FILES)}; other formats are not read from the Hub")


def push(backbone: Path, repository: str, card: str, private: bool, message: str) -> str:
    """Upload a backbone with its model card in one commit.

    Args:
        backbone: This project's ``backbone.safetensors``.
        repository: ``OWNER/NAME``; made if it does not exist.
        card: The model card, as Markdown.
        private: Whether a new model is private.
        message: The commit message.

    Returns:
        The address of the commit.

    Raises:
        UserError: If the file is no backbone of ours, the name is malformed, or you may not write there.
        RunFailure: If the Hub cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd, errors

    if not backbone.is_file() or not is_backbone_file(backbone):
        raise CheckpointError(
            f"{backbone}: not a backbone.safetensors of this project, the only format that is uploaded"
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", repository) is None:
        raise UserError(f"{repository}: OWNER/NAME was expected, for example our-lab/mixmask-r50")
    api = huggingface_hub.HfApi()
    files: list[Any] = [
        CommitOperationAdd(FILES[0], str(backbone)),
        CommitOperationAdd("README.md", card.encode()),
    ]
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.create_commit(repository, files, commit_message=message)
    except errors.HfHubHTTPError as error:
        code = getattr(error.response, "status_code", None)
        if code in (401, 403):
            raise UserError(f"{repository}: you may not write there ({code}): log in with `hf auth login`") from None
        raise RunFailure(f"{repository}: {_first_line(error)}") from None
    except Exception as error:
        if not _of_network(error):
            raise
        raise RunFailure(f"{repository}: the Hub cannot be reached ({_first_line(error)})") from None
    return str(done.commit_url)


def _of_network(error: Exception) -> bool:
    """Whether the network or the disk failed. Which library speaks HTTP depends on the version of huggingface_hub."""
    from huggingface_hub import errors

    library = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError | errors.HfHubHTTPError) or library in ("httpx", "httpx2", "httpcore", "requests")


def _first_line(error: Exception) -> str:
    return printable((str(error) or type(error).__name__).splitlines()[0])
