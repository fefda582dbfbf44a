"""The policy: a frozen vision-language model, LoRA on its language backbone, and one linear layer as the value model.

- The reference policy is the same model with the adapter disabled; no second copy exists.
- One pass of the trunk gives log-probabilities and values; the head is applied to response positions only.
- Of image encoder and projector nothing is trained, and the encoder is not called here at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, cast

from stages.lppo.quantization import Quantizer
from stages.lppo.rollout import Prefixes, Responses, Tags, attention_mask, pack_responses
from stages.models.adapter import LoRA, with_adapter
from stages.models.adapter import merged as merged
from stages.models.prompting import Prompting

if TYPE_CHECKING:
    import torch
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

    from stages.lppo.sharding import Shards
    from stages.models.crossing import Crossing, Placed
    from stages.models.family import Family, Geometry


class Policy:
    """LoRA on `family.trunk(model)`, in place, and a value head that starts at zero.

    Args:
        model: loaded with gradients off; it is changed in place.
        quantizer: what the policy's weights are rounded to; with `checkpoint`, the folder that the model was loaded
            from, and `imatrix`: see `quantization.Quantizer`.
        temperature: of sampling; the policy that is trained is the one at this temperature.
        shards: workers that each keep a part of the frozen weights; None: this process has them all.
        gradient_checkpointing: keep a block's input only, and compute its activations again in the backward pass.
        seed: of the adapter's initialisation.

    Raises:
        StageError: no linear layer of these names. SourceError: no chat template, or no token for the image.
    """

    def __init__(
        self,
        family: Family,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        lora: LoRA,
        *,
        quantizer: str | None = None,
        checkpoint: Path | None = None,
        imatrix: Path | None = None,
        temperature: float = 1.0,
        gradient_checkpointing: bool = False,
        shards: Shards | None = None,
        seed: int = 0,
    ):
        import torch

        self._family = family
        self._model = model
        self._tokenizer = tokenizer
        self.temperature = temperature
        self.embed = cast("torch.nn.Module", model.get_input_embeddings())
        self._prompting = Prompting(family, tokenizer, self.embed)
        self._head = family.head(model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.trunk = with_adapter(family.trunk(model), lora)
        self._quantizer = None
        if quantizer is not None:
            self._quantizer = Quantizer(self.trunk, quantizer, checkpoint=checkpoint, imatrix=imatrix)
        self._recomputes = gradient_checkpointing
        if gradient_checkpointing:
            inner = cast("PreTrainedModel", self.trunk.get_base_model())
            inner.activation_checkpointing_enable({"use_reentrant": False})
        self._shards = shards
        if shards is not None:
            shards.split(model, self.trunk, self._pass_a_token)
        embedding = cast("torch.Tensor", self.embed.weight)
        self.device = embedding.device
        self.dtype = embedding.dtype
        self.value_head = torch.nn.Linear(embedding.shape[1], 1).to(self.device)
        torch.nn.init.zeros_(self.value_head.weight)
        torch.nn.init.zeros_(self.value_head.bias)
        stop = model.generation_config.eos_token_id
        ends = {*(stop if isinstance(stop, list) else [stop]), tokenizer.eos_token_id} - {None}
        self.end_tokens = torch.tensor(sorted(ends), device=self.device)
        self.end_of_turn = int(cast("int", tokenizer.eos_token_id if tokenizer.eos_token_id in ends else min(ends)))

    # --- states ---

    def before_image(self) -> torch.Tensor:
        """Embeddings of what the chat template prints before the image: (tokens, width)."""
        return self._prompting.embedded(self._prompting.around_image("")[0])

    def after_image(self, prompt: str) -> torch.Tensor:
        """Embeddings of the prompt and of all that follows up to the answer: (tokens, width)."""
        return self._prompting.embedded(self._prompting.around_image(prompt)[1])

    def image(self, features: torch.Tensor, geometry: Geometry) -> Placed:
        """Exit features (patches, vision width) as what stands in the prompt for the image."""
        import torch

        with torch.no_grad():
            tokens = self._family.project(self._model, features, geometry)
            return self._prompting.image(tokens, geometry)

    def embedded(self, ids: Sequence[int]) -> torch.Tensor:
        return self._prompting.embedded(ids)

    # --- one pass of the trunk ---

    def new_cache(self) -> Cache:
        from transformers import DynamicCache

        return DynamicCache()

    def hidden(
        self,
        embeddings: torch.Tensor,
        queries: Tags,
        keys: Tags,
        crossing: Crossing | None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Last hidden states (scenes, queries, width); `keys` are the tokens in the cache, then `queries` again."""
        import torch

        if self._shards is not None:
            self._shards.begin(torch.is_grad_enabled())
        beside = {}
        if crossing is not None:
            cached = cache is not None and cache.get_seq_length() > 0
            beside = crossing.arguments(queries.position, cached=cached)
        out = self.trunk(
            inputs_embeds=embeddings,
            attention_mask=attention_mask(queries, keys, self.dtype),
            position_ids=queries.position,
            past_key_values=cache,
            use_cache=cache is not None,
            **beside,
        )
        return cast("torch.Tensor", out.last_hidden_state)

    def logprobs(self, hidden: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (..., vocabulary) at the policy's temperature, float32."""
        logits = self._head(hidden).float()
        return cast("torch.Tensor", (logits if self.temperature == 1 else logits / self.temperature).log_softmax(-1))

    def values(self, hidden: torch.Tensor) -> torch.Tensor:
        """V of the states that end in these tokens: (...)."""
        return cast("torch.Tensor", self.value_head(hidden.float())[..., 0])

    def evaluate(self, prefixes: Prefixes, responses: Responses) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of every response token's alternatives, and values of the states before them, in one pass.

        Returns: (tokens, vocabulary) and (tokens,), float32, in the order of `responses.mask.nonzero()`.
        """
        import torch

        packed = pack_responses(prefixes, responses.tokens, responses.mask)
        embeddings = torch.cat([prefixes.embeddings, self.embed(packed.tokens)], 1)
        with self._recomputing():
            hidden = self.hidden(embeddings, packed.tags, packed.tags, prefixes.crossing)
        scene, _, _ = responses.mask.nonzero(as_tuple=True)
        chosen = hidden[scene, packed.predictors[responses.mask]]
        return self.logprobs(chosen), self.values(chosen)

    def first(self, prefixes: Prefixes) -> torch.Tensor:
        """Log-probabilities of what every response may begin with: (scenes, rows, vocabulary), float32."""
        with self._recomputing():
            hidden = self.hidden(prefixes.embeddings, prefixes.tags, prefixes.tags, prefixes.crossing)
        return self.logprobs(hidden.gather(1, prefixes.row_last[:, :, None].expand(-1, -1, hidden.shape[-1])))

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Inside, activations are recomputed where that was asked for and a gradient is taken."""
        import torch

        # transformers recomputes in training mode only. There is no dropout, so nothing else changes.
        self.trunk.train(self._recomputes and torch.is_grad_enabled())
        try:
            yield
        finally:
            self.trunk.eval()

    def _pass_a_token(self, gradient: bool) -> None:
        """Go through the blocks as `evaluate` does, for nothing but their company; gradients are zero."""
        import torch

        embedding = self.embed(self.end_tokens[None, :1])
        with torch.set_grad_enabled(gradient), self._recomputing():
            out = self.trunk(inputs_embeds=embedding, use_cache=False).last_hidden_state
            if gradient:
                (out.float().sum() * 0).backward()

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Inside, adapter and rounding are off: the model as it was before training (the SFT policy of the paper)."""
        import torch

        lifted = nullcontext() if self._quantizer is None else self._quantizer.lifted()
        with torch.no_grad(), self.trunk.disable_adapter(), lifted:
            yield

    def quantize(self) -> None:
        """Round the weights again, with the adapter as it is now; nothing without a quantizer."""
        if self._quantizer is not None:
            self._quantizer.refresh()

    # --- tokens ---

    def ends(self, tokens: torch.Tensor) -> torch.Tensor:
        """Whether each token ends the turn."""
        import torch

        return torch.isin(tokens, self.end_tokens)

    def decode(self, tokens: torch.Tensor) -> str:
        return cast("str", self._tokenizer.decode(tokens.tolist(), skip_special_tokens=True))

    def encode(self, text: str) -> list[int]:
        """What a response is made of, as it stands behind a prompt, without an end."""
        return self._prompting.answer(text)

    # --- what is trained ---

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """Every trained parameter by name, in one stable order."""
        adapter = {f"adapter.{n}": p for n, p in self.trunk.named_parameters() if p.requires_grad}
        value = {f"value.{n}": p for n, p in self.value_head.named_parameters()}
        return adapter | value

    def adapter(self) -> dict[str, torch.Tensor]:
        """The adapter alone, by its names in the trunk, on the CPU."""
        found = {name: parameter for name, parameter in self.trunk.named_parameters() if parameter.requires_grad}
        return {name: parameter.detach().cpu().clone() for name, parameter in found.items()}

    def set_adapter(self, adapter: Mapping[str, torch.Tensor]) -> None:
        """Undo `adapter`."""
        import torch

        parameters = dict(self.trunk.named_parameters())
        with torch.no_grad():
            for name, value in adapter.items():
                parameters[name].copy_(value)

    def rounded_types(self) -> Mapping[str, str]:
        """What each layer's weights are rounded to; empty without a quantizer."""
        return {} if self._quantizer is None else self._quantizer.types


def scaled(adapter: Mapping[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
    """An adapter that changes the weights `share` times as much: s B A is linear in B."""
    return {name: tensor * share if ".lora_B." in name else tensor for name, tensor in adapter.items()}
