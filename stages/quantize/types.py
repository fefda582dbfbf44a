"""Which type each tensor of the language model shall have: what a recipe says, made exact before llama.cpp is asked.

A recipe names a file type (Q4_K_M is a mixture: llama.cpp chooses), and may name types for tensors whose names match a
pattern, for the head and for the embeddings. Here patterns become names of tensors and every type one that the tensor's
rows allow. llama.cpp would do this itself for patterns, but silently; for head and embeddings it ends the process.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from artifacts.errors import RecipeError, StageError
from stages.runtimes import rounding
from stages.runtimes.gguf_header import Header
from stages.runtimes.imatrix import Importance
from stages.runtimes.mixture import Fallback, differing

# llama.cpp's type names and file-type numbers (enum llama_ftype; tools/quantize/quantize.cpp).
TYPES: Final[Mapping[str, int]] = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K_S": 11,
    "Q3_K_M": 12,
    "Q3_K_L": 13,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q5_K_S": 16,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "IQ2_XXS": 19,
    "IQ2_XS": 20,
    "Q2_K_S": 21,
    "IQ3_XS": 22,
    "IQ3_XXS": 23,
    "IQ1_S": 24,
    "IQ4_NL": 25,
    "IQ3_S": 26,
    "IQ3_M": 27,
    "IQ2_S": 28,
    "IQ2_M": 29,
    "IQ4_XS": 30,
    "IQ1_M": 31,
    "BF16": 32,
    "TQ1_0": 36,
    "TQ2_0": 37,
    "MXFP4_MOE": 38,
    "Q1_0": 40,
    "Q2_0": 41,
}
FLOATS: Final = ("F32", "F16", "BF16")
TENSOR_TYPES: Final = (*FLOATS, *rounding.TYPES)  # that one tensor can be given
OUTPUT: Final = "output.weight"
EMBEDDING: Final = "token_embd.weight"


@dataclass(frozen=True)
class Wanted:
    """What a recipe asks for."""

    file_type: str
    tensors: Mapping[str, str] = field(default_factory=dict)  # pattern -> type; the first one that a name holds counts
    output: str | None = None
    embedding: str | None = None

    @property
    def named(self) -> Sequence[str]:
        """Types that it gives to single tensors."""
        return [*self.tensors.values(), *(type for type in (self.output, self.embedding) if type)]


@dataclass(frozen=True)
class Exact:
    """What llama.cpp is told: one type for each of these tensors; the others as the file type has it."""

    file_type: str
    tensors: Mapping[str, str]
    fallbacks: tuple[Fallback, ...] = ()


def check_wanted(wanted: Wanted, *, imatrix: bool) -> None:
    """Refuse what no model could be given.

    Raises:
        RecipeError: an unknown type or pattern, one that needs an importance matrix, or tensor types beside floats.
    """
    for type in wanted.named:
        if type not in TENSOR_TYPES:
            near = difflib.get_close_matches(type, TENSOR_TYPES, n=1, cutoff=0.0)[0]
            raise RecipeError(
                f"no tensor can be given the type {type!r}",
                why=f"types of single tensors are {', '.join(TENSOR_TYPES)}",
                way_out=f"did you mean {near}?",
            )
        if type in rounding.NEED_IMATRIX and not imatrix:
            raise RecipeError(
                f"tensors of the type {type} need an importance matrix",
                why="llama.cpp writes none of types this small without one",
                way_out=IMATRIX_HINT,
            )
    for place, end in (("embedding_type", wanted.embedding), ("output_type", wanted.output)):
        if end in rounding.NEED_IMATRIX:
            raise RecipeError(
                f"{place}: {end} is too small",
                why="it needs an importance matrix, and those hold nothing of embeddings and head",
                way_out="choose Q2_K or larger",
            )
    for pattern in wanted.tensors:
        try:
            re.compile(pattern)
        except re.error as error:
            raise RecipeError(
                f"tensor_types: {pattern!r} is no pattern",
                why=str(error),
                way_out="write a regular expression, for instance 'blk\\.0\\.' or 'ffn_down'",
            ) from error
    if wanted.named and wanted.file_type in FLOATS:
        raise RecipeError(
            f"type: {wanted.file_type} does not go with types for single tensors",
            why="llama.cpp gives every matrix of such a file the same type",
            way_out="name the quantized type that most tensors shall have, and the floats in tensor_types",
        )


IMATRIX_HINT: Final = "add a stage `uses: imatrix` and name it in `imatrix:`, or choose Q2_K, IQ3_S or larger"


def check_patterns(wanted: Wanted, matrices: Collection[str]) -> None:
    """Refuse a pattern that none of these names has.

    Raises:
        RecipeError: with some of the names.
    """
    for pattern in wanted.tensors:
        if not any(re.search(pattern, name) for name in matrices):
            raise RecipeError(
                f"tensor_types: no matrix of this model has a name with {pattern!r} in it",
                why=f"they are called {', '.join(sorted(matrices)[:3])}, ...",
                way_out="`pipeline inspect` lists the tensors of a GGUF",
            )


def chosen_types(wanted: Wanted, matrices: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The types that a recipe gives to single ones of these matrices, whether their rows allow them or not."""
    chosen: dict[str, str] = {}
    for pattern, type in wanted.tensors.items():
        chosen |= {name: type for name in matrices if re.search(pattern, name) and name not in chosen}
    if wanted.output is not None:
        chosen[OUTPUT if OUTPUT in matrices else EMBEDDING] = wanted.output
    if wanted.embedding is not None:
        chosen[EMBEDDING] = wanted.embedding
    return chosen


def resolve(wanted: Wanted, header: Header, importance: Importance | None) -> Exact:
    """The types of single tensors of the model in this file, by name.

    Raises:
        RecipeError: a pattern matches no matrix.
        StageError: there is no head to give a type to, or a type needs an importance matrix that has no entry for the
            tensor.
    """
    matrices = header.matrices
    check_patterns(wanted, matrices)
    chosen = chosen_types(wanted, matrices)
    exact = {}
    for name, type in chosen.items():
        row = matrices[name][0]
        taken = type if type in FLOATS else rounding.row_type(type, row)
        if taken in rounding.NEED_IMATRIX and (importance is None or name not in importance):
            raise StageError(
                f"{name} cannot be given the type {taken}",
                where=str(header.path),
                why="it needs an importance matrix, and there is no entry for this tensor",
                way_out="choose Q2_K or larger for it",
            )
        exact[name] = taken
    taken_for = {name: (type, exact[name]) for name, type in chosen.items()}
    return Exact(wanted.file_type, exact, differing(taken_for, matrices))
