"""Folders of small models as their public programs write them: weights, config.json, a tokenizer
with special tokens and a chat template.
"""

import json
from pathlib import Path

import tokenizers
from safetensors.numpy import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from quweit_jax import pretrained
from tests.pretrained import gpt2_reference, vit_files
from tests.pretrained.language_files import random_variables, small

LETTERS = "abcdefghijklmnopqrstuvwxyz \n"
BOS, EOS, USER = 28, 29, 30  # of 31 tokens in all
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}"
    "{{ message.content }}\n{% elif message.role == 'user' %}<u>{{ message.content }}"
    "{% else %}{{ raise_exception('who is ' ~ message.role) }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<u>{% endif %}"
)


def write_tokenizer(folder: Path, *, chat: bool = True) -> None:
    """One token a letter, <s> before every text, <u> around what a user says."""
    made = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    special = [AddedToken(text, special=True) for text in ("<s>", "</s>", "<u>")]
    made.add_special_tokens(special)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair=None, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    made.save(str(folder / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    config |= {"chat_template": TEMPLATE} if chat else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_language_model(folder: Path, kind: str, *, chat: bool = False) -> Path:
    """kind: 'llama', 'matmulfree' or 'gpt2'."""
    folder.mkdir()
    if kind == "gpt2":
        gpt2_reference.write(folder, gpt2_reference.BASE, gpt2_reference.weights())
    else:
        name = "transformer_pp" if kind == "llama" else kind
        pretrained.save(small(name), random_variables(name, small(name)), folder)
    write_tokenizer(folder, chat=chat)
    return folder


def write_deit(folder: Path, *, classes: int = 3) -> Path:
    """As timm writes it: 8 x 8 pixels in patches of 4."""
    folder.mkdir()
    save_file(vit_files.weights(width=16, classes=classes), folder / "model.safetensors")
    statistics = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 8, 8]}
    config = {"architecture": "deit_tiny_patch16_224", "num_classes": classes, "num_heads": 2}
    config |= {"pretrained_cfg": statistics, "label_names": ["blue", "green", "red"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_vit(folder: Path) -> Path:
    """The same weights as `write_deit`'s in the names of Hugging Face's transformers."""
    folder.mkdir()
    given, depth, width = vit_files.weights(width=16, classes=3), 1, 16
    names = {
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "norm": "vit.layernorm",
        "head": "classifier",
    }
    for i in range(depth):
        theirs = f"vit.encoder.layer.{i}"
        names |= {
            f"blocks.{i}.norm1": f"{theirs}.layernorm_before",
            f"blocks.{i}.norm2": f"{theirs}.layernorm_after",
            f"blocks.{i}.attn.proj": f"{theirs}.attention.output.dense",
            f"blocks.{i}.mlp.fc1": f"{theirs}.intermediate.dense",
            f"blocks.{i}.mlp.fc2": f"{theirs}.output.dense",
        }
    tensors = {}
    for name, value in given.items():
        whole, _, end = name.rpartition(".")
        if name in names:
            tensors[names[name]] = value
        elif whole in names:
            tensors[f"{names[whole]}.{end}"] = value
        else:  # blocks.0.attn.qkv
            for j, part in enumerate(("query", "key", "value")):
                theirs = f"vit.encoder.layer.{whole.split('.')[1]}.attention.attention.{part}.{end}"
                tensors[theirs] = value[j * width : (j + 1) * width].copy()
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "vit", "hidden_size": width, "num_hidden_layers": depth}
    config |= {"num_attention_heads": 2, "intermediate_size": 2 * width, "layer_norm_eps": 1e-6}
    config |= {"image_size": 8, "patch_size": 4, "num_channels": 3, "hidden_act": "gelu"}
    config |= {"id2label": {"0": "blue", "1": "green", "2": "red"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    )
    return folder
