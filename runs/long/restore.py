"""Make a run that `--resume runs/long` goes on with of what was kept of it: python runs/long/restore.py TEACHER

TEACHER is version 6's checkpoint.safetensors, from git's history. Weights were kept in float16 and momenta in bfloat16.
"""

import json
import lzma
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load, save_file

folder = Path(__file__).parent
content = lzma.decompress((folder / "last.safetensors.xz").read_bytes())
header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
tensors = {
    name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in load(content).items()
}
with safe_open(sys.argv[1], framework="pt") as teacher:
    tensors |= {f"teacher.{name}": teacher.get_tensor(name) for name in teacher.keys()}
save_file(tensors, folder / "last.safetensors", metadata=header)
run = json.loads(header["perceiver"])["run"]
(folder / "config.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
