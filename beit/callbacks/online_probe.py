"""What a backbone knows of labels while it is trained without any: k-NN and a linear probe."""

import logging
import math
from typing import Any

import lightning as L

from beit.callbacks.pictures import publish_metrics, undisturbed
from beit.checkpoints.loops import ends_plan
from beit.data.labelled import LabelledData
from beit.data.loading import LoaderSettings
from beit.errors import UserError
from beit.evaluation.choosing import MEASURED, Report
from beit.evaluation.features import Compute, extract
from beit.loggers.guard import Guard

log = logging.getLogger(__name__)


class OnlineProbe(L.Callback):
    """Every few epochs, evaluations of the frozen backbone on a labelled sample.

    It looks and changes nothing: no gradient, no weight, no random number of the training is
    another one for it. Logged are `probe/<name>_acc`, the accuracy on the validation sample of the
    layer that did best on a part of the training sample, and `probe/<name>_layer`, which one.

    The sample is of the data module's own images, or of its `labelled` sources where it has some.
    The first rank works alone, and the others wait for it.

    Args:
        transform: of an evaluation: PIL image -> (3, H, W) float, normalised.
        probes: by name, evaluations of features such as `KNN` and `LinearProbe`.
        train_images, val_images: at most so many; drawn once from `seed`, the classes as equal in
            number as can be.
        every_n_epochs: and at the end of the last one, or of the run's steps.
        batch_size: images of a forward pass.

    Raises:
        UserError: no probe, or a number below 1; from `check`, images without labels and what the
            probes refuse.
    """

    def __init__(
        self,
        *,
        transform: Any,
        probes: dict[str, Any],
        train_images: int,
        val_images: int,
        every_n_epochs: int,
        batch_size: int,
        seed: int,
    ) -> None:
        counts = {"train_images": train_images, "val_images": val_images}
        for name, value in (counts | {"every_n_epochs": every_n_epochs}).items():
            if value < 1:
                raise UserError(f"{name} {value} must be at least 1")
        self.probes = {name: probe for name, probe in probes.items() if probe is not None}
        if not self.probes:
            raise UserError("probes: name at least one, or leave the callback out")
        self.transform = transform
        self.counts = counts
        self.every_n_epochs = every_n_epochs
        self.seed = seed
        self.loader = LoaderSettings(batch_size, batch_size, num_workers=0, seed=seed)
        self._data: LabelledData | None = None
        self._guard = Guard("the online probe", lost="probe/ metrics")

    def check(self, task: L.LightningModule, data: Any) -> None:
        """Draw the sample. Raises UserError where the probes cannot be made of it."""
        found = self._sources(data)
        data = LabelledData.of(**found, transform=self.transform, loader=self.loader)
        data = LabelledData(
            data.train.part(self.counts["train_images"], seed=self.seed),
            data.val.part(self.counts["val_images"], seed=self.seed),
        )
        backbone: Any = getattr(task, "backbone", None)
        if backbone is None:
            raise UserError(f"callbacks.online_probe: {type(task).__name__} has no backbone")
        for probe in self.probes.values():
            probe.check(backbone, data)
        self._data = data

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if self._data is None:  # else the runner has asked before it made the run's folder
            self.check(pl_module, trainer.datamodule)
        assert self._data is not None
        if trainer.is_global_zero:
            sizes = len(self._data.train), len(self._data.val)
            log.info(
                "online probe (%s): looks at the labels of %d training and %d validation images "
                "every %d epochs; the training does not",
                *(", ".join(self.probes), *sizes, self.every_n_epochs),
            )

    def _sources(self, data: Any) -> dict[str, Any]:
        if data.labelled is not None:
            return {key: data.labelled.get(key) for key in ("train", "val", "num_classes")}
        train, val = data.loaders.train_data.source, data.loaders.val_data
        if train.labels is None:
            raise UserError(
                f"callbacks.online_probe: the run's images have no labels ({train!r}); name some "
                "that have: data@labelled=folder labelled.train.root=... labelled.val.root=..."
            )
        return {"train": train, "val": val and val.source, "num_classes": "auto"}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        # not at a stop from outside: it is told to end soon
        due = epoch % self.every_n_epochs == 0 or ends_plan(trainer)
        if due and trainer.is_global_zero:
            self._guard(self._probe, trainer, pl_module)

    def _probe(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with undisturbed(pl_module):
            reports = self._reports(trainer, pl_module)
        metrics: dict[str, float] = {}
        for name, report in reports.items():
            metrics[f"probe/{name}_acc"] = report.summary[MEASURED]
            metrics[f"probe/{name}_layer"] = float(report.summary["layer"])
        told = (f"{name} {value:.4g}" for name, value in metrics.items())
        log.info("after epoch %d: %s", trainer.current_epoch + 1, ", ".join(told))
        publish_metrics(trainer, metrics)

    def _reports(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Report]:
        assert self._data is not None, "setup comes first"
        backbone: Any = pl_module.backbone
        compute = Compute(
            device=pl_module.device,
            autocast=trainer.precision_plugin.forward_context,
            memory_gb=math.inf,
            tell=False,
        )
        train, val = (
            extract(backbone, images, compute, layers="all")
            for images in (self._data.train, self._data.val)
        )
        return {
            name: probe.measure(train.only(probe.layers), val.only(probe.layers), compute.device)
            for name, probe in self.probes.items()
        }
