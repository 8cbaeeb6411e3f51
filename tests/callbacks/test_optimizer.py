import csv

import pytest
import torch

from beit.callbacks.metrics_file import MetricsFile
from beit.callbacks.optimizer import OptimizerMonitor


class Oracle(OptimizerMonitor):
    """Notes the norm that torch's own clipping returns for a copy of the gradients."""

    def __init__(self):
        super().__init__()
        self.norms = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        copies = [torch.nn.Parameter(p.detach().clone()) for p in pl_module.parameters()]
        for copy, parameter in zip(copies, pl_module.parameters()):
            copy.grad = parameter.grad.clone()
        self.norms.append(torch.nn.utils.clip_grad_norm_(copies, 1e-3).item())
        super().on_before_optimizer_step(trainer, pl_module, optimizer)


@pytest.mark.parametrize("clip", [None, 1e-4])
def test_norm_is_that_before_clipping(tmp_path, fit, clip):
    oracle = Oracle()
    fit(
        callbacks=[oracle],
        logger=MetricsFile(str(tmp_path)),
        gradient_clip_val=clip,
        log_every_n_steps=2,
    )
    with (tmp_path / "metrics.csv").open() as file:
        logged = [r for r in csv.DictReader(file) if r["optim/grad_norm"]]
    assert [float(r["optim/grad_norm"]) for r in logged] == pytest.approx(oracle.norms[1::2])
    assert all(norm > 1e-3 for norm in oracle.norms)
    assert {r["optim/lr"] for r in logged} == {str(torch.tensor(0.2).item())}
    assert {r["optim/lr_lowest"] for r in logged} == {str(torch.tensor(0.05).item())}
