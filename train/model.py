"""The model that the flags describe."""

from argparse import Namespace
from typing import Any

from open_flamingo import Flamingo, create_model_and_transforms

# Argument of `create_model_and_transforms`, which its errors name → flag.
FLAG_OF_ARGUMENT = {
    "clip_vision_encoder_path": "--vision_encoder_path",
    "clip_vision_encoder_pretrained": "--vision_encoder_pretrained",
    "lang_encoder_path": "--lm_path",
    "tokenizer_path": "--tokenizer_path (by default that of --lm_path)",
    "cross_attn_every_n_layers": "--cross_attn_every_n_layers",
    "trust_remote_code=True": "--trust_remote_code",
}


def model_from_flags(args: Namespace, meta: bool) -> tuple[Flamingo, Any, Any]:
    """Model, image processor, tokenizer. `meta`: the model is on the meta device, and no weights are read.

    Raises ValueError or OSError, which name arguments: see `FLAG_OF_ARGUMENT`.
    """
    return create_model_and_transforms(
        args.vision_encoder_path,
        args.vision_encoder_pretrained,
        args.lm_path,
        args.tokenizer_path or args.lm_path,
        cross_attn_every_n_layers=args.cross_attn_every_n_layers,
        use_local_files=args.offline,
        freeze_lm_embeddings=args.freeze_lm_embeddings,
        gradient_checkpointing=args.gradient_checkpointing,
        trust_remote_code=args.trust_remote_code,
        train_output_rows=args.train_output_rows,
        meta=meta,
    )
