"""Step lengths that are tried out in place are one step."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import divergence_probe


def test_a_step_whose_length_is_tried_out_is_the_last_one_tried():
    torch.manual_seed(0)
    base = nn.Linear(3, 1)
    outer = torch.optim.SGD(base.parameters(), lr=0.1)
    truth = []

    def search(net, x, y):
        """Armijo's rule, from a length that is far too large."""
        weights = list(net.parameters())
        loss = F.mse_loss(net(x), y)
        gradients = torch.autograd.grad(loss, weights)
        start, length = [w.detach().clone() for w in weights], 64.0
        slope = sum(g.square().sum() for g in gradients)
        with torch.no_grad():
            while True:
                for w, w0, g in zip(weights, start, gradients, strict=True):
                    w.copy_(w0 - length * g)
                if F.mse_loss(net(x), y) <= loss - 0.1 * length * slope:
                    break
                length /= 2
        truth.append((start[0].norm().item(), weights[0].norm().item()))

    with divergence_probe.attach() as probe:
        for _ in range(4):
            gradients = []
            for _ in range(2):
                net, x, y = copy.deepcopy(base), torch.randn(9, 3), torch.randn(9, 1)
                for _ in range(3):
                    search(net, x, y)
                loss = F.mse_loss(net(x), y)
                gradients.append(torch.autograd.grad(loss, list(net.parameters())))
            for parameter, *own in zip(base.parameters(), *gradients, strict=True):
                parameter.grad = sum(own) / 2
            outer.step()
    summary = probe.diagnosis.summary
    assert (summary.tasks, summary.inner_steps, summary.outer_steps) == (8, 24, 4)
    steps = probe.recording.steps()
    rows = steps[(steps["phase"] == "support") & (steps["parameter"] == "weight")]
    seen = list(zip(rows["norm_before"], rows["norm_after"], strict=True))
    assert seen == [pytest.approx(pair, rel=1e-6) for pair in truth]
    assert probe.diagnosis.verdict == "healthy"
