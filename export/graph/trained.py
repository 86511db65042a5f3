"""The model as it serves, from stored pixels to calibrated logits.

Shape letters: B pictures, H and W the input size in pixels, K classes.
"""

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from training.model import Perceiver
from training.preprocessing import Preprocess


class TrainingForm(nn.Module):
    """Preprocess, Perceiver, temperature: the function as it was trained, and what every other form is held against."""

    def __init__(self, preprocess: Preprocess, model: Perceiver, temperature: float = 1.0) -> None:
        super().__init__()
        self.preprocess = preprocess
        self.model = model
        self.temperature = temperature

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, 3], RGB -> calibrated logits, float [B, K]."""
        logits: Tensor = self.model(self.preprocess(images))
        return logits / self.temperature


def count_operations(model: nn.Module, image: Tensor) -> int:
    """Floating-point operations of the matrix products and convolutions that one picture costs.

    They are counted while they run, so the count is that of the code and not of a formula: 2 for each multiply-add.

    Args:
        image: uint8 [1, H, W, 3].
    """
    with FlopCounterMode(display=False) as counter:
        model(image)
    return int(counter.get_total_flops())
