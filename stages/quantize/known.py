"""What `type: auto` has measured of a checkpoint, kept where `pipeline plan --explore` finds it.

One small file a checkpoint, in the pipeline's own folder: a measurement of hours should not be known to one run alone.
The last one counts. Rounding weighs columns by the importance matrix: what was measured with one holds for that one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from artifacts.disk import write_atomically
from artifacts.home import cache_dir
from artifacts.manifest import canonical_json
from stages.quantize.options import Group, Option
from stages.quantize.sensitivity import Divergence
from stages.quantize.types import FLOATS
from stages.runtimes.imatrix import Importance


@dataclass(frozen=True)
class Costs:
    """Groups of tensors, and what each type costs them."""

    groups: Sequence[tuple[Sequence[str], Mapping[str, Divergence]]]

    def of(self, types: Mapping[str, str]) -> Divergence | None:
        """What a file with these types should come to: the sum over groups, as long as all of it is small.

        Where the tensors of a group have several types, the mean of what each would cost. None: one of the types was
        not looked at, or a tensor is missing.
        """
        text = refusal = 0.0
        for tensors, costs in self.groups:
            for name in tensors:
                type = types.get(name, "")
                cost = Divergence(0.0, 0.0) if type in FLOATS else costs.get(type)
                if cost is None:
                    return None
                text += cost.text / len(tensors)
                refusal += cost.refusal / len(tensors)
        return Divergence(text, refusal)


def matrix_digest(importance: Importance | None) -> str:
    """By which an importance matrix is known again, however a recipe names it; "" for none."""
    if importance is None:
        return ""
    found = hashlib.sha256()
    for name in sorted(importance):
        found.update(f"{name} {importance[name].size}\n".encode())
        found.update(importance[name].astype("<f4").tobytes())
    return found.hexdigest()


def known_costs(checkpoint: str, matrix: str) -> Costs | None:
    """What is known of the checkpoint with this digest, rounded with the matrix of that `matrix_digest`."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        noted = json.loads(_path(checkpoint).read_bytes())
        if noted["matrix"] != matrix:
            return None
        return Costs(
            [
                (tuple(map(str, tensors)), {type: Divergence(*map(float, cost)) for type, cost in costs.items()})
                for tensors, costs in noted["groups"]
            ]
        )
    return None


def note_costs(checkpoint: str, options: Mapping[Group, Sequence[Option]], matrix: str) -> None:
    """Keep it; a home that cannot be written to keeps nothing."""
    groups = [
        [group.tensors, {option.type: [option.cost.text, option.cost.refusal] for option in few}]
        for group, few in options.items()
    ]
    path = _path(checkpoint)
    with suppress(OSError):
        write_atomically(path, canonical_json({"matrix": matrix, "groups": groups}), path.parent)


def _path(checkpoint: str) -> Path:
    return cache_dir() / "sensitivity" / f"{checkpoint}.json"
