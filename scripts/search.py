"""Choose settings by cross-validation; the same as `qlora-kit search`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qlora_kit.cli.main import main

main(["search", *sys.argv[1:]])
