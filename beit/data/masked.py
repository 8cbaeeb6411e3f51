"""Images and masks for masked image modelling whose target is the images themselves."""

from collections.abc import Sequence

from torch import Tensor

from beit.data.batches import MaskedBatch
from beit.data.dataset import MaskedSample, Masking
from beit.data.image_data import ImageData
from beit.data.loading import LoaderSettings
from beit.data.normalization import Normalization
from beit.data.sources import ImageSource
from beit.data.views import TwoViewTransform


class MaskedData(ImageData):
    """Images and masks, without a tokenizer: of `views` the encoder's alone is made.

    Crops and masks are those that PretrainingData draws from the same seed.

    Raises UserError where `mean` and `std` are not three numbers each; see also `check`.
    """

    def __init__(
        self,
        train: ImageSource,
        val: ImageSource | None,
        *,
        views: TwoViewTransform,
        masking: Masking,
        mean: Sequence[float],
        std: Sequence[float],
        loader: LoaderSettings,
    ) -> None:
        self.normalize = Normalization(mean, std)
        make_sample = MaskedSample(views, masking)
        super().__init__(
            loader,
            MaskedBatch,
            train=(train, make_sample),
            val=(val, make_sample),
            described=(
                f"views {views!r}, the encoder's alone, new ones in every epoch",
                f"encoder's view normalised by {self.normalize!r}",
                f"masking {masking!r}",
            ),
        )

    def on_after_batch_transfer(self, batch: MaskedBatch, dataloader_idx: int) -> MaskedBatch:
        return batch._replace(images=self.normalize(batch.images))

    def denormalize(self, images: Tensor) -> Tensor:
        """The encoder's images (B, 3, H, W) back to [0, 1]."""
        return self.normalize.undone(images)
