"""A hypernetwork: a slow level reads ten points of a sinusoid and generates a fast one's weights.

python examples/hypernetwork.py [STEPS]: about a minute for the default of 5,000.
"""

import math
import sys

import torch
from torch import nn

import nestlearn as nl
from nestlearn.levels import Generation, InnerLoop, TwoLevel


class Generator(nn.Sequential):
    def forward(self, x, y):  # the mean over the points: their order does not matter
        return super().forward(torch.cat([x, y], -1)).mean(-2)


torch.manual_seed(0)
net = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1))
task = InnerLoop(net, nn.functional.mse_loss, steps=0)
slow = Generator(nn.Linear(2, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
                 nn.Linear(128, task.size))  # fmt: skip
nl.lens.register_module(Generator)(nl.lens.plain)  # it remembers nothing between calls
system = TwoLevel(task, [Generation("hypernetwork", "task", generates="weights")], slow)
optimizer = torch.optim.Adam(system.parameters(), lr=1e-3)
print(nl.inspect(system, optimizer))

for step in range(int(sys.argv[1]) if len(sys.argv) > 1 else 5_000):
    amplitude, phase = 0.1 + 4.9 * torch.rand(25, 1, 1), math.pi * torch.rand(25, 1, 1)
    x = 10 * torch.rand(25, 20, 1) - 5
    y = amplitude * torch.sin(x - phase)
    loss = system.loss((x[:, :10], y[:, :10]), (x[:, 10:], y[:, 10:]))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 500 == 0:
        print(f"step {step}: error of the generated network on other points {loss:.2f}")
