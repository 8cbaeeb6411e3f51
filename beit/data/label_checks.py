"""Labels that cannot be trained on, found before anything is."""

import numpy as np

from beit.data.sources import ImageSource
from beit.errors import UserError


def number_of_classes(num_classes: int | str, train: ImageSource) -> int:
    """The number itself, or for "auto" that of the training source. Raises UserError otherwise."""
    if num_classes == "auto":
        return len(train.classes or ())
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise UserError(f"num_classes {num_classes!r}: expected a whole number above 0, or auto")
    return num_classes


def shared_classes(train: ImageSource, val: ImageSource | None) -> list[str] | None:
    """The classes of training, which validation must share.

    Where both are mere numbers, one source may lack the highest; then it is the longer list.

    Raises:
        UserError: the names differ, so that the same number means two things.
    """
    if val is None or train.classes is None or val.classes is None or train.classes == val.classes:
        return train.classes
    if _are_numbers(train.classes) and _are_numbers(val.classes):
        return max(train.classes, val.classes, key=len)
    odd = sorted(set(train.classes) ^ set(val.classes)) or ["the order"]
    known = ",".join(train.classes[:5]) + (",..." if len(train.classes) > 5 else "")
    raise UserError(
        f"training has {len(train.classes)} classes and validation {len(val.classes)}, differing "
        f"in {', '.join(odd[:3])}: the numbers of the labels would mean different things; give "
        f"lists of files the same names, data.classes=[{known}], and folders the same class folders"
    )


def _are_numbers(classes: list[str]) -> bool:
    return classes == [str(number) for number in range(len(classes))]


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
