"""The number format of a run's forward pass: bfloat16 where the processor computes in it, float32 elsewhere."""

from __future__ import annotations

import os

import torch

from training.config import Precision

CUDA_CAPABILITY = (8, 0)
CPU_CAPABILITIES = ("avx512_bf16", "amx_bf16")
# The values of oneDNN's environment variable that keep it from the instructions above. It computes torch's products.
ONEDNN_LIMIT = "ONEDNN_MAX_CPU_ISA"
ISAS_WITHOUT_BFLOAT16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16 products.

    Torch emulates them elsewhere, many times slower than float32 products (docs/training.md has figures).
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= CUDA_CAPABILITY
    if device.type != "cpu" or os.environ.get(ONEDNN_LIMIT, "").upper() in ISAS_WITHOUT_BFLOAT16:
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in CPU_CAPABILITIES)


def choose_precision(asked: Precision, device: torch.device) -> Precision:
    """The precision that a run on a device takes; ``auto`` becomes one of the two others."""
    if asked != "auto":
        return asked
    return "bfloat16" if computes_in_bfloat16(device) else "float32"


def describe_precision(precision: Precision, asked: Precision | None, device: torch.device) -> str:
    """One line on the precision of a run and the reason for it.

    Args:
        precision: the run's, not "auto".
        asked: what flags and preset said; None where a run is resumed.
        device: of the run.
    """
    native = computes_in_bfloat16(device)
    if asked is None:
        reason = "as the run began"
    elif asked != "auto":
        reason = "as asked for"
    else:
        reason = f"since the {device.type} device {'computes' if native else 'does not compute'} in bfloat16"
    slow = "; the device emulates it, many times slower than float32" if precision == "bfloat16" and not native else ""
    return f"precision {precision}, {reason}{slow}"
