"""Faults of frozen evaluation, of targets, and of what is looked at before training."""

from scripts.mutation import mutation

FROZEN = (
    mutation(
        "CLS in the mean of the patches",
        "evaluation/features",
        "evaluation/test_features",
        ("x[:, 1:].float().mean(dim=1)", "x.float().mean(dim=1)"),
    ),
    mutation(
        "features of the layer before",
        "evaluation/features",
        "evaluation/test_features",
        (
            "taps = [layer - 1 for layer in chosen]",
            "taps = [max(layer - 2, 0) for layer in chosen]",
        ),
    ),
    mutation(
        "features with dropped branches",
        "evaluation/features",
        "evaluation/test_features",
        ("    module.eval()\n    try:", "    try:"),
    ),
    mutation(
        "networks left in evaluation mode",
        "evaluation/features",
        "evaluation/test_features",
        ("            child.training = training\n", "            child.training = False\n"),
    ),
    mutation(
        "unreadable images measured as others",
        "data/labelled",
        "evaluation/test_features",
        ("batch.failed[batch.failed >= 0]", "batch.failed[:0]"),
    ),
    mutation(
        "best layer chosen by the validation images",
        "evaluation/choosing",
        "evaluation/test_linear_probe evaluation/test_knn",
        ("key=lambda row: row[HELD_OUT]", "key=lambda row: row[MEASURED]"),
    ),
    mutation(
        "penalty chosen by the images it was fitted to",
        "evaluation/linear_probe",
        "evaluation/test_linear_probe",
        (
            "choosing.accuracy(probe.predict(others), labels[mask])",
            "choosing.accuracy(probe.predict(fitted), labels[~mask])",
        ),
    ),
    mutation(
        "probe measured without the images held out",
        "evaluation/linear_probe",
        "evaluation/test_linear_probe",
        (
            "self._fit(everything, labels.to(device), l2, None)",
            "self._fit(everything[~mask], labels[~mask].to(device), l2, None)",
        ),
    ),
    mutation(
        "validation images standardised by themselves",
        "evaluation/linear_probe",
        "evaluation/test_linear_probe",
        (
            "predicted = probe.predict(to(val.of(layer, pooling).to(device)))",
            "others = val.of(layer, pooling).to(device)\n"
            "        predicted = probe.predict(Standardised.by(others)(others))",
        ),
    ),
    mutation(
        "penalty on the bias too",
        "evaluation/linear_probe",
        "evaluation/test_linear_probe",
        (
            "loss = l2 / 2 * weight.square().sum()",
            "loss = l2 / 2 * (weight.square().sum() + bias.square().sum())",
        ),
        ("l2 * weight, torch.zeros_like(bias)", "l2 * weight, l2 * bias"),
    ),
    mutation(
        "images held out vote for themselves",
        "evaluation/knn",
        "evaluation/test_knn",
        ("bank[kept], labels[kept])", "bank, labels)"),
    ),
    mutation(
        "neighbours by inner product instead of cosine",
        "evaluation/knn",
        "evaluation/test_knn",
        ("F.normalize(queries, dim=1), F.normalize(bank, dim=1)", "queries, bank"),
    ),
    mutation(
        "neighbours vote alike, near or far",
        "evaluation/knn",
        "evaluation/test_knn",
        ("/ temperature).exp()", "/ temperature).exp().ceil()"),
    ),
    mutation(
        "more neighbours than may vote",
        "evaluation/knn",
        "evaluation/test_knn",
        ("rest := int((~mask).sum())", "rest := len(mask)"),
    ),
    mutation(
        "squared singular values in RankMe",
        "evaluation/health",
        "evaluation/test_health",
        ("eigvalsh(products).clamp(min=0).sqrt()", "eigvalsh(products).clamp(min=0)"),
    ),
    mutation(
        "perplexity of tokens whose patches are seen",
        "evaluation/health",
        "evaluation/test_health",
        (
            "backbone(batch.images.to(compute.device), mask)",
            "backbone(batch.images.to(compute.device), torch.zeros_like(mask))",
        ),
    ),
    mutation(
        "online probe leaves the network in evaluation mode",
        "callbacks/online_probe",
        "callbacks/test_online_probe",
        ("        with undisturbed(pl_module):\n", "        pl_module.eval()\n        if True:\n"),
    ),
    mutation(
        "tables stop at the guard of a logger",
        "loggers/guarded",
        "loggers/test_guarded",
        ("        logger.log_table(name, rows, step)\n", "        pass\n"),
    ),
    mutation(
        "online probe draws from the run's generators",
        "callbacks/pictures",
        "callbacks/test_online_probe",
        ("        with torch.random.fork_rng():\n            yield\n", "        yield\n"),
    ),
    mutation(
        "the random network has the checkpoint's weights",
        "frozen",
        "test_frozen",
        ("network_of(checkpoint, weights=False)", "network_of(checkpoint)"),
    ),
    mutation(
        "images normalised by other numbers than the checkpoint's",
        "frozen",
        "test_frozen",
        ("known |= {", 'known |= {"mean": (0.5, 0.5, 0.5), '),
    ),
    mutation(
        "gradient probe of a backbone that drops branches",
        "tasks/linear_probe",
        "tasks/test_linear_probe",
        ("        self.backbone.eval()\n        return self", "        return self"),
    ),
)
TARGETS = (
    mutation(
        "pixels normalised over the batch instead of each patch",
        "tasks/targets",
        "tasks/test_targets",
        (
            "            mean, deviation = _moments(patches)\n            patches = (",
            "            mean, deviation = patches.mean(), patches.std()\n            patches = (",
        ),
    ),
    mutation(
        "columns before rows in a patch's pixels",
        "tasks/targets",
        "tasks/test_targets",
        (
            "patches.permute(0, 2, 3, 1, 4, 5).flatten(3)",
            "patches.permute(0, 2, 3, 1, 5, 4).flatten(3)",
        ),
    ),
    mutation(
        "masked patches shown to the encoder",
        "tasks/mim",
        "tasks/test_targets tasks/test_mim",
        (
            "return mask if self.mask_input else torch.zeros_like(mask)",
            "return torch.zeros_like(mask)",
        ),
    ),
    mutation(
        "loss of all patches where the masked ones are asked for",
        "tasks/mim",
        "tasks/test_targets tasks/test_mim",
        (
            'return mask if self.predict == "masked" else torch.ones_like(mask)',
            "return torch.ones_like(mask)",
        ),
    ),
    mutation(
        "validation weighted by images instead of patches",
        "tasks/mim",
        "tasks/test_mim",
        ('weight = {"batch_size": len(wanted)}', 'weight = {"batch_size": len(batch.images)}'),
    ),
)
PREFLIGHT = (
    mutation(
        "square-root rule computed linearly",
        "preflight/rates",
        "preflight/test_arithmetic",
        ("reference.lr * math.sqrt(ratio)", "reference.lr * ratio"),
    ),
    mutation(
        "no warning of a batch that was changed alone",
        "preflight/rates",
        "preflight/test_arithmetic",
        ("    if same_rate:\n        text", "    if same_rate and ratio == 1:\n        text"),
    ),
    mutation(
        "the recipe's numbers with the user's changes",
        "preflight/reference",
        "test_doctor",
        ('r"[+~]*(batch|optim)\\."', 'r"(batch|optim):"'),
    ),
    mutation(
        "one moment of AdamW forgotten in the memory",
        "preflight/space",
        "preflight/test_arithmetic",
        ("_MOMENTS = 2", "_MOMENTS = 1"),
    ),
    mutation(
        "parameters without a gradient not noticed",
        "preflight/trial",
        "preflight/test_trial",
        ("parameter.requires_grad and parameter.grad is None", "not parameter.requires_grad"),
    ),
)
EVALUATION = (*FROZEN, *TARGETS, *PREFLIGHT)
