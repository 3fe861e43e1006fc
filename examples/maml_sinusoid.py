"""MAML's sinusoid regression (Finn et al. 2017): a slow level learns where fast levels start.

python examples/maml_sinusoid.py [STEPS]: about a minute for the default of 5,000.
"""

import math
import sys

import torch
from torch import nn

import nestlearn as nl
from nestlearn.levels import Backpropagation, Initialisation, InnerLoop, TwoLevel

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
task = InnerLoop(net, nn.functional.mse_loss, steps=1, lr=0.01)
maml = TwoLevel(task, [Initialisation("meta", "task"), Backpropagation("meta", "task")])
optimizer = torch.optim.Adam(maml.parameters(), lr=1e-3)
print(nl.inspect(maml, optimizer))


def sinusoids(tasks=25, shots=10):
    amplitude, phase = 0.1 + 4.9 * torch.rand(tasks, 1, 1), math.pi * torch.rand(tasks, 1, 1)
    x = 10 * torch.rand(tasks, 2 * shots, 1) - 5
    y = amplitude * torch.sin(x - phase)
    return (x[:, :shots], y[:, :shots]), (x[:, shots:], y[:, shots:])


for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 5_000):
    optimizer.zero_grad()
    maml.loss(*sinusoids()).backward()
    optimizer.step()

with torch.no_grad():
    context, query = sinusoids(tasks=500)
    before, after = task.objective(net(query[0]), query[1]), maml.loss(context, query)
print(f"error on new sinusoids: {before:.2f}, after one step on ten points {after:.2f}")
