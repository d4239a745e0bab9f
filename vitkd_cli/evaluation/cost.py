"""What a model costs."""

from __future__ import annotations

import torch
from torch.func import functional_call

from vitkd_cli.vit.build import Built


def multiply_adds(built: Built) -> int:
    """Multiply-adds of one image through a model."""
    from torch.utils.flop_counter import FlopCounterMode

    parameter = next(built.model.parameters())
    image = parameter.new_zeros(1, len(built.spec.mean), *built.spec.input_size)
    training = built.model.training
    built.model.eval()
    # The counter hooks gradients onto what requires them, which fails for CaiT's class token without a graph.
    weights = {name: weight.detach() for name, weight in built.model.named_parameters()}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        functional_call(built.model, weights, (image,))
    built.model.train(training)
    return int(counter.get_total_flops()) // 2
