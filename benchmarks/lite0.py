"""The training program, with one more vision tower: EfficientNet-lite0 without its last 1×1 convolution.

    python -m benchmarks.lite0 --vision_encoder_path local-dir:clip …      # the flags of open-flamingo-train

An image is then 49 tokens of 320 channels instead of 1280. The resampler is as wide as the tower's tokens, and its cost grows with the
square of that: 9 million parameters instead of 95. What the convolution would make of a token depends on its 320 channels alone.
"""

from typing import Any

from timm.models import register_model
from timm.models.efficientnet import EfficientNet, tf_efficientnet_lite0
from torch import nn

WIDTH = 320


@register_model
def headless_lite0(pretrained: bool = False, **options: Any) -> EfficientNet:
    """Images [B, 3, 224, 224] → a feature map [B, 320, 7, 7] (`forward_features`). For OpenCLIP's `timm_model_name`."""
    model = tf_efficientnet_lite0(pretrained=pretrained, **options)
    model.conv_head, model.bn2 = nn.Identity(), nn.Identity()
    model.num_features = model.head_hidden_size = WIDTH
    return model


if __name__ == "__main__":
    import open_flamingo
    from benchmarks.child import ROOT

    open_flamingo.__path__.append(str(ROOT))  # this checkout's `train`, installed or not
    from open_flamingo.train.train import main

    main()
