"""MLPs are found by structure, in every family, and what is not understood is refused."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from nestlearn.adaptation.sites import find_sites, linear_shape
from tests.adaptation.conftest import BLOCKS, FAMILIES, HIDDEN, WIDTH, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_has_one_mlp(family: str) -> None:
    model = tiny_model(family)
    sites = find_sites(model)
    assert [s.block for s in sites] == list(range(BLOCKS))
    for site in sites:
        assert site.width == WIDTH
        assert site.hidden == HIDDEN
        assert linear_shape(model.get_submodule(site.output)) == (site.hidden, WIDTH)
        assert site.linears[-1] == site.output and len(site.linears) >= 2
        assert not any("attn" in name or "attention" in name for name in site.linears)


def test_the_output_map_is_what_the_mlp_ends_with() -> None:
    sites = find_sites(tiny_model("Llama"))
    assert sites[1].output == "model.layers.1.mlp.down_proj"
    assert set(sites[1].linears) == {f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")}
    assert find_sites(tiny_model("OPT"))[0].output == "model.decoder.layers.0.fc2"


def test_named_sites() -> None:
    model = tiny_model()
    (site,) = find_sites(model, ["model.layers.2.mlp.down_proj"])
    assert (site.hidden, site.width) == (HIDDEN, WIDTH)
    with pytest.raises(ValueError, match="no module 'model.nothing'"):
        find_sites(model, ["model.nothing"])
    with pytest.raises(ValueError, match="no linear map to the model's width 32"):
        find_sites(model, ["model.layers.0.mlp.up_proj"])


def test_models_that_cannot_be_adapted_are_refused() -> None:
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2)
    )
    with pytest.raises(ValueError, match="encoder-decoder"):
        find_sites(t5)
    with pytest.raises(ValueError, match="no token embeddings"):
        find_sites(nn.Linear(2, 2))
    mixtral = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, num_local_experts=2,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="block 0 .* is not recognised.*sites="):
        find_sites(mixtral)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(8, 4)

        def get_input_embeddings(self) -> nn.Module:
            return self.embedding

    with pytest.raises(ValueError, match="no list of blocks with attention"):
        find_sites(Plain())


def test_peft_maps_are_not_taken_for_mlps() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model()
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj", "up_proj"])
    )
    sites = find_sites(wrapped)
    assert len(sites) == BLOCKS and all("lora" not in n for s in sites for n in s.linears)
    assert isinstance(wrapped.get_submodule(sites[0].output), nn.Linear)
    assert torch.is_tensor(wrapped.get_submodule(sites[0].output).weight)
