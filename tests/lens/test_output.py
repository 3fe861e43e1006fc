"""What is printed and exported: the unit of time, totals, costs, gaps, notes."""

from __future__ import annotations

import json

import torch
from rich.console import Console
from torch import nn

import nestlearn as nl


def system() -> nl.lens.InspectedSystem:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nl.inspect(model, torch.optim.AdamW(model.parameters()), tokens=64)


def test_tree() -> None:
    text = str(system())
    assert "TransformerEncoderLayer: 3 levels" in text
    assert "unit of time: one sequence of 64 tokens, one optimizer step" in text
    assert "state 8.19 kB, 4.1 kFLOP per token" in text  # 64 x 2 x 16 x 4 bytes; 4 x 64 x 16
    assert "differentiated: yes: through keys, values and queries" in text
    assert "direct non-parametric -> weights" in text


def test_table() -> None:
    console = Console(width=200, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(system().table())
    text = console.export_text()
    for word in ("attention", "∞", "first moment", "4.1 kFLOP"):
        assert word in text


def test_json() -> None:
    found = system()
    data = json.loads(found.to_json())
    assert data["unit"] == found.unit
    assert data["parameter_bytes"] == found.parameter_bytes
    assert data["state_bytes"] == sum(b.state_bytes for b in found.boxes)
    assert data["flops_per_token"] == sum(b.flops_per_token for b in found.boxes)
    attention = data["levels"][2]["boxes"][0]
    assert attention["frequency"] == "inf" and attention["flops_per_token"] == 4096
    assert data["unknown"] == [] and data["notes"] == []


def test_long_lists_of_parameters_are_shortened_in_print_only() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(30)))
    found = nl.inspect(model)
    assert found["weights"].parameters == ("*.weight", "*.bias")
    names = tuple(f"block{i}.w" for i in range(12))
    box = nl.levels.Box("weights", "loss", "data", names, 1)
    text = str(nl.NestedSystem([box]))
    assert "block7.w, and 4 more" in text.replace("\n", " ") and "block8.w" not in text
    assert nl.NestedSystem([box]).to_dict()["levels"][0]["boxes"][0]["parameters"] == names
