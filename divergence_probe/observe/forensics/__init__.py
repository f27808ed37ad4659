"""Forensics: name the first operation that made something non-finite.

Healthy steps pay one look at a CPU loss. Only when something is wrong (or, once a line, where the
graph holds an operation whose derivative can be infinite) is the user's autograd graph read:

- :mod:`graph`: the graph in forward order, and what it kept of each operation's inputs;
- :mod:`forward`: the first operation with finite inputs and a non-finite output;
- :mod:`backward`: the same for the backward, by a gradient call of our own under node hooks;
- :mod:`checking_mode`: armed after a fault, sees operations live and gives each its line;
- :mod:`windows`: tells the forward, the gradient and the update of a step apart;
- :mod:`reporter`: gives a fault its line and its task;
- :mod:`investigator`: decides when to look, and reports.
"""

from __future__ import annotations

from divergence_probe.observe.forensics.inputs import Inputs, Names
from divergence_probe.observe.forensics.investigator import Investigator, investigator_of

__all__ = ["Inputs", "Investigator", "Names", "investigator_of"]
