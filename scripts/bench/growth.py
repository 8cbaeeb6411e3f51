"""More images, ten times the images, twice the depth: no cost grows faster than the work."""

import lightning as L
from PIL import Image

from beit.data.pretraining import PretrainingData
from beit.models.heads import MIMHead
from beit.models.vit import VisionTransformer
from beit.optim.recipe import AdamWRecipe
from beit.tasks.mim import MaskedImageModeling
from beit.tokenizers.dvae import DiscreteVAE
from scripts.bench import contenders, own_data, steps
from scripts.bench.results import Entry, Table
from scripts.bench.settings import Settings, Shape
from scripts.bench.timing import alternate, timed

ROW = "Growth: time of a unit of work"
_SMALL = Shape(image_size=64, width=48, depth=2, num_heads=2, batch_size=64)
_COMPARED = "time of a unit"


class Colours:
    """A source of small pictures that take no time to read."""

    classes = labels = None

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def load(self, index: int) -> tuple[Image.Image, None]:
        return Image.new("RGB", (72, 72), (index % 251, index % 241, index % 239)), None

    def name(self, index: int) -> str:
        return f"colour {index}"


def run(settings: Settings) -> list[Table]:
    return [_images(settings), _depth(settings)]


def _images(settings: Settings) -> Table:
    """Whole epochs of training by Lightning, with views, masks and tokens."""
    least, more = settings.number(512, 64), settings.number(4096, 128)
    counts = {
        f"{least} images": least,
        f"{more:,} more": least + more,
        "10 times as many": 10 * least,
    }
    epochs = {name: lambda count=count: _epoch(count) for name, count in counts.items()}
    seconds = alternate(timed(epochs), rounds=min(settings.rounds, 3), warmup=0)
    entries = [Entry(name, values, counts[name]) for name, values in seconds.items()]
    title = "an epoch of pretraining, a network and a tokenizer of next to nothing"
    return Table(title, entries, work="images", compared=_COMPARED)


def _depth(settings: Settings) -> Table:
    shape = settings.shape("tiny")
    deeper = Shape(**{**vars(shape), "depth": 2 * shape.depth})
    shapes = {f"depth {s.depth}": s for s in (shape, deeper)}
    built = {
        name: steps.training(contenders.OursMIM(s), *steps.mim_batch(s))
        for name, s in shapes.items()
    }
    seconds = alternate(timed(built), rounds=settings.rounds)
    entries = [
        Entry(name, values, shapes[name].batch_size * shapes[name].depth)
        for name, values in seconds.items()
    ]
    return Table(f"MIM step, {shape}", entries, work="blocks", compared=_COMPARED)


def _epoch(count: int) -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        precision="bf16-mixed",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=None,
    )
    trainer.fit(_task(), datamodule=_data(count))


def _task() -> MaskedImageModeling:
    backbone = VisionTransformer(
        _SMALL.image_size,
        16,
        width=_SMALL.width,
        depth=_SMALL.depth,
        num_heads=_SMALL.num_heads,
        absolute_position=True,
        relative_position="none",
        layer_scale=0.0,
        drop_path_rate=0.0,
        mask_token=True,
        final_norm=True,
        init_cut=0.02,
    )
    recipe = AdamWRecipe(lr=1e-3, min_lr=1e-5, weight_decay=0.05)
    return MaskedImageModeling(backbone, MIMHead(_SMALL.width, 32), optim=recipe)


def _data(count: int) -> PretrainingData:
    tokenizer = DiscreteVAE(
        image_size=_SMALL.token_image_size,
        stride=8,
        vocab_size=32,
        codebook_dim=2,
        hidden_dim=8,
        num_res_blocks=0,
    )
    return own_data.pretraining(Colours(count), _SMALL, tokenizer)
