"""A folder in timm's hub format → the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from vitkd_cli.errors import UserError, first_line


def check_upload(repository: str) -> None:
    """Refuse an upload that cannot work before the export is made: no such name, no network, no login."""
    try:
        validate_repo_id(repository)
        _, _ = repository.split("/")
    except ValueError:
        raise UserError(
            f"--push-to-hub {repository!r} is no ORG/NAME", "such as --push-to-hub me/my-student"
        ) from None
    if constants.HF_HUB_OFFLINE:
        raise UserError("--push-to-hub: HF_HUB_OFFLINE is set, so nothing is uploaded", "unset it")
    if get_token() is None:
        raise UserError("--push-to-hub: nobody is logged in to the Hub", "hf auth login, or set HF_TOKEN")


def push(folder: Path, repository: str) -> str:
    """Upload what was checked, file by file as it lies there; exit code 3 where the Hub refuses.

    timm's own ``push_to_hf_hub`` writes the folder anew, with ``num_classes`` among the model's arguments,
    and transformers refuses such a folder.

    Returns:
        The repository's address.
    """
    api = HfApi(library_name="timm")
    try:
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="Add model")
    except Exception as problem:  # the Hub's errors, httpx's, the system's
        raise UserError(
            f"--push-to-hub {repository}: {first_line(problem)}",
            f"{folder} is written and checked; check name, rights and network, and push it again",
            exit_code=3,
        ) from problem
    return str(address)
