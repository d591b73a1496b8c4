"""The whole transfer as a Ray job:

ray job submit --working-dir . -- python ray_jobs/transfer.py --config examples/snips/demo.yaml
"""

import argparse
import sys

import crosslora
from crosslora.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="YAML configuration")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as cluster.address=auto")
    arguments = parser.parse_args()
    try:
        result = crosslora.transfer(crosslora.load_config(arguments.config, arguments.overrides))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for adapter in result.adapters:
        print(f"adapter: {adapter.folder}")


if __name__ == "__main__":
    main()
