"""Which levels has a set-up? A Transformer with AdamW, linear attention with momentum, and Hope.

python examples/inspect_models.py
"""

import torch
from rich import print
from torch import nn

import nestlearn as nl

layer = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)
print(nl.inspect(layer))  # in context: frequencies 0 and infinity
print(nl.inspect(layer, torch.optim.AdamW(layer.parameters()), tokens=128))

memory = nl.nn.NeuralMemory(64, heads=4, preset="linear_attention")
sgd = torch.optim.SGD(memory.parameters(), lr=0.1, momentum=0.9)
print(nl.inspect(memory, sgd, tokens=128).table())

hope = nl.HopeForCausalLM(nl.HopeConfig.preset("tiny", cms_periods=[1, 4, 16]))
optimizer = nl.optim.MultiRate(nl.optim.level_groups(hope, lr=1e-3))
system = nl.inspect(hope, optimizer, tokens=512)
print(system)
print([[box.name for box in level] for level in system.levels])
