"""Hope (SPEC §7, Eq. 94-97): blocks of a sequence mixer and a continuum memory, as a causal LM.

    h = x + Mixer(norm x)
    y = h + CMS(norm h)

With ``mixer="self_modifying"`` this is Hope, with ``"attention"`` Hope-Attention, and with another
mixer one of the baselines, all in the same shell. Layers may differ in their mixer (Samba).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from nestlearn.levels.level import Level
from nestlearn.memory.state import State
from nestlearn.models.hope.cache import HopeCache, LayerState
from nestlearn.models.hope.configuration import HopeConfig
from nestlearn.models.hope.inputs import input_mask, resume
from nestlearn.nn.continuum import ContinuumMemory
from nestlearn.nn.mixers import build_mixer
from nestlearn.nn.norm import RMSNorm
from nestlearn.nn.write_cost import count_writes, record_writes

CHECKPOINT_CHUNKS = 8  # chunks of a recurrent mixer that are recomputed together
LOGITS_PER_CHUNK = 2**24  # entries of the logits that the loss keeps at a time (64 MB in fp32)


class HopeBlock(nn.Module):
    """One block: ``x + mixer(norm x)``, then ``x + cms(norm x)``.

    Shapes: ``forward(x (B, T, D), (mixer state, cms state), mask (B, T)) -> (y, states)``.
    """

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Any]

    def __init__(self, config: HopeConfig, layer: int = 0):
        super().__init__()
        self.mixer_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = build_mixer(config.layer_mixers[layer], config)
        self.cms_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.cms = ContinuumMemory(
            config.hidden_size,
            config.intermediate_size or 4 * config.hidden_size,
            # An adaptive optimizer makes a sum of many gradients a step as large as any other.
            levels=[Level(period=p, lr_scale=1 / p) for p in config.cms_periods],
            kind=config.cms_kind,
            error="outer",
            activation=config.hidden_act,
        )

    def forward(
        self, x: Tensor, states: LayerState = (None, None), mask: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        """Read ``x`` after what ``states`` hold."""
        recomputes = checkpoints_itself(self.mixer)
        mixed, mixer_state = self._run(self._mix, x, states[0], mask, recomputes)
        x = x + mixed
        fed, cms_state = self._run(self._feed, x, states[1], mask, False)
        return x + fed, (mixer_state, cms_state)

    def _mix(self, x: Tensor, state: State | None, mask: Tensor | None) -> tuple[Tensor, State]:
        return self.mixer(self.mixer_norm(x), state, mask)

    def _feed(self, x: Tensor, state: State | None, mask: Tensor | None) -> tuple[Tensor, State]:
        return self.cms(self.cms_norm(x), state, mask)

    def _run(
        self,
        part: Callable[..., tuple[Tensor, State]],
        x: Tensor,
        state: State | None,
        mask: Tensor | None,
        recomputes: bool,
    ) -> tuple[Tensor, State]:
        if self.gradient_checkpointing and self.training and not recomputes:
            return self._gradient_checkpointing_func(part, x, state, mask)
        return part(x, state, mask)


def checkpoints_itself(mixer: nn.Module) -> bool:
    """Whether the mixer recomputes its own activations chunk by chunk."""
    return hasattr(mixer, "checkpoint_chunks")


class HopePreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation of Hope models."""

    config_class = HopeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _is_stateful = True
    _no_split_modules = ["HopeBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_context_parallel = False

    def _init_weights(self, module: nn.Module) -> None:
        # Every layer of the library initialises itself; only the token tables depend on the config.
        if isinstance(module, nn.Embedding) or module is getattr(self, "lm_head", None):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """See ``PreTrainedModel.from_pretrained``; weights that are missing are an error.

        Raises:
            ValueError: the folder's weights do not fit its configuration.
        """
        wanted = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        missing = sorted(set(info["missing_keys"]) - {"lm_head.weight"})
        if missing:
            raise ValueError(
                f"{len(missing)} weights are missing, first {missing[0]!r}: the folder was saved "
                "by a model with another configuration (mixer, sizes or CMS levels)"
            )
        return (model, info) if wanted else model

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        super()._set_gradient_checkpointing(enable, *args, **kwargs)
        for module in self.modules():
            if checkpoints_itself(module):
                setattr(module, "checkpoint_chunks", CHECKPOINT_CHUNKS if enable else 0)  # noqa: B010

    def init_cache(self, batch_size: int) -> HopeCache:
        """A cache with the learned initial states of ``batch_size`` rows."""
        cache = HopeCache()
        cache.begin(self._base().initial_states(batch_size))
        return cache

    def num_parameters_by_part(self) -> dict[str, int]:
        """Parameters of the token tables, the mixers, the continuum memories and the rest."""
        counts = {"embeddings": 0, "mixers": 0, "cms": 0, "norms": 0}
        for name, parameter in self.named_parameters():
            part = "norms"
            if "embed_tokens" in name or "lm_head" in name:
                part = "embeddings"
            elif ".mixer." in name:
                part = "mixers"
            elif ".cms." in name:
                part = "cms"
            counts[part] += parameter.numel()
        return counts

    def level_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by CMS level over all blocks (the input of ``optim.MultiRate``)."""
        levels: dict[str, list[nn.Parameter]] = {}
        for block in self._base().blocks:
            for name, parameters in block.cms.level_parameters().items():
                levels.setdefault(name, []).extend(parameters)
        return levels

    def _base(self) -> HopeModel:
        return cast("HopeModel", getattr(self, "model", self))


class HopeModel(HopePreTrainedModel):
    """The stack of blocks: token ids (or embeddings) to final hidden states."""

    def __init__(self, config: HopeConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            HopeBlock(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    def initial_states(self, batch_size: int) -> list[LayerState]:
        """Per layer the states before the first token."""
        return [
            (cast(Any, block.mixer).init_state(batch_size), block.cms.init_state(batch_size))
            for block in self.blocks
        ]

    @property
    def blocks(self) -> list[HopeBlock]:
        """The blocks, bottom to top."""
        return cast("list[HopeBlock]", list(self.layers))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: HopeCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPast | tuple:
        """Read tokens.

        Args:
            input_ids: ``(B, T)``; or inputs_embeds: ``(B, T, D)``.
            attention_mask: ``(B, T)`` or ``(B, read + T)``, 1 at real tokens; padding on the left
                or right. Padding is neither read nor written and ticks no clock.
            past_key_values: state to go on from; it is moved forward by this call.
            use_cache: return the state; default: the config's in evaluation, False in training.

        Returns:
            ``last_hidden_state (B, T, D)``, ``past_key_values`` (a ``HopeCache`` or None) and, if
            asked for, ``hidden_states``.

        Raises:
            ValueError: neither or both inputs, ids outside the vocabulary's shape, a foreign cache.
        """
        if output_attentions:
            raise ValueError("Hope has no attention maps; drop output_attentions")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if x.ndim != 3 or x.shape[1] == 0:
            raise ValueError(f"inputs must hold at least one token, got shape {tuple(x.shape)}")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        keep = use_cache or past_key_values is not None
        cache = _as_cache(past_key_values)
        if cache.states and cache.batch_size != x.shape[0]:
            raise ValueError(
                f"the cache holds {cache.batch_size} rows and the input {x.shape[0]}; use "
                "cache.batch_repeat_interleave(...) or cache.batch_select_indices(...)"
            )
        mask = input_mask(attention_mask, x, cache.seen_tokens, keep)
        if not cache.states and cache.frozen:
            cache.begin(self.initial_states(x.shape[0]))

        history: tuple[Tensor, ...] = ()
        states: list[LayerState] = []
        for index, layer in enumerate(self.layers):
            if output_hidden_states:
                history += (x,)
            x, state = layer(x, cache.layer(index), mask)
            if keep:
                states.append(state)
        x = self.norm(x)
        if keep:
            cache.advance(states, x.shape[1], input_ids)
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=cache if use_cache else None,
            hidden_states=(*history, x) if output_hidden_states else None,
        )
        return output if _as_dict(return_dict, self.config) else output.to_tuple()


@dataclasses.dataclass
class HopeOutput(CausalLMOutputWithPast):
    """What `HopeForCausalLM` returns.

    Attributes:
        write_loss: in training with ``HopeConfig.write_cost``: what the writes of all rows cost,
            a sum. ``loss`` has it, divided as the sum of the labels' losses is; who computes a loss
            from the logits adds it so.
    """

    write_loss: Tensor | None = None


class HopeForCausalLM(HopePreTrainedModel, GenerationMixin):
    """Hope with a language-model head; trains, generates and streams.

    Example:
        >>> from nestlearn.models.hope import HopeConfig
        >>> model = HopeForCausalLM(HopeConfig.preset("tiny", mixer="attention")).eval()
        >>> prompt = torch.randint(256, (1, 8))
        >>> out = model.generate(prompt, max_new_tokens=4, do_sample=False)
        >>> out.shape[0]
        1
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HopeConfig):
        super().__init__(config)
        self.model = HopeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: HopeCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
    ) -> HopeOutput | tuple:
        """Next-token logits and, with ``labels``, the loss.

        Args:
            labels: ``(B, T)``; shifted inside; -100 is ignored. In training mode the loss computes
                the logits in pieces and does not return them (``logits`` is None).
            logits_to_keep: compute logits for the last n positions only (0: all), or for the given
                positions.
            num_items_in_batch: divide the summed loss by this instead of by the labels counted
                here (gradient accumulation).

        See ``HopeModel.forward`` for the other arguments.
        """
        costs = self.training and self.config.write_cost > 0
        with record_writes() if costs else contextlib.nullcontext(()) as written:
            outputs = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                output_hidden_states=output_hidden_states,
                output_attentions=output_attentions,
                return_dict=True,
            )
        hidden = outputs.last_hidden_state
        write_loss = self.config.write_cost * count_writes(written) if written else None
        loss = logits = None
        if labels is not None:
            loss = self._loss(hidden, labels, num_items_in_batch, write_loss)
        if labels is None or not self.training:
            last = isinstance(logits_to_keep, int)
            kept = slice(-logits_to_keep, None) if last else logits_to_keep
            logits = self.lm_head(hidden[:, kept])
        output = HopeOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            write_loss=write_loss,
        )
        return output if _as_dict(return_dict, self.config) else output.to_tuple()

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """See ``GenerationMixin.generate``; ``past_key_values`` may be a used ``HopeCache``.

        ``input_ids`` then are either the whole text again, or only what is new: which one is told
        by comparing with the last tokens the cache has read. Beams and several return sequences
        fork the cache; take the forked one from the output (``return_dict_in_generate=True``).
        """
        if kwargs.get("past_key_values") is not None:
            kwargs = resume(self, inputs, args, kwargs)
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the model makes its own cache in the first call

    def _loss(
        self, hidden: Tensor, labels: Tensor, items: int | Tensor | None, more: Tensor | None
    ) -> Tensor:
        hidden = hidden[:, :-1].flatten(0, 1)
        targets = labels[:, 1:].flatten().to(hidden.device)
        step = max(1, LOGITS_PER_CHUNK // self.config.vocab_size)
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for start in range(0, len(targets), step):
            piece, target = hidden[start : start + step], targets[start : start + step]
            if torch.is_grad_enabled() and len(targets) > step:
                # Recomputed in the backward pass: the logits of one piece exist at a time.
                from torch.utils.checkpoint import checkpoint

                total = total + checkpoint(self._piece_loss, piece, target, use_reentrant=False)
            else:
                total = total + self._piece_loss(piece, target)
        if items is None:
            items = (targets != -100).sum().clamp(min=1)
        if more is not None:
            total = total + more.to(total)
        return total / (items.to(total.device) if isinstance(items, Tensor) else items)

    def _piece_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.lm_head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)


def _as_dict(return_dict: bool | None, config: PreTrainedConfig) -> bool:
    return bool(config.return_dict if return_dict is None else return_dict)


def _as_cache(past: Any) -> HopeCache:
    if past is None:
        return HopeCache()
    if isinstance(past, HopeCache):
        return past
    raise ValueError(
        f"past_key_values must be a nestlearn HopeCache, got {type(past).__name__}: key-value "
        "caches of other models do not hold a recurrent memory"
    )
