"""The whole transfer as a Ray job; CONFIG names bases and a run folder that every node sees:

ray job submit --working-dir . -- python ray_jobs/transfer.py --config CONFIG cluster.address=auto
"""

from __future__ import annotations

import argparse
import sys

import crosslora
from crosslora.compare import compare, show
from crosslora.errors import said_in_a_sentence


def main(until: str | None = None) -> None:
    """Run all stages up to `until`, done ones aside. The job fails where this exits with 2 (mend it) or 1."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--config", required=True, help="YAML configuration")
    parser.add_argument("--redo", metavar="STAGE[/NAME]", help="make this stage and those after it again")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as cluster.address=auto")
    arguments = parser.parse_args()
    with said_in_a_sentence():
        config = crosslora.load_config(arguments.config, arguments.overrides)
        result = crosslora.transfer(config, arguments.redo, until)
        if result.adapters:
            show(compare([result.run], [adapter.name for adapter in result.adapters]))
    for adapter in result.adapters:
        print(f"adapter: {adapter.folder}")


if __name__ == "__main__":
    main()
