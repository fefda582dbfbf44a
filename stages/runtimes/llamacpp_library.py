"""llama.cpp through ctypes: the few calls that the runtime needs, with ownership and errors in Python's terms.

Notable:
- every sequence has a KV stream of its own (`kv_unified` off). With one shared buffer, a token's attention is summed
  in an order that depends on what the other sequences hold;
- prompts are prefilled one sequence at a time, or several of one length (llama.cpp would cut others into pieces that
  depend on their lengths), and answers are decoded one token a sequence, always at least two rows: for a single row
  llama.cpp takes other kernels (`n < 2` in its sgemm.cpp, split-KV attention in ops.cpp). So an answer does not depend
  on what it is batched with;
- llama.cpp's log goes into a ring of lines that errors quote; nothing is printed.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from artifacts.errors import StageError
from stages.machine import cores

CacheType = Literal["F16", "Q8_0"]
"""How keys and values are kept."""

UBATCH: Final = 2048  # tokens computed at once; results with 512 differ between batched and single runs
ROWS_AT_LEAST: Final = 2  # of a decoding step, see above
_PROMPT: Final = 32  # tokens of a prompt without its prefix, for which there is room when several are read together
_CACHE_TYPES: Final = {"F16": 1, "Q8_0": 8}  # ggml's numbers
_SPINS: Final = "3000"  # turns of a waiting thread before it sleeps, about 50 microseconds
_LOG: Final[deque[str]] = deque(maxlen=40)
_HEARD: Final[list[list[str]]] = []  # by `logged`
_KEPT: Final[list[object]] = []  # callbacks that C holds must outlive it


def cache_type_of(device: Mapping[str, int]) -> CacheType:
    """How a device keeps keys and values (`Context.device`)."""
    return "Q8_0" if device.get("kv_cache_bits") == 8 else "F16"


@cache
def library() -> ModuleType:
    """The loaded `llama_cpp.llama_cpp`, its log captured.

    Raises:
        StageError: llama-cpp-python is not installed or cannot be loaded.
    """
    # Read by libgomp when it is loaded. By default a waiting thread spins for milliseconds, hundreds of times a token.
    # Beside other busy programs it starves the thread it waits for: 13 tokens/s measured so, 95 without spinning.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
    try:
        import llama_cpp.llama_cpp as lib
    except (ImportError, OSError, RuntimeError) as error:
        raise StageError(
            "llama.cpp cannot be loaded",
            why=str(error),
            way_out='install it: pip install "icet-pipeline[stages]" (llama-cpp-python is built from source)',
        ) from error

    def keep(level: int, text: bytes, _: object) -> None:
        del level
        line = text.decode("utf-8", errors="replace").rstrip()
        if line.strip("."):
            _LOG.append(line)
            for lines in _HEARD:
                lines.append(line)

    callback = lib.llama_log_callback(keep)
    _KEPT.append(callback)
    lib.llama_log_set(callback, ctypes.c_void_p(0))
    lib.llama_backend_init()
    found: ModuleType = lib
    return found


@cache
def vision_library() -> ModuleType:
    """The loaded `llama_cpp.mtmd_cpp`, its log captured too."""
    library()
    import llama_cpp.mtmd_cpp as lib

    lib.mtmd_log_set(_KEPT[0], ctypes.c_void_p(0))
    lib.mtmd_helper_log_set(_KEPT[0], ctypes.c_void_p(0))
    found: ModuleType = lib
    return found


def log_tail() -> str:
    """The last lines that llama.cpp logged, for error messages."""
    return " | ".join(list(_LOG)[-4:]) or "llama.cpp gave no reason"


@contextmanager
def logged() -> Iterator[list[str]]:
    """Every line that llama.cpp logs meanwhile."""
    library()
    lines: list[str] = []
    _HEARD.append(lines)
    try:
        yield lines
    finally:
        _HEARD.remove(lines)


class TextModel:
    """A loaded language model and its vocabulary."""

    def __init__(self, path: Path, *, allocate: bool = True) -> None:
        """Load `path`, whose header must have been checked.

        The file is read, not mapped: llama.cpp keeps most types in an order of its own, so a mapped file would be in
        memory twice (7.5 instead of 4.3 GiB for 6.4 B parameters in Q4_K_M).

        Args:
            allocate: False: weights are laid out, but neither reserved nor read, and so is what a context of this model
                would hold (`stages.runtimes.rehearsal`); nothing can be computed.

        Raises:
            StageError: llama.cpp refuses the file.
        """
        self._lib = library()
        params = self._lib.llama_model_default_params()
        params.n_gpu_layers = 0
        params.load_mode = self._lib.LLAMA_LOAD_MODE_NONE
        params.no_alloc = not allocate
        self.pointer = self._lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self.pointer:
            raise StageError(
                f"llama.cpp does not load {path.name}",
                where=str(path),
                why=log_tail(),
                way_out="rebuild the file with the stage 'gguf'",
            )
        self.path = path
        self._vocab = self._lib.llama_model_get_vocab(self.pointer)
        self.vocab_size = int(self._lib.llama_vocab_n_tokens(self._vocab))
        self.width = int(self._lib.llama_model_n_embd(self.pointer))
        self.nbytes = int(
            self._lib.llama_model_size(self.pointer)
        )  # of all weights, each tensor once, whatever copies llama.cpp makes
        heads, kv_heads, layers = (
            int(ask(self.pointer))
            for ask in (self._lib.llama_model_n_head, self._lib.llama_model_n_head_kv, self._lib.llama_model_n_layer)
        )
        self.token_bytes = 4 * layers * kv_heads * (self.width // max(heads, 1))  # keys and values of one token, F16
        self.trained_context = int(self._lib.llama_model_n_ctx_train(self.pointer))  # tokens
        template = self._lib.llama_model_chat_template(self.pointer, None)
        self.chat_template: str | None = template.decode("utf-8") if template else None

    def tokenize(self, text: str, *, start: bool = False) -> list[int]:
        """Token ids of `text`, control tokens recognised; BOS only at the `start` and only if the model wants it."""
        raw = text.encode("utf-8")
        if not raw and not start:
            return []
        size = len(raw) + 8
        buffer = (self._lib.llama_token * size)()
        count = int(self._lib.llama_tokenize(self._vocab, raw, len(raw), buffer, size, False, True))
        if count < 0:
            raise StageError("llama.cpp cannot tokenize a prompt", where=str(self.path), why=log_tail())
        tokens = [int(token) for token in buffer[:count]]
        if start and self._lib.llama_vocab_get_add_bos(self._vocab):
            bos = int(self._lib.llama_vocab_bos(self._vocab))
            if tokens[:1] != [bos]:
                tokens.insert(0, bos)
        return tokens

    def text(self, tokens: Sequence[int]) -> str:
        """The text of token ids, control tokens left out; a cut character becomes U+FFFD."""
        if not tokens:
            return ""
        ids = (self._lib.llama_token * len(tokens))(*tokens)
        size = 16 * len(tokens) + 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = int(self._lib.llama_detokenize(self._vocab, ids, len(tokens), buffer, size, False, False))
            if count >= 0:
                return buffer.raw[:count].decode("utf-8", errors="replace")
            size = -count

    def ends(self, token: int) -> bool:
        """Whether the token ends a turn."""
        return bool(self._lib.llama_vocab_is_eog(self._vocab, token))

    def close(self) -> None:
        if self.pointer:
            self._lib.llama_model_free(self.pointer)
            self.pointer = None


class Sequences:
    """A context of several sequences, each with its own KV stream.

    Row i of a step is sequence i, so the sequences that are decoded together are always the first n.
    """

    def __init__(
        self,
        model: TextModel,
        *,
        sequences: int,
        length: int,
        outputs: int | None = None,
        ubatch: int = UBATCH,
        cache_type: CacheType = "F16",
    ) -> None:
        """Reserve the memory.

        Args:
            sequences: how many. length: tokens that each can hold; rounded up to a multiple of 256 by llama.cpp.
            outputs: how many tokens of one call may give logits; default: one a sequence.
            ubatch: tokens computed at once, at most; a call with more is split.

        Raises:
            StageError: llama.cpp refuses, for instance for want of memory.
        """
        self._lib = library()
        self._model = model
        self.sequences = sequences
        self.length = -(-length // 256) * 256
        self.outputs = max(sequences, outputs or 0)
        params = self._lib.llama_context_default_params()
        params.n_ctx = self.length * sequences
        params.n_seq_max = sequences
        self.room = min(max(self.length, sequences * _PROMPT), ubatch)  # tokens that are computed at once
        params.n_batch = max(self.length, self.room)
        params.n_ubatch = self.room
        params.n_outputs_max = self.outputs
        params.n_threads = params.n_threads_batch = cores()
        params.type_k = params.type_v = _CACHE_TYPES[cache_type]
        params.kv_unified = False
        params.offload_kqv = False
        params.op_offload = False
        params.no_perf = True
        self.pointer = self._lib.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            raise StageError(
                f"llama.cpp cannot make a context of {sequences} x {self.length} tokens",
                where=str(model.path),
                why=log_tail(),
                way_out="use fewer sequences at once or a shorter context",
            )
        self._memory = self._lib.llama_get_memory(self.pointer)
        self._tokens = self._lib.llama_batch_init(params.n_batch, 0, 1)
        self._vectors = self._lib.llama_batch_init(self.length, model.width, 1)

    def read(self, sequence: int, position: int, tokens: Sequence[int], outputs: int = 1) -> NDArray[np.float32]:
        """Append tokens to one sequence; (outputs, vocabulary) logits after the last `outputs` of them (a copy)."""
        batch = self._tokens
        batch.n_tokens = len(tokens)
        for row, token in enumerate(tokens):
            batch.token[row] = token
            self._place(batch, row, sequence, position + row, wanted=row >= len(tokens) - outputs)
        self._decode(batch)
        rows = range(len(tokens) - outputs, len(tokens))
        return np.stack([self._logits(row) for row in rows]) if outputs else np.empty((0, 0), np.float32)

    def read_together(
        self, sequences: Sequence[int], positions: Sequence[int], prompts: Sequence[Sequence[int]]
    ) -> NDArray[np.float32]:
        """Append a prompt to each of these sequences; (sequences, vocabulary) logits after each (a copy).

        The prompts have one length, and together no more than `room` tokens.
        """
        batch = self._tokens
        length = len(prompts[0])
        batch.n_tokens = length * len(prompts)
        for place, (sequence, position, tokens) in enumerate(zip(sequences, positions, prompts, strict=True)):
            for offset, token in enumerate(tokens):
                row = place * length + offset
                batch.token[row] = token
                self._place(batch, row, sequence, position + offset, wanted=offset == length - 1)
        self._decode(batch)
        return np.stack([self._logits((place + 1) * length - 1) for place in range(len(prompts))])

    def look(self, sequence: int, position: int, vectors: NDArray[np.float32]) -> None:
        """Append image embeddings (image tokens, width) to one sequence."""
        batch = self._vectors
        flat = np.ascontiguousarray(vectors, dtype=np.float32)
        batch.n_tokens = len(flat)
        ctypes.memmove(batch.embd, flat.ctypes.data, flat.nbytes)
        for row in range(len(flat)):
            self._place(batch, row, sequence, position + row, wanted=False)
        self._decode(batch)

    def step(
        self, tokens: Sequence[int], positions: Sequence[int], pick: Callable[[int, NDArray[np.float32]], int]
    ) -> list[int]:
        """Append one token to each of the first `len(tokens)` sequences; what `pick` makes of each row's logits."""
        batch = self._tokens
        batch.n_tokens = len(tokens)
        for row, (token, position) in enumerate(zip(tokens, positions, strict=True)):
            batch.token[row] = token
            self._place(batch, row, row, position, wanted=True)
        self._decode(batch)
        return [pick(row, self._logits(row)) for row in range(len(tokens))]

    def trim(self, sequence: int, length: int) -> None:
        """Forget everything of a sequence from position `length` on."""
        if not self._lib.llama_memory_seq_rm(self._memory, sequence, length, -1):
            raise StageError("llama.cpp cannot shorten a sequence of this model", where=str(self._model.path))

    def copy(self, source: int, target: int) -> None:
        """Make one sequence hold what another holds."""
        self._lib.llama_memory_seq_rm(self._memory, target, -1, -1)
        self._lib.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def close(self) -> None:
        if self.pointer:
            self._lib.llama_batch_free(self._tokens)
            self._lib.llama_batch_free(self._vectors)
            self._lib.llama_free(self.pointer)
            self.pointer = None

    @staticmethod
    def _place(batch: ctypes.Structure, row: int, sequence: int, position: int, *, wanted: bool) -> None:
        batch.pos[row] = position
        batch.n_seq_id[row] = 1
        batch.seq_id[row][0] = sequence
        batch.logits[row] = wanted

    def _decode(self, batch: ctypes.Structure) -> None:
        status = int(self._lib.llama_decode(self.pointer, batch))
        if status:
            raise StageError(
                f"llama.cpp could not decode (status {status})", where=str(self._model.path), why=log_tail()
            )

    def _logits(self, row: int) -> NDArray[np.float32]:
        pointer = self._lib.llama_get_logits_ith(self.pointer, row)
        view: NDArray[np.float32] = np.ctypeslib.as_array(pointer, shape=(self._model.vocab_size,))
        return view
