"""A ViT on CIFAR images, dense, weightless or without MLPs, in floats or in integers:
--config=experiments/configs/vit_cifar.py[:VARIANT][,key=value,...]

Variants:
  quick  (the default) from scratch in minutes on 2 cores: 2 blocks of width 128, 32 x 32 pixels in
  patches of 8.
  crops  the same for eight epochs, of padded crops: what the study of channel mixers trains.
  gpu    from scratch on one GPU in about 20 minutes.
  paper  QuWeiT's I-ViT-T at 224 pixels, fine-tuned as I-ViT publishes it; add
  --config.init_from=FOLDER_OR_FILE.

Shortcuts: dataset (cifar10, cifar100 or another TFDS image set), variant, res, mlp, integer, steps,
seed, luts, lut_inputs, lr, data_dir.
"""

from quweit_jax.config import Config, parse_argument
from quweit_jax.models.registry import defaults
from quweit_jax.training.defaults import base_config, with_shortcuts

TRAIN_IMAGES = 50_000


def get_config(argument: str | None = None):
    """The config of a variant, with shortcuts applied."""
    variant, shortcuts = parse_argument(argument, tuple(VARIANTS), default="quick")
    config = base_config()
    config.model = defaults("vit")
    config.data.source = "tfds"
    config.data.name = "cifar10"
    config.data.normalize = "cifar10"  # by the set's own means and deviations
    config.data.image_size = 32  # as they are
    config.data.augment.flip = True  # things look as well in a mirror
    VARIANTS[variant](config)
    return with_shortcuts(config, shortcuts)


def _quick(config: Config) -> None:
    """From scratch in minutes on 2 cores; what was tried is in experiments/results/vit_notes.md."""
    config.model.variant = "Mi/8"  # width 128; 16 patches an image
    config.model.depth = 2  # blocks
    config.model.pool = "mean"  # with a class token MLPs hardly matter in so few steps
    config.model.weightless.num_luts = 2048  # 16 a feature: level with the MLPs for two epochs
    config.model.weightless.lut_inputs = 6  # as in the published classifiers; better than 4 here
    config.steps = 400  # two epochs, too few to profit from crops
    config.batch_size = 256  # which suits fast tables and vectors
    config.eval_every = 50  # eight points a curve
    config.checkpoint_every = 100  # the run is short
    config.eval_batches = 16  # `evaluate` reads all test images
    config.optimizer.learning_rate = 2e-3  # large, as its batches are
    config.optimizer.vectors_learning_rate = 2e-3  # the more tables, the smaller
    config.optimizer.weight_decay = 0.05  # DeiT's
    config.optimizer.min_ratio = 0.0  # a short run ends at rest
    config.optimizer.tables_min_ratio = 0.0  # likewise


def _crops(config: Config) -> None:
    """Eight epochs, long enough to profit from crops: what experiments/studies/blocks.py trains."""
    _quick(config)
    config.data.augment.crop = "pad"  # moved by up to 4 pixels
    config.steps = 8 * TRAIN_IMAGES // config.batch_size  # 8 epochs
    config.eval_every = 142  # eleven points a curve
    config.checkpoint_every = 142  # with each of them


def _gpu(config: Config) -> None:
    """From scratch on one GPU in about 20 minutes: DeiT's recipe at 32 pixels."""
    config.model.variant = "Ti/4"  # width 192; 64 patches an image
    config.model.heads = 6  # of width 32
    config.model.drop_path = 0.1  # DeiT's
    config.model.dtype = "bfloat16"  # what a GPU multiplies fastest
    config.model.weightless.num_luts = 1536  # 8 a feature
    _deit_augmentation(config)
    config.data.augment.crop = "pad"  # moved by up to 4 pixels: images are small
    config.data.threads = 12  # a GPU waits for images otherwise
    config.prefetch = 24  # batches, likewise
    config.batch_size = 512  # to keep a GPU busy
    config.steps = 200 * TRAIN_IMAGES // config.batch_size  # 200 epochs
    config.eval_every = config.steps // 20  # 20 points a curve
    config.checkpoint_every = config.steps // 20  # at most 5 % of the work is lost
    config.eval_batch_size = 500  # divides 10,000 test images
    config.optimizer.warmup = 10 * TRAIN_IMAGES // config.batch_size  # 10 epochs
    config.optimizer.weight_decay = 0.05  # DeiT's
    config.optimizer.min_ratio = 0.01  # DeiT's


def _paper(config: Config) -> None:
    """QuWeiT's I-ViT-T, fine-tuned as I-ViT publishes it."""
    config.model.integer = True  # the model's default variant is I-ViT-T's, Ti/16
    config.model.mlp = "weightless"  # QuWeiT's
    config.model.drop_path = 0.1  # DeiT's
    config.model.remat = True  # activations are computed twice rather than kept
    config.model.weightless.num_luts = 1536  # 8 a feature
    config.data.image_size = 224  # the published weights' own
    config.data.normalize = "imagenet"  # likewise
    config.data.threads = 8  # to crop and enlarge in time
    _deit_augmentation(config)
    config.data.augment.crop = "resized"  # of any part, as ImageNet is trained
    config.data.augment.erasing = 0.25  # DeiT's
    config.batch_size = 128  # I-ViT's
    config.steps = 30 * TRAIN_IMAGES // config.batch_size  # 30 epochs
    config.eval_every = TRAIN_IMAGES // config.batch_size  # once an epoch
    config.checkpoint_every = TRAIN_IMAGES // config.batch_size  # likewise
    # I-ViT's recipe is for weights that are already trained: the new tables and sums keep rates of
    # their own.
    config.optimizer.learning_rate = 1e-6  # moves trained weights little
    config.optimizer.warmup = 0  # a rate this small needs none
    config.optimizer.min_ratio = 1 / 15
    config.optimizer.weight_decay = 1e-4
    config.optimizer.clip = 0.0  # none
    config.optimizer.beta2 = 0.999  # Adam's own default


def _deit_augmentation(config: Config) -> None:
    """What DeiT does to images, but for crops and erasing."""
    config.data.augment.randaugment_layers = 2  # changes an image
    config.data.augment.mixup = 0.8  # the beta distribution of how much two are mixed
    config.data.augment.cutmix = 1.0  # and of how much of one is pasted into the other
    config.data.augment.label_smoothing = 0.1  # of the target is spread over all classes


VARIANTS = {"quick": _quick, "crops": _crops, "gpu": _gpu, "paper": _paper}
