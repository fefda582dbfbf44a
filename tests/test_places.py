"""How registries and layouts are named."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifacts.errors import RecipeError, StoreError
from artifacts.registry.place import Reference, looks_like_reference


@pytest.mark.parametrize(
    ("text", "kind", "repository", "reference"),
    [
        ("localhost:5000/a/b:v1", "registry", "localhost:5000/a/b", "v1"),
        ("oci:ghcr.io/me/model", "registry", "ghcr.io/me/model", ""),
        ("oci://ghcr.io/me/model:v1@sha256:" + "a" * 64, "registry", "ghcr.io/me/model", "sha256:" + "a" * 64),
        ("oci-layout:dist/x", "layout", "dist/x", ""),
        ("oci-layout:./dist:v1", "layout", "dist", "v1"),
    ],
)
def test_names_are_understood(text: str, kind: str, repository: str, reference: str) -> None:
    found = Reference.parse(text)
    assert (found.kind, found.repository, found.reference) == (kind, repository, reference)
    assert looks_like_reference(text)


@pytest.mark.parametrize("text", ["dist", "./dist/x", "gguf", "run:gguf", "/abs/path", "quickstart-20261124:gguf"])
def test_folders_and_stages_are_no_references(text: str) -> None:
    assert not looks_like_reference(text)


def test_a_name_with_a_password_is_refused_without_repeating_it() -> None:
    with pytest.raises(RecipeError) as caught:
        Reference.parse("oci:me:s3cret@ghcr.io/me/model:v1")
    assert "s3cret" not in str(caught.value)


@given(text=st.text(max_size=60))
def test_no_name_breaks_the_parser(text: str) -> None:
    with suppress(RecipeError, StoreError):
        Reference.parse(text)
