from beit.callbacks.curves import Curves, collect
from beit.callbacks.metrics_file import MetricsFile


def test_collect():
    rows = [
        {"step": "9", "train/loss_step": "3.0", "train/loss_epoch": "", "val/loss": "", "x": "1"},
        {"step": "9", "train/loss_step": "", "train/loss_epoch": "8.0", "val/loss": "2.5", "x": ""},
        {"step": "4", "train/loss_step": "nan", "train/loss_epoch": "", "val/loss": "", "x": ""},
        {"step": "9", "train/loss_step": "3.5", "train/loss_epoch": "", "val/loss": "", "x": ""},
        {"step": "5", "train/loss_step": "1.0", "train/loss_epoch": "", "val/loss": "", "x": ""},
    ]
    # the row written later counts, as after a resume
    assert collect(rows) == {"loss": {"train": ([5.0, 9.0], [1.0, 3.5]), "val": ([9.0], [2.5])}}


def test_drawn_at_the_end(tmp_path, fit):
    curves = Curves(str(tmp_path / "metrics.csv"), str(tmp_path / "figures"))
    fit(callbacks=[curves], logger=MetricsFile(str(tmp_path)))
    assert (tmp_path / "figures" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_without_a_metrics_file(tmp_path, fit):
    fit(callbacks=[Curves(str(tmp_path / "metrics.csv"), str(tmp_path / "figures"))])
    assert not (tmp_path / "figures").exists()
