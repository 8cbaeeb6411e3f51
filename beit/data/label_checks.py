"""Labels that cannot be trained on, found before anything is."""

import numpy as np

from beit.data.sources import ImageSource
from beit.errors import UserError


def check_classes(train: ImageSource, val: ImageSource | None) -> None:
    """Raises UserError where the same number means two things."""
    if val is None or train.classes is None or val.classes is None or train.classes == val.classes:
        return
    odd = sorted(set(train.classes) ^ set(val.classes)) or ["the order"]
    raise UserError(
        f"training has {len(train.classes)} classes and validation {len(val.classes)}, differing "
        f"in {', '.join(odd[:3])}: the numbers of the labels would mean different things"
    )


def check_labels(source: ImageSource, role: str, num_classes: int) -> None:
    """Raises UserError for missing labels, or one outside [0, num_classes)."""
    if source.labels is None:
        raise UserError(
            f"the {role} images have no labels ({source!r}), which classification needs; use class "
            "folders or a list with labels (images without labels serve pretraining)"
        )
    wrong = np.flatnonzero((source.labels < 0) | (source.labels >= num_classes))
    if len(wrong):
        index = int(wrong[0])
        raise UserError(
            f"{role} label {source.labels[index]} of {source.name(index)} is outside 0 to "
            f"{num_classes - 1}; set num_classes to at least {int(source.labels.max()) + 1}"
        )
