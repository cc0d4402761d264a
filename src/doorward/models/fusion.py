"""The same network with less work: batch norm inside the convolutions, pooling before rectifying."""

from __future__ import annotations

import warnings

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

_RECTIFIERS = (F.relu, torch.relu)


def fused(module: nn.Module) -> nn.Module | None:
    """Return a module that computes what this one does in evaluation mode, with fewer operations.

    Batch norm is folded into the convolution before it (B. Jacob et al. 2018, arXiv 1712.05877, section 3.2).
    A rectifier before max pooling goes behind it, where there is less to rectify: the largest is the same,
    and so are gradients. Parts that stay as they are are shared with the module.

    Args:
        module: in evaluation mode.

    Returns:
        None where there is nothing to simplify, the module's own Python cannot be followed, or it runs code
        that following would miss.
    """
    if any(_has_code_of_its_own(part) for part in module.modules()):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            traced = fx.symbolic_trace(module)
        except (
            Exception,
            SystemExit,
        ):  # following a stranger's code can fail in any way, and costs speed alone
            return None
    modules = dict(traced.named_modules())
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    changed = False
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or not node.args or not isinstance(before := node.args[0], fx.Node):
            continue
        layer = modules[str(node.target)]
        if len(before.users) > 1:
            continue
        if type(layer) is nn.BatchNorm2d and layer.running_mean is not None:
            if before.op == "call_module" and type(convolution := modules[str(before.target)]) is nn.Conv2d:
                if calls.count(before.target) > 1 or calls.count(node.target) > 1:  # weights that are shared
                    continue
                modules[str(before.target)] = fuse_conv_bn_eval(convolution, layer)
                traced.add_submodule(str(before.target), modules[str(before.target)])
                node.replace_all_uses_with(before)
                traced.graph.erase_node(node)
                changed = True
        elif type(layer) is nn.MaxPool2d and not layer.return_indices and _rectifies(before, modules):
            node.replace_input_with(before, before.args[0])
            with traced.graph.inserting_after(node):
                after = traced.graph.node_copy(before)
            node.replace_all_uses_with(after)
            after.args = (node, *before.args[1:])
            traced.graph.erase_node(before)
            changed = True
    if not changed:
        return None
    try:
        traced.graph.lint()
        traced.recompile()
    except Exception:  # names that are no Python, from code of any kind
        return None
    # its own call writes to standard error when the code fails, which may be no more than a trial;
    # the class is that of this one module alone
    type(traced).__call__ = nn.Module.__call__  # type: ignore[method-assign]
    return traced


def _has_code_of_its_own(part: nn.Module) -> bool:
    """Return whether a part runs code that its class does not show: hooks, or a method that was replaced."""
    hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
    return any(hooks) or bool({"forward", "__call__", "_call_impl"} & set(vars(part)))


def _rectifies(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Return whether a node rectifies what another gives."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_module":
        return type(modules[str(node.target)]) is nn.ReLU
    return node.op == "call_function" and node.target in _RECTIFIERS
