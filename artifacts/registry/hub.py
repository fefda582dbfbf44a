"""Publishing to the Hugging Face hub, through its own client: the files, the card and the attestations as they are.

The token is the client's business (`hf auth login`, HF_TOKEN). A repository that does not exist yet is made private.
"""

from __future__ import annotations

from artifacts.bundle import Bundle
from artifacts.errors import StoreError


def upload(bundle: Bundle, name: str) -> None:
    """Put every file of the bundle into the repository `name` in one commit.

    Raises:
        StoreError: the bundle is damaged, or the hub cannot be reached or refuses.
    """
    bundle.refuse_damage()
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        # The whole bundle and nothing else: what an earlier one left there would not be in the manifest.
        api.upload_folder(repo_id=name, folder_path=bundle.folder, commit_message=bundle.digest, delete_patterns="*")
    except Exception as error:  # what it speaks HTTP with, and so what that raises, differs between its versions
        raise StoreError(
            f"the Hugging Face hub did not take {name}",
            where=api.endpoint,
            why=str(error).splitlines()[0] if str(error) else type(error).__name__,
            way_out="`hf auth login` stores a token that may write; then publish again: what arrived is not sent twice",
        ) from error
