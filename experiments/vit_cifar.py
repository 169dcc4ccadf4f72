"""A ViT on CIFAR images, dense, weightless or without MLPs, in floats or in integers:
--config=experiments/vit_cifar.py[:VARIANT][,key=value,...]

Variants:
  quick  (the default) from scratch in minutes on 2 cores: 2 blocks of width 128, 32 x 32 pixels in
  patches of 8. gpu    from scratch on one GPU in about 20 minutes. paper  QuWeiT's I-ViT-T at 224
  pixels, fine-tuned as I-ViT publishes it; add --config.init_from=FOLDER_OR_FILE.

Shortcuts: dataset (cifar10, cifar100 or another TFDS image set), variant, res, mlp, integer, steps,
seed, luts, lut_inputs, lr, data_dir.
"""

from quweit_jax import config as configs
from quweit_jax.models.registry import defaults
from quweit_jax.training.defaults import base_config

VARIANTS = ("quick", "gpu", "paper")
ALIASES = {
    "dataset": "data.name",
    "variant": "model.variant",
    "res": "data.image_size",
    "mlp": "model.mlp",
    "integer": "model.integer",
    "width": "model.width",
    "depth": "model.depth",
    "luts": "model.weightless.num_luts",
    "lut_inputs": "model.weightless.lut_inputs",
    "data_dir": "data.data_dir",
    "lr": "optimizer.learning_rate",
}
TRAIN_IMAGES = 50_000


def get_config(argument: str | None = None):
    """The config of a variant, with shortcuts applied."""
    variant, shortcuts = configs.parse_argument(argument, VARIANTS, default="quick")
    config = base_config()
    config.model = defaults("vit")
    config.data.update(source="tfds", name="cifar10", normalize="cifar10", image_size=32)
    config.data.augment.flip = True
    if variant == "quick":
        # Two epochs are too few to profit from crops. Pooling the mean and batches that suit fast
        # tables and vectors are what helps: vit_notes.md.
        config.model.update(variant="Mi/8", depth=2, pool="mean")
        config.model.weightless.update(
            num_luts=2048, lut_inputs=6
        )  # 16 d tables, 6 inputs as in the published classifiers
        config.steps, config.batch_size, config.eval_every, config.checkpoint_every = (
            400,
            256,
            50,
            100,
        )
        config.eval_batches = 16  # `evaluate` reads all test images
        config.optimizer.update(
            learning_rate=2e-3,
            vectors_learning_rate=2e-3,
            weight_decay=0.05,
            min_ratio=0.0,
            tables_min_ratio=0.0,
        )
    if variant == "gpu":
        epochs, config.batch_size = 200, 512
        config.model.update(variant="Ti/4", heads=6, drop_path=0.1, dtype="bfloat16")
        config.model.weightless.num_luts = 1536
        config.data.augment.update(
            crop="pad",
            randaugment_layers=2,
            randaugment_magnitude=9,
            mixup=0.8,
            cutmix=1.0,
            label_smoothing=0.1,
        )
        config.data.threads = 12
        config.steps = epochs * TRAIN_IMAGES // config.batch_size
        config.eval_every = config.checkpoint_every = config.steps // 20
        config.eval_batch_size, config.prefetch = 500, 24
        config.optimizer.update(
            learning_rate=1e-3,
            warmup=10 * TRAIN_IMAGES // config.batch_size,
            weight_decay=0.05,
            min_ratio=0.01,
        )
    if variant == "paper":
        epochs, config.batch_size = 30, 128
        config.model.update(
            variant="Ti/16", integer=True, mlp="weightless", drop_path=0.1, remat=True
        )
        config.model.weightless.num_luts = 1536
        config.data.update(image_size=224, normalize="imagenet", threads=8)
        config.data.augment.update(
            crop="resized",
            randaugment_layers=2,
            randaugment_magnitude=9,
            erasing=0.25,
            mixup=0.8,
            cutmix=1.0,
            label_smoothing=0.1,
        )
        config.steps = epochs * TRAIN_IMAGES // config.batch_size
        config.eval_every = config.checkpoint_every = TRAIN_IMAGES // config.batch_size
        # The recipe is for weights that are already trained: the new tables and sums keep rates of
        # their own.
        config.optimizer.update(
            learning_rate=1e-6, warmup=0, min_ratio=1 / 15, weight_decay=1e-4, clip=0.0, beta2=0.999
        )
    return configs.apply_shortcuts(config, shortcuts, ALIASES)
