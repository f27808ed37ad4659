"""What torch's and the libraries' exceptions mean in an inner loop, and what to change.

Messages are matched as torch 2.x and higher 0.2 write them; an exception none of these knows is
reported as it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

RAISED = "raised-in-inner-loop"


@dataclass(frozen=True)
class Explanation:
    """One kind of exception in the words of the inner loop.

    Attributes:
        pattern: of the message, searched for.
        meaning: what happened, in a sentence or two.
        fix: what to change, in code.
        cause: of the catalogue of causes.
        error: whether it is an error (else a warning: the loop is right but for one argument).
        inner: whether it makes sense in an inner loop only, wherever it was raised.
        module: of the module classes it must be raised in; empty for any.
    """

    pattern: str
    meaning: str
    fix: str
    cause: str = RAISED
    error: bool = True
    inner: bool = False
    module: str = ""

    def fits(self, message: str, module: str) -> bool:
        """Whether it explains an exception with ``message`` out of a ``module`` class."""
        return (
            re.search(self.pattern, message, re.S) is not None
            and re.search(self.module, module) is not None
        )


_NO_TRACKING = (
    "nn.BatchNorm2d(channels, track_running_stats=False)   # batch statistics, nothing to update\n"
    "# or, on a finished model: torch.func.replace_all_batch_norm_modules_(net)\n"
    "# or GroupNorm, which keeps no statistics"
)

EXPLANATIONS = (
    Explanation(
        r"Expected more than 1 value per channel when training",
        "BatchNorm in train mode needs more than one value per channel, and this batch has one: a "
        "single sample without a map to average over has no variance.",
        "nn.GroupNorm(groups, channels)   # does not depend on the batch\n"
        "# or adapt on at least two samples, or run the layer in eval mode with trained statistics",
        cause="tiny-bn-batch",
    ),
    Explanation(
        r"differentiated Tensors? .*not have been used in the graph",
        "The inner gradient was asked for a parameter that the support loss does not depend on.",
        "torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)   # gives None\n"
        "# then skip it: p if g is None else p - lr * g; or pass only the parameters that are used",
        cause="unused-parameters",
        error=False,
    ),
    Explanation(
        r"Batch norm got a batched tensor as input while the running_mean or running_var",
        "BatchNorm under vmap: every task would write into the same running statistics, which have "
        "no task dimension.",
        _NO_TRACKING,
        inner=True,
    ),
    Explanation(
        r"During a grad .* transform, the function provided attempted to call in-place",
        "BatchNorm in train mode counts its batches and moves its running statistics in place. "
        "Inside torch.func.grad these buffers are captured from outside, and may not be changed.",
        _NO_TRACKING,
        inner=True,
        module="BatchNorm|InstanceNorm",
    ),
    Explanation(
        r"During a grad .* transform, the function provided attempted to call in-place",
        "The function given to torch.func.grad changes, in place, a tensor it did not get as an "
        "argument.",
        "Pass the tensor as an argument (buffers too: functional_call(net, (params, buffers), x)) "
        "and return its new value.",
        inner=True,
    ),
    Explanation(
        r"vmap: called random operation",
        "Dropout (or another random draw) under vmap: it must be said whether the tasks share the "
        "draw.",
        'torch.vmap(adapt, randomness="different")   # "same": one mask for all tasks',
        inner=True,
    ),
    Explanation(
        r"vmap: .*(\.item\(\)|data-dependent control flow)",
        "A tensor was read as a Python number inside vmap (.item(), float(), if, an early stop): "
        "there it stands for all tasks at once.",
        "Return the tensor from the function and read it outside; torch.where in place of if.",
        inner=True,
    ),
    Explanation(
        r"Trying to backward through the graph a second time",
        "Two steps share a part of the graph, and the first backward freed it: something the loss "
        "depends on was computed once, before the inner loop.",
        "Compute it inside the loop (features = encoder(x) in every step), or features.detach() "
        "where no gradient is to flow into it, or keep the graph: create_graph=True for second "
        "order, retain_graph=True else.",
    ),
    Explanation(
        r"derivative for '?aten::_scaled_dot_product",
        "The fused attention kernel has no second derivative, and the meta-gradient needs it.",
        "with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):   # inner loop\n"
        "    ...\n"
        "# or first order: create_graph=False",
    ),
    Explanation(
        r"[Dd]ouble backwards? is not supported for CuDNN|_cudnn_rnn_backward",
        "cuDNN's recurrent layers have no second derivative, and the meta-gradient needs it.",
        "with torch.backends.cudnn.flags(enabled=False):   # around the inner loop's forwards",
    ),
    Explanation(
        r"derivative for .* is not implemented|not have a (second )?derivative"
        r"|[Dd]ouble backwards? .*not (supported|implemented)|once_differentiable",
        "An operation in the inner loop has no second derivative, and differentiating through the "
        "inner step needs it.",
        "Replace the operation by one that has (the unfused form), or take first-order inner "
        "gradients: create_graph=False.",
    ),
    Explanation(
        r"Target -?\d+ is out of bounds|Assertion `?t >= 0 && t < n_classes",
        "A label of the task lies outside the logits: the classifier has as many outputs as a task "
        "has ways, and the labels are still those of the whole data set.",
        "classes, y = torch.unique(labels, return_inverse=True)   # 0 .. ways - 1 in every task",
    ),
    Explanation(
        r"index out of range in self",
        "An index of the task lies outside the embedding it looks up.",
        "Map the task's tokens or ids to 0 .. num_embeddings - 1, or enlarge the embedding.",
    ),
    Explanation(
        r"element \d+ of tensors does not require grad|differentiated Tensors? .*require grad",
        "There is no graph from the loss to the fast weights: the forward ran under no_grad (or "
        "inference_mode), the weights were detached without requires_grad_(), or the loss was "
        "computed with other weights.",
        "fast = [w.detach().requires_grad_() for w in fast]   # first order\n"
        "with torch.enable_grad(): ...                        # adapting inside an evaluation",
    ),
    Explanation(
        r"modified by an inplace operation",
        "Weights, buffers or activations that an earlier inner step's graph still needs were "
        "overwritten in place.",
        "fast = [w - lr * g for w, g in zip(fast, grads)]   # new tensors, no -=, no copy_()\n"
        "# or clone before the in-place operation; nn.ReLU(inplace=False)",
    ),
    Explanation(
        r"a leaf Variable that requires grad is being used in an in-place operation",
        "The update writes into a leaf parameter while gradients are recorded.",
        "fast = [w - lr * g for w, g in zip(fast, grads)]   # differentiable\n"
        "with torch.no_grad(): w -= lr * g                  # first order, in place",
    ),
    Explanation(
        r"Optimizer type .* not supported by higher",
        "higher has no differentiable form of this optimizer (AdamW, NAdam and RAdam among them).",
        "inner = torch.optim.SGD(net.parameters(), lr=...)   # or Adam, RMSprop, Adagrad, ...\n"
        "# or higher.register_optim(MyOptimizer, MyDifferentiableOptimizer)",
        inner=True,
    ),
    Explanation(
        r"method resolution\s*order \(MRO\) for bases Module, ABC|DistributedDataParallel|"
        r"cannot pickle .*ProcessGroup",
        "higher cannot patch a DistributedDataParallel wrapper.",
        "higher.innerloop_ctx(net.module, inner)   # the module inside the wrapper",
    ),
    Explanation(
        r"support the deepcopy protocol",
        "copy.deepcopy met a tensor that is no leaf: weights that an inner step computed, or those "
        "of weight_norm or spectral_norm.",
        "Copy the values: learner.load_state_dict(net.state_dict()) into a fresh module; or use "
        "torch.func.functional_call with a dictionary of weights.",
    ),
    Explanation(
        r"expected scalar type|must have the same dtype|same dtype, but got|expected .* dtype"
        r"|Input type .* and (weight|bias) type",
        "Two tensors of the step have different dtypes: data, fast weights and labels do not "
        "agree.",
        "Bring the data to the weights' dtype: x.to(next(net.parameters()).dtype); labels .long().",
    ),
    Explanation(
        r"Expected all tensors to be on the same device|is not on the expected device"
        r"|Input type \(.*cuda.*\) and weight",
        "Two tensors of the step are on different devices: often the task's data, or state made "
        "for the inner loop (learned rates, a copied model).",
        "x, y = x.to(device), y.to(device)   # device = next(net.parameters()).device",
    ),
)


def explain(message: str, module: str = "") -> Explanation | None:
    """What an exception means, or None for one that is not known.

    Args:
        message: the exception's text.
        module: class name of the innermost ``nn.Module`` it was raised in, or ``""``.
    """
    return next((one for one in EXPLANATIONS if one.fits(message, module)), None)
