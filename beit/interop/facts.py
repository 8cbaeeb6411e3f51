"""What tensors do not tell, as the entry `beit` of a file in another layout carries it."""

from dataclasses import asdict, replace
from typing import Any

from beit.data.pixels import INTERPOLATIONS
from beit.errors import UserError
from beit.interop.decoder import decoder_in, labels_in
from beit.interop.fields import Fields
from beit.interop.weights import Preprocessing, Settings, Weights

ENTRY = "beit"


def facts(weights: Weights) -> dict[str, Any]:
    """Plain data: dicts, lists, numbers and text."""
    architecture = asdict(weights.architecture)
    architecture["image_size"] = list(architecture["image_size"])
    found = {
        "architecture": architecture,
        "preprocessing": asdict(weights.preprocessing),
        "classes": weights.classes,
    }
    if weights.decoder is not None:
        found |= {"decoder": asdict(weights.decoder), "labels": asdict(weights.labels)}
    return found


def facts_in(content: Any, path: Any) -> Fields | None:
    """The entry, if the file has one."""
    entry = content.get(ENTRY) if isinstance(content, dict) else None
    return Fields(entry, path) if isinstance(entry, dict) else None


def settings_with(found: Fields | None, settings: Settings) -> Settings:
    """What the user says, else what the entry does: what the shapes of the tensors leave open."""
    if found is None:
        return settings
    inner = found.inner("architecture")
    return replace(
        settings,
        num_heads=settings.num_heads or inner.whole("num_heads"),
        image_size=settings.image_size or inner.size("image_size"),
    )


def restored(weights: Weights, found: Fields | None) -> Weights:
    """The weights with what the entry says of them."""
    if found is None:
        return weights
    inner = found.inner("architecture")
    for name in ("width", "depth"):
        said, tensors = inner.whole(name), getattr(weights.architecture, name)
        if said != tensors:
            raise UserError(
                f"{found.where}: its entry {ENTRY} tells of a {name} of {said}, and its tensors "
                f"are of {tensors}: get the file again"
            )
    scale = inner.number("layer_scale", high=1e6)
    architecture = replace(
        weights.architecture,
        layer_scale=scale if weights.architecture.layer_scale else 0.0,
        drop_rate=inner.number("drop_rate", 0.0),
        attention_drop_rate=inner.number("attention_drop_rate", 0.0),
        drop_path_rate=inner.number("drop_path_rate", 0.0),
    )
    decoder = weights.decoder
    if decoder is not None and "decoder" in found:
        decoder = decoder_in(found.inner("decoder"))
    return weights.changed(
        architecture=architecture,
        decoder=decoder,
        labels=labels_in(found.inner("labels")) if "labels" in found else weights.labels,
        preprocessing=preprocessing_of(found.inner("preprocessing")),
        classes=found.names("classes"),
    )


def preprocessing_of(found: Fields) -> Preprocessing:
    """From keys that are those of `Preprocessing`, which are timm's too."""
    plain = Preprocessing()
    mode = found.word("crop_mode", ("center", "squash"), "center")
    return Preprocessing(
        mean=found.numbers("mean", plain.mean),
        std=found.numbers("std", plain.std),
        interpolation=found.word("interpolation", tuple(INTERPOLATIONS), plain.interpolation),
        crop_pct=found.number("crop_pct", plain.crop_pct, low=0.01),
        crop_mode="squash" if mode == "squash" else "center",
    )
