"""Merge an adapter into its base, with a proof; the same as `qlora-kit merge`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qlora_kit.cli.main import main

main(["merge", *sys.argv[1:]])
