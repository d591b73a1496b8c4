"""The demo: run examples/snips/demo.yaml, print what survived, and fail where too little did."""

import json
import shlex
import sys
from pathlib import Path

import crosslora
from crosslora.errors import said_in_a_sentence

HERE = Path(__file__).parent
LEAST = {"json_field:intent": 0.90, "json_slots": 0.60}


def main() -> None:
    with said_in_a_sentence():
        try:
            result = crosslora.transfer(crosslora.load_config(HERE / "snips" / "demo.yaml", sys.argv[1:]))
        except KeyboardInterrupt:
            sys.exit("interrupted; `make demo` goes on from here")
    moved = result.adapters[0]
    task = moved.results["tasks"]["snips"]
    for model, scores in task["models"].items():
        means = ", ".join(f"{metric} {value['mean']:.3f}" for metric, value in scores["metrics"].items())
        print(f"{model:12} {means}, ended {scores['ended']:.3f}")
    print(f"rho_teacher {json.dumps(task['rho_teacher'])}")
    print(f"adapter: {moved.folder}")
    print(f"report:  {result.run}/evaluate/{moved.name}/report.html")
    print(f"serve it: .venv/bin/crosslora serve {shlex.quote(result.run)}")
    metrics = task["models"]["student"]["metrics"]
    low = [name for name, least in LEAST.items() if metrics[name]["mean"] < least]
    if low:
        sys.exit(f"below what the demo must reach: {', '.join(f'{name} < {LEAST[name]}' for name in low)}")


if __name__ == "__main__":
    main()
