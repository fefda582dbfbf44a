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
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=bundle.folder, commit_message=bundle.digest)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise StoreError(
            f"the Hugging Face hub did not take {name}",
            why=str(error).splitlines()[0] if str(error) else type(error).__name__,
            way_out="`hf auth login` stores a token that may write; then publish again: what arrived is not sent twice",
        ) from error
