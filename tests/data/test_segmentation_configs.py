"""Each segmentation data set of configs/data opens a tree of its layout."""

import numpy as np
import pytest
from PIL import Image

from beit import config
from beit.errors import UserError

RUN = [
    "task=segmentation", "model=micro", "batch.global_size=2", "batch.per_device=2",
    "trainer.max_epochs=1", "loader.num_workers=0",
]  # fmt: skip
VOC = "VOCdevkit/VOC2012"
# words of the command line; a value in the files -> its class; where images and label maps lie
LAYOUTS = {
    "ade20k": ([], {0: -1, 1: 0, 150: 149, 255: -1}, {
        "training": ("images/training/{}.jpg", "annotations/training/{}.png"),
        "validation": ("images/validation/{}.jpg", "annotations/validation/{}.png"),
    }),
    "camvid": ([], {0: 0, 10: 10, 11: -1}, {
        split: (f"{split}/{{}}.png", f"{split}annot/{{}}.png") for split in ("train", "val")
    }),
    "voc": ([], {0: 0, 20: 20, 255: -1}, {
        split: (f"{VOC}/JPEGImages/{split}{{}}.jpg", f"{VOC}/SegmentationClass/{split}{{}}.png")
        for split in ("train", "val")
    }),
    "cityscapes": ([], {7: 0, 33: 18, 4: -1, 29: -1, 26: 13}, {
        split: (
            f"leftImg8bit/{split}/ulm/ulm_{{}}_leftImg8bit.png",
            f"gtFine/{split}/ulm/ulm_{{}}_gtFine_labelIds.png",
        )
        for split in ("train", "val")
    }),
    "segmentation_folders": (["data.classes=4", "data.ids.ignore=[9]"], {0: 0, 3: 3, 9: -1}, {
        split: (f"images/{split}/{{}}.png", f"annotations/{split}/{{}}.png")
        for split in ("train", "val")
    }),
}  # fmt: skip


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def data_module(words):
    cfg = config.compose([*RUN, *words])
    config.check(cfg)
    config.settle_devices(cfg)
    module = config.instantiate(cfg.datamodule)
    config.settle_classes(cfg, len(module.classes))
    assert cfg.data.num_classes == module.num_classes
    return module


def check_module(module, meaning):
    for data in (module.loaders.train_data, module.loaders.val_data):
        assert len(data) == 2
        for index in range(2):
            image, labels = data.source.load(index)
            assert image.size == labels.shape[::-1]
            assert labels[0].tolist() == list(meaning.values())
    module.check(world_size=1, accumulate=1)
    sample = module.loaders.train_data[0, 1]
    assert sample.tensors[0].shape[1:] == sample.tensors[1].shape


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_opens(name, tmp_path):
    words, meaning, splits = LAYOUTS[name]
    values = np.array([list(meaning)] * 7, dtype=np.uint8)
    for split, (image, labels) in splits.items():
        for number in range(2):
            save(tmp_path / image.format(number), np.full((*values.shape, 3), 9, dtype=np.uint8))
            save(tmp_path / labels.format(number), values)
        if name == "voc":
            lists = tmp_path / VOC / "ImageSets" / "Segmentation" / f"{split}.txt"
            lists.parent.mkdir(parents=True, exist_ok=True)
            lists.write_text(f"{split}0\n{split}1\n")
    check_module(data_module([f"data={name}", f"paths.data_dir={tmp_path}", *words]), meaning)


@pytest.mark.parametrize("name", ["segmentation_parquet", "segmentation_hub"])
def test_tables_open(name, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    meaning = {1: 0, 2: 1, 0: -1}
    save(tmp_path / "labels.png", np.array([list(meaning)] * 5, dtype=np.uint8))
    save(tmp_path / "image.png", np.zeros((5, 3, 3), dtype=np.uint8))
    rows = {
        column: [{"bytes": (tmp_path / file).read_bytes(), "path": None}] * 2
        for column, file in (("image", "image.png"), ("truth", "labels.png"))
    }
    features = datasets.Features({column: datasets.Image() for column in rows})
    table = datasets.Dataset.from_dict(rows, features=features)
    (tmp_path / "pack" / "data").mkdir(parents=True)
    for split in ("train", "val" if name == "segmentation_parquet" else "validation"):
        table.to_parquet(tmp_path / "pack" / "data" / f"{split}-00000-of-00001.parquet")
    where = "paths.data_dir" if name == "segmentation_parquet" else "data.repo"
    words = [
        "data.classes=[ink,paper]",
        "data.label_column=truth",
        "data.ids.reduce_zero_label=true",
    ]
    module = data_module([f"data={name}", f"{where}={tmp_path / 'pack'}", *words])
    assert module.classes == ["ink", "paper"]
    check_module(module, meaning)


def test_maps_and_colours_can_be_said_on_the_command_line(tmp_path):
    for split in ("train", "val"):
        for number in range(2):
            save(tmp_path / "images" / split / f"{number}_x.png", np.zeros((4, 3, 3), np.uint8))
            colours = np.array([[[0, 0, 0], [9, 8, 7], [1, 2, 3]]] * 4, dtype=np.uint8)
            save(tmp_path / "annotations" / split / f"{number}_y.png", colours)
    words = [
        "data=segmentation_folders", "data.classes=[ink,paper]", "data.image_suffix=_x",
        "data.label_suffix=_y", "data.ids.colors=[[9,8,7],[1,2,3],[0,0,0]]",
        "data.ids.id_map={0: 1, 1: 0}", f"paths.data_dir={tmp_path}",
    ]  # fmt: skip
    check_module(data_module(words), {"black": -1, "first": 1, "second": 0})


def test_mistakes_name_the_key(tmp_path):
    with pytest.raises(UserError, match=r"^data\.classes has no value"):
        data_module(["data=segmentation_folders"])
    with pytest.raises(UserError, match=r"data\.ids\.ingore is not an argument of LabelIds"):
        data_module(["data=ade20k", "+data.ids.ingore=4"])
