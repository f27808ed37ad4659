"""A library of inner loops, as small as can be; it stands for the one you want watched."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Learner:
    """A copy of ``model`` that adapts by gradient descent."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        self.model = model
        self.module = copy.deepcopy(model)
        self.lr = lr

    def adapt(self, loss: Tensor) -> None:
        """One inner step."""
        parameters = list(self.module.parameters())
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= self.lr * gradient
