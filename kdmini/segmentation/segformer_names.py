"""What the tensors of a SegFormer are called, here and in the files of others."""

import re
from collections.abc import Mapping
from typing import NamedTuple

NVIDIA = "of NVIDIA, if these are its weights: research or evaluation only, non-commercial"


class Naming(NamedTuple):
    """How a kind of file names the modules.

    modules: ours, with # for a number -> theirs, with {0} and {1} for the numbers and {n} for
    the first of them, counted from 1; two names where a tensor is in two pieces. What is not
    there has our name.
    """

    title: str  # of the kind of file
    license: str
    modules: Mapping[str, str]
    ignored: str = "$"  # keys that are of no use, as a regular expression

    def keys_of(self, key: str) -> list[str]:
        """Our key -> those of the file that hold the tensor, in order."""
        module, _, tensor = key.rpartition(".")
        numbers = re.findall(r"(?<=\.)\d+", module)
        pattern = re.sub(r"(?<=\.)\d+", "#", module)
        theirs = self.modules.get(module) or self.modules.get(pattern, module)
        first = int(numbers[0]) + 1 if numbers else 0
        return [f"{name}.{tensor}" for name in theirs.format(*numbers, n=first).split()]


def in_blocks(prefix: str, modules: Mapping[str, str]) -> dict[str, str]:
    """The modules of a block, by their names in it."""
    return {
        f"stages.#.blocks.#.{ours}": " ".join(prefix + name for name in theirs.split())
        for ours, theirs in modules.items()
    }


OURS = Naming("best.pt of kdmini", "", {})

TRANSFORMERS = Naming(
    "file of transformers",
    NVIDIA,
    {
        "stages.#.embed.proj": "segformer.encoder.patch_embeddings.{0}.proj",
        "stages.#.embed.norm": "segformer.encoder.patch_embeddings.{0}.layer_norm",
        **in_blocks(
            "segformer.encoder.block.{0}.{1}.",
            {
                "norm1": "layer_norm_1",
                "attn.q": "attention.self.query",
                "attn.kv": "attention.self.key attention.self.value",
                "attn.sr": "attention.self.sr",
                "attn.sr_norm": "attention.self.layer_norm",
                "attn.proj": "attention.output.dense",
                "norm2": "layer_norm_2",
                "mlp.fc1": "mlp.dense1",
                "mlp.dwconv": "mlp.dwconv.dwconv",
                "mlp.fc2": "mlp.dense2",
            },
        ),
        "stages.#.norm": "segformer.encoder.layer_norm.{0}",
        "decoder.linear.#": "decode_head.linear_c.{0}.proj",
        "decoder.fuse.conv": "decode_head.linear_fuse",
        "decoder.fuse.norm": "decode_head.batch_norm",
        "classifier": "decode_head.classifier",
    },
    r"classifier\.(weight|bias)",  # of ImageNet
)

# a state_dict; what `save_pretrained` writes has the names above
TRANSFORMERS_5_24 = Naming(
    "state_dict of transformers 5.24",
    NVIDIA,
    {
        "stages.#.embed.proj": "segformer.stages.{0}.patch_embeddings.proj",
        "stages.#.embed.norm": "segformer.stages.{0}.patch_embeddings.layer_norm",
        **in_blocks(
            "segformer.stages.{0}.blocks.{1}.",
            {
                "norm1": "layernorm_before",
                "attn.q": "attention.q_proj",
                "attn.kv": "attention.k_proj attention.v_proj",
                "attn.sr": "attention.sequence_reduction.sequence_reduction",
                "attn.sr_norm": "attention.sequence_reduction.layer_norm",
                "attn.proj": "attention.o_proj",
                "norm2": "layernorm_after",
                "mlp.fc1": "mlp.fc1",
                "mlp.dwconv": "mlp.dwconv.dwconv",
                "mlp.fc2": "mlp.fc2",
            },
        ),
        "stages.#.norm": "segformer.stages.{0}.layer_norm",
        "decoder.linear.#": "decode_head.linear_projections.{0}.proj",
        "decoder.fuse.conv": "decode_head.linear_fuse",
        "decoder.fuse.norm": "decode_head.batch_norm",
        "classifier": "decode_head.classifier",
    },
    r"classifier\.(weight|bias)",
)

# without the `backbone.` that the whole network puts before its encoder
AUTHORS = Naming(
    "file of the authors",
    NVIDIA,
    {
        "stages.#.embed.proj": "patch_embed{n}.proj",
        "stages.#.embed.norm": "patch_embed{n}.norm",
        **in_blocks(
            "block{n}.{1}.",
            {
                "norm1": "norm1",
                "attn.q": "attn.q",
                "attn.kv": "attn.kv",
                "attn.sr": "attn.sr",
                "attn.sr_norm": "attn.norm",
                "attn.proj": "attn.proj",
                "norm2": "norm2",
                "mlp.fc1": "mlp.fc1",
                "mlp.dwconv": "mlp.dwconv.dwconv",
                "mlp.fc2": "mlp.fc2",
            },
        ),
        "stages.#.norm": "norm{n}",
        "decoder.linear.#": "decode_head.linear_c{n}.proj",
        "decoder.fuse.conv": "decode_head.linear_fuse.conv",
        "decoder.fuse.norm": "decode_head.linear_fuse.bn",
        "classifier": "decode_head.linear_pred",
    },
    r"(head|decode_head\.conv_seg)\.(weight|bias)",  # of ImageNet; an idle one of all heads
)

PVT_V2 = Naming(
    "file of timm's PVTv2",
    "Apache-2.0, if it is one of timm's",
    {
        "stages.0.embed.proj": "patch_embed.proj",
        "stages.0.embed.norm": "patch_embed.norm",
        "stages.#.embed.proj": "stages.{0}.downsample.proj",
        "stages.#.embed.norm": "stages.{0}.downsample.norm",
        "stages.#.blocks.#.attn.sr_norm": "stages.{0}.blocks.{1}.attn.norm",
    },
    r"head\.(weight|bias)",
)

NAMINGS = (OURS, TRANSFORMERS, TRANSFORMERS_5_24, AUTHORS, PVT_V2)
