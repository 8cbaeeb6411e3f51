"""Faults of segmentation: label maps, their views, heads, windows, metrics, predictions."""

from scripts.mutation import mutation

_BILINEAR_LABELS = """\
    image = Image.fromarray(labels.astype(np.int32), mode="I")
    tall, wide = labels.shape[0] / height, labels.shape[1] / width
    region = (box.left * wide, box.top * tall)
    region += ((box.left + box.width) * wide, (box.top + box.height) * tall)
    image = image.resize((box.width, box.height), Image.Resampling.BILINEAR, region)
    found = np.asarray(image).astype(np.int16)
    return found[:, ::-1] if draws.mirrored else found
"""
LABELS = (
    mutation(
        "a part of the pairs with the label maps of others",
        "data/segmentation_sources",
        "data/test_segmentation_sources",
        (
            "return self.source.label_map(int(self.indices[index]))",
            "return self.source.label_map(index)",
        ),
    ),
    mutation(
        "reduce_zero_label off by one",
        "data/label_maps",
        "data/test_label_maps",
        (
            "first = 1 if self.reduce_zero_label else 0",
            "first = 2 if self.reduce_zero_label else 0",
        ),
    ),
    mutation(
        "values outside the classes become ignored",
        "data/label_maps",
        "data/test_label_maps data/test_segmentation_data",
        ("np.full(MAX_ID + 1, _UNKNOWN, dtype", "np.full(MAX_ID + 1, IGNORED, dtype"),
    ),
    mutation(
        "colours of a label map in another order",
        "data/label_maps",
        "data/test_label_maps",
        ("numbers = order[places]", "numbers = places"),
    ),
    mutation(
        "label map not turned with its orientation",
        "data/label_maps",
        "data/test_label_maps",
        ("ImageOps.exif_transpose(opened, in_place=True)", "ImageOps.exif_transpose(opened)"),
    ),
    mutation(
        "image and label map of different sizes accepted",
        "data/label_maps",
        "data/test_segmentation_sources",
        ("    if image == labels:\n", "    if len(image) == len(labels):\n"),
    ),
    mutation(
        "images paired with label maps by their order",
        "data/pairing",
        "data/test_segmentation_sources",
        (
            "return sorted((files[0], labels[key][0]) for key, files in found.items())",
            "return list(zip(*(sorted(files[0] for files in of.values()) "
            "for of in (found, labels))))",
        ),
    ),
    mutation(
        "images without a label map left out silently",
        "data/pairing",
        "data/test_segmentation_sources",
        (
            "    _check_keys(found, labels, roots, label_suffix)",
            "    found = {key: files for key, files in found.items() if key in labels}",
        ),
    ),
    mutation(
        "rows without a label map accepted",
        "data/segmentation_sources",
        "data/test_segmentation_sources",
        ("if len(missing := maps.empty_rows()):", "if len(missing := maps.empty_rows()[:0]):"),
    ),
    mutation(
        "class histogram of the training images alone",
        "data/segmentation",
        "data/test_segmentation_data",
        (
            "if source is not None\n        }",
            'if source is not None and role == "training"\n        }',
        ),
    ),
)
VIEWS = (
    mutation(
        "label maps resized bilinearly",
        "data/segmentation_views",
        "data/test_segmentation_views",
        (
            "    return labels[rows][:, columns[::-1] if draws.mirrored else columns]\n",
            _BILINEAR_LABELS,
        ),
    ),
    mutation(
        "labels taken half a pixel off",
        "data/segmentation_views",
        "data/test_segmentation_views",
        (
            "(2 * np.arange(start, start + count) + 1) * old",
            "2 * np.arange(start, start + count) * old",
        ),
    ),
    mutation(
        "label map mirrored without its image",
        "data/segmentation_views",
        "data/test_segmentation_views",
        ("crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draws.mirrored else crop", "crop"),
    ),
    mutation(
        "crops of a single class kept",
        "data/segmentation_views",
        "data/test_segmentation_views",
        ("range(CROPS if self.max_class_share < 1.0 else 0)", "range(0)"),
    ),
    mutation(
        "ignored pixels counted as a class of the crop",
        "data/segmentation_views",
        "data/test_segmentation_views",
        ("np.bincount(labels.ravel() + 1)[1:]", "np.bincount(labels.ravel() + 1)"),
    ),
    mutation(
        "crops padded with class 0",
        "data/segmentation_views",
        "data/test_segmentation_views data/test_segmentation_data",
        ("np.full(self.image_size, IGNORED, dtype", "np.full(self.image_size, 0, dtype"),
    ),
    mutation(
        "the same crops in every epoch",
        "data/dataset",
        "data/test_segmentation_data",
        (
            "return sample_rng(self.seed, self.epoch, self.index, stream)",
            "return sample_rng(self.seed, 0, self.index, stream)",
        ),
    ),
)
NETWORK = (
    mutation(
        "the heads read the block before the tap",
        "tasks/segmentation",
        "tasks/test_segmentation",
        (
            "self.backbone.forward_blocks(images, taps=self.pyramid.taps)",
            "self.backbone.forward_blocks(images, taps=[max(t - 1, 0) for t in self.pyramid.taps])",
        ),
    ),
    mutation(
        "maps begin with CLS and lack the last patch",
        "models/pyramid",
        "models/test_pyramid parity/test_segmentation",
        ("tokens[:, 1:].unflatten(1, grid)", "tokens[:, :-1].unflatten(1, grid)"),
    ),
    mutation(
        "rows and columns swapped where the pyramid doubles",
        "models/pyramid",
        "models/test_pyramid parity/test_segmentation",
        ("self.weight.permute(2, 3, 1, 0)", "self.weight.permute(3, 2, 1, 0)"),
    ),
    mutation(
        "maps enlarged corner to corner",
        "models/convolution",
        "models/test_segmentation parity/test_segmentation",
        ('mode="linear", align_corners=False', 'mode="linear", align_corners=True'),
    ),
    mutation(
        "UPerNet sums from the largest map on",
        "models/segmentation",
        "parity/test_segmentation",
        ("for i in reversed(range(NUM_MAPS - 1)):", "for i in range(NUM_MAPS - 1):"),
    ),
    mutation(
        "BatchNorm remembers the last batch alone",
        "models/convolution",
        "parity/test_segmentation",
        ("self.bn = nn.BatchNorm2d(channels)", "self.bn = nn.BatchNorm2d(channels, momentum=1.0)"),
    ),
    mutation(
        "pixels without a label count as class 0 in the loss",
        "tasks/segmentation",
        "tasks/test_segmentation",
        (
            "rows, labels.flatten(), weight",
            "rows, labels.flatten().clamp(min=0), weight",
        ),
    ),
    mutation(
        "class weights of the head alone",
        "tasks/segmentation",
        "tasks/test_segmentation",
        (
            "pixel_loss(beside, batch.labels, self.class_weights)",
            "pixel_loss(beside, batch.labels)",
        ),
    ),
    mutation(
        "auxiliary heads as heavy as the head",
        "tasks/segmentation",
        "tasks/test_segmentation",
        ("total + self.auxiliary_weight * added", "total + added"),
    ),
    mutation(
        "auxiliary heads without an optimizer",
        "tasks/segmentation",
        "tasks/test_segmentation",
        ("            auxiliary=self.auxiliary,\n        )", "        )"),
    ),
)
MEASURED = (
    mutation(
        "the last window left out",
        "evaluation/windows",
        "evaluation/test_windows",
        ("max(0, length - window + stride - 1) // stride", "max(0, length - window) // stride"),
    ),
    mutation(
        "rows of overlapping windows counted once",
        "evaluation/windows",
        "evaluation/test_windows",
        (
            "over_row[first - begin : after - begin] += 1",
            "over_row[first - begin : after - begin] = 1",
        ),
    ),
    mutation(
        "padding of a small image stays in its logits",
        "evaluation/windows",
        "evaluation/test_windows",
        (
            "total.div_(over_row * over_column)[:, :, : self.width]",
            "total.div_(over_row * over_column)",
        ),
    ),
    mutation(
        "logits of several scales averaged, not probabilities",
        "evaluation/windows",
        "evaluation/test_windows",
        ("view.resized(begin, end, size).softmax(dim=0)", "view.resized(begin, end, size)"),
    ),
    mutation(
        "logits brought to the original size half a pixel off",
        "evaluation/resizing",
        "evaluation/test_windows",
        (
            "dtype=torch.float64) + 0.5) * (height / target) - 0.5",
            "dtype=torch.float64)) * (height / target)",
        ),
    ),
    mutation(
        "mirrored logits not mirrored back",
        "evaluation/windows",
        "evaluation/test_windows",
        ("found.flip(-1) if self.mirrored else found", "found"),
    ),
    mutation(
        "hits counted twice in the union",
        "evaluation/segmentation_metrics",
        "evaluation/test_segmentation_metrics",
        ("union = pixels + predicted - hits", "union = pixels + predicted"),
    ),
    mutation(
        "classes that are not there count as 0 in the mean",
        "evaluation/segmentation_metrics",
        "evaluation/test_segmentation_metrics",
        ("self.iou.nanmean()", "self.iou.nan_to_num(0.0).mean()"),
    ),
    mutation(
        "pixels without a label count as class 0 in the scores",
        "evaluation/segmentation_metrics",
        "evaluation/test_segmentation_metrics",
        (
            "super().update(ids.long(), truth.long())",
            "super().update(ids.long(), truth.long().clamp(min=0))",
        ),
    ),
    mutation(
        "scores of all validations so far",
        "tasks/segmentation",
        "tasks/test_segmentation",
        ("        self.val_confusion.reset()\n", ""),
    ),
    mutation(
        "prediction normalises by other numbers than training",
        "segmenter",
        "test_segmenter",
        ("(pixels.float() / 255 - self.mean) / self.std", "pixels.float() / 255 - self.mean"),
    ),
)
SEGMENTATION = (*LABELS, *VIEWS, *NETWORK, *MEASURED)
