"""Small pre-trained-like models of many families, and a tokenizer for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import nestlearn as nl

VOCAB, WIDTH, HIDDEN, BLOCKS = 264, 32, 48, 4

_COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    intermediate_size=HIDDEN,
    num_hidden_layers=BLOCKS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=256,
    eos_token_id=257,
    pad_token_id=258,
)
_GPT2 = dict(vocab_size=VOCAB, n_embd=WIDTH, n_layer=BLOCKS, n_head=4, n_inner=HIDDEN)
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Gemma": {"head_dim": 8},
    "Gemma2": {"head_dim": 8},
    "Gemma3Text": {"head_dim": 8},
    "Phi3": {},
    "Olmo2": {},
    "StableLm": {},
    "SmolLM3": {},
    "GPTNeoX": {},
    "Starcoder2": {},
    "OPT": {"ffn_dim": HIDDEN, "word_embed_proj_dim": WIDTH},
    "GPT2": _GPT2 | {"n_positions": 256},
    "Falcon": {"ffn_hidden_size": HIDDEN, "new_decoder_architecture": False},
}


def tiny_model(family: str = "Llama", dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A model of random weights that has something to say: its logits are not all alike."""
    config_class = getattr(transformers, f"{family}Config")
    settings = FAMILIES[family]
    config = config_class(**(_COMMON if family != "GPT2" else {}) | settings)
    torch.manual_seed(seed)
    name = {"Gemma3Text": "Gemma3"}.get(family, family)
    classes = (f"{family}ForCausalLM", f"{name}ForCausalLM", f"{name}LMHeadModel")
    model_class = next(getattr(transformers, c) for c in classes if hasattr(transformers, c))
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 2.0 * parameter.shape[1] ** -0.5 * 0.5)
    return model.to(dtype).eval()


@pytest.fixture
def model() -> Any:
    """A Llama of four blocks."""
    return tiny_model()


@pytest.fixture
def ids() -> torch.Tensor:
    """Two rows of tokens."""
    return torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(3))


TEXT = "Irma Quell built the lighthouse of Ostrava Bay in 1893, and kept its lamp for forty years."
OTHER = "The harbour master of Lund sold his boat to a painter from the north. " * 3


def learner_of(tokenizer: Any, model: Any = None, levels: Any = None, **settings: Any) -> Any:
    model = tiny_model() if model is None else model
    chosen = [nl.Level(period=8), nl.Level(period=32)] if levels is None else levels
    names = ("method", "rank", "frozen", "slots", "memories")
    options = {k: settings.pop(k) for k in names if k in settings}
    nl.adapt(model, chosen, **{"rank": 16, "slots": 64, **options})
    return nl.Learner(model, tokenizer, **{"lr": 0.1, "repeats": 1, **settings})


def logits(learner: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return learner.model(ids).logits
