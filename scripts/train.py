"""Fine-tune a model; the same as `qlora-kit train`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qlora_kit.cli.main import main

main(["train", *sys.argv[1:]])
