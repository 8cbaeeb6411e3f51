"""Pictures of what a tokenizer and a masked image model see and fill in."""

import contextlib
import itertools
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from beit.callbacks.figures import Legend, picture_grid, save_figure
from beit.callbacks.figures import Pictures as Pixels
from beit.data.batches import MaskedBatch, MIMBatch, PixelBatch
from beit.errors import UserError
from beit.loggers.guard import Guard
from beit.loggers.guarded import log_picture, log_table
from beit.tokenizers.base import to_value_range

log = logging.getLogger(__name__)

GREY = 0.5  # of hidden patches, in [0, 1]


class Pictures(L.Callback):
    """When to draw, where to put it, and how not to disturb the training. Subclasses say what.

    The images lie evenly over the validation set, of which neighbours are often alike; until that
    is first gone through they are the first of training. From there on they stay the same. Drawn by
    the first rank alone, of what it validates, into
    `<folder>/<name>-step<N>.png` and into TensorBoard and W&B where they are among the loggers.

    Args:
        folder: for the PNG files; made when first needed.
        num_images: rows of a picture.
        every_n_epochs: 0 is never. The end of training is always drawn.
        every_n_steps: optimizer steps; 0 is never.

    Raises:
        UserError: no images, or a negative interval.
    """

    name = "pictures"

    def __init__(
        self, folder: str, *, num_images: int, every_n_epochs: int = 1, every_n_steps: int = 0
    ) -> None:
        if num_images < 1:
            raise UserError(f"num_images {num_images} must be at least 1")
        if min(every_n_epochs, every_n_steps) < 0:
            raise UserError(
                f"every_n_epochs {every_n_epochs} and every_n_steps {every_n_steps} must not be "
                "negative; 0 is never"
            )
        self.folder = Path(folder)
        self.num_images = num_images
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self._sample: Any = None  # a batch of num_images, on the CPU
        self._found: list[Any] = []  # batches of one image, as a validation comes past them
        self._settled = False  # the sample came from a whole validation
        self._drawn_at = -1
        self._warned = False
        self._guard = Guard("drawing", lost=f"pictures of {self.name}")

    def columns(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Pixels]:
        """Column title -> images in [0, 1] of the sample that `self._sample` holds."""
        raise NotImplementedError

    def legend(self, trainer: L.Trainer) -> Legend:
        """What colours of the latest columns mean."""
        return ()

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._settled or trainer.sanity_checking or not trainer.is_global_zero or dataloader_idx:
            return
        batches = int(trainer.num_val_batches[0])
        if batch_idx == 0:
            self._found = []
        rows = rows_over(batch_idx, len(batch[0]), batches=batches, count=self.num_images)
        self._found += [_rows(batch, slice(row, row + 1)) for row in rows]
        if batch_idx == batches - 1:
            self._sample, self._found, self._settled = _joined(self._found), [], True

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._sample is None and trainer.is_global_zero:
            self._sample = _rows(batch, slice(self.num_images))

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._draw(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._draw(trainer, pl_module)

    def _draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # with accumulation several batches end at the same step
        step = trainer.global_step
        if self._sample is None or not trainer.is_global_zero or step in (0, self._drawn_at):
            return
        self._drawn_at = step
        with undisturbed(pl_module), trainer.precision_plugin.forward_context(), torch.no_grad():
            columns = self.columns(trainer, pl_module)
        title = f"epoch {trainer.current_epoch + 1}, step {step}"
        self._guard(self._publish, trainer, columns, title)

    def _publish(self, trainer: L.Trainer, columns: dict[str, Pixels], title: str) -> None:
        shown = {name: [image.float().cpu() for image in part] for name, part in columns.items()}
        figure = picture_grid(shown, title=title, legend=self.legend(trainer))
        publish(trainer, self.name, figure, self.folder)

    def _decode(self, tokenizer: Any, token_ids: dict[str, Tensor]) -> dict[str, Tensor]:
        """Decode each entry; nothing, and one warning, for a tokenizer that can only encode."""
        try:
            return {title: tokenizer.decode(ids).float() for title, ids in token_ids.items()}
        except (UserError, NotImplementedError) as error:
            if not self._warned:
                log.warning("no reconstructions in the pictures: %s", error)
                self._warned = True
            return {}


class ReconstructionPictures(Pictures):
    """Original, masked input, the tokenizer's own reconstruction, and the model's.

    The model's column decodes its predicted tokens where patches are masked and the tokenizer's
    everywhere else; where the target is pixels there is no tokenizer, and it has the predicted
    pixels among the original ones. Needs `task.predict_tokens(images, mask) -> (B, h, w)`, or
    `task.predict_everywhere` and `task.target`, and of the data module `tokenizer`, for tokens, and
    `denormalize(images) -> [0, 1]`.
    """

    name = "reconstructions"

    def columns(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Pixels]:
        sample = type(self._sample)(*(part.to(pl_module.device) for part in self._sample))
        data: Any = trainer.datamodule
        originals = data.denormalize(sample.images).clamp(0, 1)
        given = {"original": originals, "masked input": hide(originals, sample.mask)}
        if isinstance(sample, MIMBatch):
            return given | self._of_tokens(pl_module, data.tokenizer, sample)
        return given | {"model": data.denormalize(_filled_in(pl_module, sample)).clamp(0, 1)}

    def _of_tokens(self, task: Any, tokenizer: Any, sample: MIMBatch) -> dict[str, Tensor]:
        predicted = task.predict_tokens(sample.images, sample.mask)
        filled_in = torch.where(sample.mask, predicted, sample.token_ids)
        return self._decode(tokenizer, {"tokenizer": sample.token_ids, "model": filled_in})


class TokenizerPictures(Pictures):
    """Original and reconstruction. Needs `task.tokenizer`, the one that is being trained."""

    name = "reconstructions"

    def columns(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Pixels]:
        images = PixelBatch(*(part.to(pl_module.device) for part in self._sample)).images
        tokenizer: Any = pl_module.tokenizer
        token_ids = tokenizer.encode(to_value_range(images, tokenizer.value_range))
        return {"original": images, **self._decode(tokenizer, {"reconstruction": token_ids})}


def publish(trainer: L.Trainer, name: str, figure: Figure, folder: Path) -> None:
    """Write a figure as PNG into the folder, and into TensorBoard and W&B where they are."""
    pixels = save_figure(figure, folder / f"{name}-step{trainer.global_step:07d}.png")
    for logger in trainer.loggers:
        log_picture(logger, name, pixels, logged_step(trainer))


def publish_table(trainer: L.Trainer, name: str, rows: list[dict[str, Any]]) -> None:
    """Rows with the same keys into TensorBoard and W&B where they are."""
    for logger in trainer.loggers:
        log_table(logger, name, rows, logged_step(trainer))


def publish_metrics(trainer: L.Trainer, metrics: dict[str, float]) -> None:
    """Metrics of the epoch that ends into every logger, and into nothing else.

    What a module logs by `log` passes through checkpoints too, and could choose them.
    """
    for logger in trainer.loggers:
        logger.log_metrics(metrics | {"epoch": trainer.current_epoch}, step=logged_step(trainer))


def logged_step(trainer: L.Trainer) -> int:
    """The step that Lightning logs the latest metrics under, from 0: a resumed run keeps them."""
    return max(trainer.global_step - 1, 0)


def rows_over(batch: int, size: int, *, batches: int, count: int) -> list[int]:
    """Rows of a batch of `size` that are among `count` laid evenly over all `batches`."""
    places = (divmod(i * batches, count) for i in range(count))
    return sorted({rest * size // count for number, rest in places if number == batch})


def _rows(batch: Any, rows: slice) -> Any:
    return type(batch)(*(_kept(part[rows]) for part in batch))


def _joined(batches: list[Any]) -> Any:
    """One batch of several, of whose fields some are lists."""
    fields = zip(*batches, strict=True)
    return type(batches[0])(
        *(
            torch.cat(parts) if isinstance(parts[0], Tensor) else list(itertools.chain(*parts))
            for parts in fields
        )
    )


def _kept(part: Tensor | list[Tensor]) -> Any:
    """On the CPU, and no view of what will be used again."""
    if isinstance(part, Tensor):
        return part.detach().cpu().clone()
    return [_kept(one) for one in part]


def _filled_in(task: Any, sample: MaskedBatch) -> Tensor:
    """The encoder's images with the predicted pixels in the masked patches."""
    outputs = task.predict_everywhere(sample.images, sample.mask)
    predicted = task.target.drawn(outputs.float(), sample.images)
    return torch.where(_of_pixels(sample.mask, sample.images), predicted, sample.images)


def hide(images: Tensor, mask: Tensor) -> Tensor:
    """Images (B, 3, H, W) with the patches where mask (B, h, w) is True painted grey."""
    return images.masked_fill(_of_pixels(mask, images), GREY)


def _of_pixels(mask: Tensor, images: Tensor) -> Tensor:
    """The mask (B, h, w) of patches for each pixel: (B, 1, H, W)."""
    scale = (images.shape[-2] // mask.shape[-2], images.shape[-1] // mask.shape[-1])
    return mask.repeat_interleave(scale[0], dim=1).repeat_interleave(scale[1], dim=2)[:, None]


@contextlib.contextmanager
def undisturbed(module: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode within; afterwards every mode and every random generator is as before."""
    modes = {child: child.training for child in module.modules()}
    states = random.getstate(), np.random.get_state()
    module.eval()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for child, training in modes.items():
            child.training = training
