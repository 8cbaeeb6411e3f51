"""The faults of `make mutations`: what is replaced where, and which tests ought to notice."""

from scripts.faulty_evaluation import EVALUATION
from scripts.faulty_segmentation import SEGMENTATION
from scripts.mutation import Mutation, mutation

MODELS = (
    mutation(
        "last three rows of the bias table swapped",
        "models/position",
        "parity/test_encoder parity/test_positions models/test_position",
        ("index[0, :] = rows - 3", "index[0, :] = rows - 2"),
        ("index[:, 0] = rows - 2", "index[:, 0] = rows - 3"),
    ),
    mutation(
        "patch grid transposed in the bias",
        "models/position",
        "parity/test_encoder parity/test_positions models/test_position",
        ("torch.arange(height).repeat_interleave(width)", "torch.arange(height).repeat(width)"),
        ("torch.arange(width).repeat(height)", "torch.arange(width).repeat_interleave(height)"),
    ),
    mutation(
        "geometric ratio one term off",
        "models/position",
        "parity/test_positions models/test_position",
        ("terms, reach = source // 2, target // 2", "terms, reach = source // 2 + 1, target // 2"),
    ),
    mutation(
        "bias table resized by other knots",
        "models/position",
        "parity/test_positions models/test_position",
        ("interior = knots[2:-2]", "interior = (knots[1:-3] + knots[2:-2]) / 2"),
    ),
    mutation(
        "mask put on the pixels, before the patch embedding",
        "models/vit",
        "parity/test_encoder parity/test_masked_modeling models/test_vit",
        (
            "        patches = self.patch_embed(images)\n",
            "        if mask is not None:\n"
            "            size = self.patch_size\n"
            "            hidden = mask.repeat_interleave(size, 1).repeat_interleave(size, 2)\n"
            "            images = images.masked_fill(hidden[:, None], 0.0)\n"
            "        patches = self.patch_embed(images)\n",
        ),
        (
            "torch.where(mask.flatten(1)[..., None], self.mask_token, patches)",
            "patches + 0 * self.mask_token",
        ),
    ),
    mutation(
        "mask inverted in the encoder",
        "models/vit",
        "parity/test_encoder parity/test_masked_modeling models/test_vit",
        (
            "torch.where(mask.flatten(1)[..., None], self.mask_token, patches)",
            "torch.where(mask.flatten(1)[..., None], patches, self.mask_token)",
        ),
    ),
    mutation(
        "depth rescale left out",
        "models/vit",
        "models/test_vit",
        ("block.mlp.fc2.weight.div_(math.sqrt(2 * number))", "block.mlp.fc2.weight.div_(1.0)"),
    ),
    mutation(
        "depth rescale off by one block",
        "models/vit",
        "models/test_vit",
        ("enumerate(self.blocks, start=1)", "enumerate(self.blocks, start=2)"),
    ),
    mutation(
        "initialisation cut at two deviations instead of one",
        "models/vit",
        "models/test_vit",
        ("std=std, a=-cut, b=cut)", "std=std, a=-2 * cut, b=2 * cut)"),
    ),
    mutation(
        "taps off by one block",
        "models/vit",
        "parity/test_encoder models/test_vit",
        ("outputs: dict[int, Tensor] = {}", "outputs: dict[int, Tensor] = {0: x}"),
        (
            "            if i in taps:\n                outputs[i] = x",
            "            outputs[i + 1] = x",
        ),
    ),
    mutation(
        "final norm twice",
        "models/vit",
        "parity/test_encoder parity/test_masked_modeling",
        ("return self.norm(x)", "return self.norm(self.norm(x))"),
    ),
    mutation(
        "bias of the keys learned too",
        "models/layers",
        "parity/test_encoder parity/test_masked_modeling models/test_vit",
        (
            "        self.v_bias = nn.Parameter(torch.zeros(width))\n",
            "        self.v_bias = nn.Parameter(torch.zeros(width))\n"
            "        self.k_bias = nn.Parameter(torch.zeros(width))\n",
        ),
        ("torch.zeros_like(self.v_bias)", "self.k_bias"),
    ),
    mutation(
        "LayerScale left out of the MLP branch",
        "models/layers",
        "parity/test_encoder parity/test_masked_modeling models/test_layers",
        ("self.mlp(self.norm2(rows)), self.gamma_2", "self.mlp(self.norm2(rows)), None"),
    ),
    mutation(
        "attention logits not scaled",
        "models/layers",
        "parity/test_encoder parity/test_masked_modeling models/test_layers",
        ("(q * scale) @ k", "q @ k"),
    ),
    mutation(
        "GELU by its tanh approximation",
        "models/layers",
        "parity/test_encoder parity/test_masked_modeling",
        ("F.gelu(self.fc1(x))", 'F.gelu(self.fc1(x), approximate="tanh")'),
    ),
    mutation(
        "CLS counted in the mean of the patches",
        "models/heads",
        "parity/test_encoder models/test_heads",
        ("features[:, 1:].mean(dim=1)", "features.mean(dim=1)"),
    ),
    mutation(
        "masked modelling reads the token before the patch",
        "models/heads",
        "parity/test_masked_modeling models/test_heads tasks/test_mim",
        ("features[:, 1:][mask.flatten(1)]", "features[:, :-1][mask.flatten(1)]"),
    ),
)
TRAINING = (
    mutation(
        "mask inverted in the loss",
        "tasks/mim",
        "parity/test_masked_modeling",
        ('return mask if self.predict == "masked"', 'return ~mask if self.predict == "masked"'),
    ),
    mutation(
        "warm-up off by one step",
        "optim/schedules",
        "parity/test_optimisation optim/test_schedules",
        ("lr * step / (warmup_steps - 1)", "lr * step / warmup_steps"),
    ),
    mutation(
        "cosine off by one step",
        "optim/schedules",
        "parity/test_optimisation optim/test_schedules",
        (
            "cosine_steps = total_steps - warmup_steps",
            "cosine_steps = total_steps - warmup_steps - 1",
        ),
    ),
    mutation(
        "layer decay off by one layer",
        "optim/groups",
        "parity/test_optimisation optim/test_groups",
        ('int(rest.partition(".")[0]) + 1', 'int(rest.partition(".")[0])'),
    ),
    mutation(
        "bias tables exempt from weight decay",
        "optim/groups",
        "parity/test_optimisation optim/test_groups optim/test_recipe",
        (
            'NO_DECAY_NAMES = ("pos_embed", "cls_token")',
            'NO_DECAY_NAMES = ("pos_embed", "cls_token", "relative_position_bias_table")',
        ),
    ),
)
_BOTH_VIEWS = """\
        first, second = self._views(image, draws, self._for_encoder, self._for_tokenizer)
"""
DATA = (
    mutation(
        "evaluation resizes bilinearly",
        "data/classification_views",
        "parity/test_views data/test_views",
        (
            "image = image.resize((wide, tall), self._resample)",
            "image = image.resize((wide, tall), Image.Resampling.BILINEAR)",
        ),
    ),
    mutation(
        "tokenizer's view from another crop box",
        "data/views",
        "parity/test_views data/test_views",
        (
            _BOTH_VIEWS,
            "        box = draw_crop(rng, image.size, self.scale, self.ratio)\n"
            "        other = draws._replace(box=box)\n"
            "        first = self._views(image, draws, self._for_encoder)[0]\n"
            "        second = self._views(image, other, self._for_tokenizer)[0]\n",
        ),
    ),
    mutation(
        "tokenizer's view not mirrored",
        "data/views",
        "parity/test_views data/test_views",
        (
            _BOTH_VIEWS,
            f"{_BOTH_VIEWS}        second = second.flip(2) if draws.mirrored else second\n",
        ),
    ),
    mutation(
        "tokenizer's view bicubic",
        "data/views",
        "parity/test_views data/test_views",
        ('token_interpolation: str = "lanczos"', 'token_interpolation: str = "bicubic"'),
    ),
    mutation(
        "blocks as large as the grid",
        "data/masking",
        "parity/test_masks data/test_masking",
        (
            "if height >= self.grid[0] or width >= self.grid[1]:",
            "if height > self.grid[0] or width > self.grid[1]:",
        ),
    ),
    mutation(
        "aspect of blocks uniform instead of log-uniform",
        "data/masking",
        "parity/test_masks data/test_masking",
        (
            "math.exp(rng.uniform(self._log_aspect, -self._log_aspect))",
            "rng.uniform(self.min_aspect, 1 / self.min_aspect)",
        ),
    ),
    mutation(
        "masks filled up from the top left",
        "data/masking",
        "parity/test_masks",
        (
            "rng.sample(left, self.target - int(mask.sum()))",
            "left[: self.target - int(mask.sum())]",
        ),
    ),
)
TOKENIZER = (
    mutation(
        "DALL-E's residual path not scaled down",
        "tokenizers/dalle",
        "parity/test_dalle tokenizers/test_dalle",
        ("1 / (NUM_GROUPS * BLOCKS_PER_GROUP) ** 2", "1 / (NUM_GROUPS * BLOCKS_PER_GROUP)"),
    ),
    mutation(
        "DALL-E's kernels in another order",
        "tokenizers/dalle",
        "parity/test_dalle tokenizers/test_dalle",
        ("ENCODER_KERNELS = (3, 3, 3, 1)", "ENCODER_KERNELS = (1, 3, 3, 3)"),
    ),
    mutation(
        "DALL-E given pixels of the whole range",
        "tokenizers/dalle",
        "parity/test_dalle tokenizers/test_dalle",
        ("value_range = (EPS, 1 - EPS)", "value_range = (0.0, 1.0)"),
    ),
)
MUTATIONS: tuple[Mutation, ...] = (
    *(*MODELS, *TRAINING, *DATA, *TOKENIZER),
    *(*SEGMENTATION, *EVALUATION),
)
