"""Trains the vision tower on shapes and colours, before the training of the whole model.

In the mix of all skills a step has three or four pictures, too few to learn shapes. Here a step has
64, and a linear layer, which is discarded afterwards, takes the place of the language model.
"""

import random

import numpy as np
import torch
import torch.nn.functional as F
from pictures import COLOURS, GRID, SHAPES, paint, patches, picture
from torch import nn

NUM_PICTURES = 64
LR = 4e-3


def teach_sight(visual: nn.Module, num_steps: int, scale: float, seed: int = 0) -> float:
    """Train the tower alone on pictures of the training side; returns the share of right answers.

    `scale` is the standard deviation that its outputs should have, as the embeddings have it.
    """
    rng = random.Random(seed)
    shapes, colours = list(SHAPES), list(COLOURS)
    judge = nn.Linear(visual.config.out_hidden_size, len(shapes) + len(colours))
    optimizer = torch.optim.AdamW([*visual.parameters(), *judge.parameters()], lr=LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=num_steps)
    grid = torch.tensor([[1, 2 * GRID, 2 * GRID]] * NUM_PICTURES)
    right = 0.0
    for step in range(num_steps):
        drawn = [picture(rng, False).picture for _ in range(NUM_PICTURES)]
        pixels = torch.from_numpy(np.ascontiguousarray(patches([paint(*d) for d in drawn])))
        seen = visual(pixels, grid_thw=grid).pooler_output
        seen = seen.reshape(NUM_PICTURES, GRID * GRID, -1)
        logits = judge(F.rms_norm(seen, seen.shape[-1:]).mean(1))
        shape = torch.tensor([shapes.index(d[0]) for d in drawn])
        colour = torch.tensor([colours.index(d[1]) for d in drawn])
        of_shape, of_colour = logits.split((len(shapes), len(colours)), -1)
        loss = F.cross_entropy(of_shape, shape) + F.cross_entropy(of_colour, colour)
        loss = loss + (seen.std() / scale).log().square()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(visual.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        both = (of_shape.argmax(-1) == shape) & (of_colour.argmax(-1) == colour)
        right = 0.95 * right + 0.05 * both.float().mean().item()
        if (step + 1) % 50 == 0:
            print(f"pictures: step {step + 1}, {right:.1%} right", flush=True)
    return right
